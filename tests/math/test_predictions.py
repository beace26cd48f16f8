"""The table of predictions: textbook formulas, round trips on every schedule, published weights, refusals."""

import math
from collections.abc import Iterator
from typing import get_args

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.math.predictions import Name, Prediction
from gendiff.math.schedules import Level, Rectified, Schedule, VarianceExploding
from gendiff.math.tables import CosineBeta, LinearBeta, ScaledLinearBeta, ZeroTerminalSNR

PRESERVING = [LinearBeta(), ScaledLinearBeta(), CosineBeta(), LinearBeta(size=10)]
SCHEDULES = [*PRESERVING, ZeroTerminalSNR(ScaledLinearBeta()), Rectified(), VarianceExploding()]
PREDICTIONS = [
    Prediction(name, sign, sigma_data)
    for name in get_args(Name)
    for sign in (1, -1)
    for sigma_data in ((0.5, 2.0) if name == "edm" else (0.5,))
]
TIMES = st.floats(0.001, 0.999)
SEEDS = st.integers(0, 2**32 - 1)
EPS = torch.finfo(torch.float64).eps

few = settings(max_examples=30)  # with checked annotations a call takes a millisecond


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return x0, eps


@few
@given(st.sampled_from(SCHEDULES), st.sampled_from(PREDICTIONS), TIMES, SEEDS)
def test_an_output_is_solved_for_the_pair_it_is_made_of(
    schedule: Schedule, prediction: Prediction, t: float, seed: int
) -> None:
    x0, eps = pair(seed, 2, 3, 4)
    level = schedule.level(t)
    x_t, out = schedule.mix(x0, eps, t), prediction.output(x0, eps, level)
    got = prediction.solve(out, x_t, level)
    # rounding of out and x_t is amplified by the coefficients alone
    p, q = prediction.pair(level)
    size = (
        (x_t.abs().max() + out.abs().max())
        * max(map(abs, (*level, p, q)))
        / prediction.determinant(level).abs()
    )
    for value, expected in zip(got, (x0, eps), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=8 * EPS * size.item())


@few
@given(st.sampled_from(PREDICTIONS), st.sampled_from(PREDICTIONS), st.sampled_from(SCHEDULES), TIMES, SEEDS)
def test_every_prediction_converts_to_every_other(
    first: Prediction, second: Prediction, schedule: Schedule, t: float, seed: int
) -> None:
    """Outputs of two networks that say the same are solved for the same pair, at one time a sample."""
    x0, eps = pair(seed, 2, 5)
    times = torch.tensor([t, 1 - t], dtype=torch.float64)
    level, x_t = schedule.level(times), schedule.mix(x0, eps, times)
    one = first.solve(first.output(x0, eps, level), x_t, level)
    other = second.solve(second.output(*one, level), x_t, level)
    worst = max(
        ((abs(x.pair(level)[0]) + abs(x.pair(level)[1]) + 1) / x.determinant(level).abs()).max()
        for x in (first, second)
    )
    scale = (max(level.sigma.max().item(), 1.0) * worst.item()) ** 2 * 50
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EPS * scale)


@few
@given(TIMES, SEEDS)
def test_textbook_conversions(t: float, seed: int) -> None:
    out, x_t = pair(seed, 2, 3)
    schedule = CosineBeta()
    alpha, sigma = level = schedule.level(t)
    for name, x0, eps in [
        ("x0", out, (x_t - alpha * out) / sigma),
        ("epsilon", (x_t - sigma * out) / alpha, out),
        ("v", alpha * x_t - sigma * out, sigma * x_t + alpha * out),
    ]:
        got = Prediction(name).solve(out, x_t, level)
        torch.testing.assert_close(got, (x0, eps), rtol=1e-9, atol=1e-9)
    flow = Prediction("flow").solve(out, x_t, Rectified().level(t))
    torch.testing.assert_close(flow, (x_t - t * out, x_t + (1 - t) * out), rtol=1e-12, atol=1e-12)


