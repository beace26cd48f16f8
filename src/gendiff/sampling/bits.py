r"""Likelihoods in bits for each value of a sample: the variational bound, and densities as bits.

Everything of the bound is `gendiff.math.ddpm`'s. Here it meets a denoiser: any schedule is the
variance-preserving one of the same SNR seen through the factor r = sqrt(alpha² + sigma²),

.. math:: \log\bar\alpha_t = -\log(1 + e^{-\lambda_t}), \qquad x_t = r_t\,x_t^{\mathrm{preserving}}

and none of the divergences depends on that factor.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import logsigmoid

from gendiff._checks import finite_on_host, positive_batch, working_dtype
from gendiff.denoiser import Cond, Denoise, Denoised
from gendiff.math import ddpm
from gendiff.math.grids import Grid
from gendiff.math.numeric import Number
from gendiff.random import Randomness, as_rng
from gendiff.sampling.divergence import Source
from gendiff.sampling.solver import check_schedule

LOG2 = math.log(2)


@final
@dataclass(frozen=True, eq=False)
class VariationalBound:
    """What `variational_bound` finds, in bits for each value of a sample, from the noise to the data.

    Attributes:
        prior: L_T of every sample, [B].
        steps: L_{t-1} of every sample for the steps of the grid but the last, [B, steps - 1].
        decoder: L_0 of every sample, [B].
    """

    prior: Float64[Tensor, "B"]
    steps: Float64[Tensor, "B N"]
    decoder: Float64[Tensor, "B"]

    @property
    def total(self) -> Float64[Tensor, "B"]:
        """The bound, [B]: the sum of all terms."""
        return self.prior + self.steps.sum(1) + self.decoder


def variational_bound(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    *,
    variance: ddpm.Variance | None = None,
    bins: int | None = 256,
    cond: Cond = None,
    rng: Source = None,
) -> VariationalBound:
    r"""One unbiased draw of the variational bound of the data, in bits for each value.

    .. math:: -\log_2 p(x_0) \le E\Big[L_T + \sum_{t>1} L_{t-1} + L_0\Big]

    for the sampler `DDPM(variance)` on this grid: its mean over the noise is no less than the NLL of that
    model, and its mean over data no less than the entropy of the data, whatever the denoiser. With an exact
    denoiser and the default variance it tends to that entropy like 1/steps. The other fixed variance is wrong
    by a factor near the data, which costs a bit or so that more steps need not win back.

    The last step ends at the data, where the lower variance is 0; that of the step before takes its place, as
    in `ddpm.Tables`. L_T compares with the unit Gaussian in units of r_T.

    Args:
        denoise: a `Denoiser`, a guider, or any wrapper round one. It is evaluated once a step, without
            gradients and without a carry.
        x: data, [B, *], on a grid of `bins` values from -1 to 1 unless that is None.
        grid: times that fall to 0, on the schedule of `denoise`: `grids.trailing(schedule, schedule.size)`
            for every entry of a table.
        variance: that of a step, one of the six names of `ddpm.log_variance`. None is `fixed_small` with
            bins, which is right for data that x_t determines near t = 0, and `fixed_large` without, which is
            right for data that have a density (Ho et al. 2020, section 3.2).
        bins: number of values that a datum can take, for the discretised decoder; None for a density, whose
            bits may be negative.
        cond: the condition given to every call.
        rng: randomness of the noise, an `Rng`, a `torch.Generator` or a seed. Step n draws the n-th time from
            the stream "bound"; with an `Rng` of ids a sample's noise is its own, however the batch is split.

    Returns:
        `VariationalBound(prior, steps, decoder)`, in float64, with the sum as `total`.

    Raises:
        ValueError: no rng; a grid on another schedule, or that does not end at 0; a grid of one step with a
            variance made of the lower one; x that is empty, not finite or, with bins, not in [-1, 1].

    References:
        Ho et al. 2020, *Denoising diffusion probabilistic models*, eq. 5 and 13; Nichol & Dhariwal 2021,
        eq. 4 to 7.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, LinearBeta, grids
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(3), 1.0), LinearBeta())
    >>> grid = grids.trailing(LinearBeta(), 50)
    >>> variational_bound(exact, torch.zeros(2, 3), grid, rng=0).steps.shape
    torch.Size([2, 49])
    """
    if variance is None:
        variance = "fixed_large" if bins is None else "fixed_small"
    _check(denoise, x, grid, variance, bins)
    source = as_rng(rng)
    x0 = x.to(working_dtype(x)).reshape(len(x), -1)
    # on the device of x, so that nothing is copied there in a step
    log_bars = logsigmoid(grid.schedule.log_snr(grid.t)).to(x.device)
    with torch.no_grad():
        prior = ddpm.prior_term(x0, log_bars[0], log=True).to(torch.float64)
        terms: list[Tensor] = []
        for i in range(grid.steps):
            noise = source.normal("bound", x.shape, dtype=x0.dtype, device=x0.device)
            x_t = ddpm.q_sample(x0, noise.reshape(x0.shape), log_bars[i], log=True)
            denoised = denoise(_scale(grid, i) * x_t.reshape(x.shape), float(grid.times[i]), cond)
            law = _reverse(denoised, x_t, log_bars[max(i - 1, 0) : i + 2], variance)
            to_data = i + 1 == grid.steps
            terms.append(_term(x0, x_t, law, log_bars[i : i + 2], bins, to_data))
    steps, decoder = terms[:-1], terms[-1]
    return VariationalBound(prior, torch.stack(steps, 1) if steps else prior.new_empty(len(x), 0), decoder)


def _scale(grid: Grid, i: int) -> float:
    """What x_t of the variance-preserving process is multiplied by to be that of the schedule."""
    return float(torch.hypot(*grid.level(i)))


def _reverse(
    denoised: Denoised, x_t: Tensor, log_bars: Float64[Tensor, "levels"], variance: ddpm.Variance
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(x_s | x_t); the last two of the levels are t and s, a first is before t."""
    log_t, log_s = log_bars[-2], log_bars[-1]
    x0 = denoised.x0.to(x_t.dtype).reshape(x_t.shape)
    mean, _ = ddpm.posterior(x0, x_t, log_t, log_s, log=True)
    c = ddpm.coefficients(log_t, log_s)
    if len(log_bars) == 3:  # read only where c.variance is 0, which is at the data
        before = ddpm.coefficients(log_bars[0], log_t).variance
        c = c._replace(variance=torch.where(c.variance == 0, before, c.variance))
    raw = denoised.log_var if variance.startswith("learned") else None
    return mean, ddpm.log_variance(variance, c, x_t, None if raw is None else raw.reshape(x_t.shape))


