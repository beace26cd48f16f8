"""LMS and PNDM: exact weights, the polynomials they are exact for, published steps, orders."""

import math
from fractions import Fraction

import pytest
import torch

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import LinearBeta, Rectified, VarianceExploding, ZeroTerminalSNR, grids
from gendiff.sampling import DDIM, LMS, PNDM, Euler, Path, iterate, sample
from gendiff.sampling.adams import ADAMS_BASHFORTH, adams
from tests.sampling.orders import ALL, BETAS, FEW, PLANE, STRAIGHT, Bent, short


def test_weights_of_equal_steps_are_those_of_the_books() -> None:
    for count, row in enumerate(ADAMS_BASHFORTH, start=1):
        assert adams([-float(j) for j in range(count)]) == pytest.approx(row, rel=1e-14)


def test_weights_are_exact_integrals() -> None:
    """Against rational arithmetic, on uneven nodes: sum of w·u^m is 1/(m + 1)."""
    nodes = [Fraction(0), Fraction(-1, 3), Fraction(-5, 4), Fraction(-2), Fraction(-31, 7)]
    weights = adams([float(node) for node in nodes])
    for power in range(len(nodes)):
        total = sum(Fraction(weight) * node**power for weight, node in zip(weights, nodes, strict=True))
        assert float(total) == pytest.approx(1 / (power + 1), rel=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified(), VarianceExploding()], ids=repr)
def test_lms_is_exact_for_polynomials_in_the_ratio(order, schedule) -> None:
    """eps = sum of rho^k, k < order, along the path: from there on steps make no error, to the data too."""
    grid = grids.uniform(schedule, 12, 0.9, 0.0)
    path, solver = Path.of(grid), LMS(order)
    state = solver.init(torch.zeros(1, 1, dtype=torch.float64), grid)
    made = []
    while not state.done:
        rho = path.points[state.i].ratio
        eps = torch.full((1, 1), sum((rho / 2) ** k for k in range(order)), dtype=torch.float64)
        state = solver.tell(state, Denoised(eps * 0, eps))
        point = path.points[state.i]
        made.append((state.x.item() / point.alpha, point.ratio))
    (y, rho), (end, after) = made[order - 2 if order > 1 else 0], made[-1]
    exact = sum(2 / (k + 1) * ((after / 2) ** (k + 1) - (rho / 2) ** (k + 1)) for k in range(order))
    assert end - y == pytest.approx(exact, rel=1e-8)


def test_lms_of_one_answer_is_eulers(randn64) -> None:
    grid, x = grids.uniform(LinearBeta(), 5), randn64(4, 2)
    made = [sample(OracleDenoiser(PLANE, LinearBeta()), x, grid, solver) for solver in (LMS(1), Euler())]
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("schedule", [Rectified(), ZeroTerminalSNR(LinearBeta())], ids=repr)
@pytest.mark.parametrize("solver", [LMS(), PNDM(), PNDM("runge_kutta"), PNDM("euler")], ids=repr)
def test_from_pure_noise_the_first_step_is_eulers(solver, schedule, randn64) -> None:
    """And no NaN comes of the infinite ratio, nor of one as large as a float can hold."""
    denoise, grid, x = OracleDenoiser(PLANE, schedule), grids.uniform(schedule, 8), randn64(4, 2)
    first, *_, last = iterate(denoise, x, grid, solver)
    assert torch.equal(first.x, next(iterate(denoise, x, grid, Euler())).x)
    assert last.x.isfinite().all()
    fine = sample(denoise, x, grids.uniform(schedule, 100), Euler())
    assert (last.x - fine).abs().max() < 0.6


def test_lms_orders() -> None:
    """Cold 2, whatever the order; from exact history its own. On the straight path from below t = 1."""
    both = ("cold", "warm")
    assert short(LMS(4), FEW[2:], steps=(128, 256), kinds=both) == []
    assert short(LMS(3), [(PLANE, STRAIGHT)], steps=(48, 96), start=0.6) == []
    assert short(LMS(3), [(PLANE, BETAS)], steps=(96, 192), kinds=["warm"]) == []
    assert short(LMS(2), FEW[:1], steps=(48, 96), kinds=both) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, 3, 4])
def test_lms_starts_on_all_laws(order) -> None:
    """From exact history `benchmarks/order.py` measures all, with that history before the first time."""
    assert short(LMS(order), ALL, steps=(64, 128), start=0.6) == []


def test_wrong_weights_of_lms_are_caught() -> None:
    wrong = Bent(LMS(4), "eps_2", "eps_3", share=0.01)
    assert short(wrong, FEW[2:], steps=(128, 256), kinds=["warm"])


