"""A solver as data: what is evaluated where, and which linear combinations are made of the answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from gendiff.sampling.path import Point

Combination: TypeAlias = Mapping[str, float]  # of a register: its coefficient
SAMPLE: Combination = {"x": 1.0}
ANSWER = ("x", "x0", "eps", "noise")


class Spread(NamedTuple):
    """A log variance that the network says: its own channels, or a place between two ends."""

    kind: Literal["learned", "learned_range"]
    small: float
    large: float

    def deviation(self, raw: Tensor) -> Tensor:
        """The standard deviation of the noise (Nichol & Dhariwal 2021, eq. 15)."""
        log = raw if self.kind == "learned" else self.small + (raw + 1) / 2 * (self.large - self.small)
        return (log / 2).exp()


@final
@dataclass(frozen=True)
class Stage:
    """One evaluation of the network, and what is made of its answer.

    Registers are tensors like the sample, by name: `x` the sample, `x0` and `eps` the answer, `noise` unit
    Gaussian noise, and whatever earlier stages kept. Those whose names start with `x_` are samples, and scale
    as x does; the others are answers or noise.

    Attributes:
        at: where the network is evaluated.
        x: the sample after it.
        keep: the memory after it, all of it; what is not named is forgotten.
        query: what the network is given; the sample unless noise is added first.
        span: times (t, s) over which the noise is an increment of a Brownian motion; None for those of the
            step.
        spread: what the noise is multiplied by, where the network says that.
    """

    at: Point
    x: Combination
    keep: Mapping[str, Combination] = field(default_factory=dict[str, Combination])
    query: Combination = field(default_factory=lambda: SAMPLE)
    span: tuple[float, float] | None = None
    spread: Spread | None = None

    @property
    def noisy(self) -> bool:
        """Whether noise enters it."""
        return any(part.get("noise") for part in (self.x, self.query, *self.keep.values()))


Plan: TypeAlias = tuple[tuple[Stage, ...], ...]  # of every step of a grid: its evaluations


def combined(combination: Combination, registers: Mapping[str, Tensor]) -> Tensor:
    """The linear combination of some registers: first x, x0, eps and noise, then what was kept, by name.

    The order is one and the same wherever a step is computed, so that it is rounded alike.

    >>> combined({"x": 2.0, "eps": 0.0, "x0": 1.0}, {"x": torch.ones(1), "x0": torch.ones(1)})
    tensor([3.])
    """
    names = ordered(tuple(combination))
    terms = [(registers[name], float(combination[name])) for name in names if combination[name] != 0]
    if not terms:
        return torch.zeros_like(registers["x"])
    (first, factor), *rest = terms
    total, own = (first, False) if factor == 1 else (first * factor, True)
    for register, factor in rest:  # in place where nobody else has the tensor, which saves an allocation
        add = torch.Tensor.add_ if own and total.dtype == register.dtype else torch.add
        total, own = add(total, register, alpha=factor), True
    return total


@cache
def ordered(names: tuple[str, ...]) -> tuple[str, ...]:
    """Registers in the order in which their terms are added."""
    return tuple(
        sorted(names, key=lambda name: (ANSWER.index(name) if name in ANSWER else len(ANSWER), name))
    )
