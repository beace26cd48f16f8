"""Solvers that need nothing from before: DDPM, DDIM, Euler, Heun and the midpoint rule."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch

from gendiff._checks import unknown
from gendiff.math import ddpm
from gendiff.math.schedules import Level
from gendiff.sampling.churn import Churned
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import Combination, Plan, Spread, Stage


class OneStep(LinearSolver):
    """A method of one evaluation a step, at the time the samples are at."""

    evaluations: ClassVar[int] = 1

    @final
    def plan(self, path: Path) -> Plan:
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple((self.move(t, s),) for t, s in pairs)

    @abstractmethod
    def move(self, t: Point, s: Point) -> Stage:
        """The one evaluation of the step from t to s."""


@final
@dataclass(frozen=True, repr=False)
class Euler(Churned):
    r"""Euler's method for the probability-flow ODE :math:`dx = x_0\,d\alpha + \epsilon\,d\sigma`.

    .. math:: x_s = x_t + (\alpha_s - \alpha_t)\,\hat x_0 + (\sigma_s - \sigma_t)\,\hat\epsilon
                  = \alpha_s\,\hat x_0 + \sigma_s\,\hat\epsilon

    The second form, in which it is computed, is DDIM's: the two are one method. With alpha = 1 it is the
    Euler of Karras et al. 2022, with the rectified schedule that of flow matching.

    Args:
        churn, noise, ratio_min, ratio_max: noise added before a step, none by default; see `Churned`.

    >>> Euler().order, Euler(churn=40, ratio_min=0.05)
    (1, Euler(churn=40, ratio_min=0.05))
    """

    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def stages(self, path: Path, t: Point, x: Combination, s: Point) -> tuple[Stage, ...]:
        return (Stage(t, to(s), query=x),)


@final
@dataclass(frozen=True)
class DDIM(OneStep):
    r"""Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    .. math:: x_s = \alpha_s\,\hat x_0 + \sqrt{\sigma_s^2 - v}\;\hat\epsilon + \sqrt v\,z,
              \qquad v = \eta^2\tilde\beta

    with :math:`\tilde\beta` the variance of q(x_s | x_t, x0). `eta=0` is deterministic, and Euler's method;
    `eta=1` has the law of DDPM with its small variance.

    Args:
        eta: share of the posterior's standard deviation that is fresh noise, in [0, 1].

    >>> DDIM(eta=2.0)
    Traceback (most recent call last):
    ValueError: eta lies in [0, 1] (0 is deterministic, 1 is DDPM), got 2.0.
    """

    eta: float | int = 0.0
    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta lies in [0, 1] (0 is deterministic, 1 is DDPM), got {self.eta}.")

    def move(self, t: Point, s: Point) -> Stage:
        if self.eta == 0 or s.sigma == 0:
            return Stage(t, to(s))
        variance = self.eta**2 * float(transition(t, s).variance)
        kept = max(s.sigma**2 - variance, 0.0) ** 0.5
        return Stage(t, {"x0": s.alpha, "eps": kept, "noise": variance**0.5})


@final
@dataclass(frozen=True)
class DDPM(OneStep):
    r"""Ancestral sampling (Ho et al. 2020, algorithm 2), over any grid and any (alpha, sigma).

    .. math:: x_s = \tilde\mu(\hat x_0, x_t) + \sqrt v\,z,\qquad z = 0 \text{ at the data}

    Its `order` is that of the law it draws from: mean and variance are right to first order in the step.

    Args:
        variance: v of the step: one of the six names of `gendiff.math.ddpm.log_variance`. The learned ones
            read the network's variance channels (`Denoiser(..., learned_variance=True)`).
    """

    variance: ddpm.Variance = "fixed_small"
    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.variance not in get_args(ddpm.Variance):
            raise ValueError(unknown("variance", self.variance, get_args(ddpm.Variance)))

    def move(self, t: Point, s: Point) -> Stage:
        c = transition(t, s)
        mean = {"x0": float(c.x0), "x": float(c.x_t)}
        if s.sigma == 0:
            return Stage(t, mean)
        if self.variance == "learned" or self.variance == "learned_range":
            small, large = (_log_variance(kind, c) for kind in ("fixed_small", "fixed_large"))
            return Stage(t, mean | {"noise": 1.0}, spread=Spread(self.variance, small, large))
        return Stage(t, mean | {"noise": math.exp(_log_variance(self.variance, c) / 2)})


@final
@dataclass(frozen=True, repr=False)
class Heun(Churned):
    r"""Heun's method, the trapezoid rule, for :math:`dx = x_0\,d\alpha + \epsilon\,d\sigma`.

    .. math:: x_s = x_t + (\alpha_s-\alpha_t)\,\tfrac{\hat x_0 + \hat x_0'}2
                        + (\sigma_s-\sigma_t)\,\tfrac{\hat\epsilon + \hat\epsilon'}2

    where the primes are the answers at Euler's guess for x_s. With alpha = 1 this is algorithm 1 of Karras et
    al. 2022, and with churn algorithm 2; with the rectified schedule it is Heun's method of flow matching. A
    step to the data is Euler's, since nothing evaluates a network at sigma = 0.

    Noise of standard deviation 1 keeps the exact law, so that `order` is that of the law too.

    Args:
        churn, noise, ratio_min, ratio_max: noise added before a step, none by default; see `Churned`. Karras
            et al. use 40, 1.003, 0.05 and 50 for ImageNet.

    >>> Heun().order, Heun().evaluations
    (2, 2)
    """

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def stages(self, path: Path, t: Point, x: Combination, s: Point) -> tuple[Stage, ...]:
        return _trapezoid(t, x, s) if s.sigma else (Stage(t, to(s), query=x),)


@final
@dataclass(frozen=True, repr=False)
class DPM2(Churned):
    r"""DPM-Solver-2 (Lu et al. 2022, algorithm 1 at r = 1/2, in the form of Karras et al.'s code).

    The midpoint rule for :math:`d(x/\alpha) = \epsilon\,d\rho`, at the geometric mean of both ratios:

    .. math:: x_m = \alpha_m\,\hat x_0 + \sigma_m\,\hat\epsilon,\quad \rho_m = \sqrt{\rho_t\,\rho_s},
              \qquad x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s(\rho_s - \rho_t)\,\hat\epsilon_m

    Steps to the data and from alpha = 0, where that mean is an end, are Euler's.

    Args:
        churn, noise, ratio_min, ratio_max: noise added before a step, none by default; see `Churned`.

    >>> DPM2().order, DPM2().evaluations
    (2, 2)
    """

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def stages(self, path: Path, t: Point, x: Combination, s: Point) -> tuple[Stage, ...]:
        if not (s.sigma and s.alpha and t.alpha and t.sigma):
            return (Stage(t, to(s), query=x),)
        middle = path.between((t.log_ratio + s.log_ratio) / 2)
        guess = Stage(t, to(middle), keep={"x_t": x}, query=x)
        moved = along(t, s, {"eps": 1.0})
        return guess, Stage(middle, {"x_t": moved["x"], "eps": moved["eps"]})


def to(s: Point) -> Combination:
    """The sample at a level, of the pair; a step of Euler's method."""
    return {"x0": s.alpha, "eps": s.sigma}


def along(t: Point, s: Point, eps: Combination) -> Combination:
    r"""The sample at s, of that at t and a mean noise: :math:`y_s = y_t + (\rho_s-\rho_t)\,\bar\epsilon`.

    With y = x/alpha and rho = sigma/alpha the ODE is dy = eps·drho, so that this is exact for the mean over
    the step (Song et al. 2021, eq. 14; the transfer of Liu et al. 2022, eq. 11). Needs alpha > 0 at t.
    """
    factor = s.sigma - s.alpha * t.ratio
    return {"x": s.alpha / t.alpha} | {name: factor * weight for name, weight in eps.items()}


def transition(t: Point, s: Point) -> ddpm.Coefficients:
    """The law of x_s given x_t and x0."""
    return ddpm.transition(_level(t), _level(s))


def _level(point: Point) -> Level:
    alpha, sigma = torch.tensor([point.alpha, point.sigma], dtype=torch.float64)
    return Level(alpha, sigma)


def _log_variance(kind: ddpm.Variance, c: ddpm.Coefficients) -> float:
    return float(ddpm.log_variance(kind, c, torch.zeros(1, dtype=torch.float64)))


def _trapezoid(t: Point, x: Combination, s: Point) -> tuple[Stage, Stage]:
    """Half of the slope at either end; what the first evaluation says of it waits for the second."""
    d_alpha, d_sigma = (s.alpha - t.alpha) / 2, (s.sigma - t.sigma) / 2
    half = {"x0": d_alpha, "eps": d_sigma}
    guess = Stage(t, to(s), keep={"x_half": {**x, **half}}, query=x)
    return guess, Stage(s, {"x_half": 1.0, **half})
