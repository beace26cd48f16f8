"""One attention layer of a model, and the facts that a processor or a middleware wants to know of it."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, final

from torch import nn

Family = Literal["unet", "unet-added", "joint", "transformer"]

TEMPORAL = ("temporal", "temp_attentions", "motion_modules", "motion_encoder")
MAIN = re.compile(r"(\w+_)?(layers|blocks)")  # where a model's own blocks are, not those of its refiners
STAGES = ("down", "mid", "up", "double", "single", "refiner", "block")


@final
@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer of a model.

    Attributes:
        name: dotted name of the layer in the model.
        kind: what attends to what: self, cross (queries of the image, keys of the text), joint (two streams
            in one attention), single (both streams in one sequence), temporal (over frames).
        heads: number of heads of the queries.
        head_dim: numbers a head.
        stage: part of the model: down, mid, up of a UNet; double, single, refiner, block of a transformer.
        depth: place among all sites, from 0 for the first to 1 for the last.
        text: where the tokens of the text stand among the keys: first, last, all, or none.
        outputs: number of tensors that the layer returns.
        family: of the call: what `Attention` of diffusers offers a processor, with or without added
            projections (unet, unet-added), the same class with a second stream (joint), or a class of the
            model's own (transformer).
        processor: name of the processor's class.
        kernels: names of the functions that its processor computes attention with; none for one that computes
            it in another way, whose inside no middleware can reach.
        module: the layer.
        state: what middlewares keep for the layer, each under a key of its own.
    """

    name: str
    kind: str
    heads: int
    head_dim: int
    stage: str
    depth: float
    text: str
    outputs: int
    family: str
    processor: str
    kernels: tuple[str, ...]
    module: nn.Module = field(repr=False)
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def grid(self) -> str:
        """How its tokens lie in the image: the rule that `Context.grid` follows."""
        if self.kind == "temporal":
            return "frames"
        return "latent, halved" if self.stage in ("down", "mid", "up") else "patches"

    @property
    def key(self) -> tuple[Any, ...]:
        """What a compiled or captured step depends on."""
        return self.name, self.kind, self.processor


def is_layer(module: nn.Module) -> bool:
    """Whether a module hands its attention to a processor."""
    return callable(getattr(module, "processor", None))


def heads_of(layer: nn.Module) -> tuple[int, int]:
    """Number of heads, and numbers a head.

    Raises:
        ValueError: for a layer that says neither.
    """
    heads = _first(layer, ("heads", "num_heads", "num_attention_heads", "n_heads", "head"))
    if not heads:
        raise ValueError(f"{type(layer).__name__} does not say how many heads it has.")
    dim = _first(layer, ("dim_head", "dim_heads", "head_dim", "attention_head_dim"))
    if dim is None:
        inner = _first(layer, ("inner_dim", "inner_kv_dim", "embed_dim", "hidden_size", "dim"))
        width = inner if inner is not None else _query_width(layer)
        dim = width // heads if width else 0
    return heads, dim


def _first(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(layer, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _query_width(layer: nn.Module) -> int | None:
    for name in ("to_q", "to_query", "q_proj", "query", "wq"):
        width = getattr(getattr(layer, name, None), "out_features", None)
        if isinstance(width, int):
            return width
    return None


def present(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a part of this name that is not None."""
    return getattr(layer, name, None) is not None


def stage_of(name: str, others: frozenset[str]) -> str:
    """The part of the model that a layer's name says it is in; `others` are first segments of all sites."""
    head = name.split(".")[0]
    for word in ("down", "mid", "up"):
        if head.startswith(f"{word}_block"):
            return word
    if "refiner" in head:
        return "refiner"
    if "single" in head:
        return "single"
    if any("single" in other for other in others) and "blocks" in head:
        return "double"
    return "block"


def kind_of(name: str, layer: nn.Module, stage: str, known: str) -> str:
    """What attends to what, by the layer's own parts and its name.

    `known` is the kind of its processor, where that cannot be told from the layer's parts.
    """
    if any(word in name for word in TEMPORAL):
        return "temporal"
    if known and MAIN.fullmatch(name.split(".")[0]):
        return known
    last = name.split(".")[-1]
    if present(layer, "to_q_t"):
        return "joint"
    if is_plain(layer):
        if present(layer, "added_kv_proj_dim") and present(layer, "add_q_proj"):
            return "joint"
        own = last == "attention" and getattr(layer, "cross_attention_dim", 0) == getattr(
            layer, "query_dim", 1
        )
        if present(layer, "added_kv_proj_dim") or (getattr(layer, "is_cross_attention", False) and not own):
            return "cross"
        return "single" if stage == "single" else "self"
    if present(layer, "add_q_proj"):
        return "joint"
    crossing = getattr(layer, "is_cross_attention", None)
    if not crossing:
        crossing = last == "attn2" or "cross_attn" in last or "cross_attention" in last or is_bridge(name)
        crossing = crossing or "Cross" in type(layer).__name__
    if crossing:
        return "cross"
    return "single" if stage == "single" else "self"


def is_bridge(name: str) -> bool:
    """Whether a layer's name says that it is from one stream of data to another, neither of them text."""
    last = name.split(".")[-1]
    return "_to_" in last or last.startswith(("av_", "va_"))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is the `Attention` of diffusers, which UNets and older transformers share."""
    return any(base.__name__ == "Attention" for base in type(layer).__mro__)


def family_of(layer: nn.Module) -> Family:
    """Which of the calls a processor has to serve."""
    if not is_plain(layer):
        return "transformer"
    if present(layer, "add_q_proj"):
        return "joint"
    return "unet-added" if present(layer, "added_kv_proj_dim") else "unet"
