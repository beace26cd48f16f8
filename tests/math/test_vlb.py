"""The variational bound: its terms against torch and mpmath, the sum against exact likelihoods."""

import math
from collections.abc import Iterator

import jaxtyping
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gendiff.math.ddpm import (
    Tables,
    coefficients,
    discretised_nll,
    level_of,
    log_variance,
    normal_kl,
    posterior,
    prior_term,
    q_sample,
    step,
    vlb_term,
)

mp = mpmath.mp.clone()  # a context of our own: the precision of mpmath's is global
mp.dps = 60
few = settings(max_examples=40)  # with checked annotations a call takes a millisecond
LOG2 = math.log(2)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- KL


MEAN, LOG_VARIANCE = st.floats(-3, 3), st.floats(-20, 5)


@few
@given(MEAN, LOG_VARIANCE, MEAN, LOG_VARIANCE)
def test_kl_is_that_of_torch(mean_1: float, log_1: float, mean_2: float, log_2: float) -> None:
    mean_1_, log_1_, mean_2_, log_2_ = row(mean_1, log_1, mean_2, log_2)[0]
    expected = kl_divergence(Normal(mean_1_, (log_1_ / 2).exp()), Normal(mean_2_, (log_2_ / 2).exp()))
    got = normal_kl(mean_1_, log_1_, mean_2_, log_2_)
    assert got.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-11)


@few
@given(LOG_VARIANCE, st.floats(-12, -1).map(lambda power: 10**power))
def test_kl_of_neighbours_is_half_the_square_of_their_distance(log: float, apart: float) -> None:
    """Two variances a small factor apart: (r²/2 + r³/6 + …)/2 without cancellation."""
    zero = torch.zeros(())
    got = normal_kl(zero, row(log + apart), zero, row(log)).item()
    r = mp.mpf(log + apart) - mp.mpf(log)
    assert got == pytest.approx(float((mp.expm1(r) - r) / 2), rel=1e-3 + 1e-15 / apart, abs=1e-16 * apart)


# --- the discretised likelihood


@few
@given(st.integers(2, 300), st.floats(-1.5, 1.5), st.floats(-15, 3))
def test_the_masses_of_all_bins_sum_to_one(bins: int, mean: float, log_variance: float) -> None:
    x = torch.linspace(-1, 1, bins, dtype=torch.float64)[None]
    nll = discretised_nll(x, torch.full_like(x, mean), row(log_variance), bins)
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


def exact_nll(x: float, mean: float, log_variance: float, bins: int) -> mpmath.mpf:
    """-log of the mass of a bin, on the side of the mean where it is small."""
    scale = mp.exp(-mp.mpf(log_variance) / 2)
    half = mp.mpf(1) / (bins - 1)
    low, high = ((mp.mpf(x) + edge - mp.mpf(mean)) * scale for edge in (-half, half))
    low = -mp.inf if x == -1 else low
    high = mp.inf if x == 1 else high
    if low + high > 0:
        low, high = -high, -low

    def tail(z: mpmath.mpf) -> mpmath.mpf:
        return mp.erfc(-z / mp.sqrt(2)) / 2

    return -mp.log(tail(high) - tail(low))


@settings(max_examples=100)
@given(st.sampled_from([2, 3, 16, 256]), st.floats(0, 1), st.floats(-2, 2), st.floats(-12, 2))
def test_the_mass_of_a_bin_has_its_digits_in_both_tails(
    bins: int, where: float, mean: float, log_variance: float
) -> None:
    i = round(where * (bins - 1))
    x = -1 + 2 * i / (bins - 1)
    got = discretised_nll(row(x), row(mean), row(log_variance), bins).item()
    exact = float(exact_nll(x, mean, log_variance, bins))
    # of a narrow bin the two ends are near, and their difference has fewer digits
    width = 2 / (bins - 1) * math.exp(-log_variance / 2)
    assert got == pytest.approx(exact, rel=1e-10, abs=1e-13 / min(width, 1))


def test_bins_are_differences_of_the_distribution_function() -> None:
    x = np.linspace(-1, 1, 256)
    edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
    mass = np.diff(norm.cdf(edges, 0.2, 0.3))
    got = discretised_nll(
        torch.tensor(x)[None], torch.full((1, 256), 0.2, dtype=torch.float64), row(2 * math.log(0.3))
    )
    np.testing.assert_allclose(got[0], -np.log(mass), rtol=1e-9)


