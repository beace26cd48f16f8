r"""Curves of the learning rate: pure functions of the highest rate, the number of the update and the total.

Updates are counted from 0, in *applied updates* of the whole run, whatever the number of processes or of
micro-steps. A curve is tabulated once, in float64, and the training step indexes the table: nothing is
stepped and nothing has a state.

Warm-up is that of `diffusers.optimization`: update i < warmup has the rate i/warmup of the highest one, so
update 0 has rate 0, and update number `warmup` is the first with the highest rate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final


class Rates(ABC):
    """A learning rate as a function of the update: `rate(learning_rate, step, total)`."""

    @abstractmethod
    def rate(self, learning_rate: float | int, step: int, total: int) -> float:
        """The rate of update number `step` (from 0) in a run of `total` updates.

        Args:
            learning_rate: the highest rate, >= 0: what the parameter group was given.
            step: number of the update, >= 0; past the end of the schedule its last value stays.
            total: number of updates of the run, >= 1.
        """

    def tables(self, learning_rates: Sequence[float | int], total: int) -> list[list[float]]:
        """One table of `total` rates for each parameter group."""
        return [[self.rate(peak, step, total) for step in range(total)] for peak in learning_rates]

    @final
    def table(self, learning_rate: float | int, total: int) -> list[float]:
        """The rates of updates 0 … total - 1.

        >>> Linear(warmup=2).table(1.0, 4)
        [0.0, 0.5, 1.0, 0.5]
        """
        check_total(total)
        return self.tables([learning_rate], total)[0]


@dataclass(frozen=True)
class Decay(Rates):
    """Warm-up, then a fall from the highest rate to the lowest over what is left of `total`."""

    warmup: int | float = 0
    total: int | None = None
    min_lr: float | int = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if self.total is not None:
            check_total(self.total)
        if not (math.isfinite(self.min_lr) and self.min_lr >= 0):
            raise ValueError(f"min_lr is a finite learning rate >= 0, got {self.min_lr}.")

    @abstractmethod
    def remaining(self, progress: float | int) -> float:
        """How much of the way down is still to go, from 1 at progress 0 to 0 at progress 1."""

    @final
    def rate(self, learning_rate: float | int, step: int, total: int) -> float:
        check_call(learning_rate, step, total)
        if learning_rate == 0:
            return 0.0  # a group that is kept as it is, whatever the lowest rate of the others
        if self.min_lr > learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr} of the schedule is above the learning rate {learning_rate} of a "
                f"parameter group, so that the rate would rise; give a smaller min_lr."
            )
        end = self.total or total
        warmup = _updates(self.warmup, end)
        if step < warmup:
            return learning_rate * step / warmup
        progress = min(1.0, (step - warmup) / max(1, end - warmup))
        return self.min_lr + (learning_rate - self.min_lr) * self.remaining(progress)


@final
@dataclass(frozen=True)
class WarmupCosine(Decay):
    r"""A linear warm-up, then half a cosine down to `min_lr`.

    .. math:: \eta_i = \eta_\min + (\eta - \eta_\min)\,\tfrac12\,(1 + \cos \pi p),\qquad
              p = \frac{i - w}{T - w} \quad (i \ge w);\qquad \eta_i = \eta\, i / w \quad (i < w)

    Args:
        warmup: w, updates of warm-up: a whole number, or a share of the total in (0, 1).
        total: T, the update at which the rate has fallen to `min_lr`; None is the length of the run.
        min_lr: the lowest rate, >= 0, absolute.

    References:
        Loshchilov & Hutter 2017, *SGDR*, eq. 5, without restarts.

    >>> [round(rate, 3) for rate in WarmupCosine(2).table(1.0, 6)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
    """

    def remaining(self, progress: float | int) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@final
@dataclass(frozen=True)
class Linear(Decay):
    r"""A linear warm-up, then straight down to `min_lr`.

    .. math:: \eta_i = \eta_\min + (\eta - \eta_\min)\,(T - i)/(T - w)

    Args:
        warmup: w, updates of warm-up: a whole number, or a share of the total in (0, 1).
        total: T, the update at which the rate has fallen to `min_lr`; None is the length of the run.
        min_lr: the lowest rate, >= 0, absolute.

    >>> Linear().table(1.0, 4)
    [1.0, 0.75, 0.5, 0.25]
    """

    def remaining(self, progress: float | int) -> float:
        return 1 - progress


@final
@dataclass(frozen=True)
class Polynomial(Decay):
    r"""A linear warm-up, then down to `min_lr` by a power of what is left.

    .. math:: \eta_i = \eta_\min + (\eta - \eta_\min)\,\bigl((T - i)/(T - w)\bigr)^{k}

    Args:
        warmup: w, updates of warm-up: a whole number, or a share of the total in (0, 1).
        total: T, the update at which the rate has fallen to `min_lr`; None is the length of the run.
        min_lr: the lowest rate, >= 0, absolute; 1e-7 is what diffusers' schedule of that name ends at.
        power: k > 0.

    >>> Polynomial(min_lr=0.0, power=2.0).table(1.0, 4)
    [1.0, 0.5625, 0.25, 0.0625]
    """

    min_lr: float | int = 1e-7
    power: float | int = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power is a finite number above 0, got {self.power}.")

    def remaining(self, progress: float | int) -> float:
        return (1 - progress) ** self.power


@final
@dataclass(frozen=True)
class Constant(Rates):
    """The same rate throughout, after a linear warm-up.

    Args:
        warmup: updates of warm-up: a whole number, or a share of the total in (0, 1).

    >>> Constant(2).table(1.0, 4)
    [0.0, 0.5, 1.0, 1.0]
    """

    warmup: int | float = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)

    def rate(self, learning_rate: float | int, step: int, total: int) -> float:
        check_call(learning_rate, step, total)
        warmup = _updates(self.warmup, total)
        return learning_rate * step / warmup if step < warmup else learning_rate


@final
@dataclass(frozen=True)
class OneCycle(Rates):
    r"""Up to the learning rate and down far below where it began, along two half cosines.

    .. math:: \eta / d \;\to\; \eta \;\to\; \eta / (d\,f),\qquad
              \text{from update } 0 \text{ to } rT - 1 \text{ to } T - 1

    It is `torch.optim.lr_scheduler.OneCycleLR` with the learning rate as `max_lr` and without its cycle of
    momentum.

    Args:
        pct_start: r, the share of the updates that it rises for, in (0, 1).
        div_factor: d >= 1, the highest rate over the first.
        final_div_factor: f >= 1, the first rate over the last.
        total: T, updates of the cycle; None is the length of the run.

    References:
        Smith & Topin 2019, *Super-convergence*, section 3 (the cosine is that of torch).

    >>> [round(rate, 4) for rate in OneCycle(pct_start=0.5, div_factor=10).table(1.0, 6)]
    [0.1, 0.55, 1.0, 0.75, 0.25, 0.0]
    """

    pct_start: float | int = 0.3
    div_factor: float | int = 25.0
    final_div_factor: float | int = 1e4
    total: int | None = None

    def __post_init__(self) -> None:
        if self.total is not None:
            check_total(self.total)
        if not 0 < self.pct_start < 1:
            raise ValueError(f"pct_start is the share of the rise, in (0, 1), got {self.pct_start}.")
        for name, value in (("div_factor", self.div_factor), ("final_div_factor", self.final_div_factor)):
            if not (math.isfinite(value) and value >= 1):
                raise ValueError(f"{name} divides a learning rate: it is finite and >= 1, got {value}.")

    def rate(self, learning_rate: float | int, step: int, total: int) -> float:
        check_call(learning_rate, step, total)
        end = self.total or total
        first = learning_rate / self.div_factor
        last = first / self.final_div_factor
        top = max(0.0, self.pct_start * end - 1)  # a cycle too short for a rise begins at the top
        if step < top:
            return _half_cosine(first, learning_rate, step / top)
        way = end - 1 - top
        return _half_cosine(learning_rate, last, min(1.0, (step - top) / way) if way > 0 else 0.0)


def _half_cosine(start: float | int, end: float | int, progress: float | int) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def _updates(warmup: int | float, end: int) -> int:
    """Updates of warm-up among `end`; a share is rounded to the nearest whole number."""
    updates = round(warmup * end) if isinstance(warmup, float) else warmup
    if updates > end:
        raise ValueError(
            f"a warm-up of {updates} updates does not end within {end}, so that the learning rate would "
            f"never be reached; give fewer, or a share of the total such as warmup=0.05."
        )
    return updates


def _check_warmup(warmup: int | float) -> None:
    whole = isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0
    if not whole and not (isinstance(warmup, float) and 0 <= warmup < 1):
        raise ValueError(
            f"warmup is a whole number of updates >= 0, or a float below 1 that is a share of the total, got "
            f"{warmup!r}."
        )


def check_total(total: int) -> None:
    """Raise a ValueError unless the total is a number of updates."""
    if isinstance(total, bool) or total < 1:
        raise ValueError(f"total is a number of updates >= 1, got {total!r}.")


def check_call(learning_rate: float | int, step: int, total: int) -> None:
    """Raise a ValueError for arguments of `rate` that are out of range."""
    check_total(total)
    if step < 0:
        raise ValueError(f"updates are counted from 0, got step={step}.")
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"a learning rate is finite and >= 0, got {learning_rate}.")
