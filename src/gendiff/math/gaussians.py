"""The exact oracles: a Gaussian, with what only it has in closed form, and `MixtureOracle` beside it.

What both answer (denoiser, noise, score, density, guidance) is in `gendiff.math.laws`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff.math._components import (
    Components,
    Number,
    Reals,
    Scalar,
    check_gaussians,
    condition,
    eigh,
    float64_copy,
    per_sample,
    variances_at,
)
from gendiff.math.laws import Law
from gendiff.math.mixtures import MixtureOracle

__all__ = ["GaussianOracle", "MixtureOracle"]


@final
@dataclass(frozen=True, eq=False)
class GaussianOracle(Law):
    r"""Gaussian data, :math:`x_0 \sim N(m, C)`, with exact answers at every noise level.

    The denoiser is linear, :math:`E[x_0|x_t] = m + \alpha C (\alpha^2 C + \sigma^2 I)^{-1} (x_t - \alpha m)`.
    `eq=False` because the equality of the base class compares the content, which == of tensors does not.

    Args:
        mean: m, [d].
        covariance: C, [d, d], symmetric positive semi-definite.

    Raises:
        ValueError: shapes that do not agree, a matrix that is no covariance.

    References:
        Bishop 2006, *Pattern recognition and machine learning*, eq. 2.113 to 2.117.

    >>> law = GaussianOracle(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    >>> law.x0(torch.tensor([[1.0, 0.0]]), alpha=1.0, sigma=1.0)
    tensor([[0.4667, 0.1333]], dtype=torch.float64)
    """

    mean: Float[Tensor, "d"]
    covariance: Float[Tensor, "height width"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", float64_copy(self.mean))
        object.__setattr__(self, "covariance", float64_copy(self.covariance))
        check_gaussians(self.mean, self.covariance)
        _ = self.components  # diagonalised now, so that a bad covariance is refused here

    @classmethod
    def diagonal(cls, mean: Float[Tensor, "d"], std: Float[Tensor, "size"]) -> "GaussianOracle":
        """Independent values: the covariance is diag(std²).

        Args:
            mean: m, [d].
            std: standard deviations, [d], >= 0.

        Returns:
            The law.

        Raises:
            ValueError: shapes that do not agree, a negative std.

        References:
            Bishop 2006, section 2.3.

        >>> GaussianOracle.diagonal(torch.zeros(2), torch.tensor([1.0, 2.0])).covariance.diagonal()
        tensor([1., 4.], dtype=torch.float64)
        """
        if bool((std < 0).any()):
            raise ValueError(f"standard deviations are not negative, got {std.min().item():g}.")
        return cls(mean, torch.diag(std.to(torch.float64).square()))

    @classmethod
    def isotropic(cls, mean: Float[Tensor, "d"], std: Number) -> "GaussianOracle":
        """The same spread in every direction: the covariance is std²·I.

        Args:
            mean: m, [d].
            std: standard deviation, >= 0.

        Returns:
            The law.

        Raises:
            ValueError: a negative std.

        References:
            Bishop 2006, section 2.3.

        >>> GaussianOracle.isotropic(torch.zeros(2), 0.5).covariance.diagonal()
        tensor([0.2500, 0.2500], dtype=torch.float64)
        """
        return cls.diagonal(mean, torch.full_like(mean, std, dtype=torch.float64))

    @cached_property
    def components(self) -> Components:
        return Components.of(self.mean.new_ones(1), self.mean[None], self.covariance[None])

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.mean, self.covariance

    def mmse(self, alpha: Reals, sigma: Reals) -> Float64[Tensor, "..."]:
        r"""The least denoising loss that there is at a level, which the exact denoiser attains.

        .. math:: E\|x_0 - E[x_0|x_t]\|^2 = \sum_i \frac{\sigma^2 \lambda_i}{\alpha^2 \lambda_i + \sigma^2}

        The sum runs over the d eigenvalues of C: divide by d for a mean over values, multiply by
        alpha²/sigma² for the loss of a noise prediction.

        Args:
            alpha: signal coefficient, >= 0, any shape.
            sigma: noise coefficient, >= 0, a shape that broadcasts with it; above 0 where C is singular.

        Returns:
            The loss, in the broadcast shape.

        Raises:
            ValueError: alpha and sigma both 0, a level without a density.

        References:
            Karras et al. 2022, eq. 2, for the loss; Bishop 2006, eq. 2.117, for the posterior covariance.

        >>> GaussianOracle.isotropic(torch.zeros(3), 1.0).mmse(alpha=1.0, sigma=torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.5000], dtype=torch.float64)
        """
        device = next((v.device for v in (alpha, sigma) if isinstance(v, Tensor)), self.mean.device)
        a, s = (
            torch.as_tensor(value, dtype=torch.float64, device=device)[..., None] for value in (alpha, sigma)
        )
        eigenvalues = self.components.eigenvalues[0].to(device)
        return (s.square() * eigenvalues / variances_at(eigenvalues, a, s)).sum(-1)

    def flow(
        self, x: Float[Tensor, "B *dims"], alpha_t: Reals, sigma_t: Reals, alpha_s: Reals, sigma_s: Reals
    ) -> Float64[Tensor, "B *dims"]:
        r"""Carry points exactly along the probability-flow ODE from the level t to the level s.

        .. math:: \alpha_s m + U \sqrt{\frac{\alpha_s^2\Lambda + \sigma_s^2}{\alpha_t^2\Lambda + \sigma_t^2}}
                  U^\top (x - \alpha_t m)

        The levels need no order, and the path between them does not matter.

        Args:
            x: points at the level t, [B, *].
            alpha_t: signal coefficient of the level the points are at, >= 0, a scalar or [B].
            sigma_t: its noise coefficient, >= 0, a scalar or [B]; above 0 where C is singular.
            alpha_s: signal coefficient of the level to go to, likewise.
            sigma_s: its noise coefficient, likewise.

        Returns:
            The points at the level s, [B, *].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Song et al. 2021, *Score-based generative modeling*, eq. 13; Karras et al. 2022, eq. 4.

        >>> GaussianOracle.isotropic(torch.ones(1), 2.0).flow(torch.tensor([1.0]), 0.0, 1.0, 1.0, 0.0)
        tensor([3.], dtype=torch.float64)
        """
        seen = self._seen(x, alpha_t, sigma_t)
        a, s = (per_sample(value, seen.offsets) for value in (alpha_s, sigma_s))
        stretch = (variances_at(seen.parts.eigenvalues, a, s) / seen.variances).sqrt()
        moved = torch.einsum("kij,bkj->bki", seen.parts.axes, stretch * seen.offsets)
        return (a * seen.parts.means + moved).reshape(x.shape)

    def marginal(self, alpha: Scalar, sigma: Scalar) -> "GaussianOracle":
        r"""The law of x_t at one level, :math:`N(\alpha m, \alpha^2 C + \sigma^2 I)`.

        Args:
            alpha: signal coefficient, >= 0.
            sigma: noise coefficient, >= 0; above 0 where C is singular.

        Returns:
            The law, to be read as one of data.

        Raises:
            ValueError: alpha and sigma both 0, a level without a density.

        References:
            Bishop 2006, eq. 2.115.

        >>> GaussianOracle.isotropic(torch.ones(1), 2.0).marginal(0.5, 1.0).covariance
        tensor([[2.]], dtype=torch.float64)
        """
        a, s = (per_sample(value, self.mean) for value in (alpha, sigma))
        variances_at(self.components.eigenvalues, a, s)
        noise = torch.eye(self.size, dtype=torch.float64, device=s.device) * s.square()
        return GaussianOracle(a * self.mean, a.square() * self.covariance + noise)

    def given(self, y: Float[Tensor, "n"], A: Float[Tensor, "rows d"], noise_std: Number) -> "GaussianOracle":
        r"""The law of x0 after the measurement y = A·x0 + noise_std·n with unit Gaussian n.

        .. math:: N\left(m + G(y - A m),\; C - G A C\right), \quad
                  G = C A^\top (A C A^\top + \mathrm{noise\_std}^2 I)^{-1}

        Args:
            y: the measured values, [n].
            A: the linear operator on the flattened x0, [n, d].
            noise_std: standard deviation of the noise, >= 0; above 0 where A·C·Aᵀ is singular.

        Returns:
            The posterior law.

        Raises:
            ValueError: shapes that do not agree, negative noise_std, noise_std of 0 where A·C·Aᵀ is singular.

        References:
            Bishop 2006, *Pattern recognition and machine learning*, eq. 2.116 and 2.117.

        >>> law = GaussianOracle.isotropic(torch.zeros(2), 1.0)
        >>> law.given(torch.tensor([1.0]), A=torch.tensor([[1.0, 0.0]]), noise_std=1.0).mean
        tensor([0.5000, 0.0000], dtype=torch.float64)
        """
        _, means, covariances = condition(self.components, y, A, noise_std)
        return GaussianOracle(means[0], covariances[0])

    def guided_marginal(
        self, uncond: "GaussianOracle", alpha: Scalar, sigma: Scalar, scale: Number
    ) -> "GaussianOracle":
        r"""The normalised law whose score guidance follows at a level, this law being the conditional one.

        .. math:: P = (1 - \mathrm{scale}) V_u^{-1} + \mathrm{scale}\,V_c^{-1}, \qquad
                  N\left(\alpha m_u + \mathrm{scale}\,P^{-1} V_c^{-1} \alpha (m_c - m_u),\; P^{-1}\right)

        with V the covariance at the level. It is no marginal of a noised law of data: each level has its own.

        Args:
            uncond: the unconditional law.
            alpha: signal coefficient, >= 0.
            sigma: noise coefficient, >= 0; above 0 where a covariance is singular.
            scale: guidance scale; 1 is off.

        Returns:
            The guided law of x_t, to be read as one of data: `log_prob(x_t)` is its density.

        Raises:
            ValueError: P is not positive definite, so that the guided density cannot be normalised; alpha and
                sigma both 0, a level without a density, laws of different d.

        References:
            Ho & Salimans 2022, *Classifier-free diffusion guidance*, section 3.2.

        >>> cond, uncond = (GaussianOracle.isotropic(mean * torch.ones(1), 1.0) for mean in (1.0, 0.0))
        >>> cond.guided_marginal(uncond, alpha=1.0, sigma=0.0, scale=3.0).mean
        tensor([3.], dtype=torch.float64)
        """
        self._same_size(uncond)
        with_, without = self.marginal(alpha, sigma), uncond.marginal(alpha, sigma)
        axes, values = without.components.axes[0], without.components.eigenvalues[0]
        root = axes * values.sqrt() @ axes.T
        # In the basis where V_u is I, P is I + scale·(Q - I) and diagonal with Q.
        precision = with_._precision()
        ratios, basis = eigh(root @ precision @ root)
        shrunk = 1 + scale * (ratios - 1)
        if not bool((shrunk > 0).all()):
            raise ValueError(
                f"the density guided at scale {scale:g} cannot be normalised, because its precision is not "
                f"positive definite; at this level the scale lies strictly between {_bounds(ratios)}."
            )
        columns = root @ basis
        covariance = columns / shrunk @ columns.T
        mean = without.mean + scale * covariance @ precision @ (with_.mean - without.mean)
        return GaussianOracle(mean, (covariance + covariance.T) / 2)

    def kl(self, other: "GaussianOracle") -> Float64[Tensor, ""]:
        r"""The Kullback-Leibler divergence of `other` from this law, in nats.

        .. math:: KL(N_1 \| N_2) = \tfrac12\left(\mathrm{tr}(C_2^{-1} C_1) - d - \log\det(C_2^{-1} C_1)
                  + (m_2 - m_1)^\top C_2^{-1} (m_2 - m_1)\right)

        Compare at a noise level by `a.marginal(alpha, sigma).kl(b.marginal(alpha, sigma))`.

        Args:
            other: the reference law, with a non-singular covariance.

        Returns:
            The divergence, a scalar >= 0; infinite where this law is singular.

        Raises:
            ValueError: `other` is singular, laws of different d.

        References:
            Rasmussen & Williams 2006, *Gaussian processes for machine learning*, eq. A.23.

        >>> GaussianOracle.isotropic(torch.ones(2), 1.0).kl(GaussianOracle.isotropic(torch.zeros(2), 1.0))
        tensor(1., dtype=torch.float64)
        """
        self._same_size(other)
        precision, apart = other._precision(), self.mean - other.mean
        log_det = self.components.eigenvalues.log().sum() - other.components.eigenvalues.log().sum()
        spread = (precision * self.covariance).sum() - self.size - log_det
        return (spread + apart @ precision @ apart) / 2

    def _precision(self) -> Float64[Tensor, "d d"]:
        """The inverse of the covariance."""
        axes, values = self.components.axes[0], self.components.eigenvalues[0]
        if not bool((values > 0).all()):
            raise ValueError(
                "a singular covariance has no inverse; noise the law first, with marginal(alpha, sigma)."
            )
        return axes / values @ axes.T

    def _same_size(self, other: "GaussianOracle") -> None:
        if other.size != self.size:
            raise ValueError(f"the two laws have d = {self.size} and d = {other.size}; they must be equal.")


def _bounds(ratios: Float64[Tensor, "d"]) -> str:
    """The open interval of scales at which all of 1 + scale·(ratios - 1) are positive, in words."""
    slopes = [float(ratio) - 1 for ratio in ratios]
    low = max((-1 / slope for slope in slopes if slope > 0), default=float("-inf"))
    high = min((-1 / slope for slope in slopes if slope < 0), default=float("inf"))
    return f"{low:.6g} and {high:.6g}"
