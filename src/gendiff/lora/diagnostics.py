"""How much of each weight an adapter changes, in how many directions, and where in the model."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from gendiff.attention import sites
from gendiff.lora.factoring import change_of, values
from gendiff.lora.measures import Measured, Measures
from gendiff.lora.plan import Planned
from gendiff.lora.sources import Source, adapter_of, model_of
from gendiff.lora.weights import weight_of, weights_of

FEED_FORWARD = re.compile(
    r"(^|\.)(ff|ffn|ff_context|mlp|img_mlp|txt_mlp|feed_forward|DenseReluDense|proj_mlp)(\.|$)"
)
ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|attention|SelfAttention)\.")
BLOCK = re.compile(r"mid_block|.*?\.\d+(?=\.|$)|[^.]+")


def measure(adapter: Source, model: nn.Module | None = None) -> Measures:
    r"""Measure what an adapter changes, at full strength.

    The singular values are those of a small matrix between the factors' QR; of DoRA and OFT, and of LoHa and
    LoKr of full rank, those of the whole matrix, which takes a second for a layer of width 1280.

    Args:
        adapter: see `Adapter`, or the handle of one on a model.
        model: the network that it is for, which says how large the weights are that it changes, and what each
            attention layer attends to; by default that of the handle. Without one the names of layers tell
            self- from cross-attention where a block has both.

    Returns:
        The `Measures`.

    Raises:
        ValueError: for an adapter of another model, and for DoRA and OFT without a model.
    """
    record, network = adapter_of(adapter), model_of(adapter, model)
    weights = weights_of(network)
    names = [row.name for row in record.plan.rows]
    kinds = _kinds(names) if network is None else {site.name: site.kind for site in sites(network)}
    found: list[Measured] = []
    for row in record.plan.rows:
        weight = weight_of(row, weights)
        with torch.no_grad():
            singular = values(change_of(row, record.tensors[row.name], weight)).double()
            size = None if weight is None else float(torch.linalg.vector_norm(weight.float()))
        length = float(singular.norm())
        found.append(
            Measured(
                name=row.name,
                group=_group(row, kinds),
                block=_block(row.name),
                layers=1,
                rank=float(row.rank),
                norm=length,
                weight_norm=size,
                effective_rank=effective_rank(singular),
                highest=float(singular[0] / length) ** 2 if length else 0.0,
            )
        )
    return Measures(tuple(found))


def effective_rank(singular: torch.Tensor) -> float:
    """The exponential of the entropy of singular values as shares of their sum; 0 where all are 0.

    Roy & Vetterli 2007, *The effective rank: a measure of effective dimensionality*, EUSIPCO, definition 1.

    >>> round(effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])), 6)
    3.0
    """
    whole = singular.double().sum()
    if not whole:
        return 0.0
    return float(torch.special.entr(singular.double() / whole).sum().exp())


def _kinds(names: list[str]) -> dict[str, str]:
    """Layers that attend to themselves or to the text, where the names of both in one block tell so."""
    found: dict[str, str] = {}
    for name in names:
        before, mark, _ = name.partition(".attn1.")
        if mark and any(other.startswith(f"{before}.attn2.") for other in names):
            found |= {f"{before}.attn1": "self", f"{before}.attn2": "cross"}
    return found


def _group(row: Planned, kinds: Mapping[str, str]) -> str:
    places = [row.name[: end.start()] for end in re.finditer(r"\.", row.name)]
    for place in places:
        if place in kinds:
            return f"{kinds[place]} attention"
    if FEED_FORWARD.search(row.name):
        return "feed-forward"
    if ATTENTION.search(row.name):
        return "attention"
    return "conv" if row.kind.startswith("Conv") else "other"


def _block(name: str) -> str:
    """The outermost block of the model that a layer is in.

    >>> [_block(name) for name in ("down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1", "conv_in")]
    ['down_blocks.1', 'mid_block', 'conv_in']
    """
    found = BLOCK.match(name)
    assert found is not None
    return found.group()
