"""UNets of Stable Diffusion in the numbering of latent diffusion's releases, counted from the live model.

Rombach et al. 2022, arXiv 2112.10752. There, the inputs and outputs of the UNet are two lists, with a member
for every layer that is skipped to or from; a member holds a resnet, its attention, and what resamples.
"""

from collections.abc import Iterator
from typing import Any

from gendiff.lora.naming.rows import Templates, layers

KINDS = ("DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D")

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {
    name: name
    for name in (
        "proj_in",
        *(
            f"transformer_blocks.{{i}}.{part}"
            for part in (
                *(f"attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")),
                "ff.net.0.proj",
                "ff.net.2",
            )
        ),
        "proj_out",
    )
}
_MIDDLE = (  # where there is one
    ("middle_block.0", "mid_block.resnets.0", _RESNET),
    ("middle_block.1", "mid_block.attentions.0", _ATTENTION),
    ("middle_block.2", "mid_block.resnets.1", _RESNET),
)


def is_sdxl(unet: Any) -> bool:
    """Whether a UNet takes sizes and pooled text, as those of Stable Diffusion XL do."""
    return unet.config.addition_embed_type == "text_time"


def templates(unet: Any) -> Templates:
    """The names of a UNet's layers in the original release.

    Raises:
        ValueError: for blocks of other kinds than the releases have.
    """
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    odd = sorted({type(block).__name__ for block in blocks if block is not None} - set(KINDS))
    if odd:
        raise ValueError(
            f"the releases of Stable Diffusion have blocks of {', '.join(KINDS)}, and this UNet has "
            f"{', '.join(odd)}: save it in the diffusers or peft format."
        )
    found = layers(_ENDS)
    for live in ("add_embedding", "class_embedding"):
        if hasattr(getattr(unet, live, None), "linear_1"):
            found |= layers({"label_emb.0.0": f"{live}.linear_1", "label_emb.0.2": f"{live}.linear_2"})
    for original, live, table in (*_inputs(unet), *_MIDDLE, *_outputs(unet)):
        found |= layers(table, original, live)
    return found


def _inputs(unet: Any) -> Iterator[tuple[str, str, dict[str, str]]]:
    place = 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            place += 1
            yield f"input_blocks.{place}.0", f"down_blocks.{i}.resnets.{j}", _RESNET
            if hasattr(block, "attentions"):
                yield f"input_blocks.{place}.1", f"down_blocks.{i}.attentions.{j}", _ATTENTION
        if block.downsamplers is not None:
            place += 1
            yield f"input_blocks.{place}.0", f"down_blocks.{i}.downsamplers.0", {"op": "conv"}


def _outputs(unet: Any) -> Iterator[tuple[str, str, dict[str, str]]]:
    place = -1
    for i, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            place += 1
            yield f"output_blocks.{place}.0", f"up_blocks.{i}.resnets.{j}", _RESNET
            if attends:
                yield f"output_blocks.{place}.1", f"up_blocks.{i}.attentions.{j}", _ATTENTION
        if block.upsamplers is not None:  # with the last resnet, after its attention
            yield f"output_blocks.{place}.{1 + attends}", f"up_blocks.{i}.upsamplers.0", {"conv": "conv"}
