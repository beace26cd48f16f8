"""Grids: the falling times a sampler visits, together with the schedule they belong to.

The network is evaluated at every time of a grid but the last, which is where sampling ends: 0, exactly the
data, or `schedule.t_min` (what `set_alpha_to_one=False` of diffusers ends at).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from gendiff._checks import unknown
from gendiff.math.numeric import Number, beta_quantile, numbers
from gendiff.math.schedules import TIMESTEPS, Level, Schedule

ROUNDING = 1e-3  # relative: ratios that others publish are rounded, or come from tables in float32


@final
@dataclass(frozen=True)
class Grid:
    """Falling times on a schedule, in float64.

    Args:
        schedule: the schedule the times belong to.
        times: at least two times, strictly falling, in [0, 1]; only the last may be 0. A tensor is accepted
            and kept as a tuple, so that the grid has content equality.
        before: of a part of a grid: the times of that before its first.
        after: likewise those after its last. A solver then does in the part what it does there in the whole.

    >>> from gendiff.math.schedules import Rectified
    >>> Grid(Rectified(), [1.0, 0.5, 0.0]).steps
    2
    """

    schedule: Schedule
    times: Sequence[Number] | Num[Tensor, "N"]
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        t = torch.as_tensor(self.times, dtype=torch.float64)
        if t.ndim != 1 or len(t) < 2:
            raise ValueError(f"a grid needs a list of at least two times, got shape {tuple(t.shape)}.")
        if not bool((t.diff() < 0).all() and t[0] <= 1 and t[-1] >= 0):
            raise ValueError(
                f"the times of a grid fall strictly within [0, 1] (1 is the noise), got {_shortened(t)}; for "
                f"a network's timesteps use grids.from_timesteps, for sigmas grids.from_sigmas."
            )
        object.__setattr__(self, "times", tuple(numbers(t)))
        if self.before or self.after:
            _ = self.whole  # which is refused where the times do not fall

    @cached_property
    def whole(self) -> "Grid":
        """The grid that this one is a part of; itself where it is no part."""
        if not self.before and not self.after:
            return self
        return Grid(self.schedule, (*self.before, *numbers(self.t), *self.after))

    @property
    def steps(self) -> int:
        """Number of steps; one less than the number of times."""
        return len(self.times) - 1

    @cached_property
    def t(self) -> Float64[Tensor, "N"]:
        """The times as a tensor, on the CPU."""
        return torch.tensor(self.times, dtype=torch.float64)

    @cached_property
    def levels(self) -> Level:
        """(alpha, sigma) at every time, float64 on the CPU."""
        return self.schedule.level(self.t)

    def level(self, i: int) -> Level:
        """(alpha, sigma) at the i-th time."""
        return Level(self.levels.alpha[i], self.levels.sigma[i])

    def on(self, schedule: Schedule) -> "Grid":
        """The grid of the same log-SNRs on another schedule; the data stays the data.

        >>> from gendiff.math.schedules import Rectified, VarianceExploding
        >>> Grid(Rectified(), [0.5, 0.0]).on(VarianceExploding()).levels.sigma
        tensor([1., 0.], dtype=torch.float64)
        """

        def converted(times: Float64[Tensor, "N"]) -> tuple[float, ...]:
            return tuple(numbers(_times_of(schedule, (-self.schedule.log_snr(times) / 2).exp())))

        ends = (converted(torch.tensor(part, dtype=torch.float64)) for part in (self.before, self.after))
        return Grid(schedule, converted(self.t), *ends)

    def shifted(self, shift: Number | None = None, *, tokens: int | None = None) -> "Grid":
        """The grid with its times moved towards the noise (shift > 1) or the data (shift < 1).

        Args:
            shift: the number s of t -> s·t/(1 + (s - 1)·t); 1 changes nothing.
            tokens: in place of `shift`, the number of tokens of an image, from which Flux's rule makes the
                number.

        >>> from gendiff.math.schedules import Rectified
        >>> uniform(Rectified(), 2).shifted(3.0).times
        (1.0, 0.75, 0.0)
        """
        if (shift is None) == (tokens is None):
            raise ValueError(
                f"give a shift or the number of tokens that it follows from, one of them, got {shift} and "
                f"{tokens}."
            )
        number = resolution_shift(tokens) if tokens is not None else shift
        assert number is not None
        return Grid(self.schedule, shift_times(self.t, number))


def shift_times(t: Float[Tensor, "..."], shift: Number) -> Float[Tensor, "..."]:
    r"""Map times by :math:`t \mapsto s t/(1 + (s-1) t)` (Esser et al. 2024, eq. 23); 0 and 1 stay exactly.

    >>> shift_times(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    tensor([0.0000, 0.7500, 1.0000])
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"a shift is a positive number (1: no change, above 1: noisier), got {shift}.")
    return shift * t / (shift * t + (1 - t))


