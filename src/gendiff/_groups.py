"""Parameter groups: which parameters have a learning rate or a weight decay of their own, by pattern."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from torch import nn

from gendiff._patterns import check, select


@final
@dataclass(frozen=True)
class ParamGroup:
    """A rule: the parameters that a pattern covers have this learning rate, this weight decay, or both.

    Names are `<component>.<own name>`, as in checkpoints. What is None stays as other rules or the run's
    configuration say.

    Args:
        pattern: dotted glob: `*` within one segment, `**` any number of segments, `|` between alternatives.
        learning_rate: highest learning rate, >= 0; 0 keeps the parameters as they are.
        weight_decay: >= 0.

    Raises:
        ValueError: for what is no pattern, for values out of range, and for a rule that sets nothing.

    >>> ParamGroup("text_encoder.**", learning_rate=1e-6)
    ParamGroup(pattern='text_encoder.**', learning_rate=1e-06, weight_decay=None)
    """

    pattern: str
    learning_rate: float | int | None = None
    weight_decay: float | int | None = None

    def __post_init__(self) -> None:
        check(self.pattern)
        values = self.values()
        if not values:
            raise ValueError(
                f"ParamGroup({self.pattern!r}) sets nothing; give learning_rate or weight_decay."
            )
        for name, value in values.items():
            _check_setting(f"{name} of ParamGroup({self.pattern!r})", value)

    def values(self) -> dict[str, float | int]:
        """What the rule sets."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "pattern"}
        return {name: value for name, value in given.items() if value is not None}


def group(
    named: Mapping[str, nn.Parameter],
    rules: Sequence[ParamGroup] = (),
    learning_rate: float | int = 1e-4,
    weight_decay: float | int = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: parameters with equal settings stand in one group.

    Rules are applied field by field, later ones win. Groups come in the order in which their first parameter
    is named, and parameters within a group in the order of `named`. A parameter that has several names (tied
    weights) is there once, under its first; a rule that covers any of its names holds for it.

    Args:
        named: the trainable parameters by name.
        rules: what differs from the two defaults below.
        learning_rate: of parameters that no rule gives another one, >= 0.
        weight_decay: of parameters that no rule gives another one, >= 0.

    Returns:
        Dictionaries of `params`, `names`, `lr` and `weight_decay`; the two settings are Python's floats.

    Raises:
        ValueError: for a rule that covers no name, for values out of range, and where there is no parameter.

    >>> net = nn.Linear(2, 2)
    >>> groups = group(dict(net.named_parameters()), [ParamGroup("**.bias", weight_decay=0.0)], 1e-3, 0.01)
    >>> [(g["names"], g["lr"], g["weight_decay"]) for g in groups]
    [(['weight'], 0.001, 0.01), (['bias'], 0.001, 0.0)]
    """
    if not named:
        raise ValueError("there is no parameter to group; check that something has requires_grad=True.")
    defaults = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    for name, value in defaults.items():
        _check_setting(name, value)
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    settings = {name: dict(defaults) for name in first.values()}
    for rule in rules:
        for name in select(rule.pattern, named, "trainable parameters"):
            settings[first[id(named[name])]].update(rule.values())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, values in settings.items():
        lr, decay = float(values["learning_rate"]), float(values["weight_decay"])
        empty = {"params": [], "names": [], "lr": lr, "weight_decay": decay}
        one = groups.setdefault((lr, decay), empty)
        one["params"].append(named[name])
        one["names"].append(name)
    return list(groups.values())


def _check_setting(name: str, value: float | int) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a finite number >= 0, got {value!r}.")
