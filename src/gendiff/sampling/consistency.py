"""Steps of consistency models: x0 in one evaluation, and fresh noise up to the next level."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from gendiff.math.numeric import Number
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.lookup import point_at
from gendiff.sampling.onestep import OneStep, to
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import Plan, Stage


@final
@dataclass(frozen=True)
class LCM(OneStep):
    r"""Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023, algorithm 3).

    .. math:: f = c_\text{skip}\,x_t + c_\text{out}\,\hat x_0, \qquad x_s = \alpha_s f + \sigma_s z

    with the boundary condition f(x, start) = x by (Luo et al. 2023, appendix C)

    .. math:: \tau = \text{scale}\,(t - \text{start}), \qquad c_\text{skip} = \frac{d^2}{\tau^2+d^2}, \qquad
              c_\text{out} = \frac{\tau}{\sqrt{\tau^2+d^2}}

    A consistency function draws from the exact law in any number of steps. With another network it is no
    integrator, which is why its `order` is 0. On the rectified schedule with `scale=inf` it is the stochastic
    sampling of flow models.

    Args:
        scale: of the boundary condition, per unit of time, > 0. The default is ten times the timestep of a
            table of a thousand, as latent consistency models are trained; inf is f = x0.
        start: time at which f(x) = x: that of timestep 0.
        std: d, standard deviation of the data in it, > 0.

    Raises:
        ValueError: for numbers out of these ranges.

    >>> LCM().order
    0
    """

    scale: Number = 10_000.0
    start: Number = 1e-3
    std: Number = 0.5
    order: ClassVar[int] = 0
    start_order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and 0 <= self.start < math.inf and 0 < self.std < math.inf):
            raise ValueError(
                f"the boundary condition has a positive scale (inf turns it off), a start of at least 0 and "
                f"a positive std, got scale={self.scale}, start={self.start} and std={self.std}."
            )

    def move(self, t: Point, s: Point) -> Stage:
        tau = self.scale * max(t.t - self.start, 0.0) if self.scale < math.inf else math.inf
        out = 1.0 if tau == math.inf else tau / math.hypot(tau, self.std)
        skip = (self.std / math.hypot(tau, self.std)) ** 2
        return Stage(t, {"x0": s.alpha * out, "x": s.alpha * skip, "noise": s.sigma})


@final
@dataclass(frozen=True)
class TCD(LinearSolver):
    r"""Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    .. math:: x_{s'} = \alpha_{s'}\hat x_0 + \sigma_{s'}\hat\epsilon, \qquad s' = (1-\gamma)\,s, \qquad
              x_s = \frac{\alpha_s}{\alpha_{s'}}\,x_{s'}
                    + \alpha_s\sqrt{\rho_s^2 - \rho_{s'}^2}\; z, \qquad \rho = \sigma/\alpha

    It jumps past s by a share of the time that is left, whatever the step, which a trajectory function can;
    with another network it is no integrator, and its `order` is 0. `gamma=0` is DDIM.

    Args:
        gamma: share of the time of s that is gone back by noise, in [0, 1] (`eta` in diffusers).
        start: time that shares count from: that of timestep 0, 1/N in a table of N.
        grain: times s' are rounded down to multiples of it above `start`; 0 does not round. diffusers rounds
            to whole timesteps: 1/N.

    Raises:
        ValueError: for numbers out of these ranges.

    >>> TCD(gamma=1.5)
    Traceback (most recent call last):
    ValueError: gamma lies in [0, 1] (0: DDIM), start and grain are at least 0, got 1.5, 0.001 and 0.0.
    """

    gamma: Number = 0.3
    start: Number = 1e-3
    grain: Number = 0.0
    order: ClassVar[int] = 0
    start_order: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.start < math.inf and 0 <= self.grain < math.inf):
            raise ValueError(
                f"gamma lies in [0, 1] (0: DDIM), start and grain are at least 0, got {self.gamma}, "
                f"{self.start} and {self.grain}."
            )

    def plan(self, path: Path) -> Plan:
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple((self._stage(path, t, s),) for t, s in pairs)

    def _stage(self, path: Path, t: Point, s: Point) -> Stage:
        left = (1 - self.gamma) * (s.t - self.start)
        if self.grain:
            left = self.grain * math.floor(left / self.grain * (1 + 1e-12) + 1e-9)
        if s.sigma == 0 or self.gamma == 0 or self.start + left >= s.t:
            return Stage(t, to(s))
        ratio = point_at(path, self.start + left, s).ratio
        fresh = s.alpha * math.sqrt(max(s.ratio**2 - ratio**2, 0.0))
        return Stage(t, {"x0": s.alpha, "eps": s.alpha * ratio, "noise": fresh})