def _term(
    x0: Tensor,
    x_t: Tensor,
    law: tuple[Tensor, Tensor],
    log_bars: Float64[Tensor, "2"],
    bins: int | None,
    to_data: bool,
) -> Float64[Tensor, "B"]:
    if to_data and bins is None:
        return _density(x0, *law)
    term = ddpm.vlb_term(
        x0, x_t, *law, log_bars[0], log_bars[1], bins=256 if bins is None else bins, log=True
    )
    return term.to(torch.float64)


def _density(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Float64[Tensor, "B"]:
    """-log2 of the Gaussian density, for each value of a sample."""
    misfit = ddpm.normal_kl(x0, log_variance, mean, log_variance)
    nats = misfit + (log_variance + math.log(2 * math.pi)) / 2
    return nats.to(torch.float64).reshape(len(x0), -1).mean(1) / LOG2


def _check(denoise: Denoise, x: Tensor, grid: Grid, variance: str, bins: int | None) -> None:
    positive_batch(x, "x")
    finite_on_host(x, "x")
    check_schedule(denoise, grid)
    if grid.times[-1] != 0:
        raise ValueError(
            f"the bound is one on data, so its grid ends at 0, got {grid.times[-1]:g}; grids do by default."
        )
    if grid.steps == 1 and variance.startswith(("fixed_small", "learned_range")):
        raise ValueError(
            f"variance {variance!r} of a single step to the data is 0; give a grid of at least two steps, or "
            f"'fixed_large'."
        )
    if bins is not None and x.device.type == "cpu" and bool((x.abs() > 1).any()):
        raise ValueError(
            f"the discretised decoder is for data in [-1, 1], got values in [{x.min().item():g}, "
            f"{x.max().item():g}]; scale them, or say bins=None for the density of continuous data."
        )


def bits_per_dim(
    log_prob: Float[Tensor, "B"],
    values: int,
    *,
    bins: int | None = 256,
    span: tuple[Number, Number] = (-1, 1),
) -> Float[Tensor, "B"]:
    r"""A log density in nats as bits for each value of a sample.

    .. math:: -\frac{\log p(x + u)}{d\,\log 2} - \log_2 w, \qquad
              w = \frac{\mathrm{high} - \mathrm{low}}{\mathrm{bins} - 1}

    Data on a grid of `bins` values, a distance w apart, have probabilities and not a density. With u uniform
    over a bin (`dequantise`) the mean of the density times the volume w^d of the bin is the probability that
    the model puts on the bin, so that by Jensen's inequality the mean of these bits over u is at least what a
    code for the data needs. That is 7 - 0.006 bits of offset for 8 bits in [-1, 1], 8 - 0.006 in [0, 1],
    where the ends of the range are values. Song et al. divide by 256 rather than 255: 7 and 8.

    Args:
        log_prob: log density over all values of a sample, in nats, [B].
        values: number d of values of a sample.
        bins: number of values that a datum can take; None for data that are no grid, without the offset.
        span: the smallest and the largest of these values.

    Raises:
        ValueError: values below 1, bins below 2, a span that does not rise.

    References:
        Theis et al. 2016, *A note on the evaluation of generative models*, section 3.1; Song et al. 2021,
        *Score-based generative modeling*, appendix D.2.

    >>> density = torch.full((1,), 3 * math.log(255 / 2 / 256))  # uniform over 256 bins in [-1, 1], d = 3
    >>> bits_per_dim(density, 3)
    tensor([8.])
    """
    if values < 1:
        raise ValueError(f"a sample has at least one value, got {values}.")
    offset = 0.0 if bins is None else math.log(_width(bins, span))
    return -(log_prob / values + offset) / LOG2


def dequantise(
    x: Float[Tensor, "B *dims"],
    rng: Randomness | torch.Generator | int,
    *,
    bins: int = 256,
    span: tuple[Number, Number] = (-1, 1),
) -> Float[Tensor, "B *dims"]:
    """Spread data on a grid of values evenly over their bins, so that they have a density.

    Args:
        x: data on `bins` values from the one end of `span` to the other, [B, *].
        rng: an `Rng`, a `torch.Generator` or a seed.
        bins: number of values that a datum can take, at least 2.
        span: the smallest and the largest of these values.

    References:
        Theis et al. 2016, section 3.1; bins lie round the values, as those of `ddpm.discretised_nll` do.

    >>> x = dequantise(torch.zeros(2, 1000), 0, bins=3)
    >>> bool((x.abs() < 0.5).all()), round(x.var().item(), 2)
    (True, 0.08)
    """
    width, dtype = _width(bins, span), torch.float64 if x.dtype == torch.float64 else torch.float32
    return x + width * (as_rng(rng).uniform("dequantise", x.shape, dtype=dtype, device=x.device) - 0.5)


def _width(bins: int, span: tuple[Number, Number]) -> float:
    low, high = span
    if bins < 2 or not low < high:
        raise ValueError(f"a grid has at least 2 bins over a span that rises, got {bins} and {span}.")
    return (high - low) / (bins - 1)
