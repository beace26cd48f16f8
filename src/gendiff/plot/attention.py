"""Attention maps: where in the image each word is seen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from torch import Tensor

from gendiff._checks import unknown
from gendiff.attention.capture import Capture
from gendiff.attention.handle import Handle
from gendiff.plot.figure import Array, Picture, picture
from gendiff.plot.images import _pixels

Words: TypeAlias = Sequence[str] | Mapping[str, Sequence[int]]

SMOOTH = "gaussian"  # has no negative weights, which would make transparent parts coloured
SMOOTH = "gaussian"  # without negative weights, which would tint what is transparent
FAINT, STRONG = 0.1, 0.8  # how much the lowest and the highest value cover the image
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601's luma, as in PIL's convert("L")


def attention(
    maps: Capture | Handle | Array,
    image: Any = None,
    words: Words | None = None,
    *,
    shared: bool = False,
    columns: int | None = None,
    cmap: str = "inferno",
    title: str | None = None,
) -> Picture:
    """Draw attention maps, a panel for each word or token, over the image where there is one.

    Args:
        maps: [N, H, W], or the `Capture` that gathered them, or its handle.
        image: what they lie over, in grey, so that all colour is the map's: of PIL, or [C, H, W] in [0, 1]
            with C = 1 or 3; None is the maps alone.
        words: what the maps are called, in their order; or which of a Capture's words are drawn; or for each
            word the places of its tokens in the text, whose mean is drawn. None draws all.
        shared: whether all panels have one scale and a colour bar, so that their colours can be compared. If
            not, each goes from its lowest to its highest value, which stand below it.
        columns: panels in a row; by default at most six.
        cmap: colour map.
        title: above everything.

    Returns:
        A figure with an axes for each map, whose last `AxesImage` has the map's numbers.

    Raises:
        TypeError: for what has no maps.
        ValueError: for a shape that is none of maps, numbers that are not finite, or words that are more,
            fewer or others than the maps.

    >>> import torch
    >>> drawn = attention(torch.rand(2, 8, 8), words=["cat", "hat"])
    >>> [axes.get_title() for axes in drawn.axes]
    ['cat', 'hat']
    """
    named = _named(maps, words)
    pixels = None if image is None else _of_image(image)
    count = len(named)
    columns = min(columns or _columns(count), count)
    rows = math.ceil(count / columns)
    high, wide = next(iter(named.values())).shape if pixels is None else pixels.shape
    room = 2.3 * min(2.0, max(0.5, high / wide)) + 0.55
    figure = picture(2.4 * columns + (0.8 if shared else 0.1), room * rows + (0.4 if title else 0), title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    every = np.stack(list(named.values()))
    for axes, (word, one) in zip(panels, named.items(), strict=False):
        scale = Normalize(*_limits(every if shared else one))
        _draw(axes, one, pixels, scale, cmap)
        axes.set_title(word, fontsize=11, parse_math=False)
        if not shared:
            axes.set_xlabel(f"{one.min():.2g} … {one.max():.2g}", fontsize=8)
    for axes in panels[count:]:
        axes.remove()
    if shared:
        bar = ScalarMappable(Normalize(*_limits(every)), cmap)
        figure.colorbar(bar, ax=list(panels[:count]), label="attention", shrink=0.8)
    return figure


def _draw(axes: Axes, one: NDArray, pixels: NDArray | None, scale: Normalize, cmap: str) -> None:
    high, wide = one.shape if pixels is None else pixels.shape
    extent = (0, wide, high, 0)
    cover: Any = None
    if pixels is not None:
        axes.imshow(pixels, "gray", vmin=0, vmax=1, extent=extent)
        cover = FAINT + (STRONG - FAINT) * np.clip(scale(one).filled(0), 0, 1)
    axes.imshow(one, cmap, scale, alpha=cover, interpolation=SMOOTH, extent=extent, aspect="equal")
    axes.set(xticks=[], yticks=[])


def _columns(count: int) -> int:
    """Panels in a row: up to four in one, else so many that no row is left half empty, where that can be."""
    if count <= 4:
        return count
    square = math.ceil(math.sqrt(count))
    return min(6, next((n for n in range(square, square + 3) if count % n == 0), square))


def _limits(values: NDArray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1)


def _named(maps: Capture | Handle | Array, words: Words | None) -> dict[str, NDArray[np.float64]]:
    """The maps that are drawn, by what they are called."""
    source = maps.middleware if isinstance(maps, Handle) else maps
    given = source.maps() if isinstance(source, Capture) else source
    if not isinstance(given, Tensor | np.ndarray):
        raise TypeError(f"maps are a tensor, a Capture or its handle, got {type(given).__name__}.")
    every = given.detach().double().cpu().numpy() if isinstance(given, Tensor) else given.astype(np.float64)
    if every.ndim != 3 or 0 in every.shape or not np.isfinite(every).all():
        raise ValueError(
            f"maps are finite numbers [N, H, W] with N >= 1, got {tuple(every.shape)}; a single one is "
            f"map[None]."
        )
    kept = source.words if isinstance(source, Capture) else ()
    places = list(source.tokens or ()) if isinstance(source, Capture) and not kept else []
    places = places or list(range(len(every)))
    if isinstance(words, Mapping):
        if kept:
            raise ValueError(f"this Capture has a map for each of {kept}; choose some of these.")
        return {word: _mean(every, places, word, tokens) for word, tokens in words.items()}
    if kept and words is not None:
        for word in words:
            if word not in kept:
                raise ValueError(unknown("word of the Capture", word, kept))
        return {word: every[kept.index(word)] for word in words}
    names = list(words or kept or [f"token {place}" for place in places])
    if isinstance(words, str) or len(names) != len(every):
        raise ValueError(
            f"there is a word for each of {len(every)} maps, got {words!r}; or {{word: places}}."
        )
    return dict(zip(_apart(names), every, strict=True))


def _mean(every: NDArray, places: list[int], word: str, tokens: Sequence[int]) -> NDArray:
    if not tokens or any(token not in places for token in tokens):
        raise ValueError(f"{word!r} is at the places {list(tokens)}, and there are maps of {places}.")
    return every[[places.index(token) for token in tokens]].mean(0)


def _apart(names: list[str]) -> list[str]:
    """Names of which two alike are told apart by their place."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _of_image(image: Any) -> NDArray[np.float32]:
    """The image in grey, [H, W] in [0, 1]."""
    if hasattr(image, "convert"):  # of PIL
        return np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255)
    if not isinstance(image, Tensor | np.ndarray):
        raise TypeError(f"the image is of PIL, or a tensor [C, H, W], got {type(image).__name__}.")
    image = image if image.ndim == 4 else image[None]
    if len(image) != 1:
        raise ValueError(f"maps lie over one image, got {len(image)}; draw them one by one.")
    pixels = _pixels(image, "")[0]
    return pixels if pixels.ndim == 2 else pixels @ GREY
