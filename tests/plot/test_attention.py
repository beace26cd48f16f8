"""Attention maps drawn: a panel a word, with the numbers of its map, over the image."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from gendiff.attention import Kind, stack
from gendiff.attention.capture import Capture
from gendiff.plot.attention import attention
from gendiff.plot.figure import Picture
from tests.zoo import build, run

UNET = "UNet2DConditionModel"


def maps(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 4, 6, generator=torch.Generator().manual_seed(count))


def numbers(picture: Picture) -> list[np.ndarray]:
    """What each panel shows, without colour bars."""
    return [np.asarray(axes.images[-1].get_array()) for axes in picture.axes if axes.images]


def titles(picture: Picture) -> list[str]:
    return [axes.get_title() for axes in picture.axes if axes.images]


def same(picture: Picture, given: torch.Tensor) -> bool:
    return len(numbers(picture)) == len(given) and all(
        np.allclose(a, b.numpy()) for a, b in zip(numbers(picture), given, strict=True)
    )


@pytest.fixture(scope="module")
def gathered():
    model = build(UNET)
    words, every = Capture(tokens={"cat": [1], "hat": [2, 4]}), Capture(tokens=[1, 2, 4])
    with stack(model) as one, torch.no_grad():
        handle = one.add(words, on=Kind.CROSS)
        one.add(every, on=Kind.CROSS)
        run(model, UNET)
    return words, every, handle


@pytest.mark.parametrize("count", [1, 4, 5, 7, 12])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "numpy"])
def test_a_panel_a_map_with_its_numbers(count: int, kind: str) -> None:
    given = maps(count) if kind == "numpy" else maps(count).to(getattr(torch, kind))
    picture = attention(given.numpy() if kind == "numpy" else given)
    assert same(picture, given.float())
    assert titles(picture) == [f"token {i}" for i in range(count)]


def test_words_are_the_titles() -> None:
    assert titles(attention(maps(), words=["a", "cat", "$5"])) == ["a", "cat", "$5"]
    assert titles(attention(maps(), words=["a", "cat", "a"])) == ["a (0)", "cat", "a (2)"]
    picture = attention(maps(), words={"hat": [2, 0], "cat": [1]})
    assert titles(picture) == ["hat", "cat"]
    assert same(picture, torch.stack([maps()[[2, 0]].mean(0), maps()[1]]))


def test_a_capture_and_its_handle_bring_their_words(gathered) -> None:
    words, every, handle = gathered
    for source in (words, handle):
        assert titles(attention(source)) == ["cat", "hat"]
        assert same(attention(source), words.maps())
    picture = attention(words, words=["hat"])
    assert (titles(picture), same(picture, words.maps()[1:])) == (["hat"], True)
    assert titles(attention(every)) == ["token 1", "token 2", "token 4"]
    picture = attention(every, words={"hat": [2, 4]})
    assert same(picture, words.maps()[1:])


@pytest.mark.parametrize("kind", ["PIL", "tensor", "batch", "grey"])
def test_the_image_lies_below_in_grey(kind: str) -> None:
    pixels = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    image = {
        "PIL": lambda: Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()),
        "tensor": lambda: pixels,
        "batch": lambda: pixels[None],
        "grey": lambda: pixels.mean(0, keepdim=True),
    }[kind]()
    picture = attention(maps(), image)
    weights = torch.tensor([0.299, 0.587, 0.114])
    luma = pixels.mean(0) if kind == "grey" else torch.einsum("chw,c->hw", pixels, weights)
    for axes in picture.axes:
        below, above = axes.images
        assert np.allclose(np.asarray(below.get_array()), luma.numpy(), atol=0.01)
        assert list(below.get_extent()) == list(above.get_extent()) == [0, 24, 16, 0]
        cover, shown = np.asarray(above.get_alpha()), np.asarray(above.get_array())
        assert 0 < cover.min() < cover.max() < 1
        assert cover.flatten().argmax() == shown.flatten().argmax()


def test_scales_are_stated_or_shared() -> None:
    given = torch.stack([maps(2)[0], 10 * maps(2)[1]])
    own, shared = attention(given), attention(given, shared=True)
    for axes, one in zip(own.axes, given, strict=True):
        assert axes.images[-1].get_clim() == pytest.approx((float(one.min()), float(one.max())))
        assert axes.get_xlabel() == f"{one.min():.2g} … {one.max():.2g}"
    for axes in shared.axes[:2]:
        assert axes.images[-1].get_clim() == pytest.approx((float(given.min()), float(given.max())))
    assert len(shared.axes) == 3
    assert shared.axes[2].get_ylabel() == "attention"


def test_it_can_be_drawn_and_pyplot_keeps_nothing() -> None:
    before = set(Gcf.figs)
    picture = attention(torch.ones(2, 3, 3), torch.rand(3, 9, 9), shared=True, title="Constant")
    FigureCanvasAgg(picture).draw()
    assert picture.get_suptitle() == "Constant"
    assert set(Gcf.figs) == before


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: attention(maps()[0]), r"\[N, H, W\].*\(4, 6\)"),
        (lambda: attention(maps() * float("nan")), "finite"),
        (lambda: attention(maps(), words=["a"]), "a word for each of 3 maps"),
        (lambda: attention(maps(), words={"a": [3]}), r"'a' is at the places \[3\]"),
        (lambda: attention(maps(), torch.rand(2, 3, 8, 8)), "one image, got 2"),
        (lambda: attention(maps(), 2 * torch.ones(3, 8, 8)), r"\[0, 1\]"),
        (lambda: attention(Capture()), "nothing was gathered"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_words_that_a_capture_has_not_are_named(gathered) -> None:
    with pytest.raises(ValueError, match="unknown word of the Capture 'cats'; did you mean 'cat'"):
        attention(gathered[0], words=["cats"])
    with pytest.raises(ValueError, match="choose some of these"):
        attention(gathered[0], words={"cat": [1]})
