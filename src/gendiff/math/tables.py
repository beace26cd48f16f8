"""Schedules that are tables of betas: the ones DDPM, Stable Diffusion and their relatives were trained on.

The conventions (grid times, interpolation, the segment next to the data) are in `gendiff.math.schedules`.
Tables are float64 throughout and keep the level as log ᾱ, from which 1 - ᾱ follows without cancellation.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff.math.numeric import Number, log1mexp, numbers
from gendiff.math.schedules import Value, VariancePreserving, levels, times

SNAP = 2.0**-22  # times this close to a grid time are that grid time: a few roundings of a float32 below 1
COSINE_OFFSET = 0.008  # Nichol & Dhariwal 2021, section 3.2
COSINE_MAX_BETA = 0.999


class TableSchedule(VariancePreserving):
    """A schedule given by log α_i = log(1 - beta_i), i = 0 … N - 1; subclasses say how these are made."""

    @abstractmethod
    def _log_alphas(self) -> Float64[Tensor, "N"]:
        """Make the table."""

    @cached_property
    @final
    def log_alphas(self) -> Float64[Tensor, "N"]:
        """log(1 - beta_i) of every entry; -inf last where the terminal SNR is zero."""
        return self._log_alphas()

    @property
    def size(self) -> int:
        return len(self.log_alphas)

    @property
    @final
    def t_min(self) -> float:
        return 1 / self.size

    @property
    @final
    def log_alpha_bar(self) -> Float64[Tensor, "N"]:
        """Log ᾱ_i, the running sum of log α_i."""
        return self.log_alphas.cumsum(0)

    @final
    def log_snr(self, t: Value) -> Float64[Tensor, "..."]:
        v = self._grid_units(times(t))
        knots = self._knots_on(v.device)
        j = v.floor().clamp(max=self.size - 1).long()
        w, left, right = v - j, _at(knots, j), _at(knots, j + 1)
        along_log_snr = torch.lerp(left[0], right[0], w)
        along_angle = -2 * torch.lerp(left[1], right[1], w).tan().log()
        inside = torch.where(_is_open(left[0], right[0]), along_angle, along_log_snr)
        return torch.where(w == 0, left[0], torch.where(w == 1, right[0], inside))

    @final
    def time(self, log_snr: Value) -> Float64[Tensor, "..."]:
        value = levels(log_snr)
        knots = self._knots_on(value.device)
        j = (torch.searchsorted(-knots[0], -value.contiguous(), right=True) - 1).clamp(0, self.size - 1)
        left, right = _at(knots, j), _at(knots, j + 1)
        along_log_snr = (value - left[0]) / (right[0] - left[0])
        along_angle = (_angle(value) - left[1]) / (right[1] - left[1])
        w = torch.where(_is_open(left[0], right[0]), along_angle, along_log_snr)
        return (j + w.clamp(0, 1)) / self.size

    @final
    def timestep(self, t: Value) -> Float64[Tensor, "..."]:
        return (self._grid_units(times(t)) - 1).clamp(min=0)

    def _grid_units(self, t: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
        """N·t, with what is an integer but for rounding made one; (i + 1)/N is rarely exact in float32."""
        v = self.size * t
        nearest = v.round()
        return torch.where((v - nearest).abs() <= self.size * SNAP, nearest, v)

    @cached_property
    def _knots(self) -> Float64[Tensor, "2 knots"]:
        """log_snr and angle at the times 0, 1/N, …, 1."""
        log_alpha_bar = self.log_alpha_bar
        log_snr = log_alpha_bar - log1mexp(log_alpha_bar)
        log_snr = torch.cat([log_snr.new_tensor([math.inf]), log_snr])
        return torch.stack([log_snr, _angle(log_snr)])

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _knots_on(self, device: torch.device) -> Float64[Tensor, "2 knots"]:
        """The knots on a device, copied there once, so that a captured step copies nothing from the host."""
        if device not in self._copies:
            self._copies[device] = self._knots.to(device)
        return self._copies[device]


def _at(knots: Float64[Tensor, "2 knots"], j: Tensor) -> Float64[Tensor, "2 ..."]:
    """Columns of the knots; knots[:, j] would read a scalar j from its device."""
    return knots.index_select(1, j.reshape(-1)).reshape(2, *j.shape)


def _is_open(left: Float64[Tensor, "..."], right: Float64[Tensor, "..."]) -> Tensor:
    """Whether a segment has an end without a finite log_snr: next to the data, or at zero terminal SNR."""
    return left.isinf() | right.isinf()


def _angle(log_snr: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    return torch.exp(-log_snr / 2).atan()


def _check_betas(name: str, start: Number, end: Number, size: int) -> None:
    if not (0 < start < 1 and 0 < end < 1) or size < 1:
        raise ValueError(
            f"{name} needs betas strictly between 0 and 1 and a size of at least 1, got "
            f"beta_start={start}, beta_end={end}, size={size}."
        )


@final
@dataclass(frozen=True)
class LinearBeta(TableSchedule):
    """Betas on a straight line (Ho et al. 2020, section 4).

    Args:
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in (0, 1).
        size: number N of entries.

    >>> LinearBeta().timestep(torch.tensor([0.001, 0.5, 1.0]))
    tensor([  0., 499., 999.], dtype=torch.float64)
    """

    beta_start: Number = 1e-4
    beta_end: Number = 0.02
    size: int = 1000  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        _check_betas("LinearBeta", self.beta_start, self.beta_end, self.size)

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        return torch.log1p(-torch.linspace(self.beta_start, self.beta_end, self.size, dtype=torch.float64))


@final
@dataclass(frozen=True)
class ScaledLinearBeta(TableSchedule):
    """Betas whose square roots are on a straight line: Stable Diffusion's (Rombach et al. 2022, their code).

    Args:
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in (0, 1).
        size: number N of entries.

    >>> ScaledLinearBeta().sigma(torch.tensor([0.001, 1.0]))
    tensor([0.0292, 0.9977], dtype=torch.float64)
    """

    beta_start: Number = 0.00085
    beta_end: Number = 0.012
    size: int = 1000  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        _check_betas("ScaledLinearBeta", self.beta_start, self.beta_end, self.size)

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.size, dtype=torch.float64)
        return torch.log1p(-roots.square())


@final
@dataclass(frozen=True)
class SigmoidBeta(TableSchedule):
    """Betas on a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff, their code; `sigmoid` of diffusers).

    Args:
        beta_start: value the first beta tends to, in (0, 1).
        beta_end: value the last beta tends to, in (0, 1).
        size: number N of entries.

    >>> -SigmoidBeta(size=3).log_alphas.expm1()[1]
    tensor(0.0100, dtype=torch.float64)
    """

    beta_start: Number = 1e-4
    beta_end: Number = 0.02
    size: int = 1000  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        _check_betas("SigmoidBeta", self.beta_start, self.beta_end, self.size)

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        rise = torch.linspace(-6, 6, self.size, dtype=torch.float64).sigmoid()
        return torch.log1p(-(rise * (self.beta_end - self.beta_start) + self.beta_start))


@final
@dataclass(frozen=True)
class CosineBeta(TableSchedule):
    r"""The cosine schedule (Nichol & Dhariwal 2021, eq. 17; `squaredcos_cap_v2` of diffusers).

    .. math:: \bar\alpha(u) = f(u)/f(0),\quad
              f(u) = \cos^2\left(\frac{u + 0.008}{1.008}\frac{\pi}{2}\right),\quad
              \beta_i = \min\left(1 - \frac{\bar\alpha((i+1)/N)}{\bar\alpha(i/N)},\ 0.999\right)

    Args:
        size: number N of entries.

    >>> -CosineBeta().log_alphas.expm1()[-1]
    tensor(0.9990, dtype=torch.float64)
    """

    size: int = 1000  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"CosineBeta needs a size of at least 1, got {self.size}.")

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        step = math.pi / 2 / (1 + COSINE_OFFSET) / self.size
        rest = step * torch.arange(self.size, 0, -1, dtype=torch.float64)  # pi/2 minus the angle in f
        # cos²a - cos²b = sin(b - a)·sin(b + a): the same betas without cancellation
        betas = math.sin(step) * (2 * rest - step).sin() / rest.sin().square()
        return torch.log1p(-betas.clamp(max=COSINE_MAX_BETA))


@final
@dataclass(frozen=True)
class Tabulated(TableSchedule):
    """Any table of betas, such as a scheduler's `trained_betas`.

    Args:
        betas: N values in (0, 1); the last one may be 1, which is zero terminal SNR. A tensor is accepted and
            kept as a tuple, so that the schedule has content equality.

    >>> Tabulated([0.1, 0.2]) == Tabulated(torch.tensor([0.1, 0.2], dtype=torch.float64))
    True
    """

    betas: Sequence[Number] | Float[Tensor, "N"]

    def __post_init__(self) -> None:
        given = torch.as_tensor(self.betas, dtype=torch.float64)
        inside = (given > 0) & (given < 1)
        if given.ndim != 1 or len(given) == 0 or not bool(inside[:-1].all() and 0 < given[-1] <= 1):
            raise ValueError(
                f"Tabulated needs a non-empty list of betas in (0, 1), the last one in (0, 1], got "
                f"{tuple(given.shape)} values from {given.min() if given.numel() else '-'} to "
                f"{given.max() if given.numel() else '-'}."
            )
        object.__setattr__(self, "betas", tuple(numbers(given)))

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        return torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))


@final
@dataclass(frozen=True)
class ZeroTerminalSNR(TableSchedule):
    r"""A table rescaled so that its last entry is pure noise (Lin et al. 2024, algorithm 1).

    .. math:: \sqrt{\bar\alpha_i'} = \left(\sqrt{\bar\alpha_i} - \sqrt{\bar\alpha_{N-1}}\right)
              \frac{\sqrt{\bar\alpha_0}}{\sqrt{\bar\alpha_0} - \sqrt{\bar\alpha_{N-1}}}

    A network that predicts epsilon cannot be used with it: at t = 1 the noise says nothing of the data.

    Args:
        schedule: the table to rescale, of at least two entries.

    >>> ZeroTerminalSNR(ScaledLinearBeta()).alpha(1.0)
    tensor(0., dtype=torch.float64)
    """

    schedule: TableSchedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, TableSchedule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ZeroTerminalSNR rescales a table, such as LinearBeta(), got {self.schedule!r}.")
        if self.schedule.size < 2 or self.schedule.log_alpha_bar[-1].isinf():
            raise ValueError(
                f"ZeroTerminalSNR needs a table of at least two entries whose terminal SNR is not zero yet, "
                f"got {self.schedule!r}."
            )

    def _log_alphas(self) -> Float64[Tensor, "N"]:
        log_alpha_bar = self.schedule.log_alpha_bar
        shrink = log1mexp((log_alpha_bar[-1] - log_alpha_bar) / 2)  # log(1 - sqrt(ᾱ_T/ᾱ_i))
        rescaled = log_alpha_bar + 2 * (shrink - shrink[0])
        return torch.diff(rescaled, prepend=rescaled.new_zeros(1))
