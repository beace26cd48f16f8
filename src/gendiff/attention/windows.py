"""When a middleware is on: intervals of steps or of noise levels, told apart on the device."""

from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

from gendiff.attention.context import Context


@final
@dataclass(frozen=True)
class Steps:
    """On at the steps first <= step < last of the network's calls.

    >>> Steps(0, 25).open(Context())
    tensor(False)
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"steps go from one number to a later one, got {self.first} to {self.last}.")

    def open(self, context: Context) -> Tensor:
        """Whether it is on, a boolean scalar on the device."""
        return (context.step >= self.first) & (context.step < self.last)


@final
@dataclass(frozen=True)
class Times:
    """On at the times low <= t <= high, where 1 is noise; needs a context that knows t."""

    low: float | int
    high: float | int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times lie in [0, 1], the low one first, got {self.low} to {self.high}.")

    def open(self, context: Context) -> Tensor:
        """Whether it is on, a boolean scalar on the device; off where t is not known."""
        return (context.t >= self.low) & (context.t <= self.high)


Window: TypeAlias = Steps | Times