def test_bins_are_the_same_from_both_sides() -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
    mean = draws(0, 1, 9)
    torch.testing.assert_close(
        discretised_nll(x, mean, row(-4.0), 9), discretised_nll(-x, -mean, row(-4.0), 9), rtol=1e-12, atol=0
    )


def test_a_narrow_decoder_is_a_density_times_the_width_of_a_bin() -> None:
    x, mean = row(0.2, -0.6), row(0.1, -0.7)
    density = Normal(mean, 0.5).log_prob(x) + math.log(2 / 255)
    wide = discretised_nll(x, mean, row(2 * math.log(0.5)), 256)
    torch.testing.assert_close(-wide, density, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_discretised_likelihood_has_the_gradient_of_its_values(dtype: torch.dtype) -> None:
    """Also at the open bins and far in the tails, where a mass underflows."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
    for shift, log in ((0.1, -2.0), (1.7, -7.0), (-1.7, -7.0), (0.0, -40.0)):
        mean = (x.flip(1) * 0.3 + shift).to(dtype).requires_grad_()
        log_variance = torch.full((1, 5), log, dtype=dtype, requires_grad=True)
        discretised_nll(x.to(dtype), mean, log_variance, 5).sum().backward()
        assert mean.grad is not None
        assert log_variance.grad is not None
        assert torch.isfinite(mean.grad).all()
        assert torch.isfinite(log_variance.grad).all()
        if log > -40:
            for i, at in enumerate(mean.detach()[0].tolist()):
                value = x[0, i].item()
                of_mean = mp.diff(lambda m, value=value, log=log: exact_nll(value, m, log, 5), at)
                of_log = mp.diff(lambda v, value=value, at=at: exact_nll(value, at, v, 5), log)
                digits = 1e-3 if dtype == torch.float32 else 1e-9
                assert mean.grad[0, i].item() == pytest.approx(float(of_mean), rel=digits, abs=digits)
                assert log_variance.grad[0, i].item() == pytest.approx(float(of_log), rel=digits, abs=digits)


@pytest.mark.usefixtures("unchecked")
def test_a_discretised_likelihood_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="at least 2 bins, got 1"):
        discretised_nll(row(0.0), row(0.0), row(0.0), 1)
    with pytest.raises(ValueError, match=r"mean has shape \(1, 1\) but x has shape \(1, 2\)"):
        discretised_nll(row(0.0, 0.0), row(0.0), row(0.0))
    with pytest.raises(ValueError, match=r"x_t has shape \(1, 1\) but x0 has shape \(1, 2\)"):
        vlb_term(row(0.0, 0.0), row(0.0), row(0.0, 0.0), row(0.0), 0.2, 0.5)


# --- the terms


@few
@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 0.999))
def test_the_prior_term_is_a_kl_in_bits_per_dimension(seed: int, bar: float) -> None:
    x0 = draws(seed, 2, 3, 4)
    kl = kl_divergence(Normal(bar**0.5 * x0, torch.tensor(1 - bar).double().sqrt()), Normal(0.0, 1.0))
    expected = kl.sum((1, 2)) / 12 / LOG2
    torch.testing.assert_close(prior_term(x0, bar), expected, rtol=1e-6, atol=1e-7)
    exact = ((bar * x0**2 - bar - math.log1p(-bar)) / 2).mean((1, 2)) / LOG2
    torch.testing.assert_close(prior_term(x0, bar), exact, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(prior_term(x0, math.log(bar), log=True), exact, rtol=1e-10, atol=1e-14)


def test_the_prior_term_of_pure_noise_is_zero() -> None:
    assert prior_term(torch.ones(2, 3), 0.0).tolist() == [0.0, 0.0]


@few
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.8), st.floats(0.05, 0.95), st.floats(-5, 1))
def test_a_term_is_a_kl_in_bits_per_dimension(
    seed: int, bar_t: float, where: float, log_variance: float
) -> None:
    x0, x_t, mean = draws(seed, 3, 2, 3, 4)
    bar_s = bar_t + where * (1 - bar_t)
    true_mean, true_variance = posterior(x0, x_t, bar_t, bar_s)
    law = Normal(mean, torch.tensor(log_variance / 2, dtype=torch.float64).exp())
    kl = kl_divergence(Normal(true_mean, true_variance.sqrt()), law)
    expected = kl.sum((1, 2)) / 12 / LOG2
    got = vlb_term(x0, x_t, mean, row(log_variance)[..., None], bar_t, bar_s)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    logs = math.log(bar_t), math.log(bar_s)
    torch.testing.assert_close(
        vlb_term(x0, x_t, mean, row(log_variance)[..., None], *logs, log=True),
        expected,
        rtol=1e-9,
        atol=1e-11,
    )


def test_the_last_term_is_the_discretised_decoder_sample_by_sample() -> None:
    x0 = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    x_t, mean = x0 + 0.01, x0 - 0.02
    log_variance = row(-6.0)
    decoder = discretised_nll(x0, mean, log_variance, 8).mean(1) / LOG2
    got = vlb_term(x0, x_t, mean, log_variance, 0.98, 1.0, bins=8)
    assert got.equal(decoder)
    bar_t, bar_s = torch.tensor([0.98, 0.5]).double(), torch.tensor([1.0, 0.75]).double()
    mixed = vlb_term(x0, x_t, mean, log_variance, bar_t, bar_s, bins=8)
    assert mixed[0] == decoder[0]
    torch.testing.assert_close(mixed[1:], vlb_term(x0, x_t, mean, log_variance, 0.5, 0.75)[1:])
    assert abs(mixed[1] - decoder[1]) > 0.1


def test_bits_per_dimension_do_not_count_dimensions() -> None:
    x0, x_t, mean = draws(1, 3, 2, 3)
    one = vlb_term(x0, x_t, mean, row(-1.0), 0.2, 0.5)
    many = vlb_term(*(x.repeat(1, 5) for x in (x0, x_t, mean)), row(-1.0), 0.2, 0.5)
    torch.testing.assert_close(many, one, rtol=1e-13, atol=0)
    assert one.shape == (2,)


def test_the_hybrid_objective_has_a_gradient_at_every_level() -> None:
    """As Nichol & Dhariwal train it: the mean detached, the raw variance channels learned."""
    x0 = torch.linspace(-1, 1, 6).reshape(3, 2)
    bar_t, bar_s = torch.tensor([0.999, 0.5, 0.01]), torch.tensor([1.0, 0.51, 0.02])
    noise = draws(2, 3, 2).float()
    x_t = q_sample(x0, noise, bar_t)
    raw = torch.zeros(3, 2, requires_grad=True)
    done = step(torch.cat([noise / 2, raw], 1), x_t, bar_t, bar_s, noise=noise, variance="learned_range")
    vlb_term(x0, x_t, done.mean.detach(), done.log_variance, bar_t, bar_s).sum().backward()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
    assert (raw.grad[1:] != 0).all()


# --- the sum


def linear_betas(size: int) -> Tensor:
    """The variance-preserving diffusion with beta(t) from 0.1 to 20, in `size` steps."""
    return torch.linspace(0.1, 20, size, dtype=torch.float64) / size


def test_the_published_range_at_the_data() -> None:
    """There β̃ is 0, and Nichol & Dhariwal take that of the second entry in its place, as `Tables` do."""
    tables = Tables.from_betas(linear_betas(50))
    raw = draws(3, 2, 4).tanh()
    c = coefficients(tables.log_alpha_bar[0], 0.0)
    c = c._replace(variance=tables.posterior_log_variance_clipped[0].exp())
    got = log_variance("learned_range", c, raw, raw)
    small, large = tables.posterior_variance[1].log(), tables.betas[0].log()
    torch.testing.assert_close(got, (raw + 1) / 2 * large + (1 - raw) / 2 * small, rtol=1e-12, atol=0)


def bound_on_a_gaussian(size: int, centre: float, std: float) -> float:
    """E[VLB] in nats for x0 ~ N(centre, std²) and its exact denoiser.

    All terms are quadratic in (x0, eps), so that three nodes of Gauss and Hermite a side are exact. A density
    has no bins: L_0 is -log N(x0; mean, β_1), where β_1 is the variance of x0 given x_1, but for O(β_1²).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    a, b = np.meshgrid(nodes, nodes)
    weight = torch.tensor(np.outer(weights, weights).ravel())
    x0, eps = (torch.tensor(v.ravel())[:, None] for v in (centre + std * a, b))
    log_bar = Tables.from_betas(linear_betas(size)).log_alpha_bar
    log_s = torch.cat([log_bar.new_zeros(1), log_bar[:-1]])
    total = (weight * prior_term(x0, log_bar[-1], log=True)).sum().item() * LOG2
    for values in zip(x0, eps, weight, strict=True):
        clean, noise = (v.expand(size, 1) for v in values[:2])
        x_t = q_sample(clean, noise, log_bar, log=True)
        alpha, sigma = level_of(log_bar, log=True).like(x_t, x_t.dtype)
        denoised = centre + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * centre)
        done = step(
            denoised, x_t, log_bar, log_s, noise=noise, prediction="x0", variance="fixed_large", log=True
        )
        terms = vlb_term(clean, x_t, done.mean, done.log_variance, log_bar, log_s, log=True)[1:].sum() * LOG2
        decoder = Normal(done.mean[0, 0], (done.log_variance[0, 0] / 2).exp()).log_prob(clean[0, 0])
        total += (values[2] * (terms - decoder)).item()
    return total


