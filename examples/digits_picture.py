"""The picture of `digits.py`: samples by class and guidance scale beside the loss by noise level."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

EACH, CELL, GAP = (
    4,
    9,
    5,
)  # images of a class in a column; pixels of one with a line beside it; between columns
PHASES = {"first tenth of training": (0.0, 0.1), "last quarter": (0.75, 1.0)}


def draw(path: Path, columns: Mapping[str, tuple[NDArray, NDArray]], log_snr: NDArray, loss: NDArray) -> None:
    """Write the picture.

    Args:
        path: of the PNG file.
        columns: by name, images [N, 1, 8, 8] in [0, 1] and their classes [N].
        log_snr: noise levels of the training samples, in the order of training.
        loss: their losses, without weights.
    """
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.1, 1])
    draw_images(left, columns)
    draw_losses(right, log_snr, loss)
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


def draw_losses(axes: Axes, log_snr: NDArray, loss: NDArray) -> None:
    """The mean loss in bins of log-SNR, early and late in training."""
    edges = np.arange(-10, 11)
    for name, phase in PHASES.items():
        first, last = (int(share * len(loss)) for share in phase)
        bins, part = np.digitize(log_snr[first:last], edges), loss[first:last]
        kept = np.flatnonzero(np.bincount(bins, minlength=len(edges))[1:-1] >= 20) + 1
        axes.plot(edges[kept] - 0.5, [part[bins == i].mean() for i in kept], marker=".", label=name)
    axes.set(xlabel="log-SNR (noise ← → data)", ylabel="squared error of v", title="loss by noise level")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
