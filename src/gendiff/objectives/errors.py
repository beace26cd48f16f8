"""Errors: how far a prediction is from its target, per sample."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gendiff._checks import same_shape, working_dtype


class Error(ABC):
    """An elementwise error, averaged over each sample."""

    @abstractmethod
    def elementwise(self, difference: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """The error of every element."""

    @final
    def __call__(
        self,
        prediction: Float[Tensor, "B *dims"],
        target: Float[Tensor, "B *dims"],
        where: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "B"]:
        """The mean error of every sample, in at least float32.

        Args:
            prediction: [B, *].
            target: [B, *].
            where: weights of the elements, >= 0, broadcast over [B, *]: a mask, or any other emphasis. The
                mean is the weighted one, Σ w·e / Σ w, so that only ratios matter; a sample without weight has
                error 0.

        Raises:
            ValueError: for shapes that do not agree.

        >>> MSE()(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), where=torch.tensor([[1.0, 0.0]]))
        tensor([1.])
        """
        same_shape(prediction=prediction, target=target)
        dtype = working_dtype(prediction, target)
        error = self.elementwise(prediction.to(dtype) - target.to(dtype)).reshape(len(prediction), -1)
        if where is None:
            return error.mean(1)
        if where.ndim != prediction.ndim or any(
            a not in (1, b) for a, b in zip(where.shape, prediction.shape, strict=True)
        ):
            raise ValueError(
                f"`where` has shape {tuple(where.shape)}, which must broadcast over "
                f"{tuple(prediction.shape)} dimension by dimension; use 1 for a dimension it does not depend "
                f"on."
            )
        weight = where.to(dtype).expand_as(prediction).reshape(error.shape)
        total = weight.sum(1)
        return (weight * error).sum(1) / torch.where(total > 0, total, 1.0)


@final
@dataclass(frozen=True)
class MSE(Error):
    """The squared difference."""

    def elementwise(self, difference: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        return difference.square()


@final
@dataclass(frozen=True)
class Huber(Error):
    r"""The pseudo-Huber error :math:`\sqrt{d^2 + c^2} - c` of every element.

    That is how the field's scripts have it; Song & Dhariwal 2024, eq. 8, take the norm of a sample for d.
    Quadratic for :math:`|d| \ll c`, where it is :math:`d^2/(2c)`, and absolute beyond.

    Args:
        c: where it turns from one to the other, > 0.

    >>> Huber(3.0).elementwise(torch.tensor([[4.0]]))
    tensor([[2.]])
    """

    c: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c must be positive and finite, got {self.c}.")

    def elementwise(self, difference: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        # d²/(√(d² + c²) + c), which is the same number and cancels nothing where d is small
        return difference * (
            difference / (torch.hypot(difference, torch.full_like(difference, self.c)) + self.c)
        )
