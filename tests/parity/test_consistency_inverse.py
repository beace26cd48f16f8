"""LCM, TCD and DDIM inversion against diffusers, on their timesteps."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, LCMScheduler, TCDScheduler

from gendiff.sampling import DDIM, LCM, TCD, Path, Point
from tests.parity.paths import close, follow, generator_noise, table_network, table_path
from tests.parity.schedulers import Fake


def ready(scheduler, steps):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


def stepped(scheduler, x, **settings):
    settings |= {"generator": torch.Generator().manual_seed(1)} if settings.pop("noisy", True) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(Fake()(x, t), t, x, **settings).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(steps, prediction, randn64) -> None:
    """With timesteps for times the scale is their `timestep_scaling`; the last step returns f itself."""
    x = randn64(2, 3, 4, 4)
    scheduler = ready(LCMScheduler(prediction_type=prediction, clip_sample=False), steps)
    path = table_path(scheduler, scheduler.timesteps, 1.0)
    mine = follow(LCM(scale=10, start=0), path, x, table_network(prediction), generator_noise())[-1]
    close(mine, stepped(scheduler, x))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd(steps, eta, prediction, randn64) -> None:
    """Their last step ends at timestep 0, whatever `set_alpha_to_one` says: a grid that ends at t_min."""
    x = randn64(2, 3, 4, 4)
    scheduler = ready(TCDScheduler(prediction_type=prediction, clip_sample=False), steps)
    assert scheduler.final_alpha_cumprod == 1
    path = table_path(scheduler, scheduler.timesteps, scheduler.alphas_cumprod[0])
    path = Path((*path.points[:-1], path.points[-1]._replace(t=0.0)), path.between)
    mine = follow(TCD(eta, start=0, grain=1), path, x, table_network(prediction), generator_noise())[-1]
    close(mine, stepped(scheduler, x, eta=eta), 1e-9)


def lagging(scheduler):
    """The rising path of their inversion: the level of a step's lower end, the timestep of its upper end."""
    bars = [float(scheduler.initial_alpha_cumprod)]
    bars += [scheduler.alphas_cumprod[int(t)].item() for t in scheduler.timesteps]
    times = [*map(float, scheduler.timesteps), -1.0]
    points = [Point(t, math.sqrt(bar), math.sqrt(1 - bar)) for t, bar in zip(times, bars, strict=True)]
    return Path(tuple(points), lambda log_ratio: points[0])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddim_inverse_is_ddim_on_a_rising_path_whose_levels_lag(steps, spacing, randn64) -> None:
    x = randn64(2, 3, 4, 4)
    scheduler = ready(DDIMInverseScheduler(timestep_spacing=spacing, clip_sample=False), steps)
    mine = follow(DDIM(), lagging(scheduler), x, table_network())[-1]
    close(mine, stepped(scheduler, x, noisy=False), 1e-8)


def test_their_inverse_leaves_from_a_level_that_was_not_reached(randn64) -> None:
    """Where steps do not divide N: it is N // steps below the timestep, not at the one before."""
    x = randn64(2, 3, 4, 4)
    scheduler = ready(DDIMInverseScheduler(timestep_spacing="trailing", clip_sample=False), 3)
    mine = follow(DDIM(), lagging(scheduler), x, table_network())[-1]
    other = stepped(scheduler, x, noisy=False)
    assert scheduler.timesteps.tolist() == [332, 666, 999]
    assert (mine - other).abs().max() > 1e-3 * other.abs().max()
