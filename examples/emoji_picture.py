"""The picture of the emoji example: training prompts and held-out pairs, real images over samples."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

COLUMNS = 12
CREDIT = "Real images: OpenMoji (openmoji.org), CC BY-SA 4.0; samples of a network trained on them likewise"
GRID = {"left": 0.01, "right": 0.99, "wspace": 0.1, "hspace": 0.12}
RIGHT, WRONG = "#2a7a2a", "#c02020"


def draw(
    path: Path,
    prompts: Mapping[str, tuple[Tensor, Tensor]],
    held: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]],
) -> None:
    """Write the picture.

    Args:
        path: of the PNG file.
        prompts: by caption, the real image and a sample, [3, S, S] in [0, 1] each.
        held: by caption, the real image, samples [n, 3, S, S], and which have the right shape [n] and the
            right colour [n]; the first four samples are shown.
    """
    rows = -(-len(prompts) // COLUMNS)
    figure = Figure(figsize=(11.5, 2.1 * rows + 5.3), facecolor="white")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.1 * rows + 0.5, 4.8]).flat
    top.suptitle("Training prompts: real, and a sample below it", fontsize=10)
    grid = GRID | {"height_ratios": [1, 1, 0.3] * rows, "top": 0.93, "bottom": 0.02}  # real, sample, caption
    cells = top.subplots(3 * rows, COLUMNS, squeeze=False, gridspec_kw=grid)
    blank(cells)
    for place, (caption, images) in enumerate(prompts.items()):
        row, column = divmod(place, COLUMNS)
        for below, image in enumerate(images):
            show(cells[3 * row + below, column], image)
        cells[3 * row + 2, column].text(0.5, 1, wrapped(caption), fontsize=6.5, ha="center", va="top")
    draw_held(bottom, held)
    figure.savefig(path, dpi=90)


def draw_held(figure: SubFigure, held: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """A column a pair: real, four samples with what is right of each, and the shares over all samples."""
    figure.suptitle("Held out from training: real, and four samples below it", fontsize=10)
    cells = figure.subplots(5, len(held), squeeze=False, gridspec_kw=GRID | {"top": 0.89, "bottom": 0.13})
    blank(cells)
    for column, (caption, (real, samples, shape, colour)) in zip(cells.T, held.items(), strict=True):
        show(column[0], real)
        column[0].set_title(caption, fontsize=9, pad=3)
        for axes, image, *right in zip(column[1:], samples, shape.tolist(), colour.tolist(), strict=False):
            show(axes, image)
            for x, name, good in zip((1.05, 1.25), ("shape", "colour"), right, strict=True):
                text, tint = f"{name} {'✓' if good else '✗'}", RIGHT if good else WRONG
                style = {"fontsize": 7, "rotation": 90, "va": "center", "transform": axes.transAxes}
                axes.text(x, 0.5, text, color=tint, **style)
        count, parts = len(samples), {"shape": shape, "colour": colour}
        shares = "\n".join(f"{n} {right.float().mean():.0%} of {count}" for n, right in parts.items())
        column[-1].set_xlabel(shares, fontsize=8)
    figure.text(0.5, 0.02, CREDIT, fontsize=7, ha="center", color="0.35")


def blank(cells: np.ndarray) -> None:
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")


def wrapped(caption: str) -> str:
    """At most two lines of about 16 letters."""
    return "\n".join(textwrap.wrap(caption, 17, max_lines=2, placeholder=" …"))
