r"""Weightings: how much each noise level counts.

A weighting says how much the error of x0 counts, :math:`w_{x_0}`. An error e of the space a loss is computed
in is an error :math:`(\sigma/D)\,e` of x0 (`gendiff.math.predictions`), so its weight there is
:math:`w = w_{x_0}\,(\sigma/D)^2`. One formula a weighting serves every prediction type.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor

from gendiff.math.predictions import Prediction
from gendiff.math.schedules import Level


class Weighting(ABC):
    """The weight of a sample's loss, from its level and the space the loss is computed in."""

    @abstractmethod
    def weight(self, level: Level, space: Prediction) -> Float64[Tensor, "B"]:
        """The weight of the squared error in `space`, per sample."""


@final
@dataclass(frozen=True)
class Unweighted(Weighting):
    """1 in the space the loss is computed in: L_simple for epsilon (Ho et al. 2020, eq. 14)."""

    def weight(self, level: Level, space: Prediction) -> Float64[Tensor, "B"]:
        return torch.ones_like(level.alpha)


class DataWeighting(Weighting):
    """A weighting that is given by how much the error of x0 counts."""

    @final
    def weight(self, level: Level, space: Prediction) -> Float64[Tensor, "B"]:
        return (
            self.of_snr((level.alpha / level.sigma).square())
            * (level.sigma / space.determinant(level)).square()
        )

    @abstractmethod
    def of_snr(self, snr: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        """The weight of the squared error of x0 at a signal-to-noise ratio alpha²/sigma²."""


@final
@dataclass(frozen=True)
class MinSNR(DataWeighting):
    r"""Min-SNR-γ (Hang et al. 2023, eq. 11): :math:`w_{x_0} = \min(\text{SNR}, \gamma)`.

    That is :math:`\min(\text{SNR},\gamma)/\text{SNR}` for epsilon and :math:`/(\text{SNR}+1)` for v.

    Args:
        gamma: where the weight stops growing, > 0.

    >>> level = Level(*(torch.tensor([v], dtype=torch.float64) for v in (0.6, 0.8)))
    >>> MinSNR(0.25).weight(level, Prediction("epsilon"))  # 0.25/(0.36/0.64)
    tensor([0.4444], dtype=torch.float64)
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def of_snr(self, snr: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        return snr.clamp(max=self.gamma)


@final
@dataclass(frozen=True)
class SoftMinSNR(DataWeighting):
    r"""Soft-min-SNR-γ (Crowson et al. 2024, eq. 4): :math:`w_{x_0} = 1/(1/\text{SNR} + 1/\gamma)`.

    Args:
        gamma: where the weight stops growing, > 0.

    >>> SoftMinSNR(4.0).of_snr(torch.tensor([4.0], dtype=torch.float64))
    tensor([2.], dtype=torch.float64)
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def of_snr(self, snr: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        return 1 / (1 / snr + 1 / self.gamma)  # right at an SNR of 0 and of infinity too


@final
@dataclass(frozen=True)
class EDMWeighting(DataWeighting):
    r"""EDM's weighting (Karras et al. 2022, table 1): :math:`w_{x_0} = \text{SNR} + 1/s^2`.

    At alpha = 1 that is their :math:`(\sigma^2 + s^2)/(\sigma s)^2`. With `edm` prediction and the same s it
    is 1 in the network's space.

    Args:
        sigma_data: standard deviation s of the data, > 0.

    >>> EDMWeighting(0.5).of_snr(torch.tensor([4.0], dtype=torch.float64))
    tensor([8.], dtype=torch.float64)
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _positive("sigma_data", self.sigma_data)

    def of_snr(self, snr: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        return snr + 1 / self.sigma_data**2


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
