"""Bounds on predicted data: maps x0 -> x0 that keep a prediction in the range of the data.

After a bound, eps must be computed again from x_t, or the pair no longer stands for x_t: `eps_of` does it,
and `sampling.Bounded` wraps a denoiser with both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import same_shape
from gendiff.math.numeric import Number
from gendiff.math.schedules import Level

Bound = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Clip:
    """Clip x0 to [-limit, limit].

    >>> Clip()(torch.tensor([[-3.0, 0.5]]))
    tensor([[-1.0000,  0.5000]])
    """

    limit: Number = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"Clip needs a positive limit, got {self.limit}.")

    def __call__(self, x0: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        return x0.clamp(-self.limit, self.limit)


@final
@dataclass(frozen=True)
class DynamicThreshold:
    r"""Clip each sample to a quantile of its absolute values and divide by that.

    :math:`s` is the quantile of :math:`|x_0|` over a sample, kept within [1, limit];
    :math:`x_0 \leftarrow \mathrm{clip}(x_0, -s, s)/s` (Saharia et al. 2022, section 2.3).

    Args:
        quantile: the share of values left as they are, in (0, 1].
        limit: the largest s, at least 1; 1 is plain clipping to [-1, 1].

    >>> DynamicThreshold(quantile=1.0, limit=4.0)(torch.tensor([[-2.0, 1.0]]))
    tensor([[-1.0000,  0.5000]])
    """

    quantile: Number = 0.995
    limit: Number = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1 or not self.limit >= 1:
            raise ValueError(
                f"DynamicThreshold needs a quantile in (0, 1] and a limit of at least 1, got quantile="
                f"{self.quantile} and limit={self.limit}."
            )

    def __call__(self, x0: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        flat = x0.flatten(1) if x0.ndim > 1 else x0[:, None]
        # interpolated by hand: torch.quantile refuses samples of more than 16 million values
        position = self.quantile * (flat.shape[1] - 1)
        below = int(position)
        ordered = flat.abs().sort(dim=1).values[:, below : below + 2]
        s = torch.lerp(ordered[:, 0], ordered[:, -1], position - below).clamp(1, self.limit)[:, None]
        return (flat.clamp(-s, s) / s).reshape(x0.shape)


def eps_of(
    x0: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"], level: Level
) -> Float[Tensor, "B *dims"]:
    """The noise that makes x_t of x0: (x_t - alpha·x0)/sigma, for sigma > 0.

    >>> eps_of(torch.zeros(1, 2), torch.ones(1, 2), Level(torch.tensor(0.5), torch.tensor(0.5)))
    tensor([[2., 2.]])
    """
    same_shape(x0=x0, x_t=x_t)
    alpha, sigma = level.like(x_t, x_t.dtype)
    return (x_t - alpha * x0) / sigma
