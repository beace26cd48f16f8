"""Framing: shapes of buckets, and pixels and facts against resize, flip and crop done one after the other."""

import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gendiff.data.context import sampled_with
from gendiff.data.framing import Buckets, Framing, group_of
from gendiff.random import Rng


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Of so little contrast that no filter overshoots, which Pillow would clip between its two passes."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(80, 177, (height, width, 3), dtype=np.uint8))


def test_known_shapes() -> None:
    # 16 cells of 64²: 2·8 = 16 and 3·5 = 15 within the ratio, 1·16 is not; 6·2 and 7·2 are, as (a, ⌊16/a⌋)
    assert Buckets(256 * 256, 64, max_ratio=4).shapes == tuple(
        (64 * h, 64 * w) for h, w in [(2, 8), (2, 7), (2, 6), (3, 5), (4, 4), (5, 3), (6, 2), (7, 2), (8, 2)]
    )
    sdxl = Buckets(1024 * 1024, max_ratio=4.0).shapes
    assert {
        (1024, 1024),
        (1152, 896),
        (896, 1152),
        (1216, 832),
        (1344, 768),
        (1536, 640),
        (2048, 512),
    } <= set(sdxl)


@given(st.integers(16, 2000), st.sampled_from([8, 32, 64]), st.floats(1, 5))
def test_shapes_fill_the_area_and_do_not_exceed_it(side: int, step: int, ratio: float) -> None:
    side = max(side, step)
    shapes = Buckets(side * side, step, ratio).shapes
    assert len(set(shapes)) == len(shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert any(h == w for h, w in shapes)
    ratios = [h / w for h, w in shapes]
    assert ratios == sorted(ratios)
    for h, w in shapes:
        assert h % step == w % step == 0
        assert h * w <= side * side
        assert max(h, w) <= ratio * min(h, w)
        assert h == w or max((h + step) * w, h * (w + step)) > side * side


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_gets_the_nearest_shape(height: int, width: int) -> None:
    buckets = Buckets(512 * 512, 64, 3.0)
    distances = [
        abs(math.log(h) - math.log(w) - math.log(height) + math.log(width)) for h, w in buckets.shapes
    ]
    assert distances[buckets.index(height, width)] <= min(distances) + 1e-12
    nearest = buckets.shapes[buckets.index(height, width)]
    assert Framing(area=512 * 512, buckets=buckets).target(height, width) == nearest


def by_hand(image: Image.Image, framing: Framing, rng: Rng) -> tuple[np.ndarray, list[int]]:
    """What diffusers' SDXL scripts do: resize the whole picture, flip it, then crop, then note where."""
    height, width = image.height, image.width
    h, w = framing.target(height, width)
    if h * width >= w * height:
        full = (h, max(w, round(h / height * width)))
    else:
        full = (max(h, round(w / width * height)), w)
    image = image.resize((full[1], full[0]), getattr(Image.Resampling, framing.interpolation.upper()))
    if framing.flip and rng.uniform("flip", ()) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if framing.crop == "center":  # as torchvision's CenterCrop
        y, x = (max(0, int(round((a - b) / 2.0))) for a, b in zip(full, (h, w), strict=True))  # noqa: RUF046
    else:
        u = rng.uniform("crop", (2,), dtype=torch.float64)
        y, x = (math.floor(float(r) * (a - b + 1)) for r, a, b in zip(u, full, (h, w), strict=True))
    seen = np.asarray(image.crop((x, y, x + w, y + h)))
    return seen, [height, width, y, x, h, w]


shape = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.integers(1, 40)
target = shape.map(lambda size: {"size": size}) | st.integers(256, 1600).map(
    lambda area: {"area": area, "buckets": 8}
)


@settings(max_examples=80, deadline=None)
@given(
    target,
    st.sampled_from(["center", "random"]),
    st.booleans(),
    st.sampled_from(["bicubic", "lanczos"]),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 99),
)
def test_pixels_and_facts_are_those_of_one_step_after_the_other(
    target: dict[str, Any], crop: str, flip: bool, interpolation: str, shape: tuple[int, int], seed: int
) -> None:
    framing = Framing(**target, crop=crop, flip=flip, interpolation=interpolation)
    image = noise(*shape, seed)
    pixels, facts = framing(image, Rng(seed))
    seen, told = by_hand(image, framing, Rng(seed))
    assert facts.tolist() == told
    np.testing.assert_allclose(
        pixels.permute(1, 2, 0).numpy() * 255, seen, atol=2.01
    )  # a level for each pass


