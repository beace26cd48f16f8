"""Denoisers taken apart and put together again: what of them a captured step has to be given anew.

A denoiser or wrapper may have `parts()` and `rebuilt(denoisers, tensors)`; one that has not is taken as it
is, and its tensors are those that it held when a step was captured.
"""

import weakref
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from gendiff.denoiser import Denoise


class Parts(NamedTuple):
    """What a denoiser is made of: other denoisers, the tensors it reads, the networks it calls, and the rest.

    The key is all the rest, equal for two that compute the same of equal parts.
    """

    key: Hashable
    denoisers: tuple[Denoise, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    networks: tuple[Any, ...] = ()


def parts_of(denoise: Denoise) -> Parts:
    """The parts of a denoiser; itself where it does not tell."""
    parts: Any = getattr(denoise, "parts", None)
    return Parts(*parts()) if parts is not None else Parts(weakref.ref(denoise))


def structure(denoise: Denoise) -> Hashable:
    """What two denoisers have in common of which one may be given the tensors of the other."""
    return _structure(denoise, {})


def _structure(denoise: Denoise, seen: dict[int, Hashable]) -> Hashable:
    """The structure; `seen` has those of denoisers and networks that were met before, by identity."""
    if id(denoise) not in seen:
        parts = parts_of(denoise)
        first: dict[int, int] = {}
        same = tuple(first.setdefault(id(one), number) for number, one in enumerate(parts.denoisers))
        shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in parts.tensors)
        networks = tuple(seen.setdefault(id(one), fingerprint(one)) for one in parts.networks)
        inner = tuple(_structure(one, seen) for one in parts.denoisers)
        seen[id(denoise)] = type(denoise), parts.key, shapes, same, networks, inner
    return seen[id(denoise)]


def fingerprint(network: Any) -> Hashable:
    """What a captured step takes for granted of a network: its modules, their modes and where weights lie.

    What is attached to a network, a list on it by the name `_attached`, says the rest by its `signature`.
    """
    if not isinstance(network, nn.Module):
        return network
    facts: list[Hashable] = []
    for module in network.modules():
        held = vars(module)
        facts += [id(module), module.training, id(held.get("processor"))]
        facts += [one.signature for one in held.get("_attached", ())]
        weights = (*held["_parameters"].values(), *held["_buffers"].values())
        facts += [(weight.data_ptr(), weight.dtype) for weight in weights if weight is not None]
    return tuple(facts)


def tensors_of(denoise: Denoise) -> list[Tensor]:
    """The tensors of a denoiser and of all that it wraps, in the order in which `rebuilt` takes them."""
    _, denoisers, tensors, _ = parts_of(denoise)
    return [*tensors, *(tensor for one in denoisers for tensor in tensors_of(one))]


def rebuilt(denoise: Denoise, tensors: Iterator[Tensor]) -> Denoise:
    """The denoiser with other tensors of the same shapes; networks are shared."""
    _, denoisers, own, _ = parts_of(denoise)
    mine = tuple(next(tensors) for _ in own)
    inner = {id(one): rebuilt(one, tensors) for one in denoisers}
    make: Any = getattr(denoise, "rebuilt", None)
    return denoise if make is None else make(tuple(inner[id(one)] for one in denoisers), mine)


def active(denoise: Denoise, t: float) -> Hashable:
    """The branches that all guiders within evaluate at a time: a captured step is for one such set."""
    own: Any = getattr(denoise, "active", None)
    return own(t) if own is not None else None, *(active(one, t) for one in parts_of(denoise).denoisers)


def root(denoise: Denoise) -> Denoise:
    """The innermost denoiser: captured steps live as long as it does."""
    inner = parts_of(denoise).denoisers
    return root(inner[0]) if inner else denoise
