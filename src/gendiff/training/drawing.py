"""Small curves as SVG, for a notebook: a few hundred points at most, on a light or a dark page."""

import math
from collections.abc import Sequence
from typing import final

from gendiff.training.wording import count

Number = float | int
Point = tuple[Number, Number]

ACCENT = "#3b82f6"  # seen on white and on black; everything else has the colour of the page's text
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 38  # margins of a chart, in its pixels
RATIO = 20.0  # of highest to lowest, from which on an axis is logarithmic


@final
class Curve:
    """A series of which at most `limit` points are kept: means over equally many values each.

    What is not finite is left out.

    Args:
        limit: of the points, even.

    >>> curve = Curve(limit=4)
    >>> for step in range(1, 7):
    ...     curve.add(step, float(step))
    >>> curve.points()
    [(2, 1.5), (4, 3.5), (6, 5.5)]
    """

    def __init__(self, limit: int = 300) -> None:
        self._limit, self._each = limit, 1
        self._whole: list[Point] = []
        self._part: list[Point] = []

    def add(self, x: Number, y: Number) -> None:
        if not math.isfinite(y):
            return
        self._part.append((x, y))
        if len(self._part) == self._each:
            self._whole.append(_mean(self._part))
            self._part = []
        if len(self._whole) == self._limit:
            self._whole = [_mean(self._whole[i : i + 2]) for i in range(0, self._limit, 2)]
            self._each *= 2

    def points(self) -> list[Point]:
        """The points, the last of which may stand for fewer values."""
        return [*self._whole, *([_mean(self._part)] if self._part else [])]


def smooth(points: Sequence[Point], share: Number = 0.03) -> list[Point]:
    """A running mean over both sides, with weights that fall by 1/e over this share of the points.

    m_i = Σ_j b^|i-j|·y_j / Σ_j b^|i-j|.

    >>> smooth([(1, 2.0), (2, 4.0)])  # too few to smooth
    [(1, 2.0), (2, 4.0)]
    """
    b = math.exp(-1 / (share * len(points))) if share * len(points) >= 1 else 0.0
    values = [y for _, y in points]
    before, after = _decaying(values, b), _decaying(values[::-1], b)[::-1]
    return [
        (x, (p + q - y) / (u + v - 1)) for (x, y), (p, u), (q, v) in zip(points, before, after, strict=True)
    ]


def chart(title: str, points: Sequence[Point], size: tuple[int, int], *, smoothed: bool, zero: bool) -> str:
    """An SVG of the points over the step.

    Args:
        title: above it; plain text that needs no escaping.
        points: (step, value); with fewer than two it is empty.
        size: (width, height) in pixels.
        smoothed: draw the running mean strongly and the points faintly.
        zero: let the axis begin at 0, rather than choose it, and a logarithmic one, from the points.
    """
    if len(points) < 2:
        return ""
    width, height = size
    inner = width - LEFT - RIGHT, height - TOP - BOTTOM
    low, high, log = _range([y for _, y in points], zero)
    first, last = points[0][0], points[-1][0]

    def place(point: Point) -> str:
        x, y = (point[0] - first) / (last - first or 1), _share(point[1], low, high, log)
        return f"{x * inner[0]:.1f},{(1 - y) * inner[1]:.1f}"

    parts = [_text(LEFT, 14, title, "start", bold=True)]
    for y in _log_ticks(low, high) if log else ticks(low, high):
        at = TOP + (1 - _share(y, low, high, log)) * inner[1]
        parts.append(_rule(LEFT, at, width - RIGHT, at, 0.15))
        parts.append(_text(LEFT - 6, at + 4, _tick(y, high), "end"))
    for x in ticks(first, last, inner[0] // 60, whole=True):
        at = LEFT + (x - first) / (last - first or 1) * inner[0]
        parts.append(_rule(at, height - BOTTOM, at, height - BOTTOM + 4, 0.5))
        parts.append(_text(min(at, width - RIGHT - 12), height - BOTTOM + 16, count(round(x)), "middle"))
    parts.append(_text(LEFT + inner[0] / 2, height - 6, "step", "middle"))
    parts.append(_rule(LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM, 0.5))
    lines = [(points, 0.4, 1.0), (smooth(points), 1.0, 2.0)] if smoothed else [(points, 1.0, 2.0)]
    drawn = "".join(
        f'<polyline points="{" ".join(map(place, line))}" fill="none" stroke="{ACCENT}" '
        f'stroke-opacity="{opacity}" stroke-width="{stroke}" stroke-linejoin="round"/>'
        for line, opacity, stroke in lines
    )
    parts.append(f'<svg x="{LEFT}" y="{TOP}" width="{inner[0]}" height="{inner[1]}">{drawn}</svg>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="11" '
        f'style="max-width: 100%; background: transparent" aria-label="{title}">{"".join(parts)}</svg>'
    )


def ticks(low: Number, high: Number, most: int = 6, *, whole: bool = False) -> list[Number]:
    """Round numbers of a linear axis.

    Args:
        low: end of the axis.
        high: its other end.
        most: of the intervals between them, >= 2.
        whole: whole numbers only.

    >>> ticks(0.0, 1.0), ticks(3, 1000, whole=True), ticks(1, 2, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [200, 400, 600, 800, 1000], [1, 2])
    """
    exponent = math.floor(math.log10((high - low) / most or 1))
    digit = next(d for d in (1, 2, 5, 10) if d * 10.0**exponent * most >= (high - low) * (1 - 1e-9))
    step = digit * 10.0**exponent
    step = max(1, round(step)) if whole else step
    begin, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step if whole else round(n * step, max(0, -exponent)) for n in range(begin, end + 1)]


def _decaying(values: Sequence[Number], b: Number) -> list[Point]:
    """Σ_j b^(i-j)·y_j and Σ_j b^(i-j) over j <= i."""
    total, weight, result = 0.0, 0.0, []
    for y in values:
        total, weight = b * total + y, b * weight + 1
        result.append((total, weight))
    return result


def _log_ticks(low: Number, high: Number) -> list[Number]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        found = [d * 10.0**e for e in decades if e % every == 0 for d in digits if low <= d * 10.0**e <= high]
        if len(found) <= 6:
            return found
    return [low, high]


def _range(values: Sequence[Number], zero: bool) -> tuple[Number, Number, bool]:
    """Ends of the axis, and whether it is logarithmic; one value in a hundred may lie outside."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[-1 - cut]
    if zero:
        return min(0.0, low), 1.1 * high if high > 0 else 1.0, False
    if low > 0 and high / low > RATIO:
        return low / 1.1, high * 1.1, True
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin, False


def _share(y: Number, low: Number, high: Number, log: bool) -> Number:
    if log:
        return math.log(max(y, low / high * low) / low) / math.log(high / low)
    return (y - low) / (high - low)


def _mean(points: Sequence[Point]) -> Point:
    return points[-1][0], sum(y for _, y in points) / len(points)


def _tick(value: Number, high: Number) -> str:
    if 1e-3 <= high < 1e6 or value == 0:
        return f"{value:,.6g}" if value < 1000 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def _text(x: Number, y: Number, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ' fill-opacity="0.75"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{weight}>{text}</text>'


def _rule(x1: Number, y1: Number, x2: Number, y2: Number, opacity: Number) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'