def test_top_and_left_count_in_the_picture_that_the_network_sees() -> None:
    columns = np.arange(40, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    framing = Framing(size=(8, 10), crop="random", flip=True)
    mirrored = set[bool]()
    for seed in range(20):
        pixels, facts = framing(Image.fromarray(columns), Rng(seed))
        row, left = (pixels[0, 0] * 255).round().int().tolist(), int(facts[3])
        straight, mirror = list(range(left, left + 10)), [39 - x for x in range(left, left + 10)]
        assert row in (straight, mirror)
        mirrored.add(row == mirror)
    assert mirrored == {False, True}


def test_every_corner_and_both_sides_are_drawn() -> None:
    image, framing = noise(8, 11), Framing(size=8, crop="random", flip=True)
    facts = [framing(image, Rng(seed))[1].tolist() for seed in range(120)]
    counts = np.bincount([left for _, _, _, left, _, _ in facts], minlength=4)
    assert all(abs(count - 30) < 20 for count in counts)  # four standard deviations
    mirror, plain = Framing(flip=True), Framing()(image)[0]
    flips = sum(not torch.equal(mirror(image, Rng(seed))[0], plain) for seed in range(120))
    assert abs(flips - 60) < 22


def test_draws_are_the_samples_own_and_alike_in_pictures_of_other_sizes() -> None:
    small, large = noise(16, 31), noise(32, 62)
    framing = Framing(size=16, crop="random", flip=True)
    for seed in range(10):
        with sampled_with(partial(Rng, seed)):
            (one, a), (again, _), (_, b) = (
                framing(small),
                framing(small),
                Framing(32, crop="random", flip=True)(large),
            )
        assert torch.equal(one, again)
        assert abs(int(b[3]) - 2 * int(a[3])) <= 2


def test_nothing_is_resized_where_nothing_has_to_be() -> None:
    image = noise(9, 13)
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels, facts = Framing()(image)
    assert torch.equal(pixels, exact)
    assert facts.tolist() == [9, 13, 0, 0, 9, 13]
    assert torch.equal(Framing(size=9)(image)[0], exact[:, :, 2:11])


def test_a_strip_does_not_grow_on_the_way() -> None:
    pixels, facts = Framing(size=64)(Image.new("RGB", (100_000, 1), (255, 0, 0)))
    assert pixels[0].min() == 1
    assert facts.tolist() == [1, 100_000, 0, (6_400_000 - 64) // 2, 64, 64]


def test_equal_settings_are_equal_however_they_are_written() -> None:
    assert Framing(8) == Framing(size=[8, 8]) == pickle.loads(pickle.dumps(Framing((8, 8))))
    assert Framing(area=4096, buckets=8) == Framing(buckets=Buckets(4096, 8)) != Framing(area=4096)
    assert hash(Framing(8)) == hash(Framing((8, 8)))


def test_groups_are_equal_for_equal_shapes_only() -> None:
    shapes = [*Buckets(1024 * 1024, 64, 4.0).shapes, *Buckets(512 * 512, 32, 4.0).shapes, (1, 64_000_000)]
    assert len({group_of(shape) for shape in shapes}) == len(set(shapes))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Framing(crop="centre"), "did you mean 'center'"),
        (lambda: Framing(interpolation="nearest"), "bicubic"),
        (lambda: Framing(size=0), ">= 1"),
        (lambda: Framing(size=(8, 8, 8)), "height, width"),
        (lambda: Framing(size=8, area=4096), "one of the two"),
        (lambda: Framing(buckets=64), "need an area"),
        (lambda: Framing(area=4096, buckets=Buckets(64 * 128)), "one of the two"),
        (lambda: Buckets(4095), "area >= 4096"),
        (lambda: Buckets(4096, step=0), "step"),
        (lambda: Buckets(4096, max_ratio=0.5), "max_ratio"),
        (lambda: Buckets(4096).index(0, 5), "height"),
        (lambda: Framing()(Image.new("L", (2, 2))), "RGB"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
