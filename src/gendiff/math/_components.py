"""The Gaussians that a law is made of: checked, diagonalised, seen at a level, and conditioned."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import pad

from gendiff._checks import expand_right, positive_batch

Number: TypeAlias = float | int  # beartype reads float literally
Reals: TypeAlias = Float[Tensor, "..."] | Number
Scalar: TypeAlias = Float[Tensor, ""] | Number
TOLERANCE = 1e-12  # relative: asymmetry, negative eigenvalues and weights beyond it are errors, not rounding


@dataclass(frozen=True, eq=False)
class Components:
    """K Gaussians in their eigenbases; `eq=False` because == of two tensors has no truth value."""

    log_weights: Float64[Tensor, "K"]
    means: Float64[Tensor, "K d"]
    eigenvalues: Float64[Tensor, "K d"]
    axes: Float64[Tensor, "K d d"]

    @classmethod
    def of(
        cls,
        weights: Float64[Tensor, "K"],
        means: Float64[Tensor, "K d"],
        covariances: Float64[Tensor, "K d d"],
    ) -> "Components":
        """Diagonalise the covariances, or say which one is none."""
        eigenvalues, axes = eigh(covariances)
        diagonal = covariances.diagonal(dim1=-2, dim2=-1)
        # A diagonal matrix is its own answer; eigh may blur its small values beside large ones.
        plain = (covariances == torch.diag_embed(diagonal)).all(-1).all(-1)[:, None]
        identity = torch.eye(means.shape[1], dtype=torch.float64, device=means.device)
        eigenvalues = torch.where(plain, diagonal, eigenvalues)
        axes = torch.where(plain[..., None], identity, axes)
        largest = eigenvalues.abs().amax(-1, keepdim=True)
        if bool((eigenvalues < -TOLERANCE * largest).any()):
            raise ValueError(
                f"a covariance is positive semi-definite, but the smallest eigenvalue is "
                f"{eigenvalues.min().item():g}; build it as R·Rᵀ, or clip the eigenvalues at 0."
            )
        # Eigenvalues within rounding of zero are zero, so that a singular covariance is recognised as one.
        noise = torch.where(plain, 0.0, means.shape[1] * torch.finfo(torch.float64).eps * largest)
        eigenvalues = torch.where(eigenvalues <= noise, 0.0, eigenvalues)
        return cls(weights.log(), means, eigenvalues, axes)

    def to(self, device: torch.device) -> "Components":
        """The same on another device."""
        return Components(
            self.log_weights.to(device),
            self.means.to(device),
            self.eigenvalues.to(device),
            self.axes.to(device),
        )

    def roots(self) -> Float64[Tensor, "K d d"]:
        """R with R·Rᵀ = C."""
        return self.axes * self.eigenvalues.sqrt()[:, None]


@dataclass(frozen=True, eq=False)
class Marginal:
    """The components as a batch of points sees them at their levels."""

    parts: Components
    alpha: Float64[Tensor, "b 1 1"]
    sigma: Float64[Tensor, "b 1 1"]
    variances: Float64[Tensor, "b K d"]  # of x_t along the axes
    offsets: Float64[Tensor, "B K d"]  # x_t - alpha·m along the axes

    @classmethod
    def of(cls, parts: Components, x: Float64[Tensor, "B d"], alpha: Reals, sigma: Reals) -> "Marginal":
        """Centre the points on every component and turn them into its axes."""
        a, s = per_sample(alpha, x[:, None]), per_sample(sigma, x[:, None])
        variances = variances_at(parts.eigenvalues, a, s)
        offsets = torch.einsum("kij,bki->bkj", parts.axes, x[:, None] - a * parts.means)
        return cls(parts, a, s, variances, offsets)

    def log_joint(self) -> Float64[Tensor, "B K"]:
        """Log of weight times density of every component."""
        exponent = self.offsets.square() / self.variances + (2 * math.pi * self.variances).log()
        return self.parts.log_weights - exponent.sum(-1) / 2

    def shares(self) -> Float64[Tensor, "B K"]:
        """The posterior probability of every component."""
        return self.log_joint().softmax(-1)

    def average(self, along_axes: Float64[Tensor, "B K d"]) -> Float64[Tensor, "B d"]:
        """Turn vectors back from the axes and average them by share."""
        return torch.einsum("bk,kij,bkj->bi", self.shares(), self.parts.axes, along_axes)

    def x0(self) -> Float64[Tensor, "B K d"]:
        """The posterior mean within every component."""
        gain = self.alpha * self.parts.eigenvalues / self.variances
        return self.parts.means + torch.einsum("kij,bkj->bki", self.parts.axes, gain * self.offsets)


def float64_copy(tensor: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """A float64 copy without history, so that a frozen law cannot be changed from outside."""
    return tensor.detach().to(torch.float64, copy=True)


def check_gaussians(means: Float64[Tensor, "... d"], covariances: Float64[Tensor, "..."]) -> None:
    """Raise a ValueError unless the covariances are finite, symmetric and fit the means."""
    size = means.shape[-1]
    if size == 0 or covariances.shape != (*means.shape, size):
        raise ValueError(
            f"a mean of shape {tuple(means.shape)} goes with a covariance of shape {(*means.shape, size)} "
            f"and d >= 1, got {tuple(covariances.shape)}; flatten samples to d values."
        )
    if not bool(torch.isfinite(means).all() and torch.isfinite(covariances).all()):
        raise ValueError("a mean or covariance holds NaN or infinity; all values must be finite.")
    asymmetry = (covariances - covariances.mT).abs().max()
    if bool(asymmetry > TOLERANCE * covariances.abs().max()):
        raise ValueError(
            f"a covariance is symmetric, but C - Cᵀ reaches {asymmetry.item():g}; "
            f"give (C + Cᵀ)/2 if that is rounding."
        )


def flat(x: Float[Tensor, "B *dims"], size: int) -> Float64[Tensor, "B d"]:
    """A batch as float64 vectors of d values, or a ValueError that says why it is not one."""
    positive_batch(x, "x")
    if x[0].numel() != size:
        raise ValueError(
            f"samples of shape {tuple(x.shape[1:])} have {x[0].numel()} values, but the law has d = {size}; "
            f"give batches [B, *] with d values a sample."
        )
    return x.reshape(len(x), size).to(torch.float64)


def per_sample(value: Reals, like: Float[Tensor, "B *dims"]) -> Float64[Tensor, "..."]:
    """A number, a scalar or one value per sample as float64 that broadcasts over `like`."""
    return expand_right(torch.as_tensor(value, dtype=torch.float64, device=like.device), like)


def variances_at(
    eigenvalues: Float64[Tensor, "..."], alpha: Float64[Tensor, "..."], sigma: Float64[Tensor, "..."]
) -> Float64[Tensor, "..."]:
    """alpha²·eigenvalues + sigma², where that is the variance of a density; CUDA tensors are not read."""
    variances = alpha.square() * eigenvalues + sigma.square()
    if variances.device.type != "cpu":
        return variances
    if not bool((alpha >= 0).all() and (sigma >= 0).all() and torch.isfinite(variances).all()):
        raise ValueError(
            f"alpha and sigma are finite and not negative, got alpha in [{alpha.min().item():g}, "
            f"{alpha.max().item():g}] and sigma in [{sigma.min().item():g}, {sigma.max().item():g}]."
        )
    if bool(((alpha == 0) & (sigma == 0)).any()):
        raise ValueError("alpha and sigma are both 0, which is no level: at least one of them is positive.")
    if not bool((variances > 0).all()):
        raise ValueError(
            "x_t has no density at sigma = 0, because a covariance is singular; give a sigma above 0, "
            "or a covariance without zero eigenvalues."
        )
    return variances


def condition(
    parts: Components, y: Float[Tensor, "n"], A: Float[Tensor, "rows d"], noise_std: Number
) -> tuple[Float64[Tensor, "K"], Float64[Tensor, "K d"], Float64[Tensor, "K d d"]]:
    """Log evidence, posterior means and covariances of every component under y = A·x0 + noise_std·n.

    With C = R·Rᵀ and A·R = P·S·Qᵀ everything is diagonal, and covariances come out positive semi-definite.
    """
    size, device = parts.means.shape[1], parts.means.device
    if y.ndim != 1 or A.shape != (len(y), size) or len(y) == 0:
        raise ValueError(
            f"a measurement y [n] = A [n, {size}] · x0 + noise needs n >= 1, got y of shape {tuple(y.shape)} "
            f"and A of shape {tuple(A.shape)}."
        )
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std is a finite standard deviation, not negative, got {noise_std}.")
    operator, roots = A.to(device, torch.float64), parts.roots()
    left, singular, right = _svd(operator @ roots)
    rank = singular.shape[1]
    noise = float(noise_std) ** 2
    observed = pad(singular, (0, len(y) - rank)).square() + noise
    if noise == 0 and bool((observed <= TOLERANCE**2 * observed[:, :1]).any()):
        raise ValueError(
            "noise_std = 0 needs A·C·Aᵀ to be non-singular, and it is singular: drop redundant rows of A, "
            "or give a noise_std above 0."
        )
    misfit = torch.einsum("kji,kj->ki", left, y.to(device, torch.float64) - parts.means @ operator.T)
    log_evidence = -(misfit.square() / observed + (2 * math.pi * observed).log()).sum(-1) / 2
    basis = roots @ right.mT
    gain = singular / observed[:, :rank]
    means = parts.means + torch.einsum("kij,kj->ki", basis[:, :, :rank], gain * misfit[:, :rank])
    # The share of the variance that is left: all of it along directions that the measurement does not see.
    left_over = pad(noise / observed[:, :rank], (0, size - rank), value=1.0)
    covariances = torch.einsum("kij,kj,klj->kil", basis, left_over, basis)
    return log_evidence, means, (covariances + covariances.mT) / 2


def eigh(matrices: Float64[Tensor, "*K d d"]) -> tuple[Float64[Tensor, "*K d"], Float64[Tensor, "*K d d"]]:
    """Eigenvalues, rising, and eigenvectors, in columns; torch ships it without types."""
    return torch.linalg.eigh(matrices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _svd(
    matrices: Float64[Tensor, "K n d"],
) -> tuple[Float64[Tensor, "K n n"], Float64[Tensor, "K rank"], Float64[Tensor, "K d d"]]:
    """P, the diagonal of S, and Qᵀ of P·S·Qᵀ, the square ones complete; torch ships it without types."""
    return torch.linalg.svd(matrices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
