"""Weightings against their published formulas and diffusers' SNR; one loss is equal in every space."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gendiff.math import (
    CosineBeta,
    Level,
    LinearBeta,
    Prediction,
    Rectified,
    ScaledLinearBeta,
    SigmoidBeta,
    VarianceExploding,
    ZeroTerminalSNR,
)
from gendiff.objectives import EDMWeighting, MinSNR, SoftMinSNR, Unweighted

SPACES = [Prediction(name) for name in ("x0", "epsilon", "v", "flow", "edm")]
SPACES += [Prediction("edm", sigma_data=1.7), Prediction("flow", sign=-1)]
WEIGHTINGS = [MinSNR(5.0), MinSNR(0.3), SoftMinSNR(4.0), EDMWeighting(0.5), EDMWeighting(2.0)]
SCHEDULES = [
    LinearBeta(),
    ScaledLinearBeta(size=50),
    CosineBeta(),
    SigmoidBeta(),
    ZeroTerminalSNR(ScaledLinearBeta()),
    Rectified(),
    VarianceExploding(),
]
VARIANCE_PRESERVING = [s for s in SCHEDULES if s.size is not None]


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def inner_times(schedule) -> torch.Tensor:
    """Times from t_min up to, but without, t = 1, where a zero terminal SNR has no epsilon."""
    return torch.linspace(max(schedule.t_min, 1e-3), 0.999, 37, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- published formulas


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=repr)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_hang_et_al(schedule, gamma):
    alpha, sigma = level = schedule.level(inner_times(schedule))
    snr = alpha**2 / sigma**2
    weight = {name: MinSNR(gamma).weight(level, Prediction(name)) for name in ("x0", "epsilon", "v")}
    assert_close(weight["x0"], torch.minimum(snr, f64(gamma)), rtol=1e-12, atol=0)
    assert_close(weight["epsilon"], torch.minimum(snr, f64(gamma)) / snr, rtol=1e-12, atol=0)
    assert_close(weight["v"], torch.minimum(snr, f64(gamma)) / (snr + 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=repr)
def test_soft_min_snr_is_crowson_et_al(schedule):
    alpha, sigma = level = schedule.level(inner_times(schedule))
    ratio = sigma / alpha  # their sigma, of data that is not scaled down
    soft = 1 / (ratio**2 + 1 / 4.0)
    assert_close(SoftMinSNR(4.0).weight(level, Prediction("x0")), soft, rtol=1e-12, atol=0)
    assert_close(SoftMinSNR(4.0).weight(level, Prediction("epsilon")), soft * ratio**2, rtol=1e-12, atol=0)


def test_soft_min_snr_lies_below_min_snr_and_meets_it_at_both_ends():
    snr = torch.logspace(-8, 8, 161, dtype=torch.float64)
    hard, soft = MinSNR(4.0).of_snr(snr), SoftMinSNR(4.0).of_snr(snr)
    assert (soft < hard).all()
    assert_close(soft[[0, -1]], hard[[0, -1]], rtol=1e-7, atol=0)
    assert_close(SoftMinSNR(4.0).of_snr(f64([4.0])), f64([2.0]))


@pytest.mark.parametrize(
    ("schedule", "name", "arguments"),
    [
        (LinearBeta(), "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (ScaledLinearBeta(), "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (CosineBeta(), "squaredcos_cap_v2", {}),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_min_snr_is_that_of_the_scripts_of_diffusers(schedule, name, arguments):
    timesteps = torch.arange(0, 1000, 7)
    snr = compute_snr(DDPMScheduler(beta_schedule=name, **arguments), timesteps)
    theirs = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]  # as their scripts have it
    level = schedule.level((timesteps + 1).double() / 1000)
    # their table is float32, in which 1 - 0.9999 keeps four digits
    for space, expected in (("epsilon", theirs / snr), ("v", theirs / (snr + 1))):
        ours = MinSNR(5.0).weight(level, Prediction(space))
        assert_close(ours, expected.double(), rtol=1e-3, atol=1e-9)
        assert_close(ours[30:], expected[30:].double(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_weighting_is_karras_et_al_table_1(sigma_data):
    sigma = torch.logspace(-3, 2, 60, dtype=torch.float64)
    level = Level(torch.ones_like(sigma), sigma)
    lambda_ = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    weighting = EDMWeighting(sigma_data)
    assert_close(weighting.weight(level, Prediction("x0")), lambda_, rtol=1e-12, atol=0)
    in_f_space = weighting.weight(level, Prediction("edm", sigma_data=sigma_data))
    assert_close(in_f_space, lambda_ * c_out**2, rtol=1e-12, atol=0)
    assert_close(in_f_space, torch.ones_like(sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_edm_weighting_is_one_in_its_own_space_on_every_schedule(schedule):
    level = schedule.level(inner_times(schedule))
    own = EDMWeighting(0.5).weight(level, Prediction("edm", sigma_data=0.5))
    assert_close(own, torch.ones_like(own), rtol=1e-12, atol=0)
    foreign = EDMWeighting(0.5).weight(level, Prediction("edm", sigma_data=1.0))
    assert (foreign - 1).abs().max() > 0.1


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_unweighted_is_one_in_every_space(space):
    level = LinearBeta().level(f64([0.001, 0.5, 1.0]))
    assert torch.equal(Unweighted().weight(level, space), torch.ones(3, dtype=torch.float64))


# --------------------------------------------------------------------- one loss, whatever space it is told in


def loss_in(space, level, x0, eps, mistake):
    """The mean squared error in a space of the pair whose x0 is wrong by `mistake` and which keeps x_t."""
    ratio = (level.alpha / level.sigma)[:, None]
    said = space.output(x0 + mistake, eps - ratio * mistake, level)
    return (said - space.output(x0, eps, level)).square().mean(1)


@settings(max_examples=60)
@given(
    weighting=st.sampled_from(WEIGHTINGS),
    log_alpha=st.floats(-4, 4),
    log_snr=st.floats(-12, 12),
    values=st.lists(st.floats(-3, 3), min_size=9, max_size=9),
)
def test_one_loss_is_the_same_number_in_every_space(weighting, log_alpha, log_snr, values):
    alpha = f64([math.exp(log_alpha)])
    level = Level(alpha, alpha * math.exp(-log_snr / 2))
    x0, eps, mistake = f64(values).reshape(3, 1, 3)
    expected = weighting.of_snr((level.alpha / level.sigma) ** 2) * mistake.square().mean(1)
    for space in SPACES:
        actual = weighting.weight(level, space) * loss_in(space, level, x0, eps, mistake)
        assert_close(actual, expected, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_one_loss_is_the_same_number_on_every_schedule(weighting, schedule, randn64):
    level = schedule.level(inner_times(schedule))
    x0, eps, mistake = randn64(3, len(level.alpha), 5)
    losses = torch.stack([weighting.weight(level, s) * loss_in(s, level, x0, eps, mistake) for s in SPACES])
    assert_close(losses, losses[:1].expand_as(losses), rtol=1e-9, atol=0)


# -------------------------------------------------------------------------------------------- ends and errors


@pytest.mark.parametrize(
    ("weighting", "at_noise", "at_data"),
    [(MinSNR(5.0), 0.0, 5.0), (SoftMinSNR(4.0), 0.0, 4.0), (EDMWeighting(0.5), 4.0, math.inf)],
)
def test_the_ends_of_the_snr_have_their_limits(weighting, at_noise, at_data):
    assert weighting.of_snr(f64([0.0, math.inf])).tolist() == [at_noise, at_data]


@pytest.mark.parametrize("weighting", [MinSNR(math.inf), SoftMinSNR(math.inf)], ids=repr)
def test_an_infinite_gamma_is_the_snr_itself(weighting):
    snr = torch.logspace(-6, 6, 13, dtype=torch.float64)
    assert_close(weighting.of_snr(snr), snr, rtol=1e-15, atol=0)


def test_zero_terminal_snr_weighs_nothing_in_v_where_x_t_says_nothing():
    level = ZeroTerminalSNR(ScaledLinearBeta()).level(f64([1.0]))
    assert MinSNR().weight(level, Prediction("v")).item() == 0
    assert EDMWeighting(0.5).weight(level, Prediction("v")).item() == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    ("kind", "name"), [(MinSNR, "gamma"), (SoftMinSNR, "gamma"), (EDMWeighting, "sigma_data")]
)
def test_constants_must_be_positive(kind, name, bad):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {bad}"):
        kind(bad)


def test_weightings_are_compared_by_content():
    assert MinSNR(3.0) == MinSNR(3.0) != MinSNR(4.0)
    assert len({SoftMinSNR(), SoftMinSNR(4.0), EDMWeighting(), MinSNR()}) == 3
