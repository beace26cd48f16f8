"""What differs between model families, as data: how to talk to a network, its text and its pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from gendiff._checks import unknown
from gendiff.condition import Condition
from gendiff.interop.diffusers.latents import SCALE_SHIFT, Latents
from gendiff.interop.diffusers.layouts import Layout, as_is

TEXT = ("text", "text_mask", "text_pooled")
Derive = Callable[[Any, Tensor, Condition, Mapping[str, Any]], Mapping[str, Any]]


@final
@dataclass(frozen=True)
class Clock:
    """How a network is told the time: timestep -> (timestep - offset)/scale, for each step in turn.

    The order is the one in which the pipeline rounds: 1 - timestep/1000 is `((0, 1000), (1, -1))`, and
    (1000 - timestep)/1000 is `((1000, -1000),)`.

    Args:
        keyword: of the network's forward.
        steps: pairs (offset, scale).
        rounded: whether the timestep is rounded to the dtype of x_t first.

    >>> import torch
    >>> Clock(steps=((1000, -1000),))(torch.tensor(250.0))
    tensor(0.7500)
    """

    keyword: str = "timestep"
    steps: tuple[tuple[float | int, float | int], ...] = ()
    rounded: bool = False

    def __call__(self, timestep: Tensor, like: Tensor | None = None) -> Tensor:
        """What the network is given for a timestep; `like` has the dtype of x_t."""
        if self.rounded and like is not None:
            timestep = timestep.to(like.dtype)
        for offset, scale in self.steps:
            timestep = (timestep - offset) / scale
        return timestep


@final
@dataclass(frozen=True, kw_only=True)
class Network:
    """How a family's network is called: by keywords, and with `return_dict=False`; its answer comes first.

    Args:
        component: the pipeline's attribute.
        x: keyword of x_t.
        clock: what becomes of the timestep.
        sign: -1 for a network that predicts the negative of what the scheduler is given.
        names: canonical name of a condition -> keyword; "a.b" is key b of the dictionary a, and None what
            only `derive` reads.
        optional: canonical name -> entry of the network's configuration without which it has no such input.
        layout: x -> (what the network is given, how its answer becomes a grid again).
        derive: (network, x_t, cond, keywords so far) -> further keywords, which follow from the others.
        beside: what `channels` are, which the network reads beside x_t: a "mask" with the picture under it,
            a "source" picture, or None. Only a network with more inputs than outputs has them.
    """

    component: str = "transformer"
    x: str = "hidden_states"
    clock: Clock = Clock()
    sign: int = 1
    names: Mapping[str, str | None] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    layout: Layout = as_is
    derive: Derive | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        if self.beside not in ("mask", "source", None):
            raise ValueError(unknown("beside", self.beside, ["mask", "source", None]))
        if self.sign not in (1, -1):
            raise ValueError(f"the sign of a network is 1 or -1, got {self.sign!r}.")


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a family's pipeline encodes prompts.

    Options of the encoding have the defaults of the pipeline's call, so that a condition is what
    `pipe("a red fox")` makes.

    Args:
        results: canonical names of what the method returns, by position; None for what is not used. A list of
            tensors is padded, and gets a `text_mask` where lengths differ.
        negatives: canonical names of what it returns for the unconditional branch, by position.
        null: what stands for no prompt: what the method gives as "negative", the "empty" prompt, or "zeros".
        method: name of the pipeline's method.
    """

    results: tuple[str | None, ...] = ("text",)
    negatives: tuple[str | None, ...] = ()
    null: str = "empty"
    method: str = "encode_prompt"

    def __post_init__(self) -> None:
        if self.null not in ("negative", "empty", "zeros"):
            raise ValueError(unknown("null", self.null, ["negative", "empty", "zeros"]))
        for name in (*self.results, *self.negatives):
            if name is not None and name not in TEXT:
                raise ValueError(unknown("canonical name of a text", name, TEXT))
        if (self.null == "negative") != any(self.negatives):
            raise ValueError(
                f"null='negative' and `negatives` belong together, got null={self.null!r} and "
                f"negatives={self.negatives}."
            )


@final
@dataclass(frozen=True, kw_only=True)
class Images:
    """How pixels become x0.

    Args:
        latents: normalisation of the autoencoder's latents; None for a family that works on pixels.
        frames: "none" for an autoencoder of pictures, "one" for one of clips that is given single frames,
            "many" if x0 has frames, [B, c, F, h, w].
        multiple: the sides of x0 are multiples of this.
        upcast: whether the pipeline runs an autoencoder that asks for it (`force_upcast`) in float32: in
            float16 to decode, in any dtype to encode.
    """

    latents: Latents | None = SCALE_SHIFT
    frames: str = "none"
    multiple: int = 1
    upcast: bool = False

    def __post_init__(self) -> None:
        if self.frames not in ("none", "one", "many"):
            raise ValueError(unknown("frames", self.frames, ["none", "one", "many"]))


@final
@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of facts about a model family; `register_family` makes its pipelines known.

    Args:
        name: of the family.
        pipelines: names of the pipeline classes.
        network: how the network is called.
        prompt: how prompts are encoded; None for a family without text.
        images: how pixels become x0.
        refuse: (pipeline, whether its network was chosen by hand) -> why it cannot be used like the others of
            the family, or None if it can.

    >>> Family(name="mine", pipelines=("MyPipeline",), network=Network(names={"text": "context"})).network.x
    'hidden_states'
    """

    name: str
    pipelines: Sequence[str]
    network: Network = Network()
    prompt: Prompt | None = Prompt()
    images: Images = Images()
    refuse: Callable[[Any, bool], str | None] | None = None

    def __post_init__(self) -> None:
        if not self.pipelines or isinstance(self.pipelines, str):
            raise ValueError(
                f"family {self.name!r} needs the names of its pipeline classes, such as "
                f"('FluxPipeline',), got {self.pipelines!r}."
            )
        object.__setattr__(self, "pipelines", tuple(self.pipelines))
        if "channels" in self.network.names:
            raise ValueError(
                f"family {self.name!r} has a keyword for 'channels', but they are joined to x_t; say "
                f"`beside` instead."
            )
