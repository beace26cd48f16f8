r"""The reference equations of denoising diffusion (Ho et al. 2020; Nichol & Dhariwal 2021), for any s < t.

With :math:`\alpha = \bar\alpha_t/\bar\alpha_s` and :math:`\beta = 1 - \alpha` the step from t to s has

.. math::
    q(x_t \mid x_s) &= \mathcal N(\sqrt{\alpha}\,x_s,\ \beta)  &\text{(eq. 2)} \\
    q(x_s \mid x_0) &= \mathcal N(\sqrt{\bar\alpha_s}\,x_0,\ 1 - \bar\alpha_s)  &\text{(eq. 4)} \\
    q(x_s \mid x_t, x_0) &= \mathcal N(\tilde\mu,\ \tilde\beta)  &\text{(eq. 6)}

The last is the product of the first two as functions of x_s. Precisions add, and so do
precision-weighted means:

.. math::
    \frac1{\tilde\beta} &= \frac{\alpha}{\beta} + \frac1{1-\bar\alpha_s}
        = \frac{\alpha(1-\bar\alpha_s) + \beta}{\beta(1-\bar\alpha_s)}
        = \frac{1-\bar\alpha_t}{\beta(1-\bar\alpha_s)} \\
    \tilde\mu &= \tilde\beta
        \left(\frac{\sqrt\alpha\,x_t}{\beta} + \frac{\sqrt{\bar\alpha_s}\,x_0}{1-\bar\alpha_s}\right)
        = \frac{\sqrt{\bar\alpha_s}\,\beta}{1-\bar\alpha_t}\,x_0
        + \frac{\sqrt\alpha\,(1-\bar\alpha_s)}{1-\bar\alpha_t}\,x_t
        &\text{(eq. 7)}

since :math:`\alpha(1-\bar\alpha_s) + \beta = \alpha - \bar\alpha_t + 1 - \alpha = 1 - \bar\alpha_t`. The
short form that articles print, :math:`\tilde\mu = \sqrt{\bar\alpha_s}\,x_0\,c_1 + \sqrt\alpha\,x_t\,c_2`, is
the same line with

.. math:: c_1 = \frac{\beta}{1-\bar\alpha_t},\qquad c_2 = \frac{1-\bar\alpha_s}{1-\bar\alpha_t},\qquad
          c_1 + \alpha\,c_2 = 1,\qquad \tilde\beta = c_2\,\beta

**Precision.** Everything is computed from log ᾱ with expm1, in float64: relative error below 1e-12. A
function that is given ᾱ itself cannot do better than about 4·eps/(1 - α), or 4·eps/(1 - ᾱ_s) where that is
more, eps = 2.2e-16, because ᾱ has been rounded: 1e-11 between neighbours of a table where β is 1e-4.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import expand_right, same_shape, working_dtype
from gendiff.math.numeric import numbers
from gendiff.math.predictions import Prediction
from gendiff.math.schedules import Level, Value

AlphaBar: TypeAlias = Value  # of one step, or of one step per sample


class Coefficients(NamedTuple):
    """The step from t to s in float64: the posterior mean is `x0·(data) + x_t·(noised data)`, its variance β̃.

    `beta` is the variance β of the step the other way, from s to t.
    """

    x0: Float64[Tensor, "..."]
    x_t: Float64[Tensor, "..."]
    variance: Float64[Tensor, "..."]
    beta: Float64[Tensor, "..."]


def coefficients(log_alpha_bar_t: AlphaBar, log_alpha_bar_s: AlphaBar) -> Coefficients:
    r"""The coefficients of eq. 6 and 7 for the step from t to s, from log ᾱ: relative error below 1e-12.

    Args:
        log_alpha_bar_t: log ᾱ_t, scalar or [B], in [-inf, 0); -inf is pure noise.
        log_alpha_bar_s: log ᾱ_s, scalar or [B], in (log ᾱ_t, 0]; 0 is the data.

    Returns:
        :math:`\sqrt{\bar\alpha_s}\beta/(1-\bar\alpha_t)`,
        :math:`\sqrt\alpha(1-\bar\alpha_s)/(1-\bar\alpha_t)`,
        :math:`\tilde\beta = \beta(1-\bar\alpha_s)/(1-\bar\alpha_t)` and
        :math:`\beta = 1-\bar\alpha_t/\bar\alpha_s`.

    Raises:
        ValueError: if s is not less noisy than t (checked on a CPU only).

    >>> [round(value.item(), 4) for value in coefficients(-2.0, 0.0)]  # a step to the data is the data
    [1.0, 0.0, 0.0, 0.8647]
    """
    log_t, log_s = _float64(log_alpha_bar_t), _float64(log_alpha_bar_s)
    return _coefficients(log_t, log_s, log_t - log_s)


def _coefficients(
    log_t: Float64[Tensor, "..."], log_s: Float64[Tensor, "..."], log_alpha: Float64[Tensor, "..."]
) -> Coefficients:
    if log_alpha.device.type == "cpu" and not bool(((log_alpha < 0) & (log_s <= 0)).all()):
        raise ValueError(
            f"a step goes from t to a less noisy s: it needs ᾱ_t < ᾱ_s <= 1, got log ᾱ_t = {numbers(log_t)} "
            f"and log ᾱ_s = {numbers(log_s)}."
        )
    beta = -torch.expm1(log_alpha)
    c1 = torch.expm1(log_alpha) / torch.expm1(log_t)
    c2 = torch.expm1(log_s) / torch.expm1(log_t) + 0.0  # at the data +0, where the quotient is -0
    return Coefficients((log_s / 2).exp() * c1, (log_alpha / 2).exp() * c2, c2 * beta, beta)


def step_coefficients(alpha_bar_t: AlphaBar, alpha_bar_s: AlphaBar, *, log: bool = False) -> Coefficients:
    """`coefficients` from ᾱ, or from log ᾱ with `log=True`.

    >>> round(step_coefficients(0.25, 0.5).beta.item(), 4)
    0.5
    """
    if log:
        return coefficients(alpha_bar_t, alpha_bar_s)
    bar_t, bar_s = _float64(alpha_bar_t), _float64(alpha_bar_s)
    # the difference of neighbours is exact, which that of their rounded logs is not; far apart the ratio is
    neighbours = torch.log1p((bar_t - bar_s) / bar_s)
    log_alpha = torch.where(2 * bar_t > bar_s, neighbours, (bar_t / bar_s).log())
    return _coefficients(bar_t.log(), bar_s.log(), log_alpha)


def transition(level_t: Level, level_s: Level) -> Coefficients:
    r"""The coefficients of q(x_s | x_t, x0) for any (alpha, sigma), variance preserving or not.

    Dividing x_t by :math:`r_t = \sqrt{\alpha_t^2 + \sigma_t^2}` makes the process variance preserving, with
    :math:`\log\bar\alpha_t = -\log(1 + \sigma_t^2/\alpha_t^2)`, for which eq. 6 and 7 hold.
    The returned β is the variance of q(x_t | x_s).

    >>> two, one = (Level(torch.tensor(1.0), torch.tensor(sigma)) for sigma in (2.0, 1.0))
    >>> [round(value.item(), 4) for value in transition(two, one)]  # (4 - 1)/4, 1/4, 1·(4 - 1)/4, 4 - 1
    [0.75, 0.25, 0.75, 3.0]
    """
    (log_t, r_t), (log_s, r_s) = (_as_preserving(level) for level in (level_t, level_s))
    c = coefficients(log_t, log_s)
    return Coefficients(c.x0 * r_s, c.x_t * (r_s / r_t), c.variance * r_s**2, c.beta * r_t**2)


def _as_preserving(level: Level) -> tuple[Tensor, Tensor]:
    """Log ᾱ of the variance-preserving process with the same SNR, and the factor r to it."""
    alpha, sigma = _float64(level.alpha), _float64(level.sigma)
    return -torch.log1p((sigma / alpha).square()), torch.hypot(alpha, sigma)


def level_of(alpha_bar: AlphaBar, *, log: bool = False) -> Level:
    """(sqrt(ᾱ), sqrt(1 - ᾱ)) in float64, from ᾱ, or from log ᾱ with `log=True`.

    >>> level_of(0.36).sigma
    tensor(0.8000, dtype=torch.float64)
    """
    value = _float64(alpha_bar)
    low, high = (-math.inf, 0.0) if log else (0.0, 1.0)
    if value.device.type == "cpu" and not bool(((value >= low) & (value <= high)).all()):
        raise ValueError(
            f"{'log ᾱ' if log else 'ᾱ'} lies in [{low:g}, {high:g}], got {numbers(value)}; a level is given "
            f"as ᾱ, or as its logarithm with log=True."
        )
    if log:
        return Level((value / 2).exp(), (-torch.expm1(value)).sqrt())
    return Level(value.sqrt(), (1 - value).sqrt())


def q_sample(
    x0: Float[Tensor, "B *dims"], eps: Float[Tensor, "B *dims"], alpha_bar: AlphaBar, *, log: bool = False
) -> Float[Tensor, "B *dims"]:
    r"""Noise the data in one go: :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon`.

    Args:
        x0: clean data, [B, *].
        eps: unit Gaussian noise, [B, *].
        alpha_bar: ᾱ_t in [0, 1], scalar or [B]; log ᾱ_t where `log` is set.
        log: whether the level is given as its logarithm.

    Returns:
        x_t, [B, *], at least float32.

    References:
        Ho et al. 2020, *Denoising diffusion probabilistic models*, eq. 4.

    >>> q_sample(torch.ones(1, 2), torch.zeros(1, 2), 0.25)
    tensor([[0.5000, 0.5000]])
    """
    same_shape(x0=x0, eps=eps)
    dtype = working_dtype(x0, eps)
    alpha, sigma = level_of(alpha_bar, log=log).like(x0, dtype)
    return alpha * x0.to(dtype) + sigma * eps.to(dtype)


def predict_x0(
    x_t: Float[Tensor, "B *dims"], eps: Float[Tensor, "B *dims"], alpha_bar: AlphaBar, *, log: bool = False
) -> Float[Tensor, "B *dims"]:
    r"""The data that (x_t, eps) stand for.

    .. math:: x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}

    Args:
        x_t: noised data, [B, *].
        eps: noise, true or predicted, [B, *].
        alpha_bar: ᾱ_t in (0, 1], scalar or [B]; log ᾱ_t where `log` is set.
        log: whether the level is given as its logarithm.

    Returns:
        x0, [B, *], at least float32.

    References:
        Ho et al. 2020, eq. 15.

    >>> predict_x0(torch.full((1, 2), 0.5), torch.zeros(1, 2), 0.25)
    tensor([[1., 1.]])
    """
    dtype = working_dtype(x_t, eps)
    return Prediction("epsilon").solve(eps.to(dtype), x_t.to(dtype), level_of(alpha_bar, log=log))[0]


def posterior(
    x0: Float[Tensor, "B *dims"],
    x_t: Float[Tensor, "B *dims"],
    alpha_bar_t: AlphaBar,
    alpha_bar_s: AlphaBar,
    *,
    log: bool = False,
) -> tuple[Float[Tensor, "B *dims"], Float[Tensor, "..."]]:
    r"""Mean and variance of q(x_s | x_t, x0), derived at the top of this module.

    .. math:: \tilde\mu = \frac{\sqrt{\bar\alpha_s}\,\beta}{1-\bar\alpha_t}\,x_0
              + \frac{\sqrt\alpha\,(1-\bar\alpha_s)}{1-\bar\alpha_t}\,x_t,\qquad
              \tilde\beta = \frac{1-\bar\alpha_s}{1-\bar\alpha_t}\,\beta

    Args:
        x0: clean data, true or predicted, [B, *].
        x_t: noised data, [B, *].
        alpha_bar_t: ᾱ_t in [0, 1), scalar or [B].
        alpha_bar_s: ᾱ_s in (ᾱ_t, 1], scalar or [B]; 1 is the data.
        log: whether both levels are given as their logarithms, which is exact to 1e-12.

    Returns:
        The mean, [B, *], and the variance, [B, 1, …] or [1, 1, …].

    Raises:
        ValueError: if shapes differ, or s is not less noisy than t.

    References:
        Ho et al. 2020, eq. 6 and 7.

    >>> posterior(torch.ones(1, 2), torch.zeros(1, 2), 0.25, 1.0)
    (tensor([[1., 1.]]), tensor([[0.]]))
    """
    same_shape(x0=x0, x_t=x_t)
    c, dtype = step_coefficients(alpha_bar_t, alpha_bar_s, log=log), working_dtype(x0, x_t)
    of_x0, of_x_t, variance = (expand_right(value.to(dtype), x_t) for value in (c.x0, c.x_t, c.variance))
    return of_x0 * x0 + of_x_t * x_t, variance


def _float64(value: AlphaBar) -> Float64[Tensor, "..."]:
    return torch.as_tensor(value, dtype=torch.float64)
