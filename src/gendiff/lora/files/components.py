"""The networks that an adapter is for, by what a pipeline calls them."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from gendiff.attention.table import unwrapped

Models: TypeAlias = nn.Module | Mapping[str, nn.Module] | Any
BACKBONES = ("unet", "transformer")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # it begins keys, and names a folder
ADAPTED = re.compile(r"(unet|transformer|text_encoder)(_\d+)?")  # what of a pipeline carries adapters


def component_of(model: nn.Module) -> str:
    """What a pipeline would call a network, by its class.

    >>> component_of(nn.Linear(1, 1))
    'model'
    """
    kind = type(unwrapped(model))
    if kind.__name__.startswith("UNet"):
        return "unet"
    if kind.__module__.startswith("transformers."):
        return "text_encoder"
    return "transformer" if "Transformer" in kind.__name__ else "model"


def components_of(model: Models) -> dict[str, nn.Module]:
    """Networks by name: of a mapping, of a pipeline of diffusers, or one by itself.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that is none, or a pipeline without networks that carry adapters.
    """
    if isinstance(model, nn.Module):
        return {component_of(model): unwrapped(model)}
    if isinstance(model, Mapping):
        for name, one in model.items():
            if not isinstance(one, nn.Module):
                raise TypeError(f"a component is a torch module, got {type(one).__name__} for {name!r}.")
            check_name(name)
        return {name: unwrapped(one) for name, one in model.items()}
    held = getattr(model, "components", None)
    if not isinstance(held, Mapping):
        raise TypeError(
            f"a model is a module, a mapping of components such as "
            f"{{'unet': unet, 'text_encoder': encoder}}, or a pipeline of diffusers, got "
            f"{type(model).__name__}."
        )
    found = {
        name: unwrapped(one)
        for name, one in held.items()
        if isinstance(one, nn.Module) and ADAPTED.fullmatch(name)
    }
    if not found:
        raise ValueError(f"the pipeline has no network that carries adapters, only {', '.join(held)}.")
    return found


def check_name(name: object) -> None:
    """Raise a ValueError for what is no name of a component."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(
            f"a component has the name that a pipeline calls it by, such as 'unet' or 'text_encoder_2', "
            f"got {name!r}."
        )
