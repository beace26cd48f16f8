"""Adapters out of the difference of two models, and of another rank."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor, nn

from gendiff._checks import working_dtype
from gendiff.attention.selectors import Selector
from gendiff.attention.table import unwrapped
from gendiff.lora.adapter import Adapter
from gendiff.lora.approximation import Approximation, Layer, assembled, fitted
from gendiff.lora.factoring import Product, change_of, cut, norm, svd
from gendiff.lora.plan import Planned, plan
from gendiff.lora.weights import checked

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]


def extract(
    tuned: Weights,
    base: Weights,
    targets: str | Selector | Iterable[str] = "**",
    *,
    rank: int | None = None,
    energy: float | int | None = None,
    max_rank: int = 64,
    seed: int = 0,
) -> Approximation:
    r"""The adapter that makes a model out of another, as near as its rank allows.

    Each layer gets the singular vectors of the highest values of :math:`W_\text{tuned} - W_\text{base}`,
    taken in float32 at least (Eckart and Young 1936); nothing is clamped, which kohya's scripts do at a
    quantile. A layer that does not differ is left out. Of a large matrix the vectors come by randomised
    iteration, see `gendiff.lora.factoring.svd`; the reported error is that of what was made.

    Args:
        tuned: the model that was trained whole; a module or its state dict.
        base: what it was trained from; one of the two is a module.
        targets: which layers, as in `plan`.
        rank: of every layer; or
        energy: the share of :math:`\lVert \Delta W \rVert_F^2` that the least rank has to keep, by default
            0.98.
        max_rank: the highest rank with `energy`, where it keeps less.
        seed: of the randomised iteration.

    Returns:
        The adapter, of scale 1; its errors by layer; and as `others` the names of weights that differ too and
        are not in it, such as biases, norms, and layers outside of the targets.

    Raises:
        ValueError: for models of other layers, and such as do not differ.
        TypeError: for two state dicts, which do not say which weights are those of layers.

    >>> import torch
    >>> base, tuned = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5))
    >>> _ = tuned.load_state_dict(base.state_dict())
    >>> tuned[0].weight.data += torch.outer(torch.arange(5.0), torch.ones(6))
    >>> extract(tuned, base).adapter.plan.rows[0].rank
    1
    """
    model = base if isinstance(base, nn.Module) else tuned
    if not isinstance(model, nn.Module):
        raise TypeError(
            "one of the two has to be a module: a state dict does not tell the weight of a layer from that "
            "of an embedding."
        )
    energy = _energy(rank, energy, 0.98)
    most = _most(rank, max_rank) or max_rank
    rows = plan(model, targets, rank=1)
    new, old = _named(tuned), _named(base)
    found: list[Layer] = []
    for row in rows.rows:
        key = f"{row.name}.weight"
        difference = _difference(row, new, old, key)
        if bool(difference.any()):
            decomposed = svd(difference, most, seed)
            kept = _rank(decomposed.values, most, energy, norm(difference))
            made = cut(decomposed, kept)
            found.append(fitted(replace(row, rank=kept, lora_alpha=float(kept)), made, difference))
    if not found:
        raise ValueError(
            f"the models do not differ in any of {len(rows)} layers; adapters that one of them carries are "
            f"no part of its weights: merge them first."
        )
    taken = {f"{row.name}.weight" for row, _, _ in found}
    return assembled(found, rows.layers, others=_others(new, old, taken))


def resize(
    adapter: Adapter,
    rank: int | None = None,
    *,
    energy: float | int | None = None,
    max_rank: int | None = None,
    seed: int = 0,
) -> Approximation:
    r"""The same adapter at a lower rank, the nearest there is, from its factors alone.

    The scale of each layer stays: its lora_alpha is the scale times the new rank, or times its root for
    rsLoRA, so that training goes on at the strength of before. A layer that has a lower rank already keeps
    it. LoHa and LoKr become LoRA.

    Args:
        adapter: see `Adapter`.
        rank: the highest rank of each layer; or
        energy: the share of :math:`\lVert \Delta W \rVert_F^2` that the least rank has to keep.
        max_rank: the highest rank with `energy`.
        seed: of the randomised iteration for LoHa and LoKr of full rank.

    Returns:
        The adapter and its errors by layer.

    Raises:
        ValueError: for neither or both of rank and energy; for DoRA and OFT, whose change has the weight in
            it.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give a rank, or the share of energy to keep, such as 0.95.")
    energy = _energy(rank, energy, 1.0)
    found = [_resized(row, adapter, _most(rank, max_rank), energy, seed) for row in adapter.plan.rows]
    return assembled(found, adapter.plan.layers, dict(adapter.metadata))


