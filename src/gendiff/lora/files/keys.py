"""What the keys of adapter files end with, in every format, and what stands before it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

ENDINGS: Mapping[
    str, str
] = {  # by how a key ends, the part; <name> is that of an adapter, and may be missing
    r"\.lora_A<name>\.weight": "lora_A",
    r"\.lora_B<name>\.weight": "lora_B",
    r"\.lora_down\.weight": "lora_A",
    r"\.lora_up\.weight": "lora_B",
    r"(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight": "lora_A",  # of diffusers before peft
    r"(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight": "lora_B",
    r"\.lora_mid\.weight": "lora_mid",
    r"\.lora_magnitude_vector<name>(?:\.weight)?": "magnitude",
    r"\.dora_scale": "dora_scale",
    r"(?:_lora|\.lora|\.lora_linear_layer|\.lora_[AB]|)\.alpha": "alpha",
    **{
        rf"\.{part}<name>": part
        for part in (
            *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
    },
    r"\.oft_R<name>\.weight": "oft_R",
}
_ENDINGS = {
    re.compile(ending.replace("<name>", r"(?:\.[A-Za-z0-9_-]+)?") + r"\Z"): part
    for ending, part in ENDINGS.items()
}
FOREIGN: Mapping[str, str] = {  # what other tools write that is no adapter here
    ".bias": "a bias that is added too, which adapters here have not",
    ".diff": "the whole difference of a weight, which is no adapter of low rank",
    ".diff_b": "the difference of a bias, which adapters here have not",
    ".oft_blocks": "OFT as kohya's tools and LyCORIS write it, on the side of the outputs",
    ".oft_diag": "OFT as LyCORIS writes it, on the side of the outputs",
    ".w_norm": "the difference of a norm, which adapters here have not",
    ".b_norm": "the difference of a norm, which adapters here have not",
    ".on_input": "of (IA)3, which is no adapter here",
}
WRAPPERS = re.compile(r"(?:^|(?<=[._]))_orig_mod[._]")  # of compiled modules, in files of other tools
TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@final
@dataclass(frozen=True)
class Key:
    """A key of a file.

    Attributes:
        key: the whole.
        stem: what stands before its ending: the name of a layer.
        part: "lora_A", "alpha" and so on.
    """

    key: str
    stem: str
    part: str


def parsed(key: str) -> Key | None:
    """A key by stem and part, or None for one of no adapter.

    >>> parsed("lora_unet_mid_block_conv.lora_down.weight")
    Key(key='lora_unet_mid_block_conv.lora_down.weight', stem='lora_unet_mid_block_conv', part='lora_A')
    """
    for ending, part in _ENDINGS.items():
        found = ending.search(key)
        if found and found.start():
            return Key(key, key[: found.start()], part)
    return None


def foreign(key: str) -> str:
    """Why a key is of no adapter, where that is known."""
    for ending, reason in FOREIGN.items():
        if key.endswith(ending):
            return f" ({reason})"
    return ""


def spellings(stem: str) -> Iterator[str]:
    """A stem as it is, and as diffusers and compiled modules wrote it at times.

    >>> list(spellings("mid_block.attn1.processor.to_out"))
    ['mid_block.attn1.processor.to_out', 'mid_block.attn1.to_out', 'mid_block.attn1.to_out.0', \
'mid_block.attn1.out_proj']
    """
    yield stem
    plain = WRAPPERS.sub("", stem).replace(".processor.", ".")
    if plain != stem:
        yield plain
    module, dot, last = plain.rpartition(".")
    if last == "to_out":
        yield f"{plain}.0"
    if last in TEXT:
        yield f"{module}{dot}{TEXT[last]}"
