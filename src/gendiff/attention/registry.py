"""Processors by name, put on the layers that one means, and taken off again exactly."""

import copy
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from gendiff import _patterns
from gendiff._checks import unknown
from gendiff.attention.fitting import refuse_misfit
from gendiff.attention.handle import Handle, changeable
from gendiff.attention.placing import place, take_off
from gendiff.attention.project import refuse_fused
from gendiff.attention.rebinding import kernels_of
from gendiff.attention.run import layer_of
from gendiff.attention.selectors import On
from gendiff.attention.site import Site
from gendiff.attention.table import sites

Made = TypeVar("Made", bound=Callable[..., Any])

PROCESSORS: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Made], Made]:
    """Make a processor class, or a function that makes one, choosable by name.

    Nothing is imported because a file names it: what is registered is what your program has registered.

    Args:
        name: how it is chosen; a name that is taken is refused.

    Raises:
        ValueError: for a name that is taken.

    >>> @register("nothing")
    ... class Nothing:
    ...     def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
    ...         return hidden_states
    >>> registered()["nothing"] is Nothing
    True
    >>> unregister("nothing")
    """

    def add(made: Made) -> Made:
        if name in PROCESSORS:
            raise ValueError(
                f"there is a processor {name!r} already, {PROCESSORS[name]!r}; choose another name."
            )
        PROCESSORS[name] = made
        return made

    return add


def unregister(name: str) -> None:
    """Forget a name."""
    if name not in PROCESSORS:
        raise ValueError(unknown("processor", name, PROCESSORS))
    del PROCESSORS[name]


def registered() -> dict[str, Callable[..., Any]]:
    """What there is to choose by name."""
    return dict(PROCESSORS)


def set_processor(
    model: nn.Module,
    processor: Any,
    on: On = None,
    *,
    replace: bool = False,
) -> Handle:
    """Put a processor on some attention layers of a model.

    Each layer has one of its own: a class, or a function that makes one, is called for each; an object is
    copied, unless its class says `shareable = True`. What was there is kept, and comes back as the same
    object when the handle is removed, in whatever order handles are.

    Args:
        model: a UNet or transformer of diffusers.
        processor: a registered name, a class, a function that makes one (it may take the `site`), an object,
            or a mapping from patterns of names to these, which stays as it is.
        on: the layers: a selector, the pattern of their names, or sites; None is all.
        replace: whether processors that hold trained weights may be replaced; they come back with the handle.

    Returns:
        The handle that brings back what was there.

    Raises:
        TypeError: for what is no processor, or one that a layer cannot call.
        ValueError: where nothing matches, or trained weights or adapters would have no effect.
    """
    changeable()
    found = tuple(sites(model).on(on))
    chosen = _chosen(processor, found)
    pairs = [(site, made_for(what, site, len(found))) for site, what in chosen]
    for site, made in pairs:
        refuse_misfit(made, site)
        refuse_fused(site.module, site.name, made)
        _refuse_closed(site, made)
        _refuse_loss(site, replace)
    entries = [(site.module, place(site.module, made)) for site, made in pairs]

    def undo() -> None:
        for module, entry in reversed(entries):
            take_off(module, entry)

    return Handle(undo, f"{_name(processor)} at {len(entries)} sites", processor)


def _chosen(processor: Any, found: tuple[Site, ...]) -> list[tuple[Site, Any]]:
    """Each site with what is to be put there."""
    if not isinstance(processor, Mapping):
        return [(site, processor) for site in found]
    by_name = {site.name: site for site in found}
    chosen: dict[str, Any] = {}
    for pattern, one in processor.items():
        for name in _patterns.select(pattern.removesuffix(".processor"), by_name, "sites"):
            if name in chosen:
                raise ValueError(f"{name} is matched by two patterns of {list(processor)}; let one match it.")
            chosen[name] = one
    return [(by_name[name], one) for name, one in chosen.items()]


def made_for(processor: Any, site: Site, count: int) -> Any:
    """The processor of one layer."""
    if isinstance(processor, str):
        if processor not in PROCESSORS:
            raise ValueError(unknown("processor", processor, PROCESSORS))
        processor = PROCESSORS[processor]
    if isinstance(processor, type) or (isinstance(processor, FunctionType) and not _is_call(processor)):
        takes = "site" in inspect.signature(processor).parameters
        return processor(site=site) if takes else processor()
    if not callable(processor):
        raise TypeError(f"a processor is called with a layer and its tokens, got {processor!r}.")
    if count == 1 or isinstance(processor, FunctionType) or getattr(processor, "shareable", False):
        return processor
    if isinstance(processor, nn.Module) and next(processor.parameters(), None) is not None:
        raise ValueError(
            f"{type(processor).__name__} has weights and is put on {count} layers, which would share them: "
            f"give its class or a function that makes one a layer, or set `shareable = True` on the class."
        )
    return copy.deepcopy(processor)


def _is_call(function: FunctionType) -> bool:
    """Whether a function is a processor itself, and makes none."""
    names = list(inspect.signature(function).parameters)
    return bool(names) and names[0] in ("attn", "attention", "layer")


def _refuse_closed(site: Site, made: Any) -> None:
    layer = layer_of(site.module)
    if layer is not None and layer.inside and not kernels_of(type(made)):
        inside = ", ".join(map(str, layer.attachments))
        raise ValueError(
            f"{_name(made)} computes its attention in one piece, and {inside} at {site.name} works inside of "
            f"it: remove what is stacked there first."
        )


def _refuse_loss(site: Site, replace: bool) -> None:
    old = site.module.processor
    if replace or not isinstance(old, nn.Module):
        return
    count = sum(parameter.numel() for parameter in old.parameters())
    if count:
        raise ValueError(
            f"the processor {type(old).__name__} of {site.name} holds {count:,} weights, which would have no "
            f"effect and be missing from state_dict: use a stack to add to it, or pass replace=True."
        )


def _name(processor: Any) -> str:
    if isinstance(processor, str | Mapping):
        return repr(processor)
    return getattr(processor, "__name__", type(processor).__name__)
