"""Noise schedules: maps from time to the level (alpha, sigma) of `x_t = alpha·x0 + sigma·eps`.

Time `t` is real, in [0, 1]: 0 is the data and 1 is the noise. Every map is evaluated in float64 and keeps the
shape of its argument; casting to the dtype of the network is the last thing that happens, elsewhere.

A table of N betas is the schedule with grid times (i + 1)/N for i = 0 … N - 1:

- `timestep = N·t - 1` is what the network was trained to be given, `t_min = 1/N` the smallest time it has
  seen;
- times within rounding of a grid time are that grid time, since (i + 1)/N is rarely exact in float32;
- between two entries log_snr is linear in t;
- below `t_min`, and in the last segment of a table with zero terminal SNR, where log_snr has no finite end,
  the angle atan2(sigma, alpha) is linear instead; t = 0 is exactly the data.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import expand_right, same_shape, working_dtype
from gendiff.math.numeric import Number

Value: TypeAlias = Float[Tensor, "..."] | Number
TIMESTEPS = 1000.0  # flow networks are given t in thousandths


class Level(NamedTuple):
    """The coefficients of `x_t = alpha·x0 + sigma·eps`: float64, a scalar or one value per sample."""

    alpha: Float64[Tensor, "..."]
    sigma: Float64[Tensor, "..."]

    def like(self, x: Float[Tensor, "B *dims"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) in `dtype`, shaped to multiply samples like `x` that are in it.

        Scalars on the host stay there: they go with a tensor on any device, and no device is waited for.
        """
        if self.alpha.ndim == 0 and self.alpha.device.type == "cpu":
            return self.alpha.to(dtype), self.sigma.to(dtype)
        return expand_right(self.alpha.to(dtype), x), expand_right(self.sigma.to(dtype), x)


@dataclass(frozen=True, eq=False)
class Moment:
    """A time with what a schedule says of it, looked up once: what wrappers pass on in place of a time.

    Attributes:
        t: the time, a scalar or [B].
        level: its (alpha, sigma).
        timestep: what the network is given for it.
        number: the time as a number, where all samples share it and it is known without asking a device.
    """

    t: Float64[Tensor, "..."]
    level: Level
    timestep: Float64[Tensor, "..."]
    number: float | None = None

    def __float__(self) -> float:
        return float(self.t) if self.number is None else self.number

    def solution(self, prediction: Any) -> Any:
        """The coefficients with which a `Prediction` solves for x0 and eps here."""
        return prediction.coefficients(self.level)

    def repeat(self, count: int) -> "Moment":
        """The moments of a batch that is repeated so many times; one of all samples stays as it is."""
        if self.t.ndim == 0:
            return self
        level = Level(*(value.repeat(count) for value in self.level))
        return Moment(self.t.repeat(count), level, self.timestep.repeat(count))


def times(t: "Value | Moment", device: torch.device | None = None) -> Float64[Tensor, "..."]:
    """A time as a float64 tensor, on `device` where one is given; on a CPU it must lie in [0, 1].

    A CUDA tensor is not read, because that would synchronise.
    """
    if isinstance(t, Moment):
        return t.t
    if isinstance(t, Tensor):
        result = t.to(device=device, dtype=torch.float64)
    else:  # a fill, which a copy from the host would wait for and a captured graph refuses
        result = torch.full((), t, dtype=torch.float64, device=device)
    if result.device.type == "cpu" and not bool(((result >= 0) & (result <= 1)).all()):
        raise ValueError(
            f"times lie in [0, 1] (0 is the data, 1 is the noise), got {result.min().item():g} … "
            f"{result.max().item():g}; a network's timestep is not a time: schedule.timestep(t) gives the "
            f"one from the other."
        )
    return result


class Schedule(ABC):
    """A noise schedule: the level (alpha, sigma) as a function of time, its log-SNR and the inverse of that.

    `log_snr(t) = log(alpha(t)²/sigma(t)²)` falls strictly with t, from +inf at t = 0. All methods take a
    tensor or a number and return float64 of the same shape.
    """

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of entries of a table; None for a schedule that is continuous."""

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The smallest time at which a network is evaluated; 0 where any time above 0 will do."""

    @abstractmethod
    def log_snr(self, t: Value) -> Float64[Tensor, "..."]:
        """log(alpha²/sigma²) at time t in [0, 1]; +inf at the data, -inf at pure noise."""

    @abstractmethod
    def time(self, log_snr: Value) -> Float64[Tensor, "..."]:
        """The inverse of `log_snr`; levels noisier than t = 1 give 1."""

    @abstractmethod
    def level(self, t: Value) -> Level:
        """The pair (alpha, sigma) at time t in [0, 1]."""

    @abstractmethod
    def timestep(self, t: Value) -> Float64[Tensor, "..."]:
        """What the network is given for time t."""

    @final
    def alpha(self, t: Value) -> Float64[Tensor, "..."]:
        """Signal coefficient at time t in [0, 1]."""
        return self.level(t).alpha

    @final
    def sigma(self, t: Value) -> Float64[Tensor, "..."]:
        """Noise coefficient at time t in [0, 1]."""
        return self.level(t).sigma

    @final
    def moment(self, t: "Value | Moment", device: torch.device) -> Moment:
        """What there is to know of a time, for samples on a device.

        A number, or a scalar on the host, is looked up on the host, so that nothing waits for the device; one
        time a sample is moved to it.

        >>> moment = Rectified().moment(0.25, torch.device("cpu"))
        >>> float(moment), moment.level.alpha.item(), moment.timestep.item()
        (0.25, 0.75, 250.0)
        """
        if isinstance(t, Moment):
            return t
        on_host = not isinstance(t, Tensor) or (t.ndim == 0 and t.device.type == "cpu")
        t = times(t) if on_host else times(t, device)
        return Moment(t, self.level(t), self.timestep(t), float(t) if on_host else None)

    @final
    def mix(
        self, x0: Float[Tensor, "B *dims"], eps: Float[Tensor, "B *dims"], t: Value
    ) -> Float[Tensor, "B *dims"]:
        r"""Noise the data: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` (Ho et al. 2020, eq. 4).

        Args:
            x0: clean data, [B, *].
            eps: unit Gaussian noise, [B, *].
            t: time in [0, 1], a scalar or [B].

        Returns:
            x_t, [B, *], in the dtype of x0 or eps, whichever is wider, and at least float32.

        >>> Rectified().mix(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.25, 1.0]))[:, 0]
        tensor([0.7500, 0.0000])
        """
        same_shape(x0=x0, eps=eps)
        dtype = working_dtype(x0, eps)
        alpha, sigma = self.level(times(t, x0.device)).like(x0, dtype)
        return alpha * x0.to(dtype) + sigma * eps.to(dtype)


