"""Draws: a batch at its noise levels, everything that training needs to know of it but the network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace
from typing import Any, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import same_shape
from gendiff.math.schedules import Level, Schedule, times
from gendiff.random import Randomness


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Draw:
    """A batch at its noise levels.

    Attributes:
        x0: clean data, [B, *].
        eps: the noise that the target is made of, [B, *].
        t: times, [B], float64.
        schedule: the schedule of the times.
        perturbation: what x_t has besides x0 and eps, in units of eps; None for nothing.
        x_t: alpha·x0 + sigma·(eps + perturbation), [B, *].
    """

    x0: Float[Tensor, "B *dims"]
    eps: Float[Tensor, "B *dims"]
    t: Float64[Tensor, "B"]
    schedule: Schedule
    x_t: Float[Tensor, "B *dims"]
    perturbation: Float[Tensor, "B *dims"] | None = None

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        x0: Float[Tensor, "B *dims"],
        eps: Float[Tensor, "B *dims"],
        t: Float[Tensor, "..."] | float,
        perturbation: Float[Tensor, "B *dims"] | None = None,
    ) -> "Draw":
        """The draw of data, noise and times, a scalar or one per sample.

        >>> from gendiff.math import Rectified
        >>> Draw.of(Rectified(), torch.zeros(2, 1), torch.ones(2, 1), 0.25).x_t
        tensor([[0.2500],
                [0.2500]])
        """
        same_shape(x0=x0, eps=eps)
        t = times(t, x0.device)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x0)):
            raise ValueError(
                f"t is a scalar or has one value per sample, got {tuple(t.shape)} for {len(x0)} samples."
            )
        t = t.expand(len(x0))
        x_t = schedule.mix(x0, eps if perturbation is None else eps + perturbation, t)
        return cls(x0, eps, t, schedule, x_t, perturbation)

    @property
    def level(self) -> Level:
        """(alpha, sigma) of every sample, float64."""
        return self.schedule.level(self.t)

    def replace(self, **changes: Any) -> "Draw":
        """The draw with another x0, eps, t or perturbation; x_t follows, unless it is given."""
        if "x_t" in changes:
            return dataclass_replace(self, **changes)
        parts = {name: getattr(self, name) for name in ("schedule", "x0", "eps", "t", "perturbation")}
        return Draw.of(**{**parts, **changes})

    def cat(self, other: "Draw") -> "Draw":
        """The samples of both draws in one batch."""
        if other.schedule != self.schedule:
            raise ValueError(f"draws on {self.schedule!r} and {other.schedule!r} do not share a batch.")
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("x0", "eps", "t", "x_t")]
        x0, eps, t, x_t = (torch.cat(pair) for pair in pairs)
        mine, theirs = self.perturbation, other.perturbation
        if mine is None and theirs is None:
            return Draw(x0, eps, t, self.schedule, x_t)
        both = [torch.zeros_like(d.eps) if d.perturbation is None else d.perturbation for d in (self, other)]
        return Draw(x0, eps, t, self.schedule, x_t, torch.cat(both))


class Corruption(ABC):
    """A change of the noise of a draw."""

    @abstractmethod
    def __call__(self, draw: Draw, rng: Randomness) -> Draw:
        """The draw with its noise changed."""


@final
@dataclass(frozen=True)
class OffsetNoise(Corruption):
    """Add one number per sample and channel to the noise, so that the mean of an image is learned too.

    This is Guttenberg 2023. The target is made of the changed noise.

    Args:
        strength: standard deviation of that number, >= 0; 0.1 is usual.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        _not_negative("strength", self.strength)

    def __call__(self, draw: Draw, rng: Randomness) -> Draw:
        shape = (*draw.eps.shape[:2], *[1] * (draw.eps.ndim - 2))
        offset = rng.normal("offset", shape, dtype=draw.eps.dtype, device=draw.eps.device)
        return draw.replace(eps=draw.eps + self.strength * offset)


@final
@dataclass(frozen=True)
class InputPerturbation(Corruption):
    """Noise the input of the network a little more than the target says (Ning et al. 2023, algorithm 1).

    Args:
        strength: standard deviation of the surplus, in units of eps, >= 0; 0.1 is the paper's.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        _not_negative("strength", self.strength)

    def __call__(self, draw: Draw, rng: Randomness) -> Draw:
        surplus = rng.normal("perturbation", draw.eps.shape, dtype=draw.eps.dtype, device=draw.eps.device)
        before = 0.0 if draw.perturbation is None else draw.perturbation
        return draw.replace(perturbation=before + self.strength * surplus)


class Coupling(ABC):
    """How data and noise are paired."""

    @abstractmethod
    def __call__(self, x0: Float[Tensor, "B *dims"], rng: Randomness) -> Float[Tensor, "B *dims"]:
        """The noise of every sample, unit Gaussian over the batch, from the stream "noise"."""


@final
@dataclass(frozen=True)
class Independent(Coupling):
    """Every sample gets noise of its own, independent of the data."""

    def __call__(self, x0: Float[Tensor, "B *dims"], rng: Randomness) -> Float[Tensor, "B *dims"]:
        dtype = x0.dtype if x0.dtype == torch.float64 else torch.float32
        return rng.normal("noise", x0.shape, dtype=dtype, device=x0.device)


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")