def resolution_shift(
    tokens: int, base: tuple[int, float] = (256, 0.5), maximum: tuple[int, float] = (4096, 1.15)
) -> float:
    """The shift for an image of so many tokens: Flux's rule, a line through two points (tokens, log shift).

    >>> round(resolution_shift(4096), 4)  # exp(1.15)
    3.1582
    """
    if tokens < 1:
        raise ValueError(f"an image has at least one token, got {tokens}.")
    slope = (maximum[1] - base[1]) / (maximum[0] - base[0])
    return math.exp(base[1] + slope * (tokens - base[0]))


def uniform(schedule: Schedule, steps: int, start: Number = 1.0, end: Number = 0.0) -> Grid:
    """Times at equal distances from `start` to `end`.

    >>> from gendiff.math.schedules import Rectified
    >>> uniform(Rectified(), 4).times
    (1.0, 0.75, 0.5, 0.25, 0.0)
    """
    return Grid(schedule, torch.linspace(start, end, _positive(steps) + 1, dtype=torch.float64))


def leading(schedule: Schedule, steps: int, offset: int = 0, end: Number = 0.0) -> Grid:
    """Every (N // steps)-th timestep from 0 up plus an offset: `leading` of Lin et al. 2024, table 2.

    >>> from gendiff.math.tables import ScaledLinearBeta
    >>> grid = leading(ScaledLinearBeta(), 4, offset=1)
    >>> grid.schedule.timestep(grid.t[:-1])
    tensor([751., 501., 251.,   1.], dtype=torch.float64)
    """
    size = _size(schedule, steps)
    return from_timesteps(schedule, [i * (size // steps) + offset for i in reversed(range(steps))], end)


def trailing(schedule: Schedule, steps: int, end: Number = 0.0) -> Grid:
    """Every (N/steps)-th timestep from the last down: `trailing` of Lin et al. 2024, table 2.

    >>> from gendiff.math.tables import ScaledLinearBeta
    >>> grid = trailing(ScaledLinearBeta(), 4)
    >>> grid.schedule.timestep(grid.t[:-1])
    tensor([999., 749., 499., 249.], dtype=torch.float64)
    """
    size = _size(schedule, steps)
    stride = size - (size - size / steps)  # rounded as by numpy.arange, which decides ties as diffusers does
    return from_timesteps(schedule, [round(size - i * stride) - 1 for i in range(steps)], end)


def linspace(schedule: Schedule, steps: int, end: Number = 0.0) -> Grid:
    """Rounded timesteps evenly from the last to 0: `linspace` of Lin et al. 2024, table 2.

    A single step is taken from the last timestep, where diffusers would take it from timestep 0.

    >>> from gendiff.math.tables import ScaledLinearBeta
    >>> grid = linspace(ScaledLinearBeta(), 4)
    >>> grid.schedule.timestep(grid.t[:-1])
    tensor([999., 666., 333.,   0.], dtype=torch.float64)
    """
    size = _size(schedule, steps)
    stride = (size - 1) / max(steps - 1, 1)
    timesteps = [round(i * stride) for i in reversed(range(steps))] if steps > 1 else [size - 1]
    return from_timesteps(schedule, timesteps, end)


def exponential(
    schedule: Schedule,
    steps: int,
    sigma_max: Number | None = None,
    sigma_min: Number | None = None,
    end: Number = 0.0,
) -> Grid:
    """Noise-to-signal ratios sigma/alpha on a geometric series from `sigma_max` to `sigma_min`, then `end`.

    Args:
        schedule: the schedule.
        steps: number of steps.
        sigma_max: first ratio, of t = 1 by default.
        sigma_min: last ratio at which the network is evaluated, of t_min by default.
        end: the time at which sampling ends.

    >>> from gendiff.math.schedules import VarianceExploding
    >>> grid = exponential(VarianceExploding(0.01, 100.0), 5)
    >>> [round(sigma, 4) for sigma in grid.levels.sigma.tolist()]
    [100.0, 10.0, 1.0, 0.1, 0.01, 0.0]
    """
    return _spaced(schedule, steps, sigma_max, sigma_min, end, torch.log, torch.exp)


def uniform_log_snr(
    schedule: Schedule, steps: int, start: Number = 1.0, last: Number | None = None, end: Number = 0.0
) -> Grid:
    """Times at equal distances of log-SNR from `start` to `last` (t_min by default), then `end`.

    Recommended for exponential integrators (Lu et al. 2022, section 3.3); the same grid as `exponential`,
    whose ends are ratios.

    >>> from gendiff.math.tables import ScaledLinearBeta
    >>> grid = uniform_log_snr(ScaledLinearBeta(), 3)
    >>> grid.schedule.log_snr(grid.t[:-1]).diff()
    tensor([6.2167, 6.2167], dtype=torch.float64)
    """
    times = torch.tensor([start, schedule.t_min if last is None else last], dtype=torch.float64)
    first_ratio, last_ratio = numbers((-schedule.log_snr(times) / 2).exp())
    return exponential(schedule, steps, first_ratio, last_ratio, end)


def karras(
    schedule: Schedule,
    steps: int,
    sigma_max: Number | None = None,
    sigma_min: Number | None = None,
    rho: Number = 7.0,
    end: Number = 0.0,
) -> Grid:
    r"""Ratios with :math:`1/\rho`-th powers at equal distances, then `end` (Karras et al. 2022, eq. 5).

    >>> from gendiff.math.schedules import VarianceExploding
    >>> karras(VarianceExploding(), 3).levels.sigma
    tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00], dtype=torch.float64)
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; Karras et al. use 7.")
    return _spaced(schedule, steps, sigma_max, sigma_min, end, lambda s: s ** (1 / rho), lambda r: r**rho)


def beta(
    schedule: Schedule,
    steps: int,
    a: Number = 0.6,
    b: Number = 0.6,
    space: Literal["sigma", "time"] = "sigma",
    end: Number = 0.0,
) -> Grid:
    """Quantiles of a beta law, denser at both ends (Lee et al. 2024), then `end`.

    Args:
        schedule: the schedule.
        steps: number of steps.
        a: first parameter of the law, > 0.
        b: second parameter of the law, > 0.
        space: what lies on the quantiles: the ratios sigma/alpha (as diffusers does) or the times (as the
            paper does).
        end: the time at which sampling ends.

    >>> from gendiff.math.tables import ScaledLinearBeta
    >>> [round(t, 4) for t in beta(ScaledLinearBeta(), 3, space="time").times]
    [1.0, 0.5005, 0.001, 0.0]
    """
    if space not in ("sigma", "time"):
        raise ValueError(unknown("space", space, ["sigma", "time"]))
    u = torch.linspace(1, 0, _positive(steps), dtype=torch.float64)
    quantiles = torch.tensor([beta_quantile(p, a, b) for p in numbers(u)], dtype=torch.float64)
    if space == "time":
        times = schedule.t_min + quantiles * (1 - schedule.t_min)
        return Grid(schedule, torch.cat([times, times.new_tensor([end])]))
    first, last = _ratios(schedule, None, None)
    return _from_ratios(schedule, last + quantiles * (first - last), end)


def from_timesteps(
    schedule: Schedule, timesteps: Sequence[Number] | Num[Tensor, "N"], end: Number = 0.0
) -> Grid:
    """The grid of a network's own timesteps: (i + 1)/N for i on a table, i/1000 on the flow schedule.

    >>> from gendiff.math.tables import LinearBeta
    >>> from_timesteps(LinearBeta(size=4), [3, 1]).times
    (1.0, 0.5, 0.0)
    """
    steps = torch.as_tensor(timesteps, dtype=torch.float64)
    times = steps / TIMESTEPS if schedule.size is None else (steps + 1) / schedule.size
    inside = bool(((times >= 0) & (times <= 1)).all())
    if not inside or not torch.allclose(schedule.timestep(times), steps, rtol=0, atol=1e-3):
        raise ValueError(
            f"{_shortened(steps)} are not timesteps of {schedule!r}, which runs from "
            f"{schedule.timestep(schedule.t_min):g} to {schedule.timestep(1.0):g}; where these are not "
            f"linear in time use grids.from_sigmas, or give times to Grid."
        )
    return Grid(schedule, torch.cat([times, times.new_tensor([end])]))


def from_sigmas(schedule: Schedule, sigmas: Sequence[Number] | Num[Tensor, "N"]) -> Grid:
    """The grid of falling ratios sigma/alpha, as k-diffusion keeps them; a last 0 is the data.

    >>> from gendiff.math.schedules import Rectified
    >>> from_sigmas(Rectified(), [3.0, 1.0, 0.0]).times
    (0.75, 0.5, 0.0)
    """
    return Grid(schedule, _times_of(schedule, torch.as_tensor(sigmas, dtype=torch.float64)))


def _spaced(
    schedule: Schedule,
    steps: int,
    sigma_max: Number | None,
    sigma_min: Number | None,
    end: Number,
    forward: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Grid:
    """Ratios at equal distances after the map `forward`, which `inverse` undoes."""
    first, last = _ratios(schedule, sigma_max, sigma_min)
    ends = forward(torch.tensor([first, last], dtype=torch.float64))
    spaced = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, _positive(steps), dtype=torch.float64))
    return _from_ratios(schedule, inverse(spaced), end)


def _ratios(schedule: Schedule, sigma_max: Number | None, sigma_min: Number | None) -> tuple[Number, Number]:
    """The first and the last ratio sigma/alpha at which the network is evaluated."""
    ends = torch.tensor([1.0, schedule.t_min], dtype=torch.float64)
    noisiest, cleanest = numbers((-schedule.log_snr(ends) / 2).exp())
    first = noisiest if sigma_max is None else sigma_max
    last = cleanest if sigma_min is None else sigma_min
    if not 0 < last < first < math.inf:
        raise ValueError(
            f"the ratios sigma/alpha of a grid fall from a finite first to a positive last one, got {first} "
            f"and {last}; {schedule!r} reaches from {noisiest} to {cleanest}: give sigma_max and sigma_min "
            f"(or start and last) inside that."
        )
    return first, last


def _from_ratios(schedule: Schedule, ratios: Float64[Tensor, "N"], end: Number) -> Grid:
    times = _times_of(schedule, ratios)
    return Grid(schedule, torch.cat([times, times.new_tensor([end])]))


def _times_of(schedule: Schedule, ratios: Float64[Tensor, "N"]) -> Float64[Tensor, "N"]:
    """The times of ratios sigma/alpha; one that the schedule does not reach is an error, rounding apart."""
    noisiest = (-schedule.log_snr(1.0) / 2).exp()
    if bool((ratios > (1 + ROUNDING) * noisiest).any()):
        raise ValueError(
            f"{schedule!r} reaches the ratio sigma/alpha {noisiest:g} at t = 1, got {_shortened(ratios)}; "
            f"give ratios (sigma_max, sigmas) up to that."
        )
    return schedule.time(-2 * ratios.log())


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}.")
    return steps


def _size(schedule: Schedule, steps: int) -> int:
    size = schedule.size
    if size is None or not 1 <= steps <= size:
        raise ValueError(
            f"this spacing needs a table of N betas and 1 to N steps, got {schedule!r} and {steps} steps; "
            f"for a continuous schedule use grids.uniform, karras or uniform_log_snr."
        )
    return size


def _shortened(values: Float64[Tensor, "N"]) -> str:
    text = [f"{value:g}" for value in numbers(values)]
    return ", ".join(text if len(text) <= 8 else [*text[:4], "…", *text[-3:]])
