r"""The variational bound, term by term, in bits per dimension (Ho et al. 2020, eq. 5).

.. math:: -\log_2 p(x_0) \le L_T + \sum_{t>1} L_{t-1} + L_0
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import same_shape, working_dtype
from gendiff.math.ddpm.equations import AlphaBar, level_of, posterior, step_coefficients
from gendiff.math.ddpm.step import MIN_LOG_VARIANCE
from gendiff.math.numeric import log_ndtr

LOG2 = math.log(2)


def normal_kl(
    mean_1: Float[Tensor, "..."],
    log_variance_1: Float[Tensor, "..."],
    mean_2: Float[Tensor, "..."],
    log_variance_2: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    r"""KL divergence of two Gaussians, elementwise, in nats.

    .. math:: \tfrac12\left(\log\frac{v_2}{v_1} - 1 + \frac{v_1}{v_2} + \frac{(\mu_1-\mu_2)^2}{v_2}\right)

    >>> normal_kl(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0))
    tensor(0.5000)
    """
    ratio = log_variance_1 - log_variance_2
    return (torch.expm1(ratio) - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp()) / 2


def discretised_nll(
    x: Float[Tensor, "B *dims"],
    mean: Float[Tensor, "B *dims"],
    log_variance: Float[Tensor, "..."],
    bins: int = 256,
) -> Float[Tensor, "B *dims"]:
    r"""-log of the mass that a Gaussian puts on the bin of each value, in nats (Ho et al. 2020, eq. 13).

    Args:
        x: data on the grid of `bins` values from -1 to 1, [B, *]; the outer bins reach to infinity.
        mean: mean of the Gaussian, [B, *].
        log_variance: its log variance, broadcast over x.
        bins: number of values that a datum can take, at least 2.

    >>> total = sum(discretised_nll(torch.tensor([v]), torch.tensor([0.3]), torch.tensor(-3.0), 5).neg().exp()
    ...             for v in (-1.0, -0.5, 0.0, 0.5, 1.0))
    >>> round(total.item(), 6)
    1.0
    """
    same_shape(x=x, mean=mean)
    if bins < 2:
        raise ValueError(f"data on a grid needs at least 2 bins, got {bins}.")
    half = 1 / (bins - 1)
    scale = (-log_variance / 2).exp()
    lower, upper = scale * (x - half - mean), scale * (x + half - mean)
    # both tails of a symmetric law: work on the side where the mass is small and does not cancel
    flip = lower + upper > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    edge_low, edge_high = x < -1 + half, x > 1 - half
    open_low, open_high = torch.where(flip, edge_high, edge_low), torch.where(flip, edge_low, edge_high)
    log_upper = torch.where(open_high, 0.0, log_ndtr(upper))
    log_lower = torch.where(open_low, -math.inf, log_ndtr(lower))
    return -(log_upper + torch.log1p(-(log_lower - log_upper).exp()))


def prior_term(
    x0: Float[Tensor, "B *dims"], alpha_bar_T: AlphaBar, *, log: bool = False
) -> Float[Tensor, "B"]:
    r"""L_T: KL(q(x_T | x0) ‖ N(0, 1)) per sample, in bits per dimension (Ho et al. 2020, eq. 5).

    >>> prior_term(torch.zeros(1, 4), 0.0)
    tensor([0.])
    """
    x0 = x0.to(working_dtype(x0))
    alpha, sigma = level_of(alpha_bar_T, log=log).like(x0, x0.dtype)
    zero = torch.zeros_like(x0)
    return _bits(normal_kl(alpha * x0, zero + 2 * sigma.log(), zero, zero))


def vlb_term(
    x0: Float[Tensor, "B *dims"],
    x_t: Float[Tensor, "B *dims"],
    mean: Float[Tensor, "B *dims"],
    log_variance: Float[Tensor, "..."],
    alpha_bar_t: AlphaBar,
    alpha_bar_s: AlphaBar,
    *,
    bins: int = 256,
    log: bool = False,
) -> Float[Tensor, "B"]:
    r"""L_{t-1}, or L_0 where s is the data, per sample, in bits per dimension.

    :math:`L_{t-1} = D_{KL}(q(x_s|x_t,x_0)\,\|\,p(x_s|x_t))`, and :math:`L_0 = -\log p(x_0|x_1)` with the
    discretised decoder. With the mean detached, this is L_vlb of the hybrid objective.

    Args:
        x0: clean data in [-1, 1], [B, *].
        x_t: noised data, [B, *].
        mean: mean of p(x_s | x_t), [B, *], as `step` gives it.
        log_variance: its log variance. For L_0 the lower bound of `fixed_small` and `learned_range` is 0:
            give the clipped one of `Tables`, or `ddpm.log_variance` the coefficients with it as variance.
        alpha_bar_t: ᾱ_t, scalar or [B].
        alpha_bar_s: ᾱ_s > ᾱ_t, scalar or [B]; 1 is the data.
        bins: number of values that a datum can take.
        log: whether both levels are given as their logarithms.

    References:
        Ho et al. 2020, eq. 5, 8, 13; Nichol & Dhariwal 2021, eq. 4–7 and 16.

    >>> q_mean, q_variance = posterior(torch.zeros(1, 4), torch.ones(1, 4), 0.2, 0.5)
    >>> vlb_term(torch.zeros(1, 4), torch.ones(1, 4), q_mean, q_variance.log(), 0.2, 0.5)
    tensor([0.])
    """
    same_shape(x0=x0, x_t=x_t, mean=mean)
    true_mean, true_variance = posterior(x0, x_t, alpha_bar_t, alpha_bar_s, log=log)
    true_log_variance = true_variance.log().clamp(min=MIN_LOG_VARIANCE)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    to_data = (step_coefficients(alpha_bar_t, alpha_bar_s, log=log).variance == 0).expand(len(x0))
    return torch.where(to_data, _bits(discretised_nll(x0, mean, log_variance, bins)), _bits(kl))


def _bits(nats: Float[Tensor, "B *dims"]) -> Float[Tensor, "B"]:
    return nats.flatten(1).mean(1) / LOG2
