"""Ancestral steps against their published forms, DDIM with eta, and the exact law."""

import math

import pytest
import torch

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import CosineBeta, Grid, LinearBeta, Rectified, VarianceExploding, ZeroTerminalSNR, grids
from gendiff.sampling import DDIM, DPM2, DPM2Ancestral, Euler, EulerAncestral, Path, iterate, sample
from tests.sampling.orders import ALL_GAUSSIAN, FEW_GAUSSIAN, PLANE, Skewed, short

SCHEDULES = [LinearBeta(), CosineBeta(), ZeroTerminalSNR(LinearBeta()), Rectified(), VarianceExploding()]
ON = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


@ON
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eulers_is_ddim(schedule, eta, randn64) -> None:
    """With one noise: the same share of the deviation is fresh. DDIM's root of 1 - 1 leaves 1e-8."""
    denoise, grid = OracleDenoiser(PLANE, schedule), grids.uniform(schedule, 5)
    x = schedule.sigma(1.0) * randn64(4, 2)
    one, other = (
        list(iterate(denoise, x, grid, solver, rng=2)) for solver in (EulerAncestral(eta), DDIM(eta))
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-6, atol=1e-7)


def test_eulers_is_that_of_k_diffusion(randn64) -> None:
    """At alpha = 1: sigma_up and sigma_down of its `get_ancestral_step`, with eta above 1 cut at sigma."""
    schedule, (x, x0, noise) = VarianceExploding(), randn64(3, 4, 2)
    grid = Grid(schedule, (0.8, 0.6))
    (_, sigma), (_, after) = ((a.item(), s.item()) for a, s in map(grid.level, (0, 1)))
    for eta in (0.3, 1.0, 4.0):
        up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        expected = x + (down - sigma) * (x - x0) / sigma + 1.2 * up * noise
        solver = EulerAncestral(eta, noise=1.2)
        told = solver.tell(solver.init(x, grid), Denoised(x0, (x - x0) / sigma), noise)
        torch.testing.assert_close(told.x, expected)


def test_the_flow_form_is_that_of_ltx(randn64) -> None:
    """sigma_down = sigma_s (1 + (sigma_s/sigma_t - 1) eta), an Euler step to it, and noise up to alpha_s."""
    x, x0, noise = randn64(3, 4, 2)
    for eta, (t, s) in [(1.0, (0.8, 0.6)), (0.4, (0.5, 0.1)), (1.0, (1.0, 0.9))]:
        down = s * (1 + (s / t - 1) * eta)
        moved = down / t * x + (1 - down / t) * x0
        renoise = math.sqrt(s**2 - down**2 * (1 - s) ** 2 / (1 - down) ** 2)
        expected = (1 - s) / (1 - down) * moved + renoise * noise
        solver, grid = EulerAncestral(eta, down="flow"), Grid(Rectified(), (t, s))
        told = solver.tell(solver.init(x, grid), Denoised(x0, (x - (1 - t) * x0) / t), noise)
        torch.testing.assert_close(told.x, expected)


@ON
@pytest.mark.parametrize("down", ["variance", "flow"])
@pytest.mark.parametrize("ends", [(1.0, 0.6), (0.6, 0.599), (0.3, 0.01)])
def test_a_step_keeps_the_marginal_of_every_point(down, schedule, ends) -> None:
    """Told the true pair, a step from N(alpha x0, sigma²) ends at N(alpha_s x0, sigma_s²)."""
    path = Path.of(Grid(schedule, ends))
    for eta in (0.0, 0.7, 1.0, 3.0):
        ((stage,),) = EulerAncestral(eta, down=down).plan(path)
        s = path.points[1]
        assert stage.x["x0"] == s.alpha
        assert math.hypot(stage.x["eps"], stage.x.get("noise", 0.0)) == pytest.approx(s.sigma, rel=1e-9)
        assert (stage.x.get("noise", 0.0) > 0) == (eta > 0)


def test_midpoint_step_is_that_of_k_diffusion(randn64) -> None:
    """At alpha = 1, from its own equations: down by the midpoint in log sigma, up by noise."""
    schedule = VarianceExploding()
    grid, x, noise = Grid(schedule, (0.8, 0.6)), 5 * randn64(4, 2), randn64(4, 2)
    sigma, after = grid.levels.sigma.tolist()

    def slope(x, sigma):
        return (x - PLANE.x0(x, 1.0, sigma)) / sigma

    up = 0.6 * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    down = math.sqrt(after**2 - up**2)
    middle = math.sqrt(sigma * down)
    guess = x + (middle - sigma) * slope(x, sigma)
    expected = x + (down - sigma) * slope(guess, middle) + up * noise
    solver = DPM2Ancestral(0.6)
    state, _ = solver.step(
        solver.init(x, grid), lambda x, t: OracleDenoiser(PLANE, schedule)(x, t), lambda x, span: noise
    )
    torch.testing.assert_close(state.x, expected)


def test_without_fresh_noise_they_are_the_methods_of_the_ode(randn64) -> None:
    grid, x = grids.uniform(LinearBeta(), 4), randn64(4, 2)
    for ancestral, plain in ((EulerAncestral(0.0), Euler()), (DPM2Ancestral(0.0), DPM2())):
        made = [sample(OracleDenoiser(PLANE, LinearBeta()), x, grid, solver) for solver in (ancestral, plain)]
        torch.testing.assert_close(*made)


@pytest.mark.parametrize("solver", [EulerAncestral(), DPM2Ancestral()], ids=repr)
@pytest.mark.parametrize("down", ["variance", "flow"])
def test_orders_of_the_law(solver, down) -> None:
    solver = type(solver)(down=down)
    assert short(solver, FEW_GAUSSIAN, steps=(24, 48), start=0.9) == []
    quieter = type(solver)(noise=0.95, down=down)
    assert short(quieter, FEW_GAUSSIAN[:1], steps=(24, 48), start=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [EulerAncestral(), DPM2Ancestral()], ids=repr)
@pytest.mark.parametrize("down", ["variance", "flow"])
def test_orders_on_all_laws(solver, down) -> None:
    assert short(type(solver)(down=down), ALL_GAUSSIAN, start=0.9) == []


def test_a_wrong_midpoint_is_caught() -> None:
    wrong = Skewed(DPM2Ancestral(), share=0.03)
    assert short(wrong, FEW_GAUSSIAN[:1], steps=(32, 64), start=0.9)


def test_they_start_at_pure_noise(randn64) -> None:
    denoise, grid = OracleDenoiser(PLANE, Rectified()), grids.uniform(Rectified(), 3)
    for solver in (EulerAncestral(), EulerAncestral(down="flow"), DPM2Ancestral(), DPM2Ancestral(9.0)):
        assert sample(denoise, randn64(4, 2), grid, solver, rng=1).isfinite().all()


def test_wrong_choices_are_refused() -> None:
    for wrong in ({"eta": -0.1}, {"eta": math.nan}, {"noise": 0.0}):
        with pytest.raises(ValueError, match=r"eta is at least 0 .* and noise above 0"):
            EulerAncestral(**wrong)
    with pytest.raises((ValueError, TypeError), match="'flo'"):
        DPM2Ancestral(down="flo")
