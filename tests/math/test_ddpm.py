"""The reference DDPM equations against the product of two Gaussians, with 50 digits and by quadrature."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import jaxtyping
import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.math.bounds import Clip, DynamicThreshold
from gendiff.math.ddpm import (
    Coefficients,
    Tables,
    Variance,
    coefficients,
    level_of,
    log_variance,
    posterior,
    predict_x0,
    q_sample,
    split_variance,
    step,
    step_coefficients,
    transition,
)
from gendiff.math.gaussians import GaussianOracle, MixtureOracle
from gendiff.math.schedules import Level, Rectified, Schedule, VarianceExploding
from gendiff.math.tables import CosineBeta, LinearBeta, ScaledLinearBeta, TableSchedule, ZeroTerminalSNR

mp = mpmath.mp.clone()  # a context of our own: the precision of mpmath's is global
mp.dps = 50
few = settings(max_examples=40)  # with checked annotations a call takes a millisecond
EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the coefficients


def product(log_t: mpmath.mpf, log_s: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    """q(x_t | x_s)·q(x_s | x0) as a function of x_s, by precisions: (of x0, of x_t, variance, beta)."""
    alpha, bar_s = mp.exp(log_t - log_s), mp.exp(log_s)
    beta = -mp.expm1(log_t - log_s)
    if log_s == 0:  # q(x_s | x0) has no spread
        return mp.mpf(1), mp.mpf(0), mp.mpf(0), beta
    likelihood, prior = alpha / beta, 1 / -mp.expm1(log_s)
    variance = 1 / (likelihood + prior)
    return variance * mp.sqrt(bar_s) * prior, variance * mp.sqrt(alpha) / beta, variance, beta


def error(got: Coefficients, exact: tuple[mpmath.mpf, ...]) -> float:
    """The largest relative error."""
    return max(float(abs(mp.mpf(a.item()) - b) / (b or 1)) for a, b in zip(got, exact, strict=True))


LOG_BAR = st.floats(-8, math.log10(60)).map(lambda power: -(10**power))
FRACTION = st.one_of(
    st.floats(1e-250, 1 - 1e-4),  # below that numbers have fewer digits
    st.floats(-20, -0.1).map(lambda power: 10**power),
    st.just(1 - 1e-4),  # neighbours
    st.just(0.0),  # the data
)


@settings(max_examples=150)
@given(LOG_BAR, FRACTION)
@example(-60.0, 1 - 1e-4)
@example(-1e-8, 1 - 1e-4)
def test_coefficients_are_the_product_of_two_gaussians(log_t: float, fraction: float) -> None:
    log_s = log_t * fraction
    assert error(coefficients(log_t, log_s), product(mp.mpf(log_t), mp.mpf(log_s))) < 1e-12


@few
@given(LOG_BAR)
def test_coefficients_from_pure_noise(log_s: float) -> None:
    """ᾱ_t = 0: x_t says nothing, and x_s is drawn from q(x_s | x0)."""
    for got in (coefficients(-math.inf, log_s), step_coefficients(-math.inf, log_s, log=True)):
        exact = mp.exp(mp.mpf(log_s) / 2), mp.mpf(0), -mp.expm1(mp.mpf(log_s)), mp.mpf(1)
        assert error(got, exact) < 1e-15
    assert [c.item() for c in coefficients(-math.inf, 0)] == [1.0, 0.0, 0.0, 1.0]


def test_the_step_to_the_data_is_exactly_the_data() -> None:
    for log_t in (-60.0, -1.0, -1e-8):
        c = coefficients(log_t, 0.0)
        assert [c.x0.item(), c.x_t.item(), c.variance.item()] == [1.0, 0.0, 0.0]
        assert math.copysign(1, c.x_t.item()) == 1


@few
@given(LOG_BAR, FRACTION)
def test_coefficients_of_the_short_form(log_t: float, fraction: float) -> None:
    r"""mean = sqrt(ᾱ_s)·x0·c1 + sqrt(α)·x_t·c2 with c1 = β/(1-ᾱ_t), c2 = (1-ᾱ_s)/(1-ᾱ_t), c1 + α·c2 = 1."""
    log_s = log_t * fraction
    c = coefficients(log_t, log_s)
    alpha = math.exp(log_t - log_s)
    c1, c2 = c.x0.item() / math.exp(log_s / 2), c.x_t.item() / math.sqrt(alpha)
    assert c1 == pytest.approx(math.expm1(log_t - log_s) / math.expm1(log_t), rel=1e-12)
    assert c2 == pytest.approx(math.expm1(log_s) / math.expm1(log_t), rel=1e-12, abs=1e-300)
    assert c1 + alpha * c2 == pytest.approx(1, rel=1e-12)
    assert c.variance.item() == pytest.approx(c2 * c.beta.item(), rel=1e-12, abs=1e-300)


@few
@given(LOG_BAR, st.one_of(st.floats(1e-250, 1 - 1e-4), st.just(1 - 1e-4)))
def test_precision_from_alpha_bar(log_t: float, fraction: float) -> None:
    """ᾱ has been rounded, which costs 4 eps over the smaller of 1 - α and 1 - ᾱ_s; no more is lost."""
    log_s = log_t * fraction
    bar_t, bar_s = math.exp(log_t), math.exp(log_s)
    if not bar_t < bar_s < 1:
        return
    got = step_coefficients(bar_t, bar_s)
    bound = 4 * EPS / min(-math.expm1(log_t - log_s), -math.expm1(log_s)) + 1e-12
    assert error(got, product(mp.mpf(log_t), mp.mpf(log_s))) < bound
    assert error(got, product(mp.log(mp.mpf(bar_t)), mp.log(mp.mpf(bar_s)))) < 1e-12


@pytest.mark.parametrize(("bar_t", "bar_s"), [(0.3, 0.5), (0.01, 0.02), (0.9, 0.99), (0.05, 0.9)])
@pytest.mark.parametrize(("x0", "x_t"), [(0.7, -1.1), (-2.0, 0.4)])
def test_the_posterior_is_the_normalised_product_of_densities(
    bar_t: float, bar_s: float, x0: float, x_t: float
) -> None:
    """Its mean and variance by quadrature; the trapezoid rule is exact to rounding for a Gaussian."""
    x_s = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    alpha = bar_t / bar_s
    forward = -(x_t - alpha**0.5 * x_s).square() / (1 - alpha)
    prior = -(x_s - bar_s**0.5 * x0).square() / (1 - bar_s)
    density = ((forward + prior) / 2).softmax(0)
    mean = (density * x_s).sum()
    variance = (density * (x_s - mean).square()).sum()
    of = [torch.tensor([[value]], dtype=torch.float64) for value in (x0, x_t)]
    got_mean, got_variance = posterior(*of, bar_t, bar_s)
    torch.testing.assert_close(got_mean[0, 0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got_variance[0, 0], variance, rtol=1e-8, atol=1e-8)


@few
@given(SEEDS, LOG_BAR, st.floats(0, 0.99))
def test_posterior_applies_the_coefficients(seed: int, log_t: float, fraction: float) -> None:
    x0, x_t = draws(seed, 2, 2, 3)
    log_s = log_t * fraction
    c = coefficients(log_t, log_s)
    mean, variance = posterior(x0, x_t, log_t, log_s, log=True)
    assert mean.equal(c.x0 * x0 + c.x_t * x_t)
    assert variance.equal(c.variance.reshape(1, 1))


def test_posterior_takes_a_level_per_sample() -> None:
    x0, x_t = draws(0, 2, 3, 4)
    bar_t, bar_s = torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.4, 0.6, 1.0])
    mean, variance = posterior(x0, x_t, bar_t, bar_s)
    assert variance.shape == (3, 1)
    for i in range(3):
        row, spread = posterior(x0[i : i + 1], x_t[i : i + 1], bar_t[i], bar_s[i])
        torch.testing.assert_close(mean[i : i + 1], row, rtol=1e-14, atol=1e-14)
        assert variance[i] == spread[0]
    assert mean[2].equal(x0[2])


@pytest.mark.parametrize(
    ("log_t", "log_s"),
    [(-1.0, -1.0), (-1.0, -2.0), (-1.0, 0.5), (0.0, 0.0), (-math.inf, -math.inf), (math.nan, 0.0)],
)
def test_a_step_leads_to_less_noise(log_t: float, log_s: float) -> None:
    text = rf"needs ᾱ_t < ᾱ_s <= 1, got log ᾱ_t = \[{log_t}\] and log ᾱ_s = \[{log_s}\]"
    with pytest.raises(ValueError, match=text):
        coefficients(log_t, log_s)


@pytest.mark.parametrize(("bar_t", "bar_s"), [(0.5, 0.5), (0.6, 0.5), (0.5, 1.5), (0.0, 0.0), (-0.1, 0.5)])
def test_alpha_bars_out_of_order_or_range_are_refused(bar_t: float, bar_s: float) -> None:
    with pytest.raises(ValueError, match="a step goes from t to a less noisy s"):
        step_coefficients(bar_t, bar_s)


def test_one_bad_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got log ᾱ_t = \[-1\.0, -1\.0\] and log ᾱ_s = \[-0\.5, -2\.0\]"):
        coefficients(torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, -2.0]))


# --- levels


@few
@given(LOG_BAR)
def test_level_of_log_alpha_bar_is_exact(log_bar: float) -> None:
    alpha, sigma = level_of(log_bar, log=True)
    exact = mp.mpf(log_bar)
    assert abs(alpha.item() / mp.exp(exact / 2) - 1) < 4 * EPS
    assert abs(sigma.item() / mp.sqrt(-mp.expm1(exact)) - 1) < 4 * EPS


def test_level_of_alpha_bar() -> None:
    alpha, sigma = level_of(torch.tensor([0.0, 0.36, 1.0], dtype=torch.float64))
    torch.testing.assert_close(alpha, torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.8, 0.0], dtype=torch.float64), rtol=1e-15, atol=0)
    assert level_of(1) == level_of(0, log=True) == (1.0, 0.0)


@pytest.mark.parametrize(("value", "log"), [(-0.1, False), (1.1, False), (math.nan, False), (0.1, True)])
def test_levels_out_of_range_are_refused(value: float, log: bool) -> None:
    name, interval = ("log ᾱ", r"\[-inf, 0\]") if log else ("ᾱ", r"\[0, 1\]")
    with pytest.raises(ValueError, match=rf"{name} lies in {interval}, got \[{value}\]; .* with log=True"):
        level_of(value, log=log)


@few
@given(SEEDS, st.floats(0.001, 1))
def test_q_sample_and_predict_x0_undo_each_other(seed: int, bar: float) -> None:
    x0, eps = draws(seed, 2, 2, 3)
    x_t = q_sample(x0, eps, bar)
    torch.testing.assert_close(x_t, bar**0.5 * x0 + (1 - bar) ** 0.5 * eps, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(predict_x0(x_t, eps, bar), x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(q_sample(x0, eps, math.log(bar), log=True), x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predict_x0(x_t, eps, math.log(bar), log=True), x0, rtol=1e-11, atol=1e-11)


def test_samples_come_back_in_at_least_float32() -> None:
    half = torch.ones(1, 2, dtype=torch.float16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        other = torch.ones(1, 2, dtype=dtype)
        expected = torch.promote_types(dtype, torch.float32)
        assert q_sample(half, other, 0.25).dtype == expected
        assert predict_x0(other, half, 0.25).dtype == expected
        assert posterior(half, other, 0.25, 0.5)[0].dtype == expected
        done = step(half, other, 0.25, 0.5, noise=half)
        assert {getattr(done, f.name).dtype for f in fields(done)} == {expected}


def test_pure_noise_says_nothing_of_x0() -> None:
    with pytest.raises(ValueError, match="epsilon prediction does not determine x0 and eps"):
        predict_x0(torch.ones(1, 2), torch.ones(1, 2), 0.0)


# --- any (alpha, sigma)


@few
@given(
    st.sampled_from([Rectified(), VarianceExploding(), CosineBeta()]),
    st.floats(0.02, 0.98),
    st.floats(1e-3, 0.99),
)
def test_transition_is_the_product_for_any_level(schedule: Schedule, t: float, fraction: float) -> None:
    """q(x_t | x_s) = N(r·x_s, sigma_t² - r²·sigma_s²) with r = alpha_t/alpha_s, times q(x_s | x0)."""
    level_t, level_s = schedule.level(t), schedule.level(t * fraction)
    (a_t, s_t), (a_s, s_s) = ((mp.mpf(v.item()) for v in level) for level in (level_t, level_s))
    r = a_t / a_s
    beta = s_t**2 - r**2 * s_s**2
    gain = r * s_s**2 / s_t**2  # Kalman's: x_s = a_s·x0 + gain·(x_t - a_t·x0)
    exact = a_s - gain * a_t, gain, (1 - gain * r) * s_s**2, beta
    assert error(transition(level_t, level_s), exact) < 1e-11


@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding(), CosineBeta()], ids=repr)
def test_transition_to_the_data_is_the_data(schedule: Schedule) -> None:
    c = transition(schedule.level(0.7), schedule.level(0.0))
    assert [c.x0.item(), c.x_t.item(), c.variance.item()] == [1.0, 0.0, 0.0]


def test_transition_of_a_preserving_process_is_coefficients() -> None:
    c = transition(level_of(-3.0, log=True), level_of(-1.0, log=True))
    for a, b in zip(c, coefficients(-3.0, -1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    pure = transition(
        Level(torch.tensor(0.0), torch.tensor(2.0)), Level(torch.tensor(0.8), torch.tensor(0.6))
    )
    assert [round(v.item(), 6) for v in pure] == [0.8, 0.0, 0.36, 4.0]


# --- the variances

FIXED = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]


@few
@given(LOG_BAR, st.floats(0, 0.99))
def test_fixed_variances_are_the_two_bounds(log_t: float, fraction: float) -> None:
    c = coefficients(log_t, log_t * fraction)
    like = torch.zeros(2, 3, dtype=torch.float64)
    small, small_log, large, large_log = (log_variance(kind, c, like) for kind in FIXED)
    floor = math.log(1e-20)
    assert small.shape == large.shape == (1, 1)
    assert small.item() == pytest.approx(max(math.log(c.variance.item() or 1e-99), floor), abs=1e-12)
    assert large.item() == pytest.approx(max(math.log(c.beta.item()), floor), abs=1e-12)
    assert small.equal(small_log)
    assert large.equal(large_log)
    assert small <= large


@few
@given(SEEDS, LOG_BAR, st.floats(0.01, 0.99))
def test_learned_variances(seed: int, log_t: float, fraction: float) -> None:
    c = coefficients(log_t, log_t * fraction)
    raw = draws(seed, 2, 3)
    assert log_variance("learned", c, raw, raw) is raw
    nu = (raw + 1) / 2
    expected = nu * c.beta.log() + (1 - nu) * c.variance.log()
    torch.testing.assert_close(log_variance("learned_range", c, raw, raw), expected, rtol=1e-12, atol=1e-12)
    ends = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    got = log_variance("learned_range", c, ends, ends)
    torch.testing.assert_close(got[0].exp(), torch.stack([c.variance, c.beta]), rtol=1e-12, atol=0)


def test_the_lower_bound_stays_finite_at_the_data() -> None:
    c = coefficients(torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, 0.0]))
    got = log_variance("fixed_small", c, torch.zeros(2, 3, 4))
    assert got.shape == (2, 1, 1)
    torch.testing.assert_close(got.flatten(), torch.tensor([c.variance[0].log().item(), math.log(1e-20)]))


def test_the_bounds_are_diffusers() -> None:
    """Theirs are float32; `fixed_small_log` there is the standard deviation."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="linear")
    schedule = LinearBeta()
    like, raw = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    log_bar = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.log_alpha_bar])
    for i in (999, 500, 100, 20):
        c = coefficients(log_bar[i + 1], log_bar[i])
        for kind in ("fixed_small", "fixed_large", "learned_range"):
            extra = raw if kind == "learned_range" else None
            theirs = scheduler._get_variance(i, extra, kind).double().reshape(1, 1)
            ours = log_variance(kind, c, like, extra)
            torch.testing.assert_close(ours if extra is not None else ours.exp(), theirs, rtol=1e-3, atol=0)


