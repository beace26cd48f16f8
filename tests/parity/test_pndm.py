"""PNDM, in both of its forms, against diffusers; and what theirs gets wrong."""

import pytest
from diffusers import PNDMScheduler

from gendiff.sampling import PNDM
from tests.parity.paths import close, follow, table_network, table_path
from tests.parity.schedulers import Fake

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FORMS = {"improved_euler": True, "runge_kutta": False}


def both(warmup, steps, x, prediction="epsilon", **settings):
    """(ours, theirs) at the end, on the timesteps that theirs says."""
    settings = {"timestep_spacing": "leading", "steps_offset": 1, **settings}
    scheduler = PNDMScheduler(**TABLE, skip_prk_steps=FORMS[warmup], prediction_type=prediction, **settings)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    path = table_path(scheduler, scheduler._timesteps[::-1], scheduler.final_alpha_cumprod)
    mine = follow(PNDM(warmup), path, x, table_network(prediction))[-1]
    for t in scheduler.timesteps:
        x = scheduler.step(Fake()(x, t), t, x).prev_sample
    return mine, x


@pytest.mark.parametrize("warmup", FORMS)
@pytest.mark.parametrize("to_data", [False, True])
def test_as_stable_diffusion_uses_it(warmup, to_data, randn64) -> None:
    for steps in (4, 5, 10, 50) if warmup == "runge_kutta" else (1, 2, 3, 4, 10, 50):
        close(*both(warmup, steps, randn64(2, 3, 4, 4), set_alpha_to_one=to_data), 1e-6)


def test_the_repeated_timestep_is_the_second() -> None:
    """What a drop-in must evaluate: N + 1 timesteps, the second twice."""
    scheduler = PNDMScheduler(**TABLE, skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    path = table_path(scheduler, [801, 601, 401, 201, 1], 1.0)
    assert [stage.at.t for stages in PNDM().plan(path) for stage in stages] == [801, 601, 601, 401, 201, 1]


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 7)])
def test_their_previous_timestep_is_not_the_one_visited_next(spacing, steps, randn64) -> None:
    """It is N // steps earlier, which is another one in linspace, and where steps do not divide N."""
    mine, other = both("improved_euler", steps, randn64(2, 3, 4, 4), timestep_spacing=spacing, steps_offset=0)
    assert (mine - other).abs().max() > 0.01 * other.abs().max()


def test_their_velocities_are_averaged_before_they_are_converted(randn64) -> None:
    """A mean of v at several times is converted by one alpha and one sample: not the mean of the noises."""
    mine, other = both("improved_euler", 10, randn64(2, 3, 4, 4), "v_prediction")
    assert (mine - other).abs().max() > 0.05 * other.abs().max()


def test_their_runge_kutta_needs_four_steps(randn64) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        both("runge_kutta", 3, randn64(2, 3, 4, 4))