@few
@given(st.floats(0.002, 80), st.floats(0.1, 3), SEEDS)
def test_edm_is_its_published_preconditioning(sigma: float, data: float, seed: int) -> None:
    """D = c_skip·x + c_out·F and c_in of Karras et al. 2022, table 1, for alpha = 1."""
    out, x = pair(seed, 2, 3)
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / math.sqrt(sigma**2 + data**2)
    c_in = 1 / math.sqrt(sigma**2 + data**2)
    level = Level(torch.tensor(1.0, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    prediction = Prediction("edm", sigma_data=data)
    x0, eps = prediction.solve(out, x, level)
    torch.testing.assert_close(x0, c_skip * x + c_out * out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(eps, (x - x0) / sigma, rtol=1e-9, atol=1e-9)
    scale = prediction.input_scale(level)
    assert scale is not None
    assert scale.item() == pytest.approx(c_in, rel=1e-14)


@few
@given(TIMES, st.floats(0.1, 3), SEEDS)
def test_edm_knows_scaled_data_as_unscaled(t: float, data: float, seed: int) -> None:
    """At (alpha, sigma) it is what it is at (1, sigma/alpha) for x_t/alpha."""
    out, x_t = pair(seed, 2, 3)
    alpha, sigma = level = CosineBeta().level(t)
    prediction = Prediction("edm", sigma_data=data)
    x0, eps = prediction.solve(out, x_t, level)
    plain = prediction.solve(out, x_t / alpha, Level(torch.ones_like(alpha), sigma / alpha))
    torch.testing.assert_close((x0, eps), plain, rtol=1e-11, atol=1e-11)


def test_input_scale_gives_unit_variance_to_edm_and_nothing_to_the_others() -> None:
    x0, eps = pair(0, 200_000, 1)
    t, data = 0.4, 0.7
    schedule = ScaledLinearBeta()
    x_t, level = schedule.mix(data * x0, eps, t), schedule.level(t)
    scale = Prediction("edm", sigma_data=data).input_scale(level)
    assert scale is not None
    assert (x_t * scale).var().item() == pytest.approx(1, abs=0.01)
    for name in ("x0", "epsilon", "v", "flow"):
        assert Prediction(name).input_scale(level) is None


@pytest.mark.parametrize("sign", [1, -1])
@few
@given(t=TIMES, data=st.floats(0.1, 3))
def test_weights_in_closed_form(sign: int, t: float, data: float) -> None:
    """(D/sigma)² turns an error of x0 into that of the output; on these schedules it is known."""

    def weight(name: str, schedule: Schedule) -> float:
        level = schedule.level(t)
        return (Prediction(name, sign, data).determinant(level) / level.sigma).item() ** 2

    preserving, exploding = ScaledLinearBeta(), VarianceExploding()
    snr = preserving.log_snr(t).exp().item()
    s = exploding.sigma(t).item()
    assert weight("x0", preserving) == pytest.approx(1, rel=1e-12)
    assert weight("epsilon", preserving) == pytest.approx(snr, rel=1e-12)
    assert weight("v", preserving) == pytest.approx(1 + snr, rel=1e-12)  # 1/sigma²
    assert weight("v", preserving) == pytest.approx(preserving.sigma(t).item() ** -2, rel=1e-12)
    assert weight("flow", Rectified()) == pytest.approx(t**-2, rel=1e-12)
    assert weight("edm", exploding) == pytest.approx((s**2 + data**2) / (s * data) ** 2, rel=1e-12)


@pytest.mark.parametrize("name", get_args(Name))
def test_a_sign_flips_the_output_and_nothing_else(name: str) -> None:
    x0, eps = pair(1, 2, 3)
    level = CosineBeta().level(0.3)
    x_t = CosineBeta().mix(x0, eps, 0.3)
    plus, minus = Prediction(name), Prediction(name, -1)
    out = plus.output(x0, eps, level)
    assert minus.output(x0, eps, level).equal(-out)
    for a, b in zip(plus.solve(out, x_t, level), minus.solve(-out, x_t, level), strict=True):
        assert a.equal(b)


def test_coefficients_are_divided_before_they_are_cast() -> None:
    """1/1000 has no exact half, which 1000 is."""
    level = Level(torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    x_t, out = torch.zeros(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.float16)
    x0, eps = Prediction("epsilon").solve(out, x_t, level)
    assert x0.dtype == eps.dtype == torch.float16
    assert x0.tolist() == [[-1000.0, -1000.0]]


@pytest.mark.parametrize("schedule", [Rectified(), ZeroTerminalSNR(LinearBeta())], ids=["flow", "zero SNR"])
def test_epsilon_is_refused_where_the_noise_is_pure(schedule: Schedule) -> None:
    with pytest.raises(
        ValueError, match=r"epsilon prediction cannot be used with .* at t = 1 alpha is 0.*'v' or 'flow'"
    ):
        Prediction("epsilon").check(schedule)
    for name in ("x0", "v", "flow", "edm"):
        Prediction(name).check(schedule)
    for other in (*PRESERVING, VarianceExploding()):
        Prediction("epsilon").check(other)


@pytest.mark.parametrize(("name", "t"), [("epsilon", 1.0), ("x0", 0.0)])
def test_an_output_that_says_nothing_is_not_solved(name: str, t: float) -> None:
    level = Rectified().level(torch.tensor([0.5, t]))
    with pytest.raises(
        ValueError, match=rf"{name} prediction does not determine x0 and eps where alpha = \[0.5, {1 - t}\]"
    ):
        Prediction(name).solve(torch.ones(2, 3), torch.ones(2, 3), level)


def test_an_output_is_at_least_float32_and_has_the_digits_of_both() -> None:
    level = Rectified().level(0.1)
    one, prediction = torch.ones(1, 2), Prediction("flow")
    assert prediction.output(one.half(), one.half(), level).dtype == torch.float32
    # -0.6·x0 + 0.8·eps, with coefficients of the wider dtype
    level = Level(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    out = Prediction("v").output(one, one.double(), level)
    assert out.equal(torch.full((1, 2), 0.8 - 0.6, dtype=torch.float64))


def test_of_takes_a_name_or_a_prediction() -> None:
    prediction = Prediction("v", -1)
    assert Prediction.of(prediction) is prediction
    assert Prediction.of("flow") == Prediction("flow", 1, 0.5)
    assert Prediction("v") != prediction


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_is_accepted() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown prediction 'epsylon'; did you mean 'epsilon'.*'x0', 'epsilon', 'v', 'flow'",
    ):
        Prediction("epsylon")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        Prediction.of("score")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the sign of a prediction is 1 or -1, got 2"):
        Prediction("v", 2)  # pyright: ignore[reportArgumentType]
    for sigma_data in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sigma_data must be positive and finite, got {sigma_data}"):
            Prediction("edm", sigma_data=sigma_data)
    level = Rectified().level(0.5)
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 4\) but out has shape \(2, 3\)"):
        Prediction("v").solve(torch.ones(2, 3), torch.ones(2, 4), level)
    with pytest.raises(ValueError, match=r"eps has shape \(2, 4\) but x0 has shape \(2, 3\)"):
        Prediction("v").output(torch.ones(2, 3), torch.ones(2, 4), level)
