"""A page of images: where each one and its texts stand, in inches from the upper left corner.

matplotlib's own layouts would need axes for each image, which takes seconds for a few hundred of them, and
would not enlarge pixels evenly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gendiff.plot.figure import Picture
from gendiff.plot.text import height, width, wrap

DPI = 100  # lengths are whole pixels at it, so that small images are enlarged evenly
WIDEST = 11.0  # inches that the images of a row share, unless they are given a size
SMALLEST, LARGEST = 0.3, 2.4  # inches of an image
GAP, APART, EDGE = 0.04, 0.24, 0.08  # inches between images, between groups, and round the page
ALONE = 3.0  # inches that a title has at least
LABEL = 1.8  # inches that the label of a row has
NAME, CAPTION, TITLE = 10, 8, 12  # sizes of fonts, in points
MOST = 6  # lines of a caption


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Images that stand together, [B, H, W] or [B, H, W, 3], and which of them stand in each row."""

    pixels: NDArray[np.float32]
    rows: list[list[int]]
    captions: Sequence[str] | None

    @property
    def columns(self) -> int:
        """Images of the longest row."""
        return max(map(len, self.rows))


@final
@dataclass(eq=False)
class Page:
    """The layout, which is made when the page is, and the drawing.

    Args:
        groups: by name, which stands above them.
        labels: of the rows; empty for rows without labels.
        size: width of an image in inches, or None.
        title: above everything, or None.
    """

    groups: Mapping[str, Group]
    labels: Sequence[Any]
    size: float | int | None
    title: str | None
    axes: Axes = field(init=False)

    def __post_init__(self) -> None:
        self.names = [wrap(str(label), LABEL, NAME) for label in self.labels]
        widest = max((width(line, NAME) for lines in self.names for line in lines), default=0.0)
        self.left = _snapped(EDGE + (widest + 0.1 if self.names else 0))
        self.wide, self.high = self._cell()
        self.starts, x = {}, self.left
        for name, group in self.groups.items():
            self.starts[name] = x
            x += self._width(group) + APART
        self.right = x - APART + EDGE
        missing = _snapped((min(width(self.title or "", TITLE), ALONE) - (self.right - 2 * EDGE)) / 2)
        if missing > 0:  # a page of one small image has room for a title
            self.left, self.right = self.left + missing, self.right + 2 * missing
            self.starts = {name: start + missing for name, start in self.starts.items()}
        self.heads = {
            name: wrap(name, self._width(group) + APART / 2, NAME) for name, group in self.groups.items()
        }
        self.titles = wrap(self.title, self.right - 2 * EDGE, TITLE) if self.title else []
        self.captions = {
            name: {i: wrap(group.captions[i], self.wide, CAPTION, MOST) for row in group.rows for i in row}
            for name, group in self.groups.items()
            if group.captions is not None
        }

    def draw(self, cmap: str) -> Picture:
        """The page as a figure."""
        title = height(len(self.titles), TITLE) + (EDGE if self.titles else 0)
        head = height(max(map(len, self.heads.values())), NAME) + (GAP if any(self.heads.values()) else 0)
        tops = [_snapped(EDGE + title + head)]
        for row in range(max(len(group.rows) for group in self.groups.values())):
            tops.append(_snapped(tops[-1] + self._row_height(row) + GAP))
        figure = Picture(figsize=(self.right, tops[-1] - GAP + EDGE))
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.right), ylim=(tops[-1] - GAP + EDGE, 0))
        self.axes.set_axis_off()
        self._text(self.right / 2, EDGE, self.titles, TITLE, ha="center")
        for top, lines in zip(tops, self.names, strict=False):
            self._text(self.left - 0.1, top + self.high / 2, lines, NAME, ha="right", va="center")
        for name, group in self.groups.items():
            middle = self.starts[name] + self._width(group) / 2
            self._text(middle, tops[0] - GAP, self.heads[name], NAME, ha="center", va="bottom")
            for top, row in zip(tops, group.rows, strict=False):
                for place, i in enumerate(row):
                    x = self.starts[name] + place * (self.wide + GAP)
                    self._image(group.pixels[i], x, top, cmap)
                    lines = self.captions.get(name, {}).get(i, [])
                    self._text(x + self.wide / 2, top + self.high + GAP, lines, CAPTION, ha="center")
        return figure

    def _cell(self) -> tuple[float, float]:
        """Width and height of an image on the page; a small one is enlarged by a whole number."""
        high, wide = next(iter(self.groups.values())).pixels.shape[1:3]
        columns = sum(group.columns for group in self.groups.values())
        inches = self.size
        if inches is None:
            captioned = any(group.captions is not None for group in self.groups.values())
            best = max(0.7 + wide / 128, 1.3 if captioned else 0.0)
            gaps = (columns - 1) * GAP + (len(self.groups) - 1) * APART
            inches = max(SMALLEST, min(best, LARGEST, (WIDEST - self.left - gaps) / columns))
        times = inches * DPI / wide
        scale = (int(times) if times >= 1 else times) / DPI
        return wide * scale, _snapped(high * scale)

    def _width(self, group: Group) -> float:
        return _snapped(group.columns * (self.wide + GAP) - GAP)

    def _row_height(self, row: int) -> float:
        """Of the images with the longest caption in the row, or of its label where that is higher."""
        below = [
            len(texts[i])
            for name, texts in self.captions.items()
            for i in (self.groups[name].rows[row] if row < len(self.groups[name].rows) else ())
        ]
        caption = height(max(below), CAPTION) + 2 * GAP if any(below) else 0.0
        label = height(len(self.names[row]), NAME) if self.names else 0.0
        return max(self.high + caption, label)

    def _image(self, pixels: NDArray[np.float32], x: float, y: float, cmap: str) -> None:
        small = pixels.shape[1] <= self.wide * DPI
        self.axes.imshow(
            pixels,
            extent=(x, x + self.wide, y + self.high, y),
            aspect="auto",
            cmap=cmap,
            vmin=0,
            vmax=1,
            interpolation="nearest" if small else "auto",
        )

    def _text(self, x: float, y: float, lines: list[str], size: int, ha: str, va: str = "top") -> None:
        if lines:
            self.axes.text(
                x, y, "\n".join(lines), size=size, ha=ha, va=va, parse_math=False, multialignment=ha
            )


def _snapped(inches: float) -> float:
    return round(inches * DPI) / DPI
