"""A bound recomputes eps, so that the pair goes on standing for x_t."""

from functools import partial

import pytest
import torch

from gendiff.denoiser import Denoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import Clip, DynamicThreshold, LinearBeta, Rectified, VarianceExploding, grids
from gendiff.sampling import DDIM, Bounded, sample


def wide(x, timestep, cond):
    return 0.5 * x + 1.5 * cond["label"][:, None] if cond else 2 * x


wide.accepts = frozenset({"label"})


@pytest.mark.parametrize(
    "schedule", [LinearBeta(), Rectified(), VarianceExploding()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("bound", [Clip(0.7), DynamicThreshold(0.5, 1.2), torch.tanh], ids=repr)
def test_the_pair_still_stands_for_x_t(bound, schedule, randn64) -> None:
    denoise, x = Denoiser(wide, schedule, "x0"), 3 * randn64(4, 5)
    for t in (0.3, torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)):
        free, bounded = denoise(x, t), Bounded(denoise, bound)(x, t)
        assert torch.equal(bounded.x0, bound(free.x0))
        assert (bounded.x0 - free.x0).abs().max() > 0.1
        alpha, sigma = schedule.level(torch.as_tensor(t)).like(x, torch.float64)
        torch.testing.assert_close(alpha * bounded.x0 + sigma * bounded.eps, x)
        assert bounded.out is None  # the network's output stands for another pair


def test_what_lies_inside_is_left_alone(randn64) -> None:
    denoise, x = Denoiser(wide, LinearBeta(), "x0"), randn64(4, 5)
    free, bounded = denoise(x, 0.5), Bounded(denoise, Clip(100.0))(x, 0.5)
    assert torch.equal(bounded.x0, free.x0)
    torch.testing.assert_close(bounded.eps, free.eps)


def test_round_a_guider_it_bounds_what_guidance_made(randn64) -> None:
    """The branches stay within 2 here; guidance at 7.5 leaves it, and the bound takes samples back."""
    denoise, x = Denoiser(wide, LinearBeta(), "x0"), randn64(4, 5).clamp(-1, 1)
    branches = {"cond": {"label": torch.ones(1)}, "uncond": {"label": torch.zeros(1)}}
    guider = Guider(denoise, branches, partial(cfg, scale=7.5))
    bounded = Bounded(guider, Clip(2.0))
    assert bounded.schedule == denoise.schedule
    assert guider(x, 0.5).x0.max() > 10
    grid = grids.trailing(LinearBeta(), 4)
    assert sample(guider, x, grid, DDIM()).max() > 10
    assert sample(bounded, x, grid, DDIM()).abs().max() <= 2
    inside = Guider(Bounded(denoise, Clip(2.0)), branches, partial(cfg, scale=7.5))
    assert inside(x, 0.5).x0.max() > 10


def test_low_precision_x_is_widened_before_eps() -> None:
    denoise = Denoiser(lambda x, timestep, cond: x, LinearBeta(), "v")
    x = torch.linspace(-3, 3, 8).reshape(2, 4).bfloat16()
    bounded = Bounded(denoise, Clip())(x, 0.2)
    assert bounded.x0.dtype == bounded.eps.dtype == torch.float32
    alpha, sigma = (value.item() for value in LinearBeta().level(0.2))
    torch.testing.assert_close(alpha * bounded.x0 + sigma * bounded.eps, x.float())
