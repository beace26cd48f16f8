"""Churn: noise that is added before a step, and taken out again by it (Karras et al. 2022, algorithm 2)."""

import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import final

from gendiff.math.numeric import Number
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import SAMPLE, Combination, Plan, Stage

LARGEST = math.sqrt(2) - 1  # the most by which a step may raise the noise: its variance doubles


@dataclass(frozen=True, repr=False)
class Churned(LinearSolver):
    r"""A method that may raise the noise of the samples before every step.

    With :math:`\rho = \sigma/\alpha` the ratio and N the steps of the grid, a step from t begins at the level
    of

    .. math:: \hat\rho = (1+\gamma)\,\rho_t,\qquad \gamma = \min(\text{churn}/N,\ \sqrt2 - 1), \qquad
              \hat x = \frac{\hat\alpha}{\alpha_t}\,x_t
                       + \hat\alpha\sqrt{\hat\rho^2-\rho_t^2}\;\text{noise}\;z

    which for alpha = 1 is Karras et al.'s. The network is given :math:`\hat x` at that level. Where it would
    lie above t = 1 it is that of t = 1, and less noise is added accordingly; none at alpha = 0, which is pure
    noise. With `churn` above N the noise does not fall with the steps, and neither does the error.

    Args:
        churn: S_churn, >= 0; 0 adds nothing, and the method is deterministic.
        noise: S_noise, the standard deviation of z, > 0; above 1 it makes up for a network that removes too
            much.
        ratio_min: S_tmin, the smallest ratio sigma/alpha at which noise is added.
        ratio_max: S_tmax, the largest one.

    Raises:
        ValueError: for numbers out of these ranges.
    """

    churn: Number = 0.0
    noise: Number = 1.0
    ratio_min: Number = 0.0
    ratio_max: Number = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.churn < math.inf and 0 < self.noise < math.inf):
            raise ValueError(
                f"churn is at least 0 (0 adds no noise) and noise above 0 (1 is the level's own), got "
                f"churn={self.churn} and noise={self.noise}."
            )
        if not 0 <= self.ratio_min <= self.ratio_max:
            raise ValueError(
                f"noise is added where sigma/alpha lies between ratio_min and ratio_max, 0 <= ratio_min <= "
                f"ratio_max, got {self.ratio_min} and {self.ratio_max}."
            )

    def __repr__(self) -> str:
        """The method with what was chosen other than by default."""
        changed = [
            f"{field.name}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    @final
    def plan(self, path: Path) -> Plan:
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple(self.stages(path, *self._stirred(path, t), s) for t, s in pairs)

    @abstractmethod
    def stages(self, path: Path, t: Point, x: Combination, s: Point) -> tuple[Stage, ...]:
        """The evaluations of the step from t, where the samples are the combination x, to s."""

    def _stirred(self, path: Path, t: Point) -> tuple[Point, Combination]:
        """Where a step begins, and what the samples are there."""
        gamma = min(self.churn / path.steps, LARGEST)
        if gamma == 0 or not t.alpha or not t.sigma or not self.ratio_min <= t.ratio <= self.ratio_max:
            return t, SAMPLE
        hat = path.between(t.log_ratio - math.log1p(gamma))
        added = hat.ratio**2 - t.ratio**2
        if added <= 0:  # t is the noisiest that the schedule has
            return t, SAMPLE
        return hat, {"x": hat.alpha / t.alpha, "noise": self.noise * hat.alpha * math.sqrt(added)}
