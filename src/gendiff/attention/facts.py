"""What the parts of a layer do not say: one row a processor class where the general rule is wrong."""

from typing import NamedTuple

from torch import nn

CHAIN = "_gendiff_processors"  # the processors that a layer had, of a list on it


class Fact(NamedTuple):
    """What is known of a processor class.

    Attributes:
        kind: what attends to what in the main blocks of a model; "" where the layer's parts say it.
        text: where the text stands among the keys of a joint or single layer: first or last; "" is first.
        outputs: number of tensors that a joint or single layer returns; 0 by the kind.
        main: which call of a kernel is the attention itself, where the layer has another for an image.
    """

    kind: str = ""
    text: str = ""
    outputs: int = 0
    main: int = 0


_JOINT_LAST = Fact(text="last", outputs=2)
_IMAGE = Fact(main=1)  # the tokens of the image prompt are attended to first
FACTS: dict[str, Fact] = {
    "CogVideoXAttnProcessor2_0": Fact("joint", outputs=2),
    "CogView4AttnProcessor": Fact("joint", outputs=2),
    "EasyAnimateAttnProcessor2_0": Fact("joint", outputs=2),
    "ErnieImageSingleStreamAttnProcessor": Fact("single", "last"),
    "GlmImageAttnProcessor": Fact("joint", outputs=2),
    "HiDreamAttnProcessor": Fact(text="last"),
    "HunyuanImageAttnProcessor": _JOINT_LAST,
    "HunyuanVideo15AttnProcessor2_0": _JOINT_LAST,
    "HunyuanVideoAttnProcessor2_0": _JOINT_LAST,
    "Ideogram4AttnProcessor": Fact("single"),
    "JointAttnProcessor2_0": Fact(text="last"),
    "JointReferenceProcessor": Fact(text="last"),
    "JoyImageAttnProcessor": Fact("joint", "last", 2),
    "JoyImageEditPlusAttnProcessor": Fact("joint", "last", 2),
    "Krea2AttnProcessor": Fact("single"),
    "Lumina2AttnProcessor2_0": Fact("single"),
    "MiniMaxH3AttnProcessor": Fact("single"),
    "MochiAttnProcessor2_0": _JOINT_LAST,
    "MotifVideoAttnProcessor2_0": _JOINT_LAST,
    "NucleusMoEAttnProcessor2_0": Fact("joint", "last", 1),
    "OmniGenAttnProcessor2_0": Fact("single"),
    "PRXAttnProcessor2_0": Fact("joint", outputs=1),
    "QwenImage21AttnProcessor": Fact("single"),
    "SkyReelsV2AttnProcessor": _IMAGE,
    "WanAnimate2CrossAttnProcessor": _IMAGE,
    "WanAttnProcessor": _IMAGE,
    "ZSingleStreamAttnProcessor": Fact("single", "last"),
}
NONE = Fact()
AXES = {  # of a video that is given to a model whose class begins so, where they are not CFHW
    "AnyFlow": "FCHW",
    "CogVideoX": "FCHW",
    "ConsisID": "FCHW",
    "Kandinsky5": "FHWC",
    "Kandinsky6": "FHWC",
    "UNetSpatioTemporal": "FCHW",
}


def fact_at(layer: nn.Module, processor: type) -> Fact:
    """The row of a layer's processor; where it has none, of the one that the layer had at first."""
    first = [type(placed.processor) for placed in vars(layer).get(CHAIN, ())[:1]]
    return next((FACTS[kind.__name__] for kind in (processor, *first) if kind.__name__ in FACTS), NONE)


def axes_of(model: str) -> str:
    """What the axes of a video are, by the class of the model that is given one."""
    return next((axes for name, axes in AXES.items() if model.startswith(name)), "CFHW")
