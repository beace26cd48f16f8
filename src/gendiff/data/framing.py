"""Framing: which part of a picture the network sees, at which size, and the facts that SDXL is told of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from gendiff._checks import unknown
from gendiff.data.context import sample_rng
from gendiff.random import Rng

CROPS = ("center", "random")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@final
@dataclass(frozen=True)
class Buckets:
    r"""Shapes of about one area and many aspect ratios, of which a picture gets the one nearest to its own.

    For every multiple a of `step` there are the shapes (a, b) and (b, a) with b = ⌊area / (a·step)⌋·step, as
    far as the longer side is at most `max_ratio` times the shorter one, and the largest square. No shape
    exceeds the area, so that the memory of a training step is bounded by it.

    Args:
        area: in pixels, such as 1024 * 1024.
        step: both sides are multiples of it, in pixels; 64 is 8 latent pixels of a VAE with factor 8.
        max_ratio: longer side over shorter side, >= 1.

    Raises:
        ValueError: for values out of range, and an area that holds no shape.

    >>> Buckets(256 * 256, step=64, max_ratio=2.5).shapes
    ((192, 320), (256, 256), (320, 192))
    """

    area: int
    step: int = 64
    max_ratio: float | int = 2.0

    def __post_init__(self) -> None:
        for name in ("area", "step"):
            _positive(name, getattr(self, name))
        if not self.max_ratio >= 1:
            raise ValueError(f"max_ratio is longer side over shorter side, >= 1, got {self.max_ratio!r}.")
        if self.area < self.step**2:
            raise ValueError(
                f"an area of {self.area} pixels holds no shape with sides that are multiples of "
                f"step={self.step}; give area >= {self.step**2}, such as 1024 * 1024, or a smaller step."
            )

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes (height, width), from wide to tall."""
        cells, found = self.area // self.step**2, set[tuple[int, int]]()
        for a in range(1, math.isqrt(int(cells * self.max_ratio)) + 1):
            b = cells // a
            if max(a, b) <= self.max_ratio * min(a, b):
                found |= {(a, b), (b, a)}
        side = math.isqrt(cells)
        found.add((side, side))
        ordered = sorted(found, key=lambda shape: (shape[0] / shape[1], shape))
        return tuple((h * self.step, w * self.step) for h, w in ordered)

    def index(self, height: int, width: int) -> int:
        r"""The number of the shape nearest to a picture: the least :math:`|\log(h/w) - \log(height/width)|`.

        >>> buckets = Buckets(1024 * 1024)
        >>> buckets.shapes[buckets.index(2000, 3000)]
        (832, 1216)
        """
        ratio = math.log(_positive("height", height) / _positive("width", width))
        return min(
            range(len(self.shapes)),
            key=lambda i: abs(math.log(self.shapes[i][0] / self.shapes[i][1]) - ratio),
        )