# --- the step


def parts(seed: int, channels: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, x_t, noise, raw = draws(seed, 4, 2, channels, 3)
    return out, x_t, noise, raw.tanh()


@few
@given(SEEDS, LOG_BAR, st.floats(0, 0.99), st.sampled_from(get_args(Variance)))
def test_a_step_is_the_posterior_of_its_x0_and_noise(
    seed: int, log_t: float, fraction: float, variance: Any
) -> None:
    out, x_t, noise, raw = parts(seed)
    log_s = log_t * fraction
    given_out = torch.cat([out, raw], 1) if variance.startswith("learned") else out
    done = step(given_out, x_t, log_t, log_s, noise=noise, prediction="v", variance=variance, log=True)
    alpha, sigma = level_of(log_t, log=True)
    torch.testing.assert_close(done.x0, alpha * x_t - sigma * out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(done.eps, sigma * x_t + alpha * out, rtol=1e-11, atol=1e-11)
    mean, _ = posterior(done.x0, x_t, log_t, log_s, log=True)
    torch.testing.assert_close(done.mean, mean, rtol=1e-13, atol=1e-13)
    c = coefficients(log_t, log_s)
    extra = raw if variance.startswith("learned") else None
    assert done.log_variance.equal(log_variance(variance, c, x_t, extra))
    spread = (done.log_variance / 2).exp() * noise if log_s < 0 else 0 * noise
    torch.testing.assert_close(done.x_s, done.mean + spread, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("variance", get_args(Variance))
def test_no_noise_at_the_data_whatever_the_variance(variance: Any) -> None:
    """Per sample: the first goes to the data, the second does not."""
    out, x_t, noise, raw = parts(0)
    out = torch.cat([out, raw], 1) if variance.startswith("learned") else out
    bar_t, bar_s = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.75])
    done = step(out, x_t, bar_t, bar_s, noise=noise, variance=variance)
    quiet = step(out, x_t, bar_t, bar_s, noise=0 * noise, variance=variance)
    assert done.x_s[0].equal(done.x0[0])
    assert done.x_s[0].equal(quiet.x_s[0])
    assert (done.x_s[1] != quiet.x_s[1]).all()
    torch.testing.assert_close(quiet.x_s[1], quiet.mean[1])


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_a_first_step_from_pure_noise_has_noise(prediction: Any) -> None:
    """ᾱ_t = 0: x_s = sqrt(ᾱ_s)·x0 + sqrt(1 - ᾱ_s)·z, and x_t plays no part but in x0."""
    out, x_t, noise, _ = parts(1)
    done = step(out, x_t, 0.0, 0.36, noise=noise, prediction=prediction)
    x0 = {"x0": out, "v": -out, "flow": x_t - out}[prediction]
    torch.testing.assert_close(done.x0, x0, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(done.x_s, 0.6 * x0 + 0.8 * noise, rtol=1e-13, atol=1e-13)
    assert step(out, x_t, -math.inf, math.log(0.36), noise=noise, prediction=prediction, log=True).x0.equal(
        done.x0
    )


@pytest.mark.parametrize("bound", [None, Clip(), Clip(0.3), DynamicThreshold(0.8, 2.0)])
@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "flow"])
def test_a_bounded_step_keeps_the_pair_at_x_t(bound: Any, prediction: Any) -> None:
    out, x_t, noise, _ = parts(2)
    bar_t, bar_s = (
        torch.tensor([0.3, 0.01], dtype=torch.float64),
        torch.tensor([0.6, 0.02], dtype=torch.float64),
    )
    done = step(3 * out, x_t, bar_t, bar_s, noise=noise, prediction=prediction, bound=bound)
    alpha, sigma = level_of(bar_t).like(x_t, torch.float64)
    torch.testing.assert_close(alpha * done.x0 + sigma * done.eps, x_t, rtol=1e-12, atol=1e-12)
    free = step(3 * out, x_t, bar_t, bar_s, noise=noise, prediction=prediction)
    assert done.x0.equal(free.x0 if bound is None else bound(free.x0))
    assert (bound is None) == done.x0.equal(free.x0)
    mean, _ = posterior(done.x0, x_t, bar_t, bar_s)
    assert done.mean.equal(mean)


