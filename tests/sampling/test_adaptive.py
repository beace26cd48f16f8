"""Adaptive pairs: their orders, errors below the tolerance, fewer evaluations where it is looser."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import Grid, LinearBeta, Rectified, grids
from gendiff.sampling import PID, Adaptive, iterate, sample
from gendiff.sampling import adaptive as module
from gendiff.testing.solvers import LAWS, SCHEDULES
from tests.sampling.orders import ALL, FEW, LINE, MIXTURE, PLANE, short

FIXED = {"rtol": 1e9, "atol": 1e9, "first": 9.0}  # every attempt is a whole step of the grid


@pytest.mark.parametrize("order", [2, 3, 5])
def test_tableaux_fulfil_the_conditions_of_order(order) -> None:
    """Quadrature and consistency of the rows, exactly; that the pair solves equations is measured below."""
    tableau = module.PAIRS[order]
    for node, row in zip(tableau.nodes, tableau.inner, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-12)
    for weights, power in ((tableau.weights, order), (tableau.lower, order - 1)):
        assert len(weights) == len(tableau.nodes)
        for k in range(power):
            total = sum(w * c**k for w, c in zip(weights, tableau.nodes, strict=True))
            assert total == pytest.approx(float(Fraction(1, k + 1)), abs=1e-12)


@pytest.mark.parametrize(("order", "steps"), [(2, (12, 24)), (3, (16, 32)), (5, (8, 16))])
def test_orders_of_the_pairs(order, steps) -> None:
    """At steps of the grid, from pure noise, on every schedule: the ODE in the angle has no singular end."""
    assert short(Adaptive(order=order, **FIXED), FEW, steps=steps, start=1.0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("order", "steps"), [(2, (32, 64, 128)), (3, (32, 64, 128)), (5, (8, 16))])
def test_orders_of_the_pairs_on_all_laws(order, steps) -> None:
    assert short(Adaptive(order=order, **FIXED), ALL, steps=steps, start=1.0) == []


def test_a_wrong_weight_is_caught(monkeypatch) -> None:
    right = module.PAIRS[3]
    wrong = right._replace(weights=(2 / 9 + 0.01, 1 / 3 - 0.01, 4 / 9, 0.0))
    monkeypatch.setitem(module.PAIRS, 3, wrong)
    assert short(Adaptive(order=3, **FIXED), FEW[:1], steps=(16, 32), start=1.0)


def run(law, schedule, solver, end=0.02):
    """The largest error of a sample over alpha² + sigma² = 1, and the progress at the end."""
    grid = Grid(schedule, [1.0, end])
    x = law.marginal(*grid.level(0)).draw(16, torch.Generator().manual_seed(0))
    (step,) = iterate(OracleDenoiser(law, schedule), x, grid, solver)
    exact = law.flow(x, *grid.level(0), *grid.level(1))
    radius = math.hypot(*map(float, grid.level(1)))
    return float((step.x - exact).square().mean(1).sqrt().max()) / radius, step.state.memory


@pytest.mark.parametrize(
    ("law", "schedule", "order"),
    [(LINE, SCHEDULES[0], 3), (PLANE, SCHEDULES[1], 5), (MIXTURE, SCHEDULES[2], 3)],
)
def test_errors_follow_the_tolerance(law, schedule, order) -> None:
    """Of a whole run within 4 tolerances of a step, and a looser one costs fewer attempts."""
    attempts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        error, progress = run(law, schedule, Adaptive(tolerance, tolerance, order))
        assert error < 4 * tolerance
        attempts.append(progress.accepted + progress.rejected)
    assert attempts == sorted(attempts)
    assert attempts[0] < attempts[-1]


@pytest.mark.slow
def test_errors_follow_the_tolerance_everywhere() -> None:
    for law in LAWS:
        for schedule in SCHEDULES:
            for order in (2, 3, 5):
                for tolerance in (1e-2, 1e-3, 1e-4):
                    assert run(law, schedule, Adaptive(tolerance, tolerance, order))[0] < 4 * tolerance


def test_the_steps_of_the_slow_places_are_short() -> None:
    """A mixture whose parts separate late: more of the steps lie there than elsewhere."""
    asked = []
    exact = OracleDenoiser(MIXTURE, Rectified())

    def denoise(x, t, cond=None, carry=None):
        asked.append(float(t))
        return exact(x, t)

    denoise.schedule = Rectified()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    sample(denoise, x, Grid(Rectified(), [1.0, 0.02]), Adaptive(1e-4, 1e-4))
    late, early = sum(t < 0.5 for t in asked), sum(t >= 0.5 for t in asked)
    assert late > early


def test_times_of_the_grid_are_landed_on(randn64) -> None:
    """Every one, exactly; the last step, to the data, is Euler's."""
    grid, x = Grid(LinearBeta(), [1.0, 0.61, 0.3, 0.001, 0.0]), randn64(4, 2)
    exact = OracleDenoiser(PLANE, LinearBeta())
    steps = list(iterate(exact, x, grid, Adaptive(1e-6, 1e-6, 5)))
    assert [step.s for step in steps] == list(grid.times[1:])
    for i, step in enumerate(steps[:-1], start=1):
        torch.testing.assert_close(
            step.x, PLANE.flow(x, *grid.level(0), *grid.level(i)), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(steps[-1].x, PLANE.x0(steps[-2].x, *grid.level(3)))


def test_a_state_is_the_whole_run(randn64) -> None:
    """From a copy of the state in the middle of an attempt, the run goes on the same."""
    solver, grid, x = Adaptive(1e-3, 1e-3), Grid(LinearBeta(), [1.0, 0.02]), randn64(4, 2)
    exact, states = OracleDenoiser(PLANE, LinearBeta()), [solver.init(x, grid)]
    while not states[-1].done:
        query = solver.ask(states[-1])
        states.append(solver.tell(states[-1], exact(query.x, query.t)))
    state = replace(states[7], plan=None)
    while not state.done:
        query = solver.ask(state)
        state = solver.tell(state, exact(query.x, query.t))
    assert torch.equal(state.x, states[-1].x)
    assert solver.ask(state) is None
    progress = state.memory
    assert len(states) - 1 == 4 * (progress.accepted + progress.rejected)


def test_a_part_of_a_grid_is_run_as_in_the_whole(randn64) -> None:
    whole, x = grids.uniform(LinearBeta(), 4, 1.0, 0.05), randn64(4, 2)
    exact, solver = OracleDenoiser(PLANE, LinearBeta()), Adaptive(**FIXED)
    steps = list(iterate(exact, x, whole, solver))
    part = Grid(LinearBeta(), whole.times[2:], before=whole.times[:2])
    torch.testing.assert_close(sample(exact, steps[1].x, part, solver), steps[-1].x)


def test_the_worst_sample_decides(randn64) -> None:
    """In a batch of easy samples one hard one is as exact as alone; a mean over the batch would hide it."""
    easy = torch.full((63, 1), 5.0, dtype=torch.float64)
    hard = torch.full((1, 1), 0.05, dtype=torch.float64)
    exact, grid = OracleDenoiser(MIXTURE, Rectified()), Grid(Rectified(), [1.0, 0.02])
    solver = Adaptive(1e-3, 1e-3)
    together = list(iterate(exact, torch.cat([easy, hard]), grid, solver))[-1]
    error = together.x[-1:] - MIXTURE.flow(hard, *grid.level(0), *grid.level(1))
    assert error.abs().max() < 4e-3


def test_the_controller_is_that_of_soderlind() -> None:
    """Elementary: safety·e^(-1/k); with p and d the powers of eq. 30; both limited by the arcus tangens."""
    assert PID(safety=1.0).factor((1.0,), 3) == pytest.approx(1.0)
    assert PID().factor((0.5,), 2) == pytest.approx(1 + math.atan(0.9 * 0.5**-0.5 - 1))
    powers = (1.2 / 3, -(0.4 + 2 * 0.1) / 3, 0.1 / 3)
    raw = 0.9 * 0.5 ** -powers[0] * 0.7 ** -powers[1] * 0.2 ** -powers[2]
    assert PID(0.4, 0.7, 0.1).factor((0.5, 0.7, 0.2), 3) == pytest.approx(1 + math.atan(raw - 1))
    assert PID().factor((0.0,), 3) < 1 + math.pi / 2
    assert PID().factor((1e9,), 3) > 0


def test_a_pi_controller_is_as_exact() -> None:
    error, progress = run(MIXTURE, LinearBeta(), Adaptive(1e-4, 1e-4, control=PID(0.2, 0.5)))
    assert error < 4e-4
    assert progress.accepted > 5


def test_the_budget_and_bad_networks_are_said(randn64) -> None:
    grid, x = Grid(LinearBeta(), [1.0, 0.02]), randn64(4, 2)
    with pytest.raises(ValueError, match=r"12 attempts did not reach t = 0.02 \(\d+ accepted, \d+ rejected"):
        sample(OracleDenoiser(PLANE, LinearBeta()), x, grid, Adaptive(1e-9, 1e-9, budget=12))

    def broken(x, t, cond=None, carry=None):
        return Denoised(x * math.nan, x)

    broken.schedule = LinearBeta()
    with pytest.raises(ValueError, match=r"between t = 1 and 0.02 is not finite: the network returned NaN"):
        sample(broken, x, grid, Adaptive())


def test_wrong_choices_are_refused(randn64) -> None:
    with pytest.raises(ValueError, match=r"a grid of two times does not say from where: give Grid\(schedule"):
        Adaptive().init(randn64(1, 1), Grid(Rectified(), [1.0, 0.0]))
    for wrong in ({"rtol": -1.0}, {"rtol": 0.0, "atol": 0.0}, {"atol": math.nan}):
        with pytest.raises(ValueError, match=r"tolerances are at least 0 and not both 0, got"):
            Adaptive(**wrong)
    for wrong in ({"first": 0.0}, {"first": math.inf}, {"budget": 0}):
        with pytest.raises(
            ValueError, match=r"the first step is a positive angle and the budget at least one"
        ):
            Adaptive(**wrong)
    with pytest.raises((ValueError, TypeError), match="4"):
        Adaptive(order=4)
    for wrong in ({"i": 0.0}, {"safety": 1.5}):
        with pytest.raises(ValueError, match=r"a PID controller has i > 0"):
            PID(**wrong)
    assert [Adaptive(order=k).evaluations for k in (2, 3, 5)] == [2, 4, 7]
