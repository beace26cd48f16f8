"""Time laws: at which noise levels a network is trained."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor

from gendiff.math.grids import shift_times
from gendiff.math.schedules import Schedule
from gendiff.random import Randomness


class TimeLaw(ABC):
    """A law of times on (0, 1], given by its quantile function; a mean above the middle is noisier."""

    @abstractmethod
    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        """The times below which the shares u in (0, 1) of the law lie."""

    def draw(
        self, schedule: Schedule, batch: int, rng: Randomness, device: torch.device | None = None
    ) -> Float64[Tensor, "B"]:
        """One time per sample, from the stream "time"."""
        return self.quantile(rng.uniform("time", (batch,), dtype=torch.float64, device=device), schedule)


@final
@dataclass(frozen=True)
class OnGrid(TimeLaw):
    """The N times of a table, each as likely as the others: what DDPM and Stable Diffusion train on.

    >>> from gendiff.math import LinearBeta
    >>> OnGrid().quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), LinearBeta(size=4))
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """

    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        size = schedule.size
        if size is None:
            raise ValueError(
                f"OnGrid needs a table of betas, got {schedule!r}; use Uniform() or LogitNormal()."
            )
        return ((u * size).floor().clamp(max=size - 1) + 1) / size


@final
@dataclass(frozen=True)
class Uniform(TimeLaw):
    """Times with constant density from `low` (the schedule's t_min by default) to `high`.

    >>> from gendiff.math import Rectified
    >>> Uniform(0.5).quantile(torch.tensor([0.5], dtype=torch.float64), Rectified())
    tensor([0.7500], dtype=torch.float64)
    """

    low: float | None = None
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= (self.low or 0.0) < self.high <= 1:
            raise ValueError(f"Uniform needs 0 <= low < high <= 1, got {self.low} and {self.high}.")

    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        low = schedule.t_min if self.low is None else self.low
        if not low < self.high:
            raise ValueError(
                f"Uniform(high={self.high}) lies below the smallest time {low} of {schedule!r}; give a "
                f"larger high, or a low of its own."
            )
        return low + u * (self.high - low)


@final
@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    r"""Times whose logit is normal (Esser et al. 2024, eq. 19), then shifted.

    .. math:: \operatorname{logit} t' \sim \mathcal N(\text{mean}, \text{std}^2),\qquad t = s t'/(1 + (s-1)t')

    Args:
        mean: mean of the logit; above 0 is noisier.
        std: its standard deviation, > 0.
        shift: the number s; 1 changes nothing. `grids.resolution_shift(tokens)` gives Flux's.

    >>> from gendiff.math import Rectified
    >>> LogitNormal(shift=3.0).quantile(torch.tensor([0.5], dtype=torch.float64), Rectified())
    tensor([0.7500], dtype=torch.float64)
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise ValueError(
                f"LogitNormal needs a finite mean and a positive std and shift, got {self.mean}, {self.std}, "
                f"{self.shift}."
            )

    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        t = shift_times((self.mean + self.std * torch.special.ndtri(u)).sigmoid(), self.shift)
        return t.clamp(min=schedule.t_min)


@final
@dataclass(frozen=True)
class LogNormal(TimeLaw):
    r"""Times whose ratio sigma/alpha is log-normal.

    .. math:: \log(\sigma/\alpha) \sim \mathcal N(\text{mean}, \text{std}^2)

    The defaults are EDM's (Karras et al. 2022, table 1, training).

    >>> from gendiff.math import VarianceExploding
    >>> schedule = VarianceExploding()
    >>> schedule.sigma(LogNormal().quantile(torch.tensor([0.5], dtype=torch.float64), schedule)).log()
    tensor([-1.2000], dtype=torch.float64)
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(
                f"LogNormal needs a finite mean and a positive std, got {self.mean} and {self.std}."
            )

    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        log_ratio = self.mean + self.std * torch.special.ndtri(u)
        return schedule.time(-2 * log_ratio).clamp(min=schedule.t_min)


@final
@dataclass(frozen=True)
class Stratified(TimeLaw):
    """Another law, with the batch spread over it: sample i of B falls in the i-th of B equal shares.

    The loss has the same expectation and less variance (Kingma et al. 2021). Each time depends on the
    sample's place in the batch, so this is the one law that a split of the batch changes.

    >>> from gendiff.math import Rectified
    >>> from gendiff.random import Rng
    >>> t = Stratified(Uniform()).draw(Rectified(), 4, Rng(0))
    >>> (t * 4).floor()
    tensor([0., 1., 2., 3.], dtype=torch.float64)
    """

    law: TimeLaw = Uniform()

    def __post_init__(self) -> None:
        if not isinstance(self.law, TimeLaw):
            raise TypeError(
                f"Stratified spreads a TimeLaw, such as Stratified(LogitNormal()), got {self.law!r}."
            )

    def quantile(self, u: Float64[Tensor, "B"], schedule: Schedule) -> Float64[Tensor, "B"]:
        place = torch.arange(len(u), dtype=torch.float64, device=u.device)
        return self.law.quantile((place + u) / len(u), schedule)