def test_a_step_with_the_exact_denoiser_has_the_exact_mean() -> None:
    """E[x_s | x_t] = E[E[x_s | x_t, x0] | x_t], which for correlated Gaussian data is a linear regression.

    In three dimensions, since in two LAPACK's eigenvectors are a symmetric matrix, its own transpose.
    """
    root, centre, x_t = draws(5, 3, 3), draws(6, 3), draws(7, 4, 3)
    covariance, unit = root @ root.T, torch.eye(3, dtype=torch.float64)
    bar_t, bar_s = 0.2, 0.6
    alpha, beta = bar_t / bar_s, 1 - bar_t / bar_s
    of_s = bar_s * covariance + (1 - bar_s) * unit
    gain = alpha**0.5 * of_s @ torch.linalg.inv(alpha * of_s + beta * unit)
    expected = bar_s**0.5 * centre + (x_t - bar_t**0.5 * centre) @ gain.T
    law = GaussianOracle(centre, covariance)
    x0 = law.x0(x_t, *level_of(bar_t))
    done = step(x0, x_t, bar_t, bar_s, noise=0 * x_t, prediction="x0")
    torch.testing.assert_close(done.mean, expected, rtol=1e-11, atol=1e-11)
    mixed = MixtureOracle(torch.tensor([0.25, 0.75]), centre.expand(2, 3), covariance.expand(2, 3, 3))
    torch.testing.assert_close(mixed.x0(x_t, *level_of(bar_t)), x0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("ours", ["epsilon", "x0", "v"])
def test_a_step_is_that_of_diffusers(variance: Any, ours: Any) -> None:
    from diffusers import DDPMScheduler

    kind = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[ours]
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        variance_type=variance,
        prediction_type=kind,
        clip_sample=True,
    )
    scheduler.set_timesteps(20)
    log_bar = ScaledLinearBeta().log_alpha_bar
    out, x_t, _, raw = (part.float() for part in parts(3))
    out = torch.cat([out, raw], 1) if variance == "learned_range" else out
    for t, s in [(950, 900), (500, 450), (50, 0), (0, -1)]:
        theirs = scheduler.step(out, t, x_t, generator=torch.Generator().manual_seed(t))
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t))
        log_s = log_bar[s] if s >= 0 else 0.0
        done = step(
            out,
            x_t,
            log_bar[t],
            log_s,
            noise=noise,
            prediction=ours,
            variance=variance,
            bound=Clip(),
            log=True,
        )
        torch.testing.assert_close(done.x0, theirs.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(done.x_s, theirs.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_a_step_says_what_it_needs() -> None:
    out, x_t, noise, _ = parts(4)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 2, 3\) but x_t has shape \(2, 2, 3\)"):
        step(out, x_t, 0.2, 0.5, noise=noise[:1])
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 2, 3\) but out has shape \(2, 4, 3\)"):
        step(torch.cat([out, out], 1), x_t, 0.2, 0.5, noise=noise)
    with pytest.raises(ValueError, match="unknown prediction 'velocity'"):
        step(out, x_t, 0.2, 0.5, noise=noise, prediction="velocity")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown variance 'fixed'; did you mean 'fixed_"):
        step(out, x_t, 0.2, 0.5, noise=noise, variance="fixed")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"it needs ᾱ_t < ᾱ_s <= 1"):
        step(out, x_t, 0.5, 0.2, noise=noise)
    with pytest.raises(ValueError, match="epsilon prediction does not determine x0"):
        step(out, x_t, 0.0, 0.2, noise=noise)
    c = coefficients(-1.0, -0.5)
    with pytest.raises(ValueError, match="variance 'learned_range' needs variance channels of the network"):
        log_variance("learned_range", c, x_t)
    with pytest.raises(ValueError, match="variance 'fixed_large' does not read variance channels"):
        log_variance("fixed_large", c, x_t, x_t)


