"""LCM and TCD: exact laws from exact functions, boundary conditions, the times they jump to."""

import math

import pytest
import torch

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import Grid, LinearBeta, Rectified, VarianceExploding, grids
from gendiff.sampling import DDIM, LCM, TCD, Path, Point, iterate, sample
from gendiff.sampling.lookup import point_at
from tests.sampling.orders import LINE, PLANE

SCHEDULES = [LinearBeta(), Rectified(), VarianceExploding()]
ON = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def law_at_end(solver, schedule, grid, x0_of):
    """Mean and variance of the affine map that a run is, from unit perturbations of x and of each noise."""
    rows = torch.zeros(2 + grid.steps, 1, dtype=torch.float64)
    rows[1] = 1
    state, row = solver.init(rows, grid), 2
    while not state.done:
        noise = torch.zeros_like(rows)
        noise[row], row = 1, row + 1
        level = grid.level(state.i)
        x0 = x0_of(state.x, *level)
        state = solver.tell(state, Denoised(x0, (state.x - level.alpha * x0) / level.sigma), noise)
    mean, moved = state.x[0], state.x[1:] - state.x[0]
    start = LINE.marginal(*grid.level(0))
    mean = mean + start.mean * moved[0]
    return mean, moved[0].square() * start.covariance[0] + moved[1:].square().sum(0)


@ON
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_consistency_function_draws_from_the_exact_law(schedule, steps) -> None:
    """f(x_t, t) is the end of the exact flow: mean and variance are those of the data at any step count."""
    grid = grids.uniform(schedule, steps, 0.9)

    def f(x, alpha, sigma):
        return LINE.flow(x, alpha, sigma, torch.tensor(1.0), torch.tensor(0.0))

    mean, variance = law_at_end(LCM(math.inf), schedule, grid, f)
    torch.testing.assert_close(mean, LINE.mean)
    torch.testing.assert_close(variance, LINE.covariance[0])
    _, off = law_at_end(LCM(2.0, 0.0), schedule, grid, f)  # a boundary condition that f was not made with
    assert (off - LINE.covariance[0]).abs() > 1e-3


def test_boundary_conditions_of_luo() -> None:
    """Appendix C: at timestep k of a thousand tau = 10k, and c_skip = 1/4 / (tau² + 1/4)."""
    for k in (0, 19, 999):
        ((stage,),) = LCM().plan(Path.of(Grid(LinearBeta(), [(k + 1) / 1000, 1e-4])))
        alpha = LinearBeta().alpha(1e-4).item()
        tau = 10 * k
        assert stage.x["x"] == pytest.approx(alpha * 0.25 / (tau**2 + 0.25), abs=1e-12)
        assert stage.x["x0"] == pytest.approx(alpha * tau / math.sqrt(tau**2 + 0.25), abs=1e-9)


def test_lcm_without_boundary_is_fresh_noise_on_x0(randn64) -> None:
    x, x0, noise = randn64(3, 4, 2)
    grid = Grid(Rectified(), [0.8, 0.3])
    told = LCM(math.inf).tell(LCM(math.inf).init(x, grid), Denoised(x0, x), noise)
    torch.testing.assert_close(told.x, 0.7 * x0 + 0.3 * noise)


@ON
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_keeps_the_marginal_of_every_point(gamma, schedule) -> None:
    """And by noise from the level of the time (1 - gamma)·s, which is looked up."""
    path = Path.of(Grid(schedule, [0.9, 0.5, 0.01]))
    for (stage,), s in zip(TCD(gamma, start=0.0).plan(path), path.points[1:], strict=True):
        assert stage.x["x0"] == s.alpha
        assert math.hypot(stage.x["eps"], stage.x.get("noise", 0.0)) == pytest.approx(s.sigma, rel=1e-9)
        alpha, sigma = schedule.level((1 - gamma) * s.t)
        assert stage.x["eps"] == pytest.approx((s.alpha * sigma / alpha).item(), rel=1e-6, abs=1e-12)


def test_tcd_rounds_its_times_down_where_it_is_told(randn64) -> None:
    """0.7 of timestep 499 is 349.3: level 349 of a table of a thousand."""
    schedule = LinearBeta()
    path = Path.of(Grid(schedule, [1.0, 0.5, 0.001]))
    (first,), (last,) = TCD(0.3, grain=1e-3).plan(path)
    alpha, sigma = schedule.level(0.35)
    assert first.x["eps"] == pytest.approx((path.points[1].alpha * sigma / alpha).item(), rel=1e-9)
    assert not last.noisy  # to timestep 0, from which shares count
    plain = [step.x for step in iterate(OracleDenoiser(PLANE, schedule), randn64(4, 2), GRID, TCD(0.0))]
    assert len(plain) == GRID.steps


GRID = grids.uniform(LinearBeta(), 5)


def test_tcd_without_noise_is_ddim(randn64) -> None:
    x, denoise = randn64(4, 2), OracleDenoiser(PLANE, LinearBeta())
    assert torch.equal(sample(denoise, x, GRID, TCD(0.0)), sample(denoise, x, GRID, DDIM()))


def test_points_are_found_by_time() -> None:
    """To the last digits on every schedule; the data where no point is that early."""
    for schedule in SCHEDULES:
        path = Path.of(grids.uniform(schedule, 3))
        for t in (0.9, 0.5, 0.001, 1e-6):
            point = point_at(path, t, path.points[0])
            assert point.t == pytest.approx(t, rel=1e-9)
            torch.testing.assert_close(torch.tensor(point.ratio), torch.tensor(float(ratio(schedule, t))))
    clamped = Path(path.points, lambda log_ratio: Point(max(0.2, 0.5 - log_ratio), 1.0, math.exp(-log_ratio)))
    assert point_at(clamped, 0.2, Point(0.5, 1.0, 1.0)).log_ratio == pytest.approx(0.3)
    assert point_at(clamped, 0.1, Point(0.5, 1.0, 1.0)) == Point(0.1, 1.0, 0.0)


def ratio(schedule, t):
    alpha, sigma = schedule.level(t)
    return sigma / alpha


def test_wrong_numbers_are_refused() -> None:
    for wrong in ({"scale": 0}, {"start": -1.0}, {"std": 0.0}, {"std": math.inf}):
        with pytest.raises(ValueError, match=r"the boundary condition has a positive scale"):
            LCM(**wrong)
    for wrong in ({"gamma": 1.5}, {"gamma": math.nan}, {"start": -1.0}, {"grain": -1.0}):
        with pytest.raises(ValueError, match=r"gamma lies in \[0, 1\]"):
            TCD(**wrong)
    assert (LCM().order, TCD().order) == (0, 0)
