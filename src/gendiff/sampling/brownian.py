"""A Brownian motion for every sample, for stochastic methods whose noise must be that of one path."""

import math
from fractions import Fraction
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff.random import Rng, as_rng

FINEST = 40  # 2^-40 of the time is far below any step, and 1 - 2^-40 is exact in float64


@final
class Brownian:
    r"""Unit-variance increments of one Brownian motion W per sample, the same whatever the grid.

    .. math:: z = \frac{W(s) - W(t)}{\sqrt{|t - s|}}

    A grid of 10 steps and one of 1000 draw from the same path, so that more steps refine a picture in place
    of changing it, and a strong order can be measured. W is the midpoint construction: at 0 it is 0, at 1 a
    unit Gaussian, and half-way between two known times, h apart, their mean plus :math:`\sqrt{h}/2` times a
    Gaussian that the place names. It is a pure function of the key and the time: the order of the draws, the
    split of the batch and what else is drawn change nothing.

    Times are rounded to multiples of 2^-depth. The increments are exactly those of a Brownian motion at the
    rounded times; additivity holds to rounding in float64. A first draw costs `depth` Gaussians, the next
    ones those of the halvings that their places do not share.

    Args:
        rng: the source, an `Rng` with a key a sample, or a seed. (The draws of a `torch.Generator` depend on
            what was drawn before.)
        depth: number of halvings, 1 to 40; 2^-20 is 10^-6 of the time.

    Raises:
        TypeError: if `rng` is a generator.
        ValueError: if the depth is out of range, or two times are the same after rounding.

    References:
        Lévy 1948, midpoint construction; Kidger et al. 2021, *Efficient and accurate gradients for neural
        SDEs*, section 4, for its use in solvers.

    >>> noise, x = Brownian(0), torch.zeros(1, 3)
    >>> whole = noise.increment(x, (1.0, 0.0))
    >>> halves = noise.increment(x, (1.0, 0.5)) + noise.increment(x, (0.5, 0.0))
    >>> torch.allclose(whole, halves / 2**0.5)
    True
    """

    def __init__(self, rng: Rng | int, depth: int = 20) -> None:
        source = as_rng(rng)
        if not isinstance(source, Rng):
            raise TypeError(
                f"a Brownian motion is a function of key and time, which {type(rng).__name__} has none of; "
                f"give Rng(seed), Rng(seed, ids=...) or a seed."
            )
        if not 1 <= depth <= FINEST:
            raise ValueError(f"the depth of a Brownian motion is 1 to {FINEST} halvings, got {depth}.")
        self.rng, self.depth = source, depth
        self._known = dict[int, Tensor]()  # saves work, and changes no number
        self._like: tuple[torch.Size, torch.device] | None = None

    def __repr__(self) -> str:
        return f"Brownian({self.rng!r}, depth={self.depth})"

    def increment(self, x: Float[Tensor, "B *dims"], span: tuple[float, float]) -> Float[Tensor, "B *dims"]:
        """Unit Gaussian noise like x for the way from t to s.

        Args:
            x: the samples, for shape, dtype and device.
            span: two times in [0, 1]; the other way round gives the negative.
        """
        t, s = (self._place(time) for time in span)
        if t == s:
            raise ValueError(
                f"the times {span[0]} and {span[1]} are the same at {self.depth} halvings; give a larger "
                f"depth (up to {FINEST}) or fewer steps."
            )
        w_t, w_s = self._values(x, t, s)
        return ((w_s - w_t) / math.sqrt(abs(t - s) / 2**self.depth)).to(x.dtype)

    def _place(self, time: float) -> int:
        if not 0 <= time <= 1:
            raise ValueError(f"times lie in [0, 1], got {time}.")
        return round(time * 2**self.depth)

    def _values(self, x: Tensor, *places: int) -> list[Tensor]:
        """W at multiples of 2^-depth; what is met on the way is kept for the next call, and no more."""
        like = x.shape, x.device
        known = self._known if self._like == like else {}
        met = dict[int, Tensor]()
        values = [self._value(x, place, known, met) for place in places]
        self._like, self._known = like, met
        return values

    def _value(self, x: Tensor, place: int, known: dict[int, Tensor], met: dict[int, Tensor]) -> Tensor:
        left, right = 0, 2**self.depth
        w_left = torch.zeros_like(x, dtype=torch.float64)
        if place == left:
            return w_left
        w_right = met[right] = known[right] if right in known else self._normal(x, right)
        while place != right:
            middle = (left + right) // 2
            if middle in known:
                w = known[middle]
            else:
                deviation = math.sqrt((right - left) / 2**self.depth) / 2  # of a bridge, half-way
                w = torch.add((w_left + w_right) / 2, self._normal(x, middle), alpha=deviation)
            met[middle] = w
            if place <= middle:
                right, w_right = middle, w
            else:
                left, w_left = middle, w
        return w_right

    def _normal(self, x: Tensor, place: int) -> Tensor:
        """The Gaussian of a place, which is named as a fraction and so does not depend on the depth."""
        time = Fraction(place, 2**self.depth)
        source = self.rng.fold("brownian").fold(f"{time.numerator}:{time.denominator}")
        return source.normal("bridge", x.shape, dtype=torch.float64, device=x.device)
