"""The mixture of Gaussians as a law of data: several modes, and still exact at every noise level."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import finite_on_host
from gendiff.math._components import (
    TOLERANCE,
    Components,
    Number,
    Reals,
    Scalar,
    check_gaussians,
    condition,
    flat,
    float64_copy,
    per_sample,
    variances_at,
)
from gendiff.math.laws import Law

EPSILON = torch.finfo(torch.float64).eps
MAX_ITERATIONS = (
    500  # every one halves the residual or the bracket, so about 200 is the worst that can happen
)


@final
@dataclass(frozen=True, eq=False)
class MixtureOracle(Law):
    r"""Data from a mixture, :math:`x_0 \sim \sum_k w_k N(m_k, C_k)`, with exact answers at every noise level.

    Covariances of zero make it the law of a finite data set, whose denoiser is what a network that memorises
    it learns.
    `eq=False` because the equality of the base class compares the content, which == of tensors does not.

    Args:
        weights: w, [K], positive, sum 1.
        means: m, [K, d].
        covariances: C, [K, d, d], symmetric positive semi-definite.

    Raises:
        ValueError: shapes that do not agree, weights or covariances that are none.

    References:
        Karras et al. 2022, appendix B.3, for a finite data set.

    >>> law = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), 0.01 * torch.ones(2, 1, 1))
    >>> law.x0(torch.tensor([[0.0], [0.5]]), alpha=0.5, sigma=0.1)
    tensor([[0.],
            [1.]], dtype=torch.float64)
    """

    weights: Float[Tensor, "K"]
    means: Float[Tensor, "rows d"]
    covariances: Float[Tensor, "blocks height width"]

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, float64_copy(getattr(self, name)))
        if self.weights.shape != self.means.shape[:1] or len(self.weights) == 0:
            raise ValueError(
                f"K weights go with means [K, d] and K >= 1, got shapes {tuple(self.weights.shape)} and "
                f"{tuple(self.means.shape)}."
            )
        total = self.weights.sum().item()
        if not bool((self.weights > 0).all()) or not abs(total - 1) <= TOLERANCE:
            raise ValueError(
                f"weights are positive and sum to 1 within {TOLERANCE:g}, but the smallest is "
                f"{self.weights.min().item():g} and the sum {total!r}; divide float64 weights by their sum, "
                f"and leave out components of weight 0."
            )
        check_gaussians(self.means, self.covariances)
        _ = self.components  # diagonalised now, so that a bad covariance is refused here

    @cached_property
    def components(self) -> Components:
        return Components.of(self.weights, self.means, self.covariances)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weights, self.means, self.covariances

    def flow(
        self, x: Float[Tensor, "B *dims"], alpha_t: Reals, sigma_t: Reals, alpha_s: Reals, sigma_s: Reals
    ) -> Float64[Tensor, "B *dims"]:
        r"""Carry points along the probability-flow ODE from the level t to the level s, exactly where d = 1.

        On a line trajectories cannot cross, so the flow is the monotone map between the two marginals,
        :math:`F_s^{-1}(F_t(x))`. It is evaluated in log odds, log F - log(1 - F), which keep their relative
        precision in both tails, and inverted by safeguarded Newton steps. The error is a few ulp, times the
        slope p_t(x)/p_s(y) of the map where that is large: trajectories that part towards two modes. Results
        carry no gradient; that slope is the derivative.

        Args:
            x: points at the level t, [B, *], of one value each.
            alpha_t: signal coefficient of the level the points are at, >= 0, a scalar or [B].
            sigma_t: its noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.
            alpha_s: signal coefficient of the level to go to, in either direction, likewise.
            sigma_s: its noise coefficient, likewise.

        Returns:
            The points at the level s, [B, *].

        Raises:
            ValueError: d > 1, alpha and sigma both 0, a level without a density, points that are not finite.

        References:
            Song et al. 2021, *Score-based generative modeling*, eq. 13; Karras et al. 2022, eq. 4.

        >>> law = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), 0.01 * torch.ones(2, 1, 1))
        >>> law.flow(torch.tensor([-0.5, 0.0, 0.5]), alpha_t=0.0, sigma_t=1.0, alpha_s=1.0, sigma_s=0.0)
        tensor([-0.9702,  0.0000,  0.9702], dtype=torch.float64)
        """
        if self.size != 1:
            raise ValueError(
                f"the flow of a mixture is exact in d = 1 only, and here d = {self.size}; integrate the ODE "
                f"of score() with tight tolerances, or use GaussianOracle, whose flow is exact in any d."
            )
        points = flat(x, self.size)
        finite_on_host(points, "x")
        with torch.no_grad():
            source, target = self._line(points, alpha_t, sigma_t), self._line(points, alpha_s, sigma_s)
            return target.inverse(source.log_odds(points[:, 0])[0]).reshape(x.shape)

    def marginal(self, alpha: Scalar, sigma: Scalar) -> "MixtureOracle":
        r"""The law of x_t at one level, :math:`\sum_k w_k N(\alpha m_k, \alpha^2 C_k + \sigma^2 I)`.

        Args:
            alpha: signal coefficient, >= 0.
            sigma: noise coefficient, >= 0; above 0 where a covariance is singular.

        Returns:
            The law, to be read as one of data.

        Raises:
            ValueError: alpha and sigma both 0, a level without a density.

        References:
            Karras et al. 2022, appendix B.3.

        >>> law = MixtureOracle(torch.ones(1), 2 * torch.ones(1, 1), torch.ones(1, 1, 1)).marginal(0.5, 1.0)
        >>> law.means.item(), law.covariances.item()
        (1.0, 1.25)
        """
        a, s = (per_sample(value, self.weights) for value in (alpha, sigma))
        variances_at(self.components.eigenvalues, a, s)
        noise = torch.eye(self.size, dtype=torch.float64, device=s.device) * s.square()
        return MixtureOracle(self.weights, a * self.means, a.square() * self.covariances + noise)

    def given(self, y: Float[Tensor, "n"], A: Float[Tensor, "rows d"], noise_std: Number) -> "MixtureOracle":
        r"""The law of x0 after the measurement y = A·x0 + noise_std·n with unit Gaussian n.

        Every component is conditioned like a single Gaussian, and its weight is multiplied by its evidence:

        .. math:: w_k' \propto w_k N(y; A m_k, A C_k A^\top + \mathrm{noise\_std}^2 I)

        Args:
            y: the measured values, [n].
            A: the linear operator on the flattened x0, [n, d].
            noise_std: standard deviation of the noise, >= 0; above 0 where an A·C·Aᵀ is singular.

        Returns:
            The posterior law, a mixture of as many components.

        Raises:
            ValueError: shapes that do not agree, negative noise_std, noise_std of 0 where A·C·Aᵀ is singular.

        References:
            Bishop 2006, *Pattern recognition and machine learning*, eq. 2.115 (evidence) to 2.117.

        >>> law = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, 1))
        >>> law.given(torch.tensor([1.0]), A=torch.ones(1, 1), noise_std=1.0).weights  # odds exp(1)
        tensor([0.2689, 0.7311], dtype=torch.float64)
        """
        log_evidence, means, covariances = condition(self.components, y, A, noise_std)
        weights = (self.components.log_weights + log_evidence).softmax(0)
        # A weight below 1e-308 is no longer a number above 0, which weights are; at that size none counts.
        return MixtureOracle(weights.clamp(min=torch.finfo(torch.float64).tiny), means, covariances)

    def _line(self, x: Float64[Tensor, "B 1"], alpha: Reals, sigma: Reals) -> "Line":
        """The marginal of a one-dimensional mixture at the levels of the points x."""
        parts = self.components.to(x.device)
        a, s = per_sample(alpha, x), per_sample(sigma, x)
        scales = variances_at(parts.eigenvalues[:, 0], a, s).sqrt()
        return Line(parts.log_weights, a * parts.means[:, 0], scales)


@final
@dataclass(frozen=True, eq=False)
class Line:
    """Distribution functions of mixtures on a line, in log odds; never compared, hence `eq=False`."""

    log_weights: Float64[Tensor, "K"]
    centres: Float64[Tensor, "b K"]
    scales: Float64[Tensor, "b K"]

    def log_odds(self, y: Float64[Tensor, "B"]) -> tuple[Float64[Tensor, "B"], Float64[Tensor, "B"]]:
        """Log F(y) - log(1 - F(y)), which rises strictly with y, and its slope p/(F·(1 - F))."""
        z = (y[:, None] - self.centres) / self.scales
        below, above = (torch.logsumexp(self.log_weights + _log_ndtr(side), -1) for side in (z, -z))
        log_densities = self.log_weights - z.square() / 2 - (math.sqrt(2 * math.pi) * self.scales).log()
        density = log_densities.logsumexp(-1)
        return below - above, (density - below - above).exp()

    def inverse(self, odds: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        """The y of given log odds, by Newton steps; where one does not halve the residual, by bisection."""
        low, high = self._bracket(odds)
        y, last = (low + high) / 2, torch.full_like(odds, math.inf)
        done = torch.zeros_like(odds, dtype=torch.bool)
        for _ in range(MAX_ITERATIONS):
            value, slope = self.log_odds(y)
            residual = value - odds
            low, high = torch.where(residual < 0, y, low), torch.where(residual > 0, y, high)
            newton = y - residual / slope
            still = torch.minimum((newton - y).abs(), high - low) <= EPSILON * (
                y.abs() + self.scales.amin(-1)
            )
            # A residual that is rounding, in wide gaps between modes, says nothing about where to go next.
            done = done | still | (residual.abs() <= 4 * EPSILON * (1 + odds.abs()))
            if bool(done.all()):
                return y
            good = (newton > low) & (newton < high) & (residual.abs() < last / 2)
            y = torch.where(done, y, torch.where(good, newton, (low + high) / 2))
            last = residual.abs()
        raise AssertionError("the bracket of a monotone function did not close")

    def _bracket(self, odds: Float64[Tensor, "B"]) -> tuple[Float64[Tensor, "B"], Float64[Tensor, "B"]]:
        """Two ends that enclose the solution.

        The quantile of a mixture lies between the smallest and the largest of its components' quantiles, and
        those within sqrt(-2·log(2p)) scales of the centre, as the normal tail is at most exp(-z²/2)/2.
        """
        log_tail = -torch.nn.functional.softplus(odds.abs())
        reach = (-2 * (log_tail + math.log(2))).clamp(min=0).sqrt()
        zero = torch.zeros_like(reach)
        low, high = torch.where(odds < 0, -reach, zero), torch.where(odds > 0, reach, zero)
        left, right = (self.centres + self.scales * z[:, None] for z in (low, high))
        return left.amin(-1), right.amax(-1)


def _log_ndtr(z: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Log of the standard normal distribution function; torch ships it without a type."""
    return torch.special.log_ndtr(z)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
