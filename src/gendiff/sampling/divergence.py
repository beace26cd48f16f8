"""The divergence of a field: the trace of its Jacobian, exactly or from random probes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from gendiff._checks import unknown
from gendiff.random import Randomness, as_rng

Probes = Literal["rademacher", "gaussian"]
Source = Randomness | torch.Generator | int | None


class Divergence(ABC):
    """How the trace of the Jacobian is found: the directions it is looked at along, and what they give."""

    @abstractmethod
    def directions(self, x: Tensor, rng: Source) -> Sequence[Tensor]:
        """The vectors e of the products eᵀ·J·e, each like x, drawn once for a whole trajectory."""

    @abstractmethod
    def combine(self, products: Float64[Tensor, "k B"]) -> tuple[Tensor, Tensor | None]:
        """The trace and its standard error, [B] each, from one product a direction."""


@final
@dataclass(frozen=True)
class Exact(Divergence):
    r"""The trace itself, :math:`\sum_i e_i^\top J e_i`: a backward pass for each value, for small data.

    >>> [direction.tolist() for direction in Exact().directions(torch.zeros(1, 2), None)]
    [[[1.0, 0.0]], [[0.0, 1.0]]]
    """

    def directions(self, x: Tensor, rng: Source) -> Sequence[Tensor]:
        size = x[0].numel()
        basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
        return basis.expand(size, *x.shape).unbind(0)

    def combine(self, products: Float64[Tensor, "k B"]) -> tuple[Tensor, Tensor | None]:
        return products.sum(0), torch.zeros_like(products[0])


@final
@dataclass(frozen=True)
class Hutchinson(Divergence):
    r"""An unbiased estimate of the trace, the mean of :math:`z^\top J z` over probes with E[z·zᵀ] = I.

    For a symmetric J the variance of one probe is :math:`2\sum_{i \ne j} J_{ij}^2` with signs, and
    :math:`2\sum_{ij} J_{ij}^2` with Gaussian numbers: signs are exact where J is diagonal, and never worse.

    Args:
        probes: number of probes, each one backward pass an evaluation; at least 1.
        law: `rademacher` (signs, each 1 or -1) or `gaussian`.

    Raises:
        ValueError: fewer than one probe, an unknown law.

    References:
        Hutchinson 1990, *A stochastic estimator of the trace of the influence matrix*, section 2; Grathwohl
        et al. 2019, *FFJORD*, eq. 7, for one set of probes a trajectory.

    >>> [probe.shape for probe in Hutchinson(probes=2).directions(torch.zeros(3, 4), rng=0)]
    [torch.Size([3, 4]), torch.Size([3, 4])]
    """

    probes: int = 1
    law: Probes = "rademacher"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"Hutchinson's estimate needs at least 1 probe, got {self.probes}.")
        if self.law not in get_args(Probes):
            raise ValueError(unknown("law of probes", self.law, get_args(Probes)))

    def directions(self, x: Tensor, rng: Source) -> Sequence[Tensor]:
        if rng is None:
            raise ValueError(
                "Hutchinson's estimate draws probes, so it needs rng: an Rng (with ids, what a sample gets "
                "does not depend on its batch), a torch.Generator or a seed; Exact() needs none."
            )
        source, shape = as_rng(rng), (len(x), self.probes, *x.shape[1:])
        if self.law == "gaussian":
            return source.normal("probe", shape, dtype=x.dtype, device=x.device).unbind(1)
        signs = source.integers("probe", 2, shape, device=x.device)
        return (2 * signs - 1).to(x.dtype).unbind(1)

    def combine(self, products: Float64[Tensor, "k B"]) -> tuple[Tensor, Tensor | None]:
        count = len(products)
        error = products.std(0) / math.sqrt(count) if count > 1 else None
        return products.mean(0), error
