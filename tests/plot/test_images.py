"""Sample grids: every pixel as it was given, in the place that its label and its set say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import AxesImage
from torch import Tensor

from gendiff.plot import sample_grid
from gendiff.plot.figure import Picture


def images(count: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(count))


def drawn(picture: Picture) -> list[AxesImage]:
    return list(picture.axes[0].images)


def place(image: AxesImage) -> tuple[float, float]:
    left, _, _, top = image.get_extent()
    return round(left, 6), round(top, 6)


def table(picture: Picture, given: Tensor) -> list[list[int]]:
    """Which of the given images stand where, row by row, found by their pixels alone."""
    rows: dict[float, dict[float, int]] = {}
    for image in drawn(picture):
        left, top = place(image)
        pixels = np.asarray(image.get_array())
        same = [i for i, one in enumerate(given[:, 0].numpy()) if np.array_equal(one, pixels)]
        rows.setdefault(top, {})[left] = same[0]
    return [[rows[top][left] for left in sorted(rows[top])] for top in sorted(rows)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "numpy"])
def test_the_pixels_in_the_axes_are_those_given(channels: int, kind: str) -> None:
    given = images(5, channels)
    given = given.to(getattr(torch, kind)) if kind != "numpy" else given
    picture = sample_grid(given.numpy() if kind == "numpy" else given)
    expected = given.float().permute(0, 2, 3, 1).squeeze(-1).numpy()
    assert len(drawn(picture)) == 5
    for image, pixels in zip(drawn(picture), expected, strict=True):
        assert np.array_equal(np.asarray(image.get_array()), pixels)
        assert image.get_clim() == (0, 1)


def test_rendered_small_pixels_are_crisp_and_of_one_size() -> None:
    board = (torch.arange(64).reshape(8, 8) % 8 + torch.arange(64).reshape(8, 8) // 8) % 2
    picture = sample_grid(board.float()[None, None].expand(4, 1, 8, 8))
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    shot = np.asarray(canvas.buffer_rgba())[..., 0]
    left, right, bottom, top = (round(100 * edge) for edge in drawn(picture)[0].get_extent())
    inside = shot[top:bottom, left:right]
    cell = (right - left) // 8
    assert (right - left, bottom - top) == (8 * cell, 8 * cell)
    assert np.array_equal(inside, np.kron(255 * board.numpy(), np.ones((cell, cell))))


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (8, (2, 4)), (16, (4, 4))]
)
def test_without_columns_a_page_is_about_as_wide_as_high(count: int, shape: tuple[int, int]) -> None:
    rows = table(sample_grid(images(count)), images(count))
    assert (len(rows), len(rows[0])) == shape
    assert [i for row in rows for i in row] == list(range(count))


def test_labels_make_the_rows_and_columns_cut_them() -> None:
    given = images(7)
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 2])
    picture = sample_grid(given, labels)
    assert table(picture, given) == [[1, 4], [3], [0, 2, 5, 6]]
    assert [text.get_text() for text in picture.axes[0].texts] == ["0", "1", "2"]
    assert table(sample_grid(given, labels, 2), given) == [[1, 4], [3], [0, 2]]
    assert table(sample_grid(given, ["b", "a", "b", "a", "a", "b", "b"]), given)[0] == [0, 2, 5, 6]


def test_sets_stand_side_by_side_and_the_same_place_is_the_same_image() -> None:
    first, second = images(6), images(6).flip(0)
    picture = sample_grid({"one": first, "two": second}, columns=2)
    assert table(picture, first) == [[0, 1, 5, 4], [2, 3, 3, 2], [4, 5, 1, 0]]
    heads = {text.get_text(): text.get_position()[0] for text in picture.axes[0].texts}
    lefts = sorted({place(image)[0] for image in drawn(picture)})
    assert lefts[0] < heads["one"] < lefts[2] < heads["two"]


def test_each_set_may_have_labels_of_its_own() -> None:
    first, second = images(3), images(4)
    picture = sample_grid({"a": first, "b": second}, {"a": [0, 1, 1], "b": [1, 1, 0, 1]})
    assert table(picture, torch.cat([first, second])) == [[0, 5], [1, 2, 3, 4, 6]]


def test_captions_stand_below_their_image_and_above_the_next_row() -> None:
    captions = ["short", "a long caption " * 20, "costs $5", ""]
    picture = sample_grid(images(4, 3), captions=captions, columns=2, title="Four")
    assert not any(text.get_parse_math() for text in picture.axes[0].texts)
    boxes = {text.get_text(): text.get_window_extent() for text in picture.axes[0].texts}
    tops = [image.get_window_extent() for image in drawn(picture)]
    long = next(text for text in boxes if text.startswith("a long"))
    assert long.count("\n") == 5
    assert long.endswith("…")
    for text, i, below in (("short", 0, 2), (long, 1, 3)):
        assert boxes[text].y1 <= tops[i].y0
        assert boxes[text].y0 >= tops[below].y1
        assert tops[i].x0 - 1 <= boxes[text].x0 <= boxes[text].x1 <= tops[i].x1 + 1
    assert boxes["costs $5"].y0 >= 0
    assert boxes["Four"].y0 >= tops[0].y1


def test_size_and_colours_are_the_users() -> None:
    picture = sample_grid(images(2), size=0.8, cmap="gray_r")
    left, right, _, _ = drawn(picture)[0].get_extent()
    assert right - left == pytest.approx(0.8)
    assert drawn(picture)[0].get_cmap().name == "gray_r"
    assert sample_grid(images(2)).get_size_inches()[0] < sample_grid(images(40)).get_size_inches()[0] < 12


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sample_grid(images(1)[0]), r"\[B, C, H, W\].*\(1, 8, 8\).*image\[None\]"),
        (lambda: sample_grid(torch.rand(2, 4, 8, 8)), "C = 1 or 3.*latents are decoded"),
        (lambda: sample_grid(images(4)[:0]), "B >= 1"),
        (lambda: sample_grid(2 * images(2) - 1), r"\[0, 1\].*decode"),
        (lambda: sample_grid(images(2) * float("nan")), r"\[0, 1\], got nan"),
        (lambda: sample_grid((255 * images(2)).to(torch.uint8)), "uint8.*by 255"),
        (lambda: sample_grid({}), "no set"),
        (lambda: sample_grid({"a": images(2), "b": images(2, size=4)}), "one height and width"),
        (lambda: sample_grid(images(3), [0, 1]), "each of the 3 images, got 2"),
        (lambda: sample_grid(images(3), captions="abc"), "a single text"),
        (lambda: sample_grid({"one": images(3)}, {"on": [0, 1, 2]}), "did you mean 'one'"),
        (lambda: sample_grid({"a": images(1), "b": images(1)}, {"a": [0]}), "nothing for the images 'b'"),
        (lambda: sample_grid(images(3), columns=0), "columns"),
        (lambda: sample_grid(images(3), size=-1.0), "size"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
