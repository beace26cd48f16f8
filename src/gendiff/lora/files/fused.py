"""Layers that another naming stacks in one: adapters of parts joined, and one cut into parts, exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gendiff.lora.naming import Original, Rows

Tensors: TypeAlias = Mapping[str, Tensor]
FACTORS: Mapping[str, tuple[tuple[str, str], ...]] = {  # left, whose rows are outputs, and right
    "lora": (("lora_B", "lora_A"),),
    "dora": (("lora_B", "lora_A"),),
    "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}
"""By algorithm, the factors whose rows can be cut and stacked."""


@final
@dataclass(frozen=True)
class Part:
    """The adapter of a layer, or of several that are stacked.

    Attributes:
        scale: the factor of the product.
        tensors: the parts.
    """

    scale: float
    tensors: Tensors

    @property
    def rank(self) -> int:
        """Of the first right factor."""
        right = "lora_A" if "lora_A" in self.tensors else "hada_w1_b"
        return len(self.tensors[right])


def is_whole(original: Original, width: int) -> bool:
    """Whether a layer of another naming is just one of the live model."""
    return original.rows == (Rows(original.rows[0].layer, 0, width),)


def layers_of(original: Original) -> list[str]:
    """The live layers whose rows it stacks."""
    return list(dict.fromkeys(rows.layer for rows in original.rows))


def row_norms(weight: Tensor) -> Tensor:
    """The magnitudes of DoRA that change nothing, in float32 at least."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1).norm(dim=1)


def join(
    original: Original, algorithm: str, parts: Mapping[str, Part], weights: Mapping[str, Tensor]
) -> Part:
    r"""One adapter for stacked layers that adds to each what its own adds, and to the rest nothing.

    Right factors that are the same are kept once; others are stacked, and the left ones stand block by block:

    .. math:: [s_q B_q A_q;\; s_k B_k A_k] = s_q [B_q, 0;\; 0, \tfrac{s_k}{s_q} B_k]\, [A_q; A_k]

    Args:
        original: which rows of which layers are stacked.
        algorithm: of all parts.
        parts: the adapters, by layer.
        weights: of the layers, of which DoRA takes the lengths of rows without an adapter.
    """
    factors = FACTORS[algorithm]
    shared: list[Part] = []  # one for each kind of right factors
    kinds: dict[str, int] = {}
    for layer, part in parts.items():
        same = [i for i, other in enumerate(shared) if _same_right(part, other, factors)]
        kinds[layer] = same[0] if same else len(shared)
        if not same:
            shared.append(part)
    scale = next(iter(parts.values())).scale
    starts = [sum(one.rank for one in shared[:i]) for i in range(len(shared) + 1)]
    found: dict[str, Tensor] = {}
    for number, (left, right) in enumerate(factors):
        found[right] = torch.cat([one.tensors[right] for one in shared])
        stacked: list[Tensor] = []
        for rows in original.rows:
            like = next(iter(parts.values())).tensors[left]
            block = like.new_zeros(rows.stop - rows.start, starts[-1], *like.shape[2:])
            if rows.layer in parts:
                part, kind = parts[rows.layer], kinds[rows.layer]
                ratio = 1.0 if number else part.scale / scale
                own = part.tensors[left][rows.start : rows.stop]
                block[:, starts[kind] : starts[kind + 1]] = own if ratio == 1 else own * ratio
            stacked.append(block)
        found[left] = torch.cat(stacked)
    if algorithm == "dora":
        lengths = {
            layer: parts[layer].tensors["magnitude"] if layer in parts else row_norms(weights[layer])
            for layer in layers_of(original)
        }
        like = next(iter(parts.values())).tensors["magnitude"]
        found["magnitude"] = torch.cat([lengths[r.layer][r.start : r.stop].to(like) for r in original.rows])
    return Part(scale, found)


def cut(original: Original, algorithm: str, whole: Part, weights: Mapping[str, Tensor]) -> dict[str, Part]:
    """The adapter of each of stacked layers; the inverse of `join`.

    All take the right factors, of which a part leaves out what only others use. A part to which nothing is
    added has none.

    Args:
        original: which rows of which layers are stacked.
        algorithm: of the adapter.
        whole: for the stack.
        weights: of the layers, by which a part of DoRA is known to add nothing.
    """
    places: dict[str, list[tuple[int, Rows]]] = {}
    start = 0
    for rows in original.rows:
        places.setdefault(rows.layer, []).append((start, rows))
        start += rows.stop - rows.start
    factors = FACTORS[algorithm]
    used = _used(whole.tensors, factors)
    found: dict[str, Part] = {}
    for layer, pieces in places.items():
        order = [
            place + offset
            for place, rows in sorted(pieces, key=lambda piece: piece[1].start)
            for offset in range(rows.stop - rows.start)
        ]
        own = {left: whole.tensors[left][order] for left, _ in factors}
        if algorithm == "dora":
            own["magnitude"] = whole.tensors["magnitude"][order]
        kept = _used(own, factors) | ~used
        adds = bool(_used(own, factors).any()) or not bool(used.any())
        if not adds and algorithm == "dora":
            adds = not torch.equal(row_norms(weights[layer]).to(own["magnitude"]), own["magnitude"])
            kept = torch.arange(len(kept)) == 0 if adds else kept  # only the lengths change
        if adds:
            for left, right in factors:
                every = bool(kept.all())
                own[left] = own[left] if every else own[left][:, kept]
                own[right] = whole.tensors[right] if every else whole.tensors[right][kept]
            found[layer] = Part(whole.scale, own)
    return found


def _used(tensors: Tensors, factors: Sequence[tuple[str, str]]) -> Tensor:
    """Which columns of the left factors hold anything."""
    return torch.stack(
        [
            tensors[left].flatten(2).any(2).any(0) if tensors[left].ndim > 2 else tensors[left].any(0)
            for left, _ in factors
        ]
    ).any(0)


def _same_right(one: Part, other: Part, factors: Sequence[tuple[str, str]]) -> bool:
    return all(torch.equal(one.tensors[right], other.tensors[right]) for _, right in factors)
