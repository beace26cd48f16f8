"""Inversion: up by the method's own formula, and back again with its order."""

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import Grid, LinearBeta, Rectified, grids
from gendiff.sampling import DDIM, DDPM, DPM2, LMS, PNDM, Adaptive, Euler, Heun, invert, sample
from gendiff.testing.solvers import Order
from tests.sampling.orders import BETAS, EXPLODING, MIXTURE, PLANE, STRAIGHT, Bent


def there_and_back(solver, schedule, steps, end, up=None):
    """How fast the error of x, inverted and sampled again, falls with the steps."""
    denoise, errors = OracleDenoiser(MIXTURE, schedule), []
    for n in steps:
        grid = grids.uniform(schedule, n, 1.0, end)
        x = MIXTURE.marginal(*grid.level(n)).draw(16, torch.Generator().manual_seed(0))
        again = sample(denoise, invert(denoise, x, grid, up or solver), grid, solver)
        errors.append(float((again - x).square().mean().sqrt()))
    return Order(tuple(steps), tuple(errors)).slopes[-1]


METHODS = (DDIM(), Heun(), DPM2(), LMS(2), PNDM())
PAIRS = [(solver, schedule) for solver in METHODS for schedule in (BETAS, STRAIGHT, EXPLODING)]


def check_back_again(solver, schedule) -> None:
    assert there_and_back(solver, schedule, (32, 64), 0.02) > solver.order - 0.15


@pytest.mark.parametrize(("solver", "schedule"), PAIRS[::4], ids=str)
def test_back_again_with_the_order_of_the_method(solver, schedule) -> None:
    check_back_again(solver, schedule)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "schedule"), PAIRS, ids=str)
def test_back_again_on_every_schedule(solver, schedule) -> None:
    check_back_again(solver, schedule)


@pytest.mark.parametrize(("solver", "schedule"), [(DDIM(), BETAS), (Heun(), STRAIGHT)], ids=str)
def test_from_the_data_itself(solver, schedule) -> None:
    """No network is evaluated at the data; the first step asks at its upper end."""
    assert there_and_back(solver, schedule, (64, 128), 0.0) > solver.order - 0.15


def test_it_is_the_flow_to_the_noise() -> None:
    """What comes out is the exact flow of x to the first time, of first and second order."""
    for solver, order in ((DDIM(), 1), (Heun(), 2)):
        errors = []
        for n in (32, 64):
            grid = grids.uniform(BETAS, n, 1.0, 0.02)
            x = MIXTURE.marginal(*grid.level(n)).draw(16, torch.Generator().manual_seed(0))
            made = invert(OracleDenoiser(MIXTURE, BETAS), x, grid, solver)
            exact = MIXTURE.flow(x, *grid.level(n), *grid.level(0))
            errors.append(float((made - exact).square().mean().sqrt()))
        assert Order((32, 64), tuple(errors)).order > order - 0.15


def test_ddim_up_is_equation_12_with_its_ends_exchanged(randn64) -> None:
    schedule, grid, x = LinearBeta(), Grid(LinearBeta(), [0.6, 0.4, 0.2]), randn64(4, 2)
    expected = x
    for t, s in ((0.2, 0.4), (0.4, 0.6)):
        (a, b), (c, d) = schedule.level(t), schedule.level(s)
        expected = c * PLANE.x0(expected, a, b) + d * PLANE.eps(expected, a, b)
    torch.testing.assert_close(invert(OracleDenoiser(PLANE, schedule), x, grid), expected)


def test_the_first_step_from_the_data(randn64) -> None:
    """(alpha x, t_1) is what the network is given, and its eps is what is added."""
    schedule, asked, x = Rectified(), [], randn64(4, 2)
    exact = OracleDenoiser(PLANE, schedule)

    class Watched:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, x_t, t, cond=None, carry=None):
            asked.append((x_t, float(t)))
            return exact(x_t, t)

    made = invert(Watched(), x, Grid(schedule, [1.0, 0.25, 0.0]), Euler())
    assert [t for _, t in asked] == [0.25, 0.25]
    torch.testing.assert_close(asked[0][0], 0.75 * x)
    first = 0.75 * x + 0.25 * PLANE.eps(0.75 * x, 0.75, 0.25)
    torch.testing.assert_close(asked[1][0], first)
    torch.testing.assert_close(made, PLANE.eps(first, 0.75, 0.25))


def test_a_wrong_way_up_is_caught() -> None:
    """With a hundredth of the noise counted as data, what comes back has an error that stays."""
    assert there_and_back(DDIM(), STRAIGHT, (32, 64), 0.02, up=Bent(DDIM(), "eps", "x0", 1e-2)) < 0.85


def test_what_cannot_be_inverted_is_refused(randn64) -> None:
    grid, denoise, x = grids.uniform(BETAS, 4), OracleDenoiser(PLANE, BETAS), randn64(4, 2)
    for solver in (DDPM(), DDIM(0.5), Heun(churn=4)):
        with pytest.raises(ValueError, match=r"draws noise, so that there is no noise that its samples"):
            invert(denoise, x, grid, solver)
    with pytest.raises(TypeError, match=r"a LinearSolver can be run up a grid"):
        invert(denoise, x, grid, Adaptive())
    with pytest.raises(ValueError, match=r"the grid is on LinearBeta.* but the denoiser was made for Rect"):
        invert(OracleDenoiser(PLANE, STRAIGHT), x, grid)


def test_gradients_flow_where_they_are_asked_for(randn64) -> None:
    grid, x = grids.uniform(BETAS, 3), randn64(2, 2).requires_grad_()
    assert not invert(OracleDenoiser(PLANE, BETAS), x, grid).requires_grad
    assert invert(OracleDenoiser(PLANE, BETAS), x, grid, grad=True).requires_grad
