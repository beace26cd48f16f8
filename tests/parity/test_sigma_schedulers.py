"""Schedulers that step in sigma/alpha, as k-diffusion does, against our plans on their own tables.

Their sigmas are float32; the network is one fake function in float64. What is compared is the step: the
tables of spacings are those of diffusers on both sides.
"""

import math

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)

from gendiff.sampling import DPM2, LMS, DPM2Ancestral, Euler, EulerAncestral, Heun
from tests.parity.paths import close, follow, generator_noise, sigma_network, sigma_path, sigma_steps
from tests.parity.schedulers import Fake

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning"
)  # KDPM2
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PAIRS = {
    EulerDiscreteScheduler: Euler(),
    HeunDiscreteScheduler: Heun(),
    KDPM2DiscreteScheduler: DPM2(),
    LMSDiscreteScheduler: LMS(),
    EulerAncestralDiscreteScheduler: EulerAncestral(),
    KDPM2AncestralDiscreteScheduler: DPM2Ancestral(),
}
KIND = pytest.mark.parametrize("kind", PAIRS, ids=lambda kind: kind.__name__)
SPACINGS = ("linspace", "leading", "trailing")


def made(kind, **settings):
    if kind is EulerAncestralDiscreteScheduler:
        settings = {name: value for name, value in settings.items() if not name.startswith("use_")}
    return kind(**TABLE, **settings)


@KIND
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_spacing_and_number_of_steps(kind, prediction, randn64) -> None:
    """Ancestral midpoints of few steps within 2e-4: their sigma_down is a difference in float32."""
    for spacing in SPACINGS:
        for steps in (1, 2, 10):
            scheduler = made(kind, timestep_spacing=spacing, prediction_type=prediction)
            scheduler.set_timesteps(steps)
            x = randn64(2, 3, 4, 4) * float(scheduler.init_noise_sigma)
            other = sigma_steps(scheduler, steps, x)[-1]
            path = sigma_path(scheduler)
            mine = follow(PAIRS[kind], path, x, sigma_network(prediction), generator_noise())[-1]
            rough = kind is KDPM2AncestralDiscreteScheduler and steps < 10
            close(mine, other, 2e-4 if rough else 1e-5)


@KIND
@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_every_table_of_sigmas(kind, sigmas, randn64) -> None:
    scheduler = made(kind, **{sigmas: True})
    scheduler.set_timesteps(7)
    x = randn64(2, 3, 4, 4) * float(scheduler.init_noise_sigma)
    other = sigma_steps(scheduler, 7, x)[-1]
    mine = follow(PAIRS[kind], sigma_path(scheduler), x, sigma_network(), generator_noise())[-1]
    close(mine, other)


def test_lms_of_every_order(randn64) -> None:
    for order in (1, 2, 3, 4):
        scheduler = made(LMSDiscreteScheduler)
        scheduler.set_timesteps(8)
        x, y = (randn64(2, 3) * 14.6,) * 2
        for t in scheduler.timesteps:
            out = Fake()(scheduler.scale_model_input(y, t), t)
            y = scheduler.step(out, t, y, order=order).prev_sample
        close(follow(LMS(order), sigma_path(scheduler), x, sigma_network())[-1], y)


def test_theirs_lms_that_begins_within_a_grid_takes_weights_of_answers_it_has_not(randn64) -> None:
    """Image-to-image: at step k of the table it uses weights of order k + 1, and of them the newest only.

    Ours begins anew with rising orders. The first step from there is Euler's; theirs is not.
    """
    scheduler = made(LMSDiscreteScheduler)
    scheduler.set_timesteps(8)
    path = sigma_path(scheduler)
    scheduler.set_begin_index(4)
    x = randn64(2, 3) * scheduler.sigmas[4].item()
    t = scheduler.timesteps[4]
    scheduler.scale_model_input(x, t)
    answer = sigma_network()(x, path.points[4])
    theirs = scheduler.step(answer[1], t, x).prev_sample
    euler = x + (scheduler.sigmas[5] - scheduler.sigmas[4]).double() * answer[1]
    assert (theirs - euler).abs().max() > 0.1
    begun = type(path)(path.points[4:], path.between)
    torch.testing.assert_close(follow(LMS(), begun, x, sigma_network())[0], euler, rtol=1e-6, atol=1e-6)


def test_their_churn_asks_the_network_before_the_noise_is_added(randn64) -> None:
    """Karras et al.'s algorithm 2 asks at the raised level, of the noised samples; theirs at neither."""
    scheduler = made(EulerDiscreteScheduler)
    scheduler.set_timesteps(5)
    path, x = sigma_path(scheduler), randn64(2, 3) * 14.6
    t, sigma, after = scheduler.timesteps[0], scheduler.sigmas[0].double(), scheduler.sigmas[1].double()
    out = Fake()(scheduler.scale_model_input(x, t), t)
    noise = generator_noise()(x)
    theirs = scheduler.step(out, t, x, s_churn=1.0, generator=torch.Generator().manual_seed(1)).prev_sample
    hat = 1.2 * sigma
    noised = x + noise * math.sqrt(hat**2 - sigma**2)
    as_theirs = noised + (after - hat) * out
    torch.testing.assert_close(theirs, as_theirs, rtol=1e-5, atol=1e-5)
    network = sigma_network()
    table = path.between  # which may go above the table's end, where Karras et al.'s sigma does
    right = follow(Euler(churn=1.0), path, x, network, generator_noise())[0]
    _, eps = network(noised, table(-math.log(hat)))
    torch.testing.assert_close(right, noised + (after - hat) * eps, rtol=1e-6, atol=1e-6)
    assert (right - theirs).abs().max() > 0.1


def test_the_karras_timesteps_of_kdpm2_are_rounded() -> None:
    """Its sigmas are not: the network is told another level than the samples have. Heun's are exact."""
    for kind, rounded in ((KDPM2DiscreteScheduler, True), (HeunDiscreteScheduler, False)):
        scheduler = made(kind, use_karras_sigmas=True)
        scheduler.set_timesteps(7)
        path = sigma_path(scheduler)
        exact = [path.between(point.log_ratio).t for point in path.points[:-1]]
        off = max(abs(point.t - t) for point, t in zip(path.points, exact, strict=False))
        assert (off > 0.1) == rounded