def test_variance_channels_are_the_second_half() -> None:
    x_t = torch.zeros(2, 3, 4)
    out = torch.arange(2 * 6 * 4.0).reshape(2, 6, 4)
    prediction, raw = split_variance(out, x_t)
    assert prediction.equal(out[:, :3])
    assert raw.equal(out[:, 3:])
    for wrong in (out[:, :5], out[:, :, :3], torch.zeros(2, 3, 4)):
        text = r"twice the channels of x_t, got \(2, .* for x_t of \(2, 3, 4\)"
        with pytest.raises(ValueError, match=text):
            split_variance(wrong, x_t)
    with pytest.raises(ValueError, match="twice the channels"):
        split_variance(torch.zeros(2), torch.zeros(2))


# --- the tables

SCHEDULES: list[TableSchedule] = [
    LinearBeta(),
    ScaledLinearBeta(),
    CosineBeta(),
    ZeroTerminalSNR(ScaledLinearBeta()),
]


def exact_tables(log_alphas: list[float]) -> dict[str, list[mpmath.mpf]]:
    """Every table, each from its definition, with 50 digits."""
    logs, total = [], mp.mpf(0)
    for log_alpha in log_alphas:
        total += mp.mpf(log_alpha)
        logs.append(total)
    steps = [product(t, s) for t, s in zip(logs, [mp.mpf(0), *logs[:-1]], strict=True)]
    bars = [mp.exp(log) for log in logs]
    return {
        "betas": [-mp.expm1(mp.mpf(log_alpha)) for log_alpha in log_alphas],
        "alphas": [mp.exp(mp.mpf(log_alpha)) for log_alpha in log_alphas],
        "alpha_bar": bars,
        "alpha_bar_prev": [mp.mpf(1), *bars[:-1]],
        "log_alpha_bar": logs,
        "sqrt_alpha_bar": [mp.sqrt(bar) for bar in bars],
        "sqrt_one_minus_alpha_bar": [mp.sqrt(-mp.expm1(log)) for log in logs],
        "sqrt_recip_alpha_bar": [mp.sqrt(1 / bar) if bar else mp.inf for bar in bars],
        "sqrt_recipm1_alpha_bar": [mp.sqrt(mp.expm1(-log)) for log in logs],
        "posterior_mean_coef1": [c[0] for c in steps],
        "posterior_mean_coef2": [c[1] for c in steps],
        "posterior_variance": [c[2] for c in steps],
        "posterior_log_variance_clipped": [mp.log(c[2]) for c in [steps[min(1, len(steps) - 1)], *steps[1:]]],
    }


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_table_is_exact_and_its_cast_right(schedule: TableSchedule) -> None:
    """float64 within 1e-12 and float32 within 1e-6 of 50 digits, entry by entry."""
    tables = Tables.from_schedule(schedule)
    cast = tables.to(torch.float32)
    exact = exact_tables(schedule.log_alphas.tolist())
    assert list(exact) == [f.name for f in fields(Tables)]
    for name, values in exact.items():
        for table, bound, smallest in ((tables, 1e-12, 0.0), (cast, 1e-6, 1e-37)):
            for got, value in zip(getattr(table, name).tolist(), values, strict=True):
                if mp.isinf(value) or abs(value) <= smallest:
                    assert got == pytest.approx(float(value), abs=smallest)
                else:  # a logarithm has the absolute error that its exponential has relatively
                    size = max(abs(value), 1) if name == "posterior_log_variance_clipped" else abs(value)
                    assert abs(mp.mpf(got) - value) < bound * size, name


