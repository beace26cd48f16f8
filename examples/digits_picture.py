"""The picture of `digits.py`: samples by class and guidance scale beside the loss by noise level."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

EACH, CELL, GAP = (
    4,
    9,
    5,
)  # images of a class in a column; pixels of one with a line beside it; between columns
LEVELS = np.arange(-9.5, 10)  # the middles of the levels that the trainer sums its losses by
Rows = Sequence[Mapping[str, Any]]
PHASES = {"first tenth of training": (0.0, 0.1), "last quarter": (0.75, 1.0)}


def draw(path: Path, columns: Mapping[str, tuple[NDArray, NDArray]], rows: Rows) -> None:
    """Write the picture.

    Args:
        path: of the PNG file.
        columns: by name, images [N, 1, 8, 8] in [0, 1] and their classes [N].
        rows: of the training log, with the losses by noise level.
    """
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.1, 1])
    draw_images(left, columns)
    draw_losses(right, rows)
    figure.savefig(path, dpi=120)


def draw_images(axes: Axes, columns: Mapping[str, tuple[NDArray, NDArray]]) -> None:
    """Rows are classes; the same place in two columns of samples started from the same noise."""
    width = EACH * CELL + GAP
    canvas = np.full((10 * CELL, len(columns) * width - GAP), np.nan)
    for column, (images, labels) in enumerate(columns.values()):
        for digit in range(10):
            for place, image in enumerate(images[labels == digit][:EACH]):
                y, x = digit * CELL, column * width + place * CELL
                canvas[y : y + 8, x : x + 8] = image[0]
    axes.imshow(canvas, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([column * width + EACH * CELL / 2 - 1 for column in range(len(columns))], list(columns))
    axes.set_yticks([digit * CELL + 3.5 for digit in range(10)], [str(digit) for digit in range(10)])
    axes.set(ylabel="class asked for")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_losses(axes: Axes, rows: Rows) -> None:
    """The mean loss by log-SNR, early and late in training."""
    for name, (first, last) in PHASES.items():
        part = rows[int(first * len(rows)) : max(1, round(last * len(rows)))]
        loss, count = (
            np.sum([row["levels"][key] for row in part], axis=0)[1:-1] for key in ("loss", "count")
        )
        kept = count >= 20
        axes.plot(LEVELS[kept], loss[kept] / count[kept], marker=".", label=name)
    axes.set(xlabel="log-SNR (noise ← → data)", ylabel="squared error of v", title="loss by noise level")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
