"""Several adapters as one, by what they add to the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff._philox import hash64
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.approximation import Approximation, Layer, assembled, fitted
from gendiff.lora.factoring import Change, Product, change_of, cut, dense, svd, total, widest
from gendiff.lora.plan import Planned
from gendiff.lora.sources import Source, adapter_of, model_of
from gendiff.lora.weights import weight_of, weights_of

Weighted: TypeAlias = tuple[Source, float | int]


@final
@dataclass(frozen=True, eq=False)
class Term:
    """What one adapter adds to a layer: its name or place, its weight, and the change at weight 1."""

    key: str
    weight: float
    row: Planned
    change: Change


@final
@dataclass(frozen=True, eq=False)
class Weighed:
    """An adapter with its name or place, its weight, and the weights of its model where these are known."""

    key: str
    weight: float
    adapter: Adapter
    weights: Mapping[str, Tensor]

    def term(self, layer: str, device: torch.device) -> Term:
        """What it adds to a layer, made when that layer's turn comes."""
        row = self.adapter.plan[layer]
        weight = weight_of(row, self.weights) if ALGORITHMS[row.algorithm].needs_weight else None
        parts = {part: tensor.to(device) for part, tensor in self.adapter.tensors[layer].items()}
        change = change_of(row, parts, weight)
        return Term(self.key, self.weight, row, change)