@final
@dataclass(frozen=True)
class Framing:
    r"""Resizes a picture until it covers the target, flips it, and crops the target out of it.

    A picture of H × W gets r = max(h/H, w/W) and is resized, antialiased, to (max(h, round(r·H)),
    max(w, round(r·W))). Only what the crop needs is computed. The draws are `sample_rng`'s, from the streams
    "crop" and "flip", and are relative to the free space: pictures that are zipped are cropped alike.

    The six facts are SDXL's: original height and width, top and left of the crop, target height and width.
    Top and left are what was cut off above and on the left of the picture *as the network sees it*, in pixels
    of the resized picture. With a flip they are therefore counted in the flipped picture, as in diffusers'
    SDXL scripts, which flip first and crop afterwards: left = 0 says that what the network sees at its left
    edge is an edge of the picture.

    Args:
        size: of the target, (height, width) or one number for both, in pixels.
        area: of the target in pixels, whose shape is then one of `Buckets`.
        buckets: the buckets, or their step; None is 64 if there is an area. With neither size nor area a
            picture keeps its size.
        crop: "center" or "random".
        flip: whether half of the visits see the mirror image.
        interpolation: "bicubic" or "lanczos".

    Raises:
        ValueError: for an unknown name, values out of range, and a size beside an area.

    References:
        Podell et al. 2023, *SDXL*, section 2.2 (c_size, c_crop) and 2.3 (c_ar).

    >>> pixels, facts = Framing(size=(64, 32))(Image.new("RGB", (100, 128)))
    >>> tuple(pixels.shape), facts.tolist()
    ((3, 64, 32), [128, 100, 0, 9, 64, 32])
    """

    size: int | Sequence[int] | None = None
    area: int | None = None
    buckets: Buckets | int | None = None
    crop: str = "center"
    flip: bool = False
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name, accepted in (("crop", CROPS), ("interpolation", FILTERS)):
            if getattr(self, name) not in accepted:
                raise ValueError(unknown(name, getattr(self, name), accepted))
        if self.size is not None and not (self.area is None and self.buckets is None):
            raise ValueError(
                f"size={self.size!r} is one shape, area={self.area} and buckets={self.buckets} are many; "
                f"give one of the two."
            )
        buckets = _buckets(self.area, self.buckets)
        # what is equal shall compare equal and look the same, however it was written
        object.__setattr__(self, "size", _shape(self.size))
        object.__setattr__(self, "buckets", buckets)
        object.__setattr__(self, "area", None if buckets is None else buckets.area)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The shape that a picture of this height and width will have.

        >>> Framing(area=1024 * 1024).target(600, 800)
        (896, 1152)
        """
        if isinstance(self.size, tuple):
            h, w = self.size
            return h, w
        if isinstance(self.buckets, Buckets):
            return self.buckets.shapes[self.buckets.index(height, width)]
        return height, width

    def __call__(
        self, image: Image.Image, rng: Rng | None = None
    ) -> tuple[Float[Tensor, "3 h w"], Int64[Tensor, "6"]]:
        """The pixels in [0, 1] and the six facts of an RGB picture; `rng` is by default the sample's own."""
        rng = sample_rng() if rng is None else rng
        height, width = image.height, image.width
        h, w = self.target(height, width)
        ratio = max(h / height, w / width)
        full_h, full_w = max(h, round(ratio * height)), max(w, round(ratio * width))
        top, left = self._corner(full_h - h, full_w - w, rng)
        flipped = self.flip and rng.uniform("flip", ()).item() < 0.5
        x = full_w - w - left if flipped else left  # the same edge in the picture that is not flipped yet
        # A box of the source instead of a crop of the result, so that a strip of 1 × 100000 does not grow to
        # 512 × 51200000 on the way. The pixels are the same, but for the order of Pillow's two passes.
        across, down = width / full_w, height / full_h
        box = (x * across, top * down, min((x + w) * across, width), min((top + h) * down, height))
        image = image.resize((w, h), FILTERS[self.interpolation], box=box)
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return pixels(image), torch.tensor([height, width, top, left, h, w])

    def _corner(self, free_h: int, free_w: int, rng: Rng) -> tuple[int, int]:
        if self.crop == "center":
            return round(free_h / 2), round(free_w / 2)
        u, v = rng.uniform("crop", (2,), dtype=torch.float64).tolist()
        return int(u * (free_h + 1)), int(v * (free_w + 1))


def pixels(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """An RGB picture as float32 in [0, 1].

    >>> pixels(Image.new("RGB", (1, 1), (255, 0, 51))).flatten().tolist()
    [1.0, 0.0, 0.20000000298023224]
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture is {image.mode}, not RGB; give image.convert('RGB').")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


def group_of(shape: tuple[int, int]) -> int:
    """The group of a shape in every image dataset: height·10⁹ + width.

    Datasets that know nothing of each other can be mixed, since equal groups are equal shapes.

    >>> group_of((832, 1216))
    832000001216
    """
    height, width = shape
    return height * 10**9 + width


def _buckets(area: int | None, buckets: Buckets | int | None) -> Buckets | None:
    if isinstance(buckets, Buckets):
        if area not in (None, buckets.area):
            raise ValueError(f"area={area} is not that of {buckets}; give one of the two.")
        return buckets
    if area is not None:
        return Buckets(area) if buckets is None else Buckets(area, step=buckets)
    if buckets is not None:
        raise ValueError(f"buckets={buckets} is the step of buckets, which need an area: area=1024 * 1024.")
    return None


def _shape(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size is one number or (height, width), got {size!r}.")
    height, width = (_positive("size", side) for side in sides)
    return height, width


def _positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is a whole number of pixels >= 1, got {value!r}.")
    return value
