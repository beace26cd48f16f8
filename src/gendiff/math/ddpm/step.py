"""One reverse step of DDPM, from a network output to x_s, with every published variance."""

import math
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import expand_right, same_shape, unknown, working_dtype
from gendiff.math.bounds import Bound, eps_of
from gendiff.math.ddpm.equations import AlphaBar, Coefficients, level_of, step_coefficients
from gendiff.math.predictions import Name, Prediction

Variance = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]
MIN_LOG_VARIANCE = math.log(1e-20)  # β̃ is 0 for the step to the data, where its logarithm must stay finite


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One reverse step: x_s, the pair it stands on, and the law p(x_s | x_t) it was drawn from."""

    x_s: Float[Tensor, "B *dims"]
    x0: Float[Tensor, "B *dims"]
    eps: Float[Tensor, "B *dims"]
    mean: Float[Tensor, "B *dims"]
    log_variance: Float[Tensor, "..."]


def log_variance(
    kind: Variance,
    c: Coefficients,
    like: Float[Tensor, "B *dims"],
    raw: Float[Tensor, "B *dims"] | None = None,
) -> Float[Tensor, "..."]:
    r"""Log variance of p(x_s | x_t) of the given kind.

    ==================================  ===================================================================
    kind                                log variance
    ==================================  ===================================================================
    `fixed_small`, `fixed_small_log`    :math:`\log\tilde\beta`, the lower bound (Ho et al. 2020, section 3.2)
    `fixed_large`, `fixed_large_log`    :math:`\log\beta`, the upper bound (likewise)
    `learned`                           the network's own channels
    `learned_range`                     :math:`\nu\log\beta + (1-\nu)\log\tilde\beta`,
                                        :math:`\nu = (\text{raw}+1)/2` (Nichol & Dhariwal 2021, eq. 15)
    ==================================  ===================================================================

    The `_log` names are those of saved configurations; the values are the same. The logarithm of β̃ is kept
    above log(1e-20), since β̃ is 0 for the step to the data.

    Args:
        kind: one of the six names.
        c: coefficients of the step.
        like: samples [B, *] whose dtype and rank the result takes.
        raw: the network's variance channels [B, *]; for the learned kinds only.

    >>> from gendiff.math.ddpm import coefficients
    >>> log_variance("fixed_large", coefficients(-1.0, -0.5), torch.zeros(1, 1)).exp()
    tensor([[0.3935]])
    """
    if kind not in get_args(Variance):
        raise ValueError(unknown("variance", kind, get_args(Variance)))
    if (raw is None) == kind.startswith("learned"):
        raise ValueError(
            f"variance {kind!r} {'needs' if raw is None else 'does not read'} variance channels of the "
            f"network; one with twice the channels of x_t goes with 'learned' or 'learned_range', others "
            f"with 'fixed_*'."
        )
    small, large = (_shaped(value.log().clamp(min=MIN_LOG_VARIANCE), like) for value in (c.variance, c.beta))
    if raw is None:
        return small if kind.startswith("fixed_small") else large
    return raw if kind == "learned" else torch.lerp(small.expand_as(raw), large.expand_as(raw), (raw + 1) / 2)


def _shaped(value: Float64[Tensor, "..."], like: Float[Tensor, "B *dims"]) -> Float[Tensor, "..."]:
    return expand_right(value.to(like.dtype), like)


def step(
    out: Float[Tensor, "B *out"],
    x_t: Float[Tensor, "B *dims"],
    alpha_bar_t: AlphaBar,
    alpha_bar_s: AlphaBar,
    *,
    noise: Float[Tensor, "B *dims"],
    prediction: Prediction | Name = "epsilon",
    variance: Variance = "fixed_small",
    bound: Bound | None = None,
    log: bool = False,
) -> Step:
    r"""One reverse step from t to any s < t (Ho et al. 2020, eq. 11 and algorithm 2).

    .. math:: x_s = \tilde\mu(\hat x_0, x_t) + \sqrt{v}\,z,\quad z \sim \mathcal N(0, 1),
              \qquad z = 0 \text{ at the data}

    Args:
        out: network output, [B, C, *], or [B, 2C, *] with the variance channels last for the learned
            variances.
        x_t: noised data, [B, C, *].
        alpha_bar_t: ᾱ_t in [0, 1), scalar or [B].
        alpha_bar_s: ᾱ_s in (ᾱ_t, 1], scalar or [B]; 1 is the data.
        noise: unit Gaussian noise z, [B, C, *]; it plays no part where s is the data.
        prediction: what `out` is; a name or a `Prediction`.
        variance: the variance v of the step, one of six names (see `log_variance`).
        bound: `Clip(...)` or `DynamicThreshold(...)` on the predicted x0; eps is then computed again from
            x_t.
        log: whether both levels are given as their logarithms.

    Returns:
        `Step(x_s, x0, eps, mean, log_variance)`.

    Raises:
        ValueError: for shapes that differ, an unknown name, or an s that is not less noisy than t.

    >>> done = step(torch.zeros(1, 2), torch.ones(1, 2), 0.25, 1.0, noise=torch.ones(1, 2))
    >>> done.x_s  # to the data: x_t/sqrt(ᾱ_t), and no noise
    tensor([[2., 2.]])
    """
    same_shape(x_t=x_t, noise=noise)
    dtype = working_dtype(out, x_t)
    x_t, out, raw = x_t.to(dtype), out.to(dtype), None
    if str(variance).startswith("learned"):
        out, raw = split_variance(out, x_t)
    level = level_of(alpha_bar_t, log=log)
    x0, eps = Prediction.of(prediction).solve(out, x_t, level)
    if bound is not None:
        x0 = bound(x0)
        eps = eps_of(x0, x_t, level)
    c = step_coefficients(alpha_bar_t, alpha_bar_s, log=log)
    mean = _shaped(c.x0, x_t) * x0 + _shaped(c.x_t, x_t) * x_t
    log_v = log_variance(variance, c, x_t, raw)
    to_data = expand_right(c.variance == 0, x_t)
    x_s = mean + torch.where(to_data, 0.0, (log_v / 2).exp()) * noise.to(dtype)
    return Step(x_s, x0, eps, mean, log_v)


def split_variance(out: Float[Tensor, "B *out"], x_t: Float[Tensor, "B *dims"]) -> tuple[Tensor, Tensor]:
    """The prediction and the raw variance channels of an output of twice the channels of x_t.

    >>> [part.shape[1] for part in split_variance(torch.zeros(1, 6, 4), torch.zeros(1, 3, 4))]
    [3, 3]
    """
    if x_t.ndim < 2 or out.shape != (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:]):
        raise ValueError(
            f"a learned variance needs an output of twice the channels of x_t, got {tuple(out.shape)} for "
            f"x_t of {tuple(x_t.shape)}; for a network without variance channels use a fixed variance."
        )
    prediction, raw = out.chunk(2, dim=1)
    return prediction, raw