def combine(
    adapters: Mapping[str, Weighted] | Sequence[Weighted],
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | int | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Approximation:
    r"""One adapter that adds the weighted sum of what several add, :math:`\sum_i w_i\,\Delta W_i`.

    ======== =========================================================================================
    method   what is made
    ======== =========================================================================================
    cat      the sum, exactly: the factors side by side, so that ranks add up
    svd      the nearest matrix to the sum of a rank
    ties     of each change the largest entries, of these the ones of the sign that weighs more, and the
             mean of those (Yadav et al. 2023, arXiv 2306.01708, algorithm 1); trimmed within a layer
    dare     of each change a random part of the entries, made larger in turn (Yu et al. 2024, arXiv
             2311.03099, section 3.2), then the sum
    linear   sums of the A and of the B, as peft has it: with terms of the A of one and the B of another,
             so that it is the sum only where one adapter changes a layer; for comparison
    ======== =========================================================================================

    Scales, rsLoRA, mixed ranks, and layers that only some of them have are taken into account. LoHa and LoKr
    are LoRA of a higher rank; DoRA and OFT change a weight in all directions, and need `model` and a method
    with a rank. Weights are in the changes before ties elects signs. ties and dare hold the matrices of one
    layer at a time. Matrices that are no product of low rank are cut to the rank by randomised iteration, see
    `gendiff.lora.factoring.svd`.

    Args:
        adapters: `Adapter` or handle, with its weight, by name or in a sequence. A weight may be negative.
        method: one of the table.
        rank: of each layer, for svd, ties and dare; by default the highest of those combined there.
        density: the share of entries that ties (0.2 in the paper) and dare (0.1) keep.
        seed: of dare's choice and the randomised iteration; torch's own generators are left as they were. A
            choice depends on the name, or place, of its adapter and the layer, and on nothing else.
        model: the network that the adapters are for, where DoRA or OFT is among them.

    Returns:
        The adapter, a LoRA of scale 1, and its relative errors :math:`\lVert \Delta W - \sum_i w_i\,\Delta
        W_i \rVert_F / \lVert \sum_i w_i\,\Delta W_i \rVert_F` by layer.

    Raises:
        ValueError: for methods that have no such setting, or cannot take such an adapter; for adapters of
            different models.

    >>> from gendiff.lora import inject, plan
    >>> net = nn.Sequential(nn.Linear(8, 6))
    >>> one = inject(net, plan(net, "*", rank=2), "one").adapter()
    >>> combine({"one": (one, 0.5), "two": (one, 0.7)}).adapter.plan.rows[0].rank
    4
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else dict(enumerate(adapters))
    sources = [
        Weighed(str(key), float(weight), adapter_of(source), weights_of(model_of(source, model)))
        for key, (source, weight) in named.items()
    ]
    _check(sources, method, rank, density)
    names = dict.fromkeys(row.name for one in sources for row in one.adapter.plan.rows)
    settings = {"density": density, "seed": seed}
    layers = (_terms(name, [one for one in sources if name in one.adapter.tensors]) for name in names)
    targets = max(one.adapter.plan.layers for one in sources)
    return assembled((_layer(terms, method, rank, settings) for terms in layers), targets)


def _terms(layer: str, sources: list[Weighed]) -> list[Term]:
    """What each adapter adds to a layer, on the device of the first."""
    device = next(iter(sources[0].adapter.tensors[layer].values())).device
    return [one.term(layer, device) for one in sources]


def _layer(terms: list[Term], method: str, rank: int | None, settings: Mapping[str, Any]) -> Layer:
    first = terms[0].row
    for term in terms:
        if term.row.shape != first.shape:
            raise ValueError(
                f"{first.name} is of shape {first.shape} for {terms[0].key!r} and {term.row.shape} for "
                f"{term.key!r}: these adapters are for different models."
            )
    goal, asked = _sum(terms), METHODS[method](terms, **settings)
    if method in RANKED:
        most = rank or max(term.row.rank for term in terms)
        made = cut(svd(asked, most, settings["seed"]), most)
    else:
        made = asked
    assert isinstance(made, Product)
    row = Planned(first.name, first.kind, first.shape, made.rank, float(made.rank))
    return fitted(row, made, goal, asked)


def _sum(terms: list[Term], **settings: Any) -> Change:
    return total([term.change * term.weight for term in terms])


def _side_by_side(terms: list[Term], **settings: Any) -> Change:
    for term in terms:
        if not isinstance(term.change, Product):
            raise ValueError(_in_all_directions(term.key, term.row))
    return _sum(terms)


def _linear(terms: list[Term], **settings: Any) -> Change:
    left, right, dtypes = [], [], []
    for term in terms:
        strength = term.weight * term.row.scale
        if term.row.algorithm != "lora" or term.row.rank != terms[0].row.rank:
            raise ValueError(
                f'"linear" adds up factors of lora of one rank, and {term.row.name} has {term.row.algorithm} '
                f'of rank {term.row.rank} in {term.key!r}, beside {terms[0].row.rank}: take "cat" or "svd".'
            )
        assert isinstance(term.change, Product)
        root = math.sqrt(abs(strength))
        left.append(term.change.left * (math.copysign(root, strength) / term.row.scale))
        right.append(term.change.right * root)
        dtypes.append(term.change.dtype)
    return Product(torch.stack(left).sum(0), torch.stack(right).sum(0), widest(dtypes))


def _ties(terms: list[Term], *, density: float, **settings: Any) -> Tensor:
    kept = torch.stack([term.weight * _largest(dense(term.change), density) for term in terms])
    elected = kept.sum(0).sign()
    agree = (kept.sign() == elected) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(matrix: Tensor, density: float) -> Tensor:
    """The entries of the largest size, so many that they are a share of all, and at least one."""
    sizes = matrix.abs()
    dropped = min(int((1 - density) * sizes.numel() + 0.5), sizes.numel() - 1)
    return matrix * (sizes >= sizes.flatten().kthvalue(dropped + 1).values)


def _dare(terms: list[Term], *, density: float, seed: int) -> Tensor:
    found: list[Tensor] = []
    for term in terms:
        matrix = dense(term.change)
        generator = torch.Generator().manual_seed(hash64(f"{seed} {term.key} {term.row.name}"))
        kept = torch.rand(matrix.shape, generator=generator) < density
        found.append(term.weight / density * matrix * kept.to(matrix.device))
    return torch.stack(found).sum(0)


METHODS: Mapping[str, Callable[..., Change]] = {
    "cat": _side_by_side,
    "svd": _sum,
    "ties": _ties,
    "dare": _dare,
    "linear": _linear,
}
RANKED, THINNED = ("svd", "ties", "dare"), ("ties", "dare")


def _check(sources: list[Weighed], method: str, rank: int | None, density: float | int | None) -> None:
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if not sources:
        raise ValueError("there is nothing to combine: give adapters with their weights.")
    if rank is not None and method not in RANKED:
        raise ValueError(f'the rank of "{method}" follows from the adapters: leave it out, or take "svd".')
    if rank is not None and rank < 1:
        raise ValueError(f"a rank is a whole number of 1 or more, got {rank}.")
    if (density is None) == (method in THINNED):
        raise ValueError(
            f'density is the share of entries that "ties" (0.2 in its paper) and "dare" (0.1) keep, got '
            f'{density} for "{method}".'
        )
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is a share in (0, 1], got {density}.")
    for one in sources:
        if not math.isfinite(one.weight):
            raise ValueError(f"the weight of {one.key!r} is a finite number, got {one.weight}.")
        for row in one.adapter.plan.rows:
            if method not in RANKED and ALGORITHMS[row.algorithm].needs_weight:
                raise ValueError(_in_all_directions(one.key, row))
            if rank is None and row.algorithm == "oft":
                raise ValueError(f"{one.key!r} is oft, of which no rank is to be read: give rank.")


def _in_all_directions(key: str, row: Planned) -> str:
    return (
        f"{row.algorithm} of {key!r} changes {row.name} in all directions, so that it has no factors to put "
        f'beside or onto others: take "svd" with a rank.'
    )
