"""DDPM and DDIM against diffusers' schedulers, step by step with one fake network and one noise.

Their tables are float32, ours float64. The step equations are compared in float64, with our table put in
place of theirs; 1e-9 leaves room for their 1 - ᾱ_t/ᾱ_s, which cancels. As shipped they are compared in
`test_as_shipped`. What they get wrong is left out here and shown in `test_ddpm_ddim_faults.py`.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from gendiff.denoiser import Denoiser
from gendiff.math import (
    Clip,
    CosineBeta,
    DynamicThreshold,
    LinearBeta,
    ScaledLinearBeta,
    SigmoidBeta,
    Tabulated,
    ZeroTerminalSNR,
    grids,
)
from gendiff.sampling import DDIM, DDPM, Bounded, iterate
from tests.parity.schedulers import SPACINGS, Fake, converted, theirs

PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
BETAS = [0.1, 0.05, 0.2, 0.3, 0.15, 0.02, 0.4, 0.1, 0.25, 0.3]
TABLES = {
    "linear": (LinearBeta(), {}),
    "scaled_linear": (ScaledLinearBeta(1e-4, 0.02), {"beta_schedule": "scaled_linear"}),
    "cosine": (CosineBeta(), {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (SigmoidBeta(), {"beta_schedule": "sigmoid"}),
    "trained": (Tabulated(BETAS), {"trained_betas": BETAS, "num_train_timesteps": len(BETAS)}),
    "zero terminal": (ZeroTerminalSNR(LinearBeta()), {"rescale_betas_zero_snr": True}),
}
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]


def ours(schedule, prediction, grid, solver, x, *, bound=None, learned=False):
    denoise = Denoiser(Fake(learned), schedule, PREDICTIONS[prediction], learned_variance=learned)
    denoise = denoise if bound is None else Bounded(denoise, bound)
    return [step.x for step in iterate(denoise, x, grid, solver, rng=torch.Generator().manual_seed(1))]


def agree(mine, other) -> None:
    """At every step, relative to the largest value, since unit errors of eps are errors 1/alpha of x0."""
    assert len(mine) == len(other)
    for x, y in zip(mine, other, strict=True):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max().clamp(min=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm(spacing, variance, prediction, randn64) -> None:
    """Their last step draws noise unless it leaves timestep 0: where that shows, it is not compared."""
    schedule, x = LinearBeta(), randn64(2, 3, 4, 4)
    scheduler = DDPMScheduler(
        timestep_spacing=spacing, variance_type=variance, prediction_type=prediction, clip_sample=False
    )
    learned = variance == "learned_range"
    other = theirs(converted(scheduler, schedule), 4, Fake(learned), x)
    mine = ours(schedule, prediction, SPACINGS[spacing](schedule, 4), DDPM(variance), x, learned=learned)
    last = None if spacing != "trailing" or variance.startswith("fixed_small") else -1
    agree(mine[:last], other[:last])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "size", "steps"), [("leading", 1000, 3), ("trailing", 1000, 4), ("linspace", 5, 5)]
)
def test_ddim(spacing, size, steps, eta, prediction, randn64) -> None:
    """Every spacing, at numbers of steps for which their previous timestep is the one visited next."""
    schedule, x = LinearBeta(size=size), randn64(2, 3, 4, 4)
    scheduler = DDIMScheduler(
        num_train_timesteps=size, timestep_spacing=spacing, prediction_type=prediction, clip_sample=False
    )
    other = theirs(converted(scheduler, schedule), steps, Fake(), x, eta=eta)
    agree(ours(schedule, prediction, SPACINGS[spacing](schedule, steps), DDIM(eta), x), other)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_that_ends_at_the_first_entry(eta, randn64) -> None:
    """`set_alpha_to_one=False` with `steps_offset=1`, Stable Diffusion's, is a grid that ends at t_min."""
    schedule, x = ScaledLinearBeta(), randn64(2, 3, 4, 4)
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    other = theirs(converted(scheduler, schedule), 7, Fake(), x, eta=eta)
    grid = grids.leading(schedule, 7, offset=1, end=schedule.t_min)
    agree(ours(schedule, "epsilon", grid, DDIM(eta), x), other)


