"""The point of a time between those of a path."""

from gendiff.math.numeric import Number
from gendiff.sampling.path import Path, Point

NOISIEST, CLEANEST = -40.0, 40.0  # half log-SNRs at which a float64 sees no more signal, or no more noise


def point_at(path: Path, t: Number, noisier: Point) -> Point:
    """The point of a time below that of a point of the path, by bisection: its time falls as its SNR rises.

    Args:
        path: the path.
        t: the time, in whatever units the path has.
        noisier: a point at a later time.

    Returns:
        The noisiest point whose time is at most t; exactly the data where there is none.

    >>> from gendiff.math import Rectified, grids
    >>> path = Path.of(grids.uniform(Rectified(), 2))
    >>> round(point_at(path, 0.25, path.points[0]).alpha, 12)
    0.75
    """
    low = high = max(noisier.log_ratio, NOISIEST)
    width = 1.0
    while path.between(high).t > t:
        if high >= CLEANEST:
            return Point(float(t), 1.0, 0.0)
        low, high, width = high, min(high + width, CLEANEST), 2 * width
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if path.between(middle).t > t else (low, middle)
    return path.between(high)
