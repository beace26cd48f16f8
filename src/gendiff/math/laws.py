r"""Laws of data that are known exactly at every noise level.

For x0 drawn from a mixture of Gaussians :math:`\sum_k w_k N(m_k, C_k)` and x_t = alpha·x0 + sigma·eps
everything follows from the eigenvalues of :math:`C_k = U_k \Lambda_k U_k^\top`, taken once. At a level a
component is

.. math:: N(\alpha m_k, V_k), \quad V_k = U_k (\alpha^2 \Lambda_k + \sigma^2) U_k^\top, \qquad
          r_k(x_t) \propto w_k N(x_t; \alpha m_k, V_k) \text{ its share in a point.}

Nothing is approximated, so these laws are what solvers, losses and guidance are measured against.

Results are float64 whatever the dtype of the arguments, on the device of `x_t`. Levels are numbers, scalars
or one value per sample, not negative. A level without a density (sigma = 0 where a covariance is singular) is
refused on CPU; CUDA tensors are not read, because that would synchronise: there the result is not finite.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff.math._components import Components, Marginal, Number, Reals, Scalar, flat, per_sample


class Law(ABC):
    """A law of the data x0 in R^d whose law at every noise level is known; final classes say which.

    Batches are [B, *] with d values a sample, and results keep that shape. Equality is by content.
    """

    @cached_property
    @abstractmethod
    def components(self) -> Components:
        """The Gaussians that the law is made of."""

    @abstractmethod
    def flow(
        self, x: Float[Tensor, "B *dims"], alpha_t: Reals, sigma_t: Reals, alpha_s: Reals, sigma_s: Reals
    ) -> Float64[Tensor, "B *dims"]:
        """Carry points along the probability-flow ODE from the level t to the level s."""

    @abstractmethod
    def given(self, y: Float[Tensor, "n"], A: Float[Tensor, "rows d"], noise_std: Number) -> "Law":
        """The law of x0 after the measurement y = A·x0 + noise_std·n."""

    @abstractmethod
    def marginal(self, alpha: Scalar, sigma: Scalar) -> "Law":
        """The law of x_t at one level, as a law of data of its own."""

    @abstractmethod
    def _tensors(self) -> tuple[Tensor, ...]:
        """What the law is made from, and what equality and hash compare."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Law) or type(other) is not type(self):
            return NotImplemented
        return all(
            torch.equal(mine, theirs) for mine, theirs in zip(self._tensors(), other._tensors(), strict=True)
        )

    def __hash__(self) -> int:
        # Extremes do not depend on the order of summation, and 0.0 and -0.0, which are equal, hash alike.
        return hash((type(self), *((float(tensor.min()), float(tensor.max())) for tensor in self._tensors())))

    @property
    @final
    def size(self) -> int:
        """d, the number of values of a sample."""
        return self.components.means.shape[1]

    @final
    def x0(self, x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals) -> Float64[Tensor, "B *dims"]:
        r"""The exact denoiser, the posterior mean of the data.

        .. math:: E[x_0 | x_t] = \sum_k r_k(x_t) \left(m_k + \alpha C_k V_k^{-1} (x_t - \alpha m_k)\right)

        At alpha = 0 this is the mean of the data, at sigma = 0 it is x_t/alpha.

        Args:
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.

        Returns:
            The posterior mean, [B, *], which no denoiser undercuts in mean squared error.

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Karras et al. 2022, appendix B.3, which is this with C_k = 0.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> two = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
        >>> two.x0(torch.tensor([0.0, 1.0]), alpha=1.0, sigma=1.0)  # tanh(x_t)
        tensor([0.0000, 0.7616], dtype=torch.float64)
        """
        seen = self._seen(x_t, alpha, sigma)
        return torch.einsum("bk,bki->bi", seen.shares(), seen.x0()).reshape(x_t.shape)

    @final
    def eps(self, x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals) -> Float64[Tensor, "B *dims"]:
        r"""The exact noise, :math:`E[\epsilon|x_t] = \sum_k r_k \sigma V_k^{-1} (x_t - \alpha m_k)`.

        At alpha = 0 this is x_t/sigma, at sigma = 0 it is 0. It is computed without x0, so nothing cancels.

        Args:
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.

        Returns:
            The posterior mean of the noise, [B, *].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Ho et al. 2020, section 3.2.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> two = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
        >>> two.eps(torch.tensor([0.0, 1.0]), alpha=1.0, sigma=1.0)  # x_t - tanh(x_t)
        tensor([0.0000, 0.2384], dtype=torch.float64)
        """
        seen = self._seen(x_t, alpha, sigma)
        return seen.average(seen.sigma * seen.offsets / seen.variances).reshape(x_t.shape)

    @final
    def score(
        self, x_t: Float[Tensor, "B *dims"], alpha: Reals = 1.0, sigma: Reals = 0.0
    ) -> Float64[Tensor, "B *dims"]:
        r"""The gradient of `log_prob`, :math:`\nabla\log p(x_t) = -\sum_k r_k V_k^{-1}(x_t - \alpha m_k)`.

        Tweedie's formula ties it to the denoiser: eps = -sigma·score and alpha·x0 = x_t + sigma²·score.

        Args:
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.

        Returns:
            The score, [B, *].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Efron 2011, *Tweedie's formula and selection bias*, eq. 1.4; Vincent 2011, *A connection between
            score matching and denoising autoencoders*, section 4; Karras et al. 2022, eq. 3.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> one = MixtureOracle(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> one.score(torch.tensor([1.0]), alpha=1.0, sigma=1.0)
        tensor([-0.5000], dtype=torch.float64)
        """
        seen = self._seen(x_t, alpha, sigma)
        return -seen.average(seen.offsets / seen.variances).reshape(x_t.shape)

    @final
    def log_prob(
        self, x_t: Float[Tensor, "B *dims"], alpha: Reals = 1.0, sigma: Reals = 0.0
    ) -> Float64[Tensor, "B"]:
        r"""The exact log density at a level, :math:`\log\sum_k w_k N(x_t; \alpha m_k, V_k)`.

        With alpha = 1 and sigma = 0, the default, it is that of the data, so the NLL is -log_prob(x0).

        Args:
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.

        Returns:
            Natural logarithms of the density over all d values, [B].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Karras et al. 2022, appendix B.3.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> one = MixtureOracle(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> one.log_prob(torch.zeros(1, 2))  # -log(2π)
        tensor([-1.8379], dtype=torch.float64)
        """
        return self._seen(x_t, alpha, sigma).log_joint().logsumexp(-1)

    @final
    def covariance_of_x0(
        self, x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals
    ) -> Float64[Tensor, "B d d"]:
        r"""The exact uncertainty about the data that a noisy sample leaves.

        .. math:: Cov[x_0 | x_t] = \sum_k r_k \left(\sigma^2 C_k V_k^{-1} + \delta_k \delta_k^\top\right),
                  \quad \delta_k = E_k[x_0 | x_t] - E[x_0 | x_t]

        It is also the Jacobian of the denoiser times sigma²/alpha, and its trace is the least loss at x_t.

        Args:
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.

        Returns:
            Covariances over the d flattened values, [B, d, d].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Efron 2011, eq. 2.8, for the second moment of Tweedie's formula.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> two = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))
        >>> two.covariance_of_x0(torch.tensor([0.0]), alpha=1.0, sigma=1.0)
        tensor([[[1.]]], dtype=torch.float64)
        """
        seen = self._seen(x_t, alpha, sigma)
        share, centres, axes = seen.shares(), seen.x0(), seen.parts.axes
        inner = seen.sigma.square() * seen.parts.eigenvalues / seen.variances
        apart = centres - torch.einsum("bk,bki->bi", share, centres)[:, None]
        within = torch.einsum("bk,kij,bkj,klj->bil", share, axes, inner.expand_as(apart), axes)
        return within + torch.einsum("bk,bki,bkj->bij", share, apart, apart)

    @final
    def draw(self, count: int, generator: torch.Generator) -> Float64[Tensor, "count d"]:
        """Draw x0 exactly: a component by its weight, then m + R·n with R·Rᵀ = C and n unit Gaussian.

        Args:
            count: number of draws, >= 1.
            generator: the randomness, which is advanced; the draws are on its device.

        Returns:
            Independent draws, [count, d].

        Raises:
            ValueError: count below 1.

        References:
            Bishop 2006, *Pattern recognition and machine learning*, section 11.1.4, for m + R·n.

        >>> from gendiff.math.gaussians import MixtureOracle
        >>> point = MixtureOracle(torch.ones(1), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, 2))
        >>> point.draw(1, torch.Generator().manual_seed(0))
        tensor([[1., 2.]], dtype=torch.float64)
        """
        if count < 1:
            raise ValueError(f"draw needs a count of at least 1, got {count}.")
        device, parts = generator.device, self.components.to(generator.device)
        which = torch.multinomial(parts.log_weights.exp(), count, replacement=True, generator=generator)
        normal = torch.randn(count, self.size, dtype=torch.float64, device=device, generator=generator)
        return parts.means[which] + torch.einsum("bij,bj->bi", parts.roots()[which], normal)

    @final
    def guided_score(
        self, uncond: "Law", x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals, scale: Reals
    ) -> Float64[Tensor, "B *dims"]:
        r"""The score that classifier-free guidance follows, this law being the conditional one.

        .. math:: \nabla\log p_u + \mathrm{scale}\,(\nabla\log p_c - \nabla\log p_u)

        Args:
            uncond: the unconditional law.
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.
            scale: guidance scale, a scalar or [B]; 1 is off.

        Returns:
            The guided score, [B, *], the gradient of `guided_log_prob`.

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Ho & Salimans 2022, *Classifier-free diffusion guidance*, eq. 6, whose w is scale - 1.

        >>> from gendiff.math.gaussians import GaussianOracle
        >>> cond, uncond = (GaussianOracle.isotropic(mean * torch.ones(1), 1.0) for mean in (1.0, 0.0))
        >>> cond.guided_score(uncond, torch.tensor([0.0]), alpha=1.0, sigma=0.0, scale=3.0)
        tensor([3.], dtype=torch.float64)
        """
        without, weight = uncond.score(x_t, alpha, sigma), per_sample(scale, x_t)
        return without + weight * (self.score(x_t, alpha, sigma) - without)

    @final
    def guided_log_prob(
        self, uncond: "Law", x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals, scale: Reals
    ) -> Float64[Tensor, "B"]:
        r"""The log of :math:`p_u^{1-\mathrm{scale}} p_c^{\mathrm{scale}}` at a level, not normalised.

        This law is the conditional one. `GaussianOracle.guided_marginal` normalises the product of Gaussians,
        where that can be done. Every level has its own product, and noising one gives no other.

        Args:
            uncond: the unconditional law.
            x_t: noisy data, [B, *].
            alpha: signal coefficient, >= 0, a scalar or [B].
            sigma: noise coefficient, >= 0, a scalar or [B]; above 0 where a covariance is singular.
            scale: guidance scale, a scalar or [B]; 1 is off.

        Returns:
            The log density up to a constant of the level, [B].

        Raises:
            ValueError: alpha and sigma both 0, a level without a density, shapes that do not agree.

        References:
            Ho & Salimans 2022, section 3.2.

        >>> from gendiff.math.gaussians import GaussianOracle
        >>> cond, uncond = (GaussianOracle.isotropic(mean * torch.ones(1), 1.0) for mean in (1.0, 0.0))
        >>> cond.guided_log_prob(uncond, torch.tensor([1.0]), alpha=1.0, sigma=0.0, scale=2.0)
        tensor([-0.4189], dtype=torch.float64)
        """
        without = uncond.log_prob(x_t, alpha, sigma)
        weight = per_sample(scale, without)
        return without + weight * (self.log_prob(x_t, alpha, sigma) - without)

    @final
    def _seen(self, x_t: Float[Tensor, "B *dims"], alpha: Reals, sigma: Reals) -> Marginal:
        """This law from the points x_t, flattened, at their levels."""
        x = flat(x_t, self.size)
        return Marginal.of(self.components.to(x.device), x, alpha, sigma)