def test_the_bound_on_unit_gaussian_data_is_their_entropy() -> None:
    """Then all x_t are unit Gaussians, and the reverse variance is β itself (Ho et al. 2020, section 3.2)."""
    for size in (40, 160):
        assert bound_on_a_gaussian(size, 0.0, 1.0) == pytest.approx(
            math.log(2 * math.pi * math.e) / 2, abs=1e-11
        )


@pytest.mark.parametrize(("centre", "std"), [(0.0, 0.3), (0.3, 0.5)])
def test_the_bound_on_a_gaussian_tends_to_its_entropy_from_above(centre: float, std: float) -> None:
    nll = math.log(2 * math.pi * math.e * std**2) / 2
    gaps = [bound_on_a_gaussian(size, centre, std) - nll for size in (40, 160, 640)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]  # of first order in 1/N, 4 times less for 4 times the steps
    assert gaps[2] < 0.05


def bound_on_a_grid(size: int, law: Tensor) -> float:
    """E[VLB] in bits for data on a grid with probabilities `law` and their exact denoiser."""
    bins = len(law)
    values = torch.linspace(-1, 1, bins, dtype=torch.float64)
    eps = torch.linspace(-8, 8, 401, dtype=torch.float64)
    density = (-eps.square() / 2).softmax(0)
    tables = Tables.from_betas(linear_betas(size))
    log_bar = tables.log_alpha_bar
    log_s = torch.cat([log_bar.new_zeros(1), log_bar[:-1]])
    x0 = values.repeat_interleave(len(eps))[:, None]
    noise = eps.repeat(bins)[:, None]
    weight = (law[:, None] * density).flatten()
    total = (weight * prior_term(x0, log_bar[-1], log=True)).sum().item()
    # all steps in one batch
    x0, noise = x0.repeat(size, 1), noise.repeat(size, 1)
    log_t, log_s, clipped = (
        table.repeat_interleave(len(weight))
        for table in (log_bar, log_s, tables.posterior_log_variance_clipped)
    )
    x_t = q_sample(x0, noise, log_t, log=True)
    alpha, sigma = level_of(log_t, log=True).like(x_t, x_t.dtype)
    share = (law.log() - ((x_t - alpha * values) / sigma).square() / 2).softmax(1)
    denoised = (share * values).sum(1, keepdim=True)
    done = step(denoised, x_t, log_t, log_s, noise=noise, prediction="x0", log=True)
    terms = vlb_term(x0, x_t, done.mean, clipped[:, None], log_t, log_s, bins=bins, log=True)
    return total + (weight.repeat(size) * terms).sum().item()


def test_the_bound_on_discrete_data_tends_to_its_entropy_from_above() -> None:
    """With the discretised decoder, from end to end in bits per dimension."""
    law = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    entropy = -(law * law.log2()).sum().item()
    gaps = [bound_on_a_grid(size, law) - entropy for size in (30, 90, 270)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.06