class VariancePreserving(Schedule):
    """A schedule with alpha² + sigma² = 1, for which log_snr says everything."""

    @final
    def level(self, t: Value) -> Level:
        log_snr = self.log_snr(t)
        return Level(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


@final
@dataclass(frozen=True)
class Rectified(Schedule):
    r"""The straight path of rectified flow, :math:`\alpha = 1 - t,\ \sigma = t`; the network is given 1000·t.

    A shift of SD3 or Flux is a map of times (`Grid.shifted`, `LogitNormal(shift=...)`), never part of the
    schedule.

    References:
        Liu et al. 2023, *Flow straight and fast*, eq. 1; Lipman et al. 2023, *Flow matching*, eq. 20.

    >>> Rectified().alpha(torch.tensor([0.0, 0.25, 1.0]))
    tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """

    @property
    def size(self) -> int | None:
        return None

    @property
    def t_min(self) -> float:
        return 0.0

    def level(self, t: Value) -> Level:
        t = times(t)
        return Level(1 - t, t)

    def log_snr(self, t: Value) -> Float64[Tensor, "..."]:
        t = times(t)
        return 2 * (torch.log1p(-t) - t.log())

    def time(self, log_snr: Value) -> Float64[Tensor, "..."]:
        return (-levels(log_snr) / 2).sigmoid()

    def timestep(self, t: Value) -> Float64[Tensor, "..."]:
        return TIMESTEPS * times(t)


@final
@dataclass(frozen=True)
class VarianceExploding(Schedule):
    r"""Noise on top of unscaled data: :math:`\alpha = 1` and sigma geometric in time.

    .. math:: \sigma(t) = \sigma_\min (\sigma_\max / \sigma_\min)^{(t - t_\min)/(1 - t_\min)}
              \quad (t \ge t_\min = 10^{-3})

    Below `t_min` the angle atan2(sigma, 1) is linear, so that t = 0 is exactly the data. The network is given
    log(sigma)/4.

    Args:
        sigma_min: noise level at t_min, > 0, in units of the data.
        sigma_max: noise level at t = 1, > sigma_min.

    References:
        Song et al. 2021, *Score-based generative modeling*, appendix C; Karras et al. 2022, table 1
        (c_noise).

    >>> VarianceExploding(0.01, 100.0).sigma(1.0)
    tensor(100.0000, dtype=torch.float64)
    """

    sigma_min: Number = 0.002
    sigma_max: Number = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"VarianceExploding needs 0 < sigma_min < sigma_max < inf, got {self.sigma_min} and "
                f"{self.sigma_max}."
            )

    @property
    def size(self) -> int | None:
        return None

    @property
    def t_min(self) -> float:
        return 1e-3

    def level(self, t: Value) -> Level:
        t = times(t)
        u = (t - self.t_min) / (1 - self.t_min)
        geometric = (math.log(self.sigma_min) + u * self._log_range).exp()
        linear = (t / self.t_min * math.atan(self.sigma_min)).tan()
        return Level(torch.ones_like(t), torch.where(t < self.t_min, linear, geometric))

    def log_snr(self, t: Value) -> Float64[Tensor, "..."]:
        return -2 * self.sigma(t).log()

    def time(self, log_snr: Value) -> Float64[Tensor, "..."]:
        log_sigma = -levels(log_snr) / 2
        u = (log_sigma - math.log(self.sigma_min)) / self._log_range
        angle = log_sigma.exp().atan() / math.atan(self.sigma_min)
        return torch.where(u < 0, angle * self.t_min, self.t_min + u.clamp(0, 1) * (1 - self.t_min))

    def timestep(self, t: Value) -> Float64[Tensor, "..."]:
        return self.sigma(t).log() / 4

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


def levels(log_snr: Value) -> Float64[Tensor, "..."]:
    """A log-SNR, or any number, as a float64 tensor."""
    return torch.as_tensor(log_snr, dtype=torch.float64)
