"""Another adapter's numbers in the place of an adapter's, without a new tensor."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gendiff._checks import unknown
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.layers import config, part_of, tuner
from gendiff.lora.plan import LoraPlan, Planned

if TYPE_CHECKING:
    from gendiff.lora.handle import LoraHandle


def swap(handle: "LoraHandle", adapter: Adapter) -> None:
    """See `LoraHandle.swap`."""
    if handle.open:
        raise RuntimeError(
            f"{handle.name!r} is within a block of `scaled`, `disabled` or `merged`, at the end of which "
            f"things are put back: leave the block first."
        )
    _check(handle, adapter.plan)
    with torch.no_grad():
        for slot in handle.slots.values():
            parts = adapter.tensors.get(slot.name, {})
            for name, one in parts_of(handle, slot).items():
                one.copy_(padded(parts[name], one)) if parts else one.zero_()
        for row in adapter.plan.rows:
            if ALGORITHMS[row.algorithm].scaled:
                handle.layers[row.name].scaling[handle.name].fill_(row.scale)
    handle.plan = replace(adapter.plan, layers=handle.plan.layers)
    _book(handle)


def parts_of(handle: "LoraHandle", slot: Planned) -> dict[str, Tensor]:
    """The tensors of a layer, of the shapes that the algorithm says."""
    layer = handle.layers[slot.name]
    return {
        part: part_of(layer, part, handle.name).view(shape)
        for part, shape in ALGORITHMS[slot.algorithm].shapes(slot).items()
    }


def cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first corner of a tensor, of a shape."""
    return tensor[tuple(slice(size) for size in shape)]


def padded(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the first corner of one as large as another, with zeros round it."""
    found = torch.zeros_like(like)
    cut(found, tuple(tensor.shape)).copy_(tensor)
    return found


def _check(handle: "LoraHandle", plan: LoraPlan) -> None:
    """Raise unless an adapter fits where another one is."""
    if handle.principal is not None:
        raise ValueError(
            f"{handle.name!r} began by {handle.principal.init}, on weights that it has changed: remove it, "
            f"and inject the other adapter."
        )
    for row in plan.rows:
        if row.name not in handle.slots:
            raise ValueError(
                f"the adapter has a layer more: {unknown('layer', row.name, handle.slots)} Remove "
                f"{handle.name!r}, and inject the other adapter."
            )
        reason = _misfit(handle.slots[row.name], row)
        if reason:
            raise ValueError(f"{row.name}: {reason}: remove {handle.name!r}, and inject the other adapter.")
    planned = {row.name for row in plan.rows}
    for slot in handle.slots.values():
        if slot.name not in planned and not ALGORITHMS[slot.algorithm].rests:
            raise ValueError(
                f"the adapter has no layer {slot.name!r}, where {slot.algorithm} would learn on: remove "
                f"{handle.name!r}, and inject the other adapter."
            )


def _misfit(slot: Planned, row: Planned) -> str:
    """Why a layer of an adapter does not fit into that of another."""
    if (row.algorithm, row.shape) != (slot.algorithm, slot.shape):
        return f"{row.algorithm} of {row.shape} is not {slot.algorithm} of {slot.shape}"
    algorithm = ALGORITHMS[row.algorithm]
    mine, theirs = algorithm.shapes(slot), algorithm.shapes(row)
    if algorithm.pads and row.rank > slot.rank:
        return f"a rank of {row.rank} is more than the {slot.rank} that is there"
    if not algorithm.pads and mine != theirs:
        return f"{row.algorithm} has parts of {theirs}, which are not {mine}"
    return ""


def _book(handle: "LoraHandle") -> None:
    """Tell peft the strengths, of which it makes scales again: those of the ranks that are there."""
    rows = {row.name: row for row in handle.plan.rows}
    books: list[Planned] = []
    for slot in handle.slots.values():
        if ALGORITHMS[slot.algorithm].scaled and slot.name in rows:
            scale, layer = rows[slot.name].scale, handle.layers[slot.name]
            slot = replace(slot, lora_alpha=scale * (math.sqrt(slot.rank) if slot.rslora else slot.rank))
            alphas: Any = layer.lora_alpha if tuner(slot.algorithm) == "lora" else layer.alpha
            alphas[handle.name] = slot.lora_alpha
        books.append(slot)
    handle.model.peft_config[handle.name] = config(LoraPlan(tuple(books), handle.plan.layers), True)  # pyright: ignore
