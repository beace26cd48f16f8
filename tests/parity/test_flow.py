"""Flow schedulers of diffusers are Euler, Heun, LCM and Euler ancestral on the straight path."""

import math

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXEulerAncestralRFScheduler,
)

from gendiff.denoiser import Denoiser
from gendiff.math import Grid, Rectified
from gendiff.sampling import LCM, Euler, EulerAncestral, Heun, sample
from tests.parity.paths import close
from tests.parity.schedulers import Fake

DENOISE = Denoiser(Fake(), Rectified(), "flow")


def theirs(scheduler, x, **settings):
    for t in scheduler.timesteps:
        x = scheduler.step(Fake()(x, t), t, x, **settings).prev_sample
    return x


def grid_of(scheduler):
    """Its sigmas once each: Heun's table holds the inner ones twice."""
    sigmas = scheduler.sigmas.double()
    heun = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
    return Grid(Rectified(), sigmas[[0, *range(1, len(sigmas), 2)]] if heun else sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "solver"), [(FlowMatchEulerDiscreteScheduler, Euler()), (FlowMatchHeunDiscreteScheduler, Heun())]
)
def test_flow_euler_and_heun_are_ours_on_the_straight_path(kind, solver, shift, randn64) -> None:
    """Theirs steps in float32."""
    x = randn64(2, 3, 4, 4)
    for steps in (1, 2, 3, 10, 50):
        scheduler = kind(shift=shift)
        scheduler.set_timesteps(steps)
        close(sample(DENOISE, x, grid_of(scheduler), solver), theirs(scheduler, x), 2e-6)


def test_stochastic_sampling_is_lcm_without_a_boundary(randn64) -> None:
    x = randn64(2, 3, 4, 4).float()
    for scheduler in (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()):
        scheduler.set_timesteps(4)
        other = theirs(scheduler, x, generator=torch.Generator().manual_seed(1))
        rng = torch.Generator().manual_seed(1)
        close(sample(DENOISE, x, grid_of(scheduler), LCM(math.inf), rng=rng), other, 2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_ancestral_flow_scheduler(eta, randn64) -> None:
    scheduler, x = LTXEulerAncestralRFScheduler(eta=eta), randn64(2, 3, 4, 4).float()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 7).tolist())
    generator, y = torch.Generator().manual_seed(1), x
    for t in scheduler.timesteps[:-1]:
        y = scheduler.step(Fake()(y, t), t, y, generator=generator).prev_sample
    rng = torch.Generator().manual_seed(1)
    solver = EulerAncestral(eta, down="flow")
    close(sample(DENOISE, x, grid_of(scheduler), solver, rng=rng), y, 2e-6)


def test_their_churn_of_flows_leaves_the_signal_as_it_was(randn64) -> None:
    """At sigma_hat samples of a flow hold (1 - sigma_hat)·x0; theirs keep (1 - sigma)·x0 under the noise."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    x0, steps = torch.full((1, 1), 100.0), len(scheduler.sigmas) - 1
    sigma, after = scheduler.sigmas[2].item(), scheduler.sigmas[3].item()
    x = (1 - sigma) * x0
    gamma = min(0.9 / steps, math.sqrt(2) - 1)
    hat = sigma * (1 + gamma)
    noise = torch.randn(1, 1, generator=torch.Generator().manual_seed(1))
    made = scheduler.step(
        -x0, scheduler.timesteps[3], x, s_churn=0.9, generator=torch.Generator().manual_seed(1)
    )
    noised = x + noise * math.sqrt(hat**2 - sigma**2)  # and not (1 - hat)/(1 - sigma)·x + …
    expected = noised - x0 * sigma / hat * (after - hat)
    torch.testing.assert_close(made.prev_sample, expected, rtol=1e-4, atol=1e-3)
