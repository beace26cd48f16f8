"""What `codec_of` is asked for, checked against what the pipeline has."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from gendiff._checks import unknown


def frozen(vae: nn.Module, encoders: Mapping[str, nn.Module], train: Sequence[str]) -> tuple[str, ...]:
    """Freeze what does not train; the names of what does."""
    if isinstance(train, str):
        raise TypeError(f"train is a sequence of names, such as ({train!r},), got a string.")
    for name in train:
        if name not in encoders:
            raise ValueError(unknown("text encoder to train", name, encoders))
        if not any(parameter.requires_grad for parameter in encoders[name].parameters()):
            raise ValueError(
                f"nothing in {name} requires a gradient, so it cannot train; call "
                f"pipe.{name}.requires_grad_(True) first, or add an adapter."
            )
    for module in [vae, *(encoder for name, encoder in encoders.items() if name not in train)]:
        module.requires_grad_(False)
    return tuple(train)


def drops(drop: Mapping[str, float | int], groups: Sequence[str]) -> dict[str, float | int]:
    """The probabilities that are not zero, in the order of the groups."""
    for group, probability in drop.items():
        if group not in groups:
            raise ValueError(unknown("group to drop", group, groups))
        if not 0 <= probability < 1:
            raise ValueError(f"drop[{group!r}] is a probability in [0, 1), got {probability}.")
    return {group: drop[group] for group in groups if drop.get(group)}


def guidance_of(pipe: Any, guidance: float | int | None, read: bool) -> float | int | None:
    """The scale that a network is told: what was asked for, or the default of the pipeline's call."""
    if guidance is not None and not read:
        raise ValueError(
            f"guidance={guidance} has no effect: this network is told no guidance scale. For classifier-free "
            f"guidance use a gendiff.Guider."
        )
    parameter = signature(type(pipe).__call__).parameters.get("guidance_scale")
    return parameter.default if guidance is None and read and parameter is not None else guidance
