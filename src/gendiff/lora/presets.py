"""Which layers of which family carry adapters, as data: patterns of names, one for a kind of layer."""

from collections.abc import Mapping
from types import MappingProxyType

from gendiff._checks import unknown

_BLOCKS = ("**.attn[12].to_[qkv]", "**.attn[12].to_out.0")  # self- and cross-attention of a block
_STREAMS = (  # attention of two streams
    "transformer_blocks.*.attn.to_[qkv]",
    "transformer_blocks.*.attn.to_out.0",
    "transformer_blocks.*.attn.add_[qkv]_proj",
    "transformer_blocks.*.attn.to_add_out",
)
_FF = ("**.ff.net.0.proj", "**.ff.net.2")
_FF_STREAMS = (*_FF, "**.ff_context.net.0.proj", "**.ff_context.net.2")
_UNET = {
    "attention": _BLOCKS,
    "ff": _FF,
    "conv": (
        "**.resnets.*.conv[12]",
        "**.resnets.*.time_emb_proj",
        "**.attentions.*.proj_in | **.attentions.*.proj_out",
    ),
}

FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "sd": _UNET,
        "sdxl": _UNET,
        "sd3": {  # and its second attention of the image, where a model has it
            "attention": (
                "transformer_blocks.*.attn*.to_[qkv]",
                "transformer_blocks.*.attn*.to_out.0",
                *_STREAMS[2:],
            ),
            "ff": _FF_STREAMS,
        },
        "flux": {
            "attention": (*_STREAMS, "single_transformer_blocks.*.attn.to_[qkv]"),
            "ff": (
                *_FF_STREAMS,
                "single_transformer_blocks.*.proj_mlp",
                "single_transformer_blocks.*.proj_out",
            ),
        },
        "flux2": {
            "attention": (
                *_STREAMS,
                "single_transformer_blocks.*.attn.to_qkv_mlp_proj",  # which is its feed-forward part too
                "single_transformer_blocks.*.attn.to_out",
            ),
            "ff": (
                "transformer_blocks.*.ff.linear_in",
                "transformer_blocks.*.ff.linear_out",
                "transformer_blocks.*.ff_context.linear_in",
                "transformer_blocks.*.ff_context.linear_out",
            ),
        },
        "wan": {"attention": _BLOCKS, "ff": ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2")},
        "qwen-image": {
            "attention": _STREAMS,
            "ff": (
                "**.img_mlp.net.0.proj",
                "**.img_mlp.net.2",
                "**.txt_mlp.net.0.proj",
                "**.txt_mlp.net.2",
            ),
        },
        "z-image": {
            "attention": ("layers.*.attention.to_[qkv]", "layers.*.attention.to_out.0"),
            "ff": ("layers.*.feed_forward.w[123]",),
        },
        "pixart": {"attention": _BLOCKS, "ff": _FF},
        "sana": {"attention": _BLOCKS, "ff": ("**.ff.conv_inverted", "**.ff.conv_point")},
        "clip": {
            "attention": ("**.self_attn.[qkv]_proj", "**.self_attn.out_proj"),
            "ff": ("**.mlp.fc[12]",),
        },
        "t5": {"attention": ("**.SelfAttention.[qkvo]",), "ff": ("**.DenseReluDense.w*",)},
    }
)


def is_preset(text: str) -> bool:
    """Whether a target is the name of a preset, as "sdxl/attention+ff", and no pattern."""
    return "/" in text


def preset(name: str) -> tuple[str, ...]:
    """The patterns of a preset, `family/part+part`.

    Raises:
        ValueError: for an unknown family or part, with what there is.

    >>> preset("pixart/attention+ff")
    ('**.attn[12].to_[qkv]', '**.attn[12].to_out.0', '**.ff.net.0.proj', '**.ff.net.2')
    """
    family, _, parts = name.partition("/")
    if family not in FAMILIES:
        raise ValueError(unknown("family of a preset", family, FAMILIES))
    known = FAMILIES[family]
    found: tuple[str, ...] = ()
    for part in parts.split("+"):
        if part not in known:
            raise ValueError(unknown(f"part of {family}", part, known))
        found += known[part]
    return found