@pytest.mark.parametrize("warmup", ["improved_euler", "runge_kutta"])
def test_pndm_orders(warmup) -> None:
    assert short(PNDM(warmup), FEW) == []
    assert short(PNDM(warmup), FEW[:1], kinds=["warm"]) == []
    assert short(Bent(PNDM(warmup), "eps", "eps_1", share=0.05), FEW[:1])


@pytest.mark.slow
@pytest.mark.parametrize("warmup", ["improved_euler", "runge_kutta", "euler"])
def test_pndm_orders_on_all_laws(warmup) -> None:
    assert short(PNDM(warmup), ALL, steps=(128, 256), start=0.6) == []


@pytest.mark.parametrize(
    ("warmup", "counts"),
    [("improved_euler", [2, 1, 1, 1, 1, 1]), ("runge_kutta", [4, 4, 4, 1, 1, 1]), ("euler", [1] * 6)],
)
def test_where_pndm_evaluates(warmup, counts) -> None:
    """PLMS visits the second time twice; Runge-Kutta the middle of the first three steps, in time."""
    path = Path.of(grids.uniform(LinearBeta(), 6))
    plan = PNDM(warmup).plan(path)
    assert [len(stages) for stages in plan] == counts
    times = [stage.at.t for stages in plan for stage in stages]
    t = [point.t for point in path.points]
    if warmup == "improved_euler":
        assert times == [t[0], t[1], t[1], t[2], t[3], t[4], t[5]]
    if warmup == "runge_kutta":
        middle = (t[0] + t[1]) / 2
        assert times[:5] == pytest.approx([t[0], middle, middle, t[1], t[1]], abs=1e-9)


def test_pndm_is_equations_11_to_13_of_liu(randn64) -> None:
    """F-PNDM and PLMS from the paper's own operators, in ᾱ."""
    schedule, x = LinearBeta(), randn64(4, 2)
    grid = grids.uniform(schedule, 6, 0.9, 0.1)
    t = grid.times

    def transfer(x, e, t, s):
        a, b = (schedule.alpha(u).item() ** 2 for u in (t, s))
        slope = (math.sqrt((1 - a) * b) + math.sqrt((1 - b) * a)) * math.sqrt(a)
        return math.sqrt(b / a) * x - (b - a) / slope * e

    def eps(x, t):
        return PLANE.eps(x, *schedule.level(t))

    def runge_kutta(x, t, s):
        m = (t + s) / 2
        e1 = eps(x, t)
        e2 = eps(transfer(x, e1, t, m), m)
        e3 = eps(transfer(x, e2, t, m), m)
        e4 = eps(transfer(x, e3, t, s), s)
        return transfer(x, (e1 + 2 * e2 + 2 * e3 + e4) / 6, t, s), e1

    def improved_euler(x, t, s):
        e1 = eps(x, t)
        return transfer(x, (e1 + eps(transfer(x, e1, t, s), s)) / 2, t, s), e1

    begun = {"runge_kutta": (runge_kutta, 3), "improved_euler": (improved_euler, 1)}
    for warmup, (begin, count) in begun.items():
        y, past = x, []
        for i in range(6):
            if i < count:
                y, e = begin(y, t[i], t[i + 1])
                past.append(e)
                continue
            past.append(eps(y, t[i]))
            e4, e3, e2, e1 = (past[-k] if k <= len(past) else 0 for k in (4, 3, 2, 1))
            mean = {
                2: (3 * e1 - e2) / 2,
                3: (23 * e1 - 16 * e2 + 5 * e3) / 12,
            }.get(len(past), (55 * e1 - 59 * e2 + 37 * e3 - 9 * e4) / 24)
            y = transfer(y, mean, t[i], t[i + 1])
        made = sample(OracleDenoiser(PLANE, schedule), x, grid, PNDM(warmup))
        torch.testing.assert_close(made, y, rtol=1e-7, atol=1e-8)


def test_few_steps_are_enough_for_any_start(randn64) -> None:
    for steps in (1, 2, 3):
        grid, x = grids.uniform(BETAS, steps), randn64(4, 2)
        for solver in (LMS(), PNDM(), PNDM("runge_kutta"), PNDM("euler")):
            made = sample(OracleDenoiser(PLANE, BETAS), x, grid, solver)
            assert made.isfinite().all()
            if steps == 1:
                torch.testing.assert_close(made, sample(OracleDenoiser(PLANE, BETAS), x, grid, DDIM()))


def test_wrong_choices_are_refused() -> None:
    for order in (0, 7, -1):
        with pytest.raises(ValueError, match=rf"LMS has an order from 1 \(Euler\) to 6, got {order}"):
            LMS(order)
    with pytest.raises((ValueError, TypeError), match="'rk'"):
        PNDM("rk")
    assert (LMS(3).order, LMS(3).start_order, LMS(1).start_order) == (3, 2, 1)
