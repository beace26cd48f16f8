"""Samples side by side: rows by label, columns by method, every pixel as it is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gendiff._checks import unknown
from gendiff.plot.figure import Array, Picture
from gendiff.plot.page import Group, Page

Labels: TypeAlias = Array | Sequence[str | int]
T = TypeVar("T")

ROUNDING = 1e-3  # pixels this far outside [0, 1] are rounding, as of bfloat16


def sample_grid(
    images: Array | Mapping[str, Array],
    rows: Labels | Mapping[str, Labels] | None = None,
    columns: int | None = None,
    captions: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    size: float | int | None = None,
    cmap: str = "gray",
    title: str | None = None,
) -> Picture:
    """Draw images in a grid, or several named sets of images side by side.

    The same place in two sets is the same row and column, so that what started from one noise can be
    compared.

    Args:
        images: [B, C, H, W] in [0, 1] with C = 1 or 3, or named sets of such images.
        rows: a label for each image; images of one label stand in one row that is called so. Numbers are
            sorted, texts stand in the order in which they come. A mapping gives every set its own labels.
        columns: images in a row of a set. With `rows`, what a label has beyond them is left out; by default
            nothing is, and without `rows` a picture is about as wide as high.
        captions: a text under each image, wrapped; beyond six lines it is cut off with "…".
        size: width of an image in inches; by default what the page has room for.
        cmap: colour map of images with one channel; "gray_r" is ink on paper.
        title: above everything.

    Returns:
        A figure with one `AxesImage` for each image drawn, row by row within a set.

    Raises:
        ValueError: for no image, a shape that is none of images, pixels outside [0, 1], or labels and
            captions that are more or fewer than the images.

    >>> import torch
    >>> sets = {"data": torch.zeros(4, 1, 8, 8), "samples": torch.ones(4, 1, 8, 8)}
    >>> picture = sample_grid(sets, rows=[0, 0, 1, 1])
    >>> len(picture.axes[0].images)
    8
    """
    several = images if isinstance(images, Mapping) else {"": images}
    if not several:
        raise ValueError("there is no set of images to draw; give {name: images}.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is a number of images >= 1, got {columns}.")
    if size is not None and not 0 < size < math.inf:
        raise ValueError(f"size is the width of an image in inches, > 0, got {size}.")
    pixels = {name: _pixels(value, name) for name, value in several.items()}
    if len({one.shape[1:3] for one in pixels.values()}) > 1:
        shapes = {name: one.shape[1:3] for name, one in pixels.items()}
        raise ValueError(f"images side by side have one height and width, got {shapes}; resize them first.")
    labels = {name: _names(one) for name, one in _of_each("rows", rows, pixels).items()}
    texts = {name: list(map(str, one)) for name, one in _of_each("captions", captions, pixels).items()}
    names = _order(labels.values())
    places = _by_label(labels, names, columns) if labels else _in_turn(pixels, columns)
    groups = {name: Group(one, places[name], texts.get(name)) for name, one in pixels.items()}
    return Page(groups, names, size, title).draw(cmap)


def _pixels(images: Array, name: str) -> NDArray[np.float32]:
    """Images as matplotlib has them, checked."""
    called = f"the images {name!r}" if name else "images"
    kind = str(images.dtype)
    pixels = images.detach().float().cpu().numpy() if isinstance(images, Tensor) else images
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"{called} are [B, C, H, W] with B >= 1 and C = 1 or 3, got {tuple(pixels.shape)}; latents are "
            f"decoded first, and a single image is image[None]."
        )
    if "float" not in kind:
        raise ValueError(f"{called} are numbers in [0, 1], got {kind}; divide pixels of 0 … 255 by 255.")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"pixels of {called} lie in [0, 1], got {low:g} … {high:g}; x0 of a network is in [-1, 1] or a "
            f"latent: give codec.decode(x0), or (x0 / 2 + 0.5).clamp(0, 1)."
        )
    pixels = pixels.astype(np.float32).clip(0, 1)
    return pixels[:, 0] if pixels.shape[1] == 1 else np.moveaxis(pixels, 1, -1)


def _of_each(
    what: str, given: Labels | Mapping[str, Labels] | None, pixels: Mapping[str, NDArray]
) -> dict[str, Labels]:
    """Labels or captions of every set; those that are given once hold for all."""
    if given is None:
        return {}
    each = dict(given) if isinstance(given, Mapping) else dict.fromkeys(pixels, given)
    for name in each:
        if name not in pixels:
            raise ValueError(unknown(f"set of images in {what}", name, pixels))
    for name, images in pixels.items():
        if name not in each:
            raise ValueError(
                f"{what} has nothing for the images {name!r}; give them to every set or to none."
            )
        if isinstance(each[name], str) or len(each[name]) != len(images):
            count = "a single text" if isinstance(each[name], str) else f"{len(each[name])}"
            raise ValueError(f"{what} has one entry for each of the {len(images)} images, got {count}.")
    return each


def _names(labels: Labels) -> list[str | int | float]:
    """Labels as Python's numbers and texts."""
    return labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)


def _order(labels: Iterable[list[T]]) -> list[T]:
    """The different labels, sorted where all are numbers."""
    found = list(dict.fromkeys(label for one in labels for label in one))
    return found if any(isinstance(label, str) for label in found) else sorted(found)  # type: ignore[type-var]


def _by_label(
    labels: Mapping[str, list[T]], names: Sequence[T], columns: int | None
) -> dict[str, list[list[int]]]:
    """Row by row, the images that have its label."""
    return {
        name: [[i for i, label in enumerate(one) if label == row][:columns] for row in names]
        for name, one in labels.items()
    }


def _in_turn(pixels: Mapping[str, NDArray], columns: int | None) -> dict[str, list[list[int]]]:
    """Row by row, the images as they come."""
    if columns is None:
        count = max(len(one) for one in pixels.values())
        high, wide = next(iter(pixels.values())).shape[1:3]
        square = math.ceil(math.sqrt(count * high / (wide * len(pixels))))
        fits = (n for n in range(square, 2 * square) if count % n == 0)  # no row is then left half empty
        columns = min(next(fits, square), count)
    return {
        name: [list(range(i, min(i + columns, len(one)))) for i in range(0, len(one), columns)]
        for name, one in pixels.items()
    }
