"""Ancestral steps: down by the ODE to less noise than is wanted, and up again by fresh noise."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final, get_args

from gendiff._checks import unknown
from gendiff.math.numeric import Number
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.onestep import along, to
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import Combination, Plan, Stage

Down: TypeAlias = Literal["variance", "flow"]


@dataclass(frozen=True)
class Ancestral(LinearSolver):
    r"""A method whose steps end in fresh noise.

    With :math:`\rho = \sigma/\alpha`, a step from t to s goes by the ODE to the ratio
    :math:`\rho_d = q\rho_s`, and by noise to s:

    .. math:: x_s = \alpha_s\,\frac{x_d}{\alpha_d} + \sigma_s\sqrt{1-q^2}\;\text{noise}\;z

    which keeps the law whatever q is, on variance-exploding, variance-preserving and flow schedules alike.

    Args:
        eta: how much of the noise is fresh, >= 0; 0 is the ODE.
        noise: standard deviation of z, > 0; 1 keeps the law.
        down: how `eta` says q. "variance": :math:`q^2 = 1 - \min(1, \eta^2(1-\rho_s^2/\rho_t^2))`, a share of
            the posterior's standard deviation as in DDIM (k-diffusion, diffusers). "flow": with
            :math:`f = \sigma/(\alpha+\sigma)` the time of a flow at the same ratio,
            :math:`f_d = f_s\,(1 - \eta(1 - f_s/f_t))` (rectified-flow form of ComfyUI and LTX). At 1 both are
            the reverse SDE to first order.

    Raises:
        ValueError: for numbers out of these ranges, or another name.
    """

    eta: Number = 1.0
    noise: Number = 1.0
    down: Down = "variance"

    def __post_init__(self) -> None:
        if not (0 <= self.eta < math.inf and 0 < self.noise < math.inf):
            raise ValueError(
                f"eta is at least 0 (0: the ODE) and noise above 0 (1: the level's own), got {self.eta} and "
                f"{self.noise}."
            )
        if self.down not in get_args(Down):
            raise ValueError(unknown("down", self.down, get_args(Down)))

    @final
    def share(self, t: Point, s: Point) -> float:
        """The share q of the noise of s that is not fresh."""
        if self.down == "variance":
            kept = (1 - self.eta**2) + (self.eta * s.ratio / t.ratio) ** 2  # summed so: exact at eta = 1
            return math.sqrt(max(0.0, kept))
        before, after = (point.sigma / (point.alpha + point.sigma) for point in (t, s))
        least = max(0.0, 1 - self.eta * (1 - after / before)) * after
        return least / (1 - least) * (1 - after) / after

    @final
    def fresh(self, s: Point, share: float) -> Combination:
        """What is added at the end of a step."""
        return {"noise": self.noise * s.sigma * math.sqrt(1 - share**2)} if share < 1 else {}


@final
@dataclass(frozen=True)
class EulerAncestral(Ancestral):
    r"""Euler's method with ancestral steps: :math:`x_s = \alpha_s\hat x_0 + q\sigma_s\hat\epsilon + …z`.

    With `noise=1` and `down="variance"` it is `DDIM(eta)`; the two names are for one method.

    Args:
        eta, noise, down: how much noise is fresh; see `Ancestral`.

    >>> EulerAncestral(eta=-1.0)
    Traceback (most recent call last):
    ValueError: eta is at least 0 (0: the ODE) and noise above 0 (1: the level's own), got -1.0 and 1.0.
    """

    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def plan(self, path: Path) -> Plan:
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple((self._stage(t, s),) for t, s in pairs)

    def _stage(self, t: Point, s: Point) -> Stage:
        if s.sigma == 0:
            return Stage(t, to(s))
        share = self.share(t, s)
        return Stage(t, {"x0": s.alpha, "eps": share * s.sigma, **self.fresh(s, share)})


@final
@dataclass(frozen=True)
class DPM2Ancestral(Ancestral):
    r"""`DPM2` with ancestral steps.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t}x_t + (q\sigma_s - \alpha_s\rho_t)\,\hat\epsilon_m
                    + \sigma_s\sqrt{1-q^2}\;\text{noise}\;z, \qquad \rho_m = \sqrt{\rho_t\,q\rho_s}

    Its law has the order of the ODE step, since fresh noise adds no error. Steps to the data and from alpha =
    0 are Euler's.

    Args:
        eta, noise, down: how much noise is fresh; see `Ancestral`.

    >>> DPM2Ancestral().order
    2
    """

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def plan(self, path: Path) -> Plan:
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple(self._stages(path, t, s) for t, s in pairs)

    def _stages(self, path: Path, t: Point, s: Point) -> tuple[Stage, ...]:
        if s.sigma == 0:
            return (Stage(t, to(s)),)
        share = self.share(t, s)
        down = Point(s.t, s.alpha, share * s.sigma)  # the ODE's end, in units in which alpha is that of s
        if share == 0 or not t.alpha:
            return (Stage(t, {**to(down), **self.fresh(s, share)}),)
        middle = path.between((t.log_ratio + down.log_ratio) / 2)
        moved = along(t, down, {"eps": 1.0})
        ends = {"x": moved["x"], **self.fresh(s, share)}  # all of x_s that needs no second evaluation
        guess = Stage(t, to(middle), keep={"x_end": ends})
        return guess, Stage(middle, {"x_end": 1.0, "eps": moved["eps"]})