def test_why_the_tables_are_not_those_of_diffusers() -> None:
    """Their float32 of the cosine schedule: ᾱ is off by 1.3e-5, the posterior variance by 8.6e-4."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    tables = Tables.from_schedule(CosineBeta())
    theirs = torch.stack([scheduler._get_variance(i) for i in range(1000)]).double()
    off = (scheduler.alphas_cumprod.double() / tables.alpha_bar - 1).abs().max().item()
    off_variance = (theirs / tables.posterior_variance - 1)[1:].abs().max().item()
    assert off == pytest.approx(1.3e-5, rel=0.1)
    assert off_variance == pytest.approx(8.6e-4, rel=0.1)


def test_tables_of_betas_are_those_of_the_schedule() -> None:
    schedule = LinearBeta(size=20)
    made = Tables.from_betas(torch.linspace(1e-4, 0.02, 20, dtype=torch.float64))
    for f in fields(Tables):
        assert getattr(made, f.name).equal(getattr(Tables.from_schedule(schedule), f.name))
    assert len(made) == 20
    assert Tables.from_betas([0.1, 1]).alpha_bar.tolist() == pytest.approx([0.9, 0.0])
    assert Tables.from_betas([0.1]).posterior_log_variance_clipped.tolist() == [-math.inf]
    assert Tables.from_betas([0.1, 0.2]).posterior_log_variance_clipped.diff().item() == 0


def test_tables_move_without_losing_digits() -> None:
    tables = Tables.from_betas([0.1, 0.2, 0.3])
    moved = tables.to(device="cpu")
    half = tables.to(torch.float16, "cpu")
    for f in fields(Tables):
        assert getattr(moved, f.name).equal(getattr(tables, f.name))
        assert getattr(half, f.name).dtype == torch.float16
