"""An adapter within a block: scaled, off, or in the weights; then the bits of before."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.quantised import refuse_merging

if TYPE_CHECKING:
    from gendiff.lora.handle import LoraHandle


@contextmanager
def scaled(handle: "LoraHandle", weight: float | int | Tensor) -> Iterator[None]:
    """See `LoraHandle.scaled`."""
    for row in handle.plan.rows:
        if not ALGORITHMS[row.algorithm].scaled:
            raise ValueError(
                f"{row.algorithm} has no scale: it turns what goes into a layer, wholly or not at all; "
                f"`disabled` leaves it out."
            )
    before = {name: scale.clone() for name, scale in handle.scales.items()}
    with _opened(handle, _changed(handle)):
        try:
            with torch.no_grad():
                for scale in handle.scales.values():
                    scale.mul_(weight)
                for name in _changed(handle):
                    here, original = handle.layers[name].get_base_layer().weight, handle.weight(name)
                    share = weight.to(original) if isinstance(weight, Tensor) else weight
                    here.copy_(torch.lerp(original, here.to(original), share))
            yield
        finally:
            for name, scale in handle.scales.items():
                scale.copy_(before[name])


@contextmanager
def disabled(handle: "LoraHandle") -> Iterator[None]:
    """See `LoraHandle.disabled`."""
    with _opened(handle, _changed(handle)), _off(handle):
        for name in _changed(handle):
            _write(handle, name, handle.weight(name))
        yield


@contextmanager
def merged(handle: "LoraHandle") -> Iterator[None]:
    """See `LoraHandle.merged`."""
    names = [row.name for row in handle.plan.rows]
    for name in names:
        refuse_merging(name, handle.layers[name].get_base_layer())
        _refuse_beside(handle, name)
    with _opened(handle, names), _off(handle):
        for name in names:
            weight, change = handle.weight(name), handle.delta(name)
            _write(handle, name, weight.to(change.dtype) + change)
        yield


def _changed(handle: "LoraHandle") -> list[str]:
    """The layers whose weights the beginning of the adapter has changed."""
    return list(handle.principal.originals) if handle.principal is not None else []


def _write(handle: "LoraHandle", name: str, value: Tensor) -> None:
    with torch.no_grad():
        handle.layers[name].get_base_layer().weight.copy_(value)


@contextmanager
def _opened(handle: "LoraHandle", changed: Iterable[str]) -> Iterator[None]:
    """A block, in which weights may change that are put back at its end."""
    saved: dict[str, Tensor] = {}
    handle.open += 1
    try:
        for name in changed:
            saved[name] = handle.layers[name].get_base_layer().weight.detach().clone()
        yield
    finally:
        for name, value in saved.items():
            _write(handle, name, value)
        handle.open -= 1


@contextmanager
def _off(handle: "LoraHandle") -> Iterator[None]:
    """The layers without the adapter, which afterwards stands again where it stood among the others."""
    places: dict[str, int] = {}
    try:
        for name, layer in handle.layers.items():
            active = list(layer.active_adapters)
            if handle.name in active:
                places[name] = active.index(handle.name)
                layer._active_adapter = [one for one in active if one != handle.name]
        yield
    finally:
        for name, place in places.items():
            layer = handle.layers[name]
            active = list(layer.active_adapters)
            layer._active_adapter = [*active[:place], handle.name, *active[place:]]


def _refuse_beside(handle: "LoraHandle", name: str) -> None:
    """Raise where the sum with another adapter depends on the weight that this one would change."""
    layer: Any = handle.layers[name]
    others = [one for one in layer.active_adapters if one != handle.name]
    own = handle.plan[name].algorithm
    relies = own if ALGORITHMS[own].needs_weight else None
    for other in others:
        if getattr(layer, "use_dora", {}).get(other, False):
            relies = "dora"
        if relies is not None:
            raise ValueError(
                f"{name} carries {other!r} beside {handle.name!r}, and what {relies} adds depends on the "
                f"weight, which would not be that with this one in it: leave the other out by its `disabled` "
                f"for the time being."
            )