def test_without_the_offset_their_last_step_does_nothing(randn64) -> None:
    """It goes from the first entry to itself, which is no step of a grid: ours has one less."""
    schedule, x = LinearBeta(), randn64(2, 3, 4, 4)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    *other, last = theirs(converted(scheduler, schedule), 7, Fake(), x)
    torch.testing.assert_close(last, other[-1], rtol=1e-12, atol=1e-12)
    visited = grids.leading(schedule, 7).times
    agree(ours(schedule, "epsilon", grids.Grid(schedule, visited[:-1]), DDIM(), x), other)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DDPMScheduler, name) for name in TABLES]
    + [(DDIMScheduler, name) for name in TABLES if name != "sigmoid"],
)
def test_every_table_of_betas(kind, name, randn64) -> None:
    """The table itself within the rounding of a float32 cumprod over N entries, and one run on it."""
    schedule, settings = TABLES[name]
    scheduler = kind(prediction_type="v_prediction", clip_sample=False, **settings)
    alpha_bar = schedule.log_alpha_bar.exp()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, rtol=2e-5, atol=2e-7)
    steps, x = 4, randn64(2, 3, 4, 4)
    other = theirs(converted(scheduler, schedule), steps, Fake(), x)
    solver = DDPM() if kind is DDPMScheduler else DDIM()
    agree(ours(schedule, "v_prediction", grids.leading(schedule, steps), solver, x), other)


BOUNDS = {
    "clip": (Clip(), {"clip_sample": True}),
    "clip at 0.7": (Clip(0.7), {"clip_sample": True, "clip_sample_range": 0.7}),
    "threshold": (
        DynamicThreshold(0.9, 1.5),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    ),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name, prediction, randn64) -> None:
    """DDPM always, DDIM with `use_clipped_model_output`, which recomputes eps; at these x0 all bounds act."""
    schedule, x = LinearBeta(), randn64(2, 3, 4, 4)
    bound, settings = BOUNDS[name]
    grid = grids.leading(schedule, 4)
    scheduler = DDPMScheduler(prediction_type=prediction, **settings)
    other = theirs(converted(scheduler, schedule), 4, Fake(), x)
    agree(ours(schedule, prediction, grid, DDPM(), x, bound=bound), other)
    scheduler = DDIMScheduler(prediction_type=prediction, **settings)
    other = theirs(converted(scheduler, schedule), 4, Fake(), x, eta=0.5, use_clipped_model_output=True)
    bounded = ours(schedule, prediction, grid, DDIM(0.5), x, bound=bound)
    agree(bounded, other)
    assert (bounded[-1] - ours(schedule, prediction, grid, DDIM(0.5), x)[-1]).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "solver"), [(DDPMScheduler, DDPM()), (DDIMScheduler, DDIM())])
def test_as_shipped(kind, solver, randn64) -> None:
    """Float32 samples on their own tables: within 2e-5, since 1 - ᾱ of a float32 ᾱ of 0.9999 has 4 digits.

    An error of 6e-8 in ᾱ is one of 3e-6 in sigma = 0.01, and of 1e-5 in an x0 that a clip keeps below 1.
    """
    schedule, x = LinearBeta(), randn64(2, 3, 4, 4).float()
    other = theirs(
        kind(), 25, Fake(), x, **({"use_clipped_model_output": True} if kind is DDIMScheduler else {})
    )
    mine = ours(schedule, "epsilon", grids.leading(schedule, 25), solver, x, bound=Clip())
    assert mine[-1].dtype == torch.float32
    for x_s, y_s in zip(mine, other, strict=True):
        torch.testing.assert_close(x_s, y_s, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_timesteps_of_every_spacing(spacing) -> None:
    schedule, scheduler = LinearBeta(), DDIMScheduler(timestep_spacing=spacing)
    for steps in [2, 3, 7, 10, 20, 25, 28, 30, 50, 64, 99, 100, 333, 501, 1000]:
        scheduler.set_timesteps(steps)
        grid = SPACINGS[spacing](schedule, steps)
        assert schedule.timestep(grid.t[:-1]).tolist() == scheduler.timesteps.tolist()