def _resized(row: Planned, adapter: Adapter, most: int | None, energy: float, seed: int) -> Layer:
    if row.algorithm in ("dora", "oft"):
        raise ValueError(
            f"the change of {row.algorithm} at {row.name} depends on the weight and has no low rank to begin "
            f'with: combine([(adapter, 1)], "svd", rank=..., model=model) makes a LoRA near it.'
        )
    change = change_of(row, adapter.tensors[row.name])
    highest = change.rank if isinstance(change, Product) else min(change.shape)
    highest = min(highest, row.shape[0], math.prod(row.shape[1:]))
    most = highest if most is None else min(most, highest)
    decomposed = svd(change, most, seed)
    kept = _rank(decomposed.values, most, energy, norm(change))
    strength = row.scale
    alpha = strength * (math.sqrt(kept) if row.rslora else kept)
    made = replace(row, rank=kept, lora_alpha=alpha, algorithm="lora", options=())
    return fitted(made, cut(decomposed, kept), change)


def _energy(rank: int | None, energy: float | int | None, usual: float) -> float:
    """The share of energy to keep: all of it at a given rank."""
    if rank is not None and energy is not None:
        raise ValueError("give a rank, or the share of energy to keep and perhaps max_rank, not both.")
    energy = (usual if rank is None else 1.0) if energy is None else energy
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], such as 0.98, got {energy}.")
    return float(energy)


def _most(rank: int | None, max_rank: int | None) -> int | None:
    most = max_rank if rank is None else rank
    if most is not None and most < 1:
        raise ValueError(f"a rank is a whole number of 1 or more, got {most}.")
    return most


def _rank(values: Tensor, most: int, energy: float, length: float) -> int:
    """The least rank that keeps a share of the squared norm, and at most `most`."""
    most = min(most, len(values))
    if energy == 1 or not length:
        return most
    kept = values.double().square().cumsum(0) / length**2
    return min(most, int((kept < energy).sum()) + 1)


def _named(model: Weights) -> Mapping[str, Tensor]:
    """The weights by name, of a layer that carries adapters by the name that it has without."""
    if not isinstance(model, nn.Module):
        return model
    return {name.replace(".base_layer.", "."): value for name, value in unwrapped(model).state_dict().items()}


def _difference(row: Planned, new: Mapping[str, Tensor], old: Mapping[str, Tensor], key: str) -> Tensor:
    """The difference of the weights of a layer, as a matrix."""
    for which, weights in (("tuned", new), ("base", old)):
        if key not in weights:
            raise ValueError(
                f"the {which} model has no {key!r}, which the other one has: both have to be of the same "
                f"architecture, and a state dict has the names of the model."
            )
        checked(row.name, weights[key], row.shape)
    return _minus(new[key], old[key]).flatten(1)


def _minus(one: Tensor, other: Tensor) -> Tensor:
    wide = working_dtype(one, other)
    return one.detach().to(other.device, wide) - other.detach().to(wide)


def _others(new: Mapping[str, Tensor], old: Mapping[str, Tensor], taken: set[str]) -> tuple[str, ...]:
    """Names of the weights of both that differ and were not taken."""
    shared = [key for key, value in new.items() if key in old and old[key].shape == value.shape]
    floats = [key for key in shared if new[key].is_floating_point() and key not in taken]
    return tuple(key for key in floats if bool(_minus(new[key], old[key]).any()))
