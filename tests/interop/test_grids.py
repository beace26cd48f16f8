"""Grids of schedulers and pipelines of diffusers: the levels that theirs visit, and the timesteps there."""

import diffusers
import pytest
import torch

from gendiff.interop.diffusers.grids import grid_of
from gendiff.interop.diffusers.schedules import schedule_of
from gendiff.math import Rectified, grids
from gendiff.math.grids import shift_times
from gendiff.testing import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def ratios(grid):
    return (-grid.schedule.log_snr(grid.t) / 2).exp()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_spacings_are_those_of_gendiff(spacing, steps) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    schedule = schedule_of(scheduler)
    plain = {"leading": lambda s, n: grids.leading(s, n, offset=1)}
    wanted = plain.get(spacing, getattr(grids, spacing))(schedule, steps)
    assert grid_of(scheduler, steps).times == wanted.times
    assert grid_of(diffusers.DDIMScheduler(steps_offset=1), steps, spacing=spacing).times == wanted.times


def test_the_end() -> None:
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1)
    assert grid_of(scheduler, 5).times[-1] == 1e-3
    assert grid_of(diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), 5).times[-1] == 1e-3
    assert grid_of(diffusers.DPMSolverMultistepScheduler(), 5).times[-1] == 0.0


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta", "lu"])
def test_sigma_schedules(kind) -> None:
    """The levels of theirs; of the network's timesteps only that they are within rounding of theirs."""
    setting = "use_lu_lambdas" if kind == "lu" else f"use_{kind}_sigmas"
    theirs = diffusers.DPMSolverMultistepScheduler(**{setting: True})
    theirs.set_timesteps(12)
    grid = grid_of(theirs, 12)
    torch.testing.assert_close(ratios(grid), theirs.sigmas.double(), rtol=1e-4, atol=0)
    timesteps = grid.schedule.timestep(grid.t[:-1])
    assert (timesteps - theirs.timesteps).abs().max() < 1.01


def test_edm_and_video() -> None:
    theirs = diffusers.EDMDPMSolverMultistepScheduler()
    theirs.set_timesteps(9)
    grid = grid_of(theirs, 9)
    torch.testing.assert_close(grid.levels.sigma, theirs.sigmas.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        grid.schedule.timestep(grid.t[:-1]), theirs.timesteps.double(), rtol=1e-5, atol=1e-5
    )
    video = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    video.set_timesteps(9)
    grid = grid_of(video, 9)
    torch.testing.assert_close(grid.levels.sigma, video.sigmas.double(), rtol=1e-5, atol=0)


def test_shifts_are_applied_once() -> None:
    static = grid_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    even = torch.linspace(1, 1e-3, 4, dtype=torch.float64)
    torch.testing.assert_close(static.t[:-1], shift_times(even, 3.0))
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    grid = grid_of(dynamic, 4, size=4096)
    torch.testing.assert_close(
        grid.t[:-1], shift_times(even, torch.tensor(1.15).exp().item()), rtol=1e-7, atol=0
    )
    with pytest.raises(ValueError, match="give size="):
        grid_of(dynamic, 4)
    with pytest.raises(ValueError, match="give the number of tokens"):
        grid_of(dynamic, 4, size=(1024, 1024))
    with pytest.raises(ValueError, match=r"unknown spacing of FlowMatchEulerDiscreteScheduler 'trailing'"):
        grid_of(dynamic, 4, spacing="trailing")
    with pytest.raises(ValueError, match="an inversion goes up"):
        grid_of(diffusers.DDIMInverseScheduler(), 4)


@pytest.mark.parametrize(
    "name", ["flux", "flux2", "qwen", "z-image", "lumina2", "sd3", "sana", "wan", "sd15", "sdxl"]
)
def test_the_grid_of_a_pipeline_is_what_it_visits(name) -> None:
    """Its own sigmas and its shift by size; static shifts where theirs is applied twice are left out."""
    pipe, size = tiny_pipeline(name), {"height": 64, "width": 96}
    if name in ("sd3",):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    extra = {"num_frames": 5} if name == "wan" else {}
    extra |= {"use_resolution_binning": False} if name == "sana" else {}
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt="a fox", num_inference_steps=3, output_type="latent", **size, **extra)
    theirs, grid = pipe.scheduler, grid_of(pipe, 3, size=(64, 96))
    if isinstance(grid.schedule, Rectified):
        torch.testing.assert_close(grid.t, theirs.sigmas.double(), rtol=1e-5, atol=1e-5)
    else:
        visited = grid.schedule.timestep(grid.t[:-1])
        assert visited.tolist() == pytest.approx(theirs.timesteps.unique().flip(0).tolist(), abs=0.51)
