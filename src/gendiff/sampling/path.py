"""What a solver knows of a grid: the level at every point, as numbers in float64 on the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

from gendiff.math.grids import Grid
from gendiff.math.numeric import numbers


class Point(NamedTuple):
    """A time and its level; what stands for `t` in a query is up to whoever made the path."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """Noise to signal, sigma/alpha; infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_ratio(self) -> float:
        r"""Half the log-SNR, :math:`\lambda = \log(\alpha/\sigma)` (Lu et al. 2022, section 3.1)."""
        if not self.alpha or not self.sigma:
            return -math.inf if not self.alpha else math.inf
        return math.log(self.alpha) - math.log(self.sigma)


@final
@dataclass(frozen=True, eq=False)
class Path:
    """The points of a grid from the noise down, and a way to points between them.

    Attributes:
        points: at every time of the grid.
        between: the point of a given half log-SNR, for methods that evaluate the network inside a step.

    >>> from gendiff.math import Rectified, grids
    >>> path = Path.of(grids.uniform(Rectified(), 2))
    >>> path.steps, path.points[1], path.between(0.0)
    (2, Point(t=0.5, alpha=0.5, sigma=0.5), Point(t=0.5, alpha=0.5, sigma=0.5))
    """

    points: tuple[Point, ...]
    between: Callable[[float], Point]

    @property
    def steps(self) -> int:
        """Number of steps; one less than that of points."""
        return len(self.points) - 1

    @classmethod
    def of(cls, grid: Grid) -> "Path":
        """The path of all times of a grid, also those before and after a part of it."""
        whole = grid.whole
        points = tuple(map(Point, numbers(whole.t), *map(numbers, whole.levels)))

        def between(log_ratio: float) -> Point:
            t = grid.schedule.time(2 * log_ratio)
            return Point(float(t), *map(float, grid.schedule.level(t)))

        return cls(points, between)
