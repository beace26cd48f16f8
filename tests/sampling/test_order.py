"""Solvers have the order they declare, measured on exact laws; and the measure catches those that do not."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import grids
from gendiff.sampling import DDIM, DDPM, Euler, Heun, LinearSolver, Query, Solver, sample
from gendiff.testing.solvers import LAWS, SCHEDULES, Order, check_solver, measure_order

LINE, PLANE, MIXTURE = LAWS
BETAS, STRAIGHT, EXPLODING = SCHEDULES


@pytest.mark.parametrize(
    ("solver", "schedules", "steps"),
    [
        (Euler(), [STRAIGHT], (16, 32)),
        (DDIM(), [BETAS], (16, 32)),
        (Heun(), [BETAS, STRAIGHT], (20, 40)),
        (DDIM(eta=0.5), [BETAS], (32, 64)),
        (DDPM(), [BETAS], (48, 96)),
        (DDPM("fixed_large"), [STRAIGHT], (32, 64)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Solver) else "",
)
def test_the_declared_order_is_the_measured_one(solver, schedules, steps) -> None:
    """Deterministic methods against the exact flow, stochastic ones against the exact marginal: within 0.15.

    `benchmarks/order.py` prints the same on every schedule and with smaller steps.
    """
    check_solver(solver, schedules=schedules, steps=steps)


def test_heun_on_the_schedule_it_was_published_for() -> None:
    assert measure_order(Heun(), LINE, EXPLODING, steps=(20, 40)).order == pytest.approx(2, abs=0.15)


@dataclass(frozen=True)
class Tilted(LinearSolver):
    """Heun's method whose second evaluation counts 0.4 in place of 0.5."""

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def plan(self, path):
        def tilted(combination, factor):
            return {
                name: value * factor if name in ("x0", "eps") else value
                for name, value in combination.items()
            }

        return tuple(
            (
                replace(first, keep={"x_half": tilted(first.keep["x_half"], 1.2)}),
                replace(second, x=tilted(second.x, 0.8)),
            )
            for first, second in Heun().plan(path)
        )


@dataclass(frozen=True)
class Adams(Solver):
    """Adams-Bashforth over three answers, x0 a polynomial in alpha, eps one in sigma; starts as Euler's."""

    order: int = 3
    start_order: int = 2
    evaluations: ClassVar[int] = 1

    def ask(self, state):
        return None if state.done else Query(state.x, state.t[state.i])

    def tell(self, state, denoised, noise=None):
        level, after = state.ends
        history = [(level, denoised), *(state.memory or [])][:3]
        x = state.x
        for k, name in enumerate(("x0", "eps")):
            width = after[k] - level[k]
            if width != 0:
                nodes = torch.stack([(past[k] - level[k]) / width for past, _ in history])
                powers = torch.arange(len(history), dtype=torch.float64)
                weights = torch.linalg.solve(nodes ** powers[:, None], 1 / (powers + 1))
                answers = [getattr(answer, name) for _, answer in history]
                x = x + width * sum(w * answer for w, answer in zip(weights, answers, strict=True))
        return state.advance(x, memory=history[:2])


def test_a_wrong_weight_of_heun_is_caught() -> None:
    with pytest.raises(AssertionError, match="in 3 of 3 cases") as caught:
        check_solver(Tilted(), schedules=[STRAIGHT], steps=(16, 32))
    table = str(caught.value).splitlines()[1:]
    laws = "GaussianOracle(1)", "GaussianOracle(2)", "MixtureOracle(1)"
    for row, law in zip(table, laws, strict=True):
        assert row.startswith(f"FAILS  {law} Rectified cold ")
        assert "declared 2, measured Order(1.0" in row


def test_order_and_start_order_of_a_multistep_method_are_told_apart() -> None:
    """Started as Euler's method it has order 2 for ever; with exact history its own, which is 3."""

    def check(solver):
        check_solver(solver, laws=[PLANE], schedules=[STRAIGHT], steps=(32, 64))

    check(Adams())
    with pytest.raises(AssertionError, match="in 2 of 2 cases") as caught:
        check(Adams(order=2, start_order=3))
    cold, warm = str(caught.value).splitlines()[1:]
    assert re.search(r"Rectified cold +declared 3, measured Order\((1.9|2.0)", cold)
    assert re.search(r"Rectified from exact history +declared 2, measured Order\((2.9|3.0)", warm)


@dataclass(frozen=True)
class Weak(Solver):
    """DDPM that draws its noise a tenth too small."""

    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def ask(self, state):
        return DDPM().ask(state)

    def needs_noise(self, state):
        return DDPM().needs_noise(state)

    def tell(self, state, denoised, noise=None):
        return DDPM().tell(state, denoised, None if noise is None else 0.9 * noise)


def test_too_little_noise_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"in 1 of 1 cases"):
        check_solver(Weak(), laws=[LINE], schedules=[STRAIGHT], steps=(16, 32))


def test_the_law_read_off_a_run_is_the_law_of_samples(randn64) -> None:
    """The affine map against Monte Carlo: 100,000 samples of DDPM have the error that is measured."""
    grid = grids.uniform(STRAIGHT, 8, 1.0, 0.02)
    x = randn64(100_000, 2)
    noise = torch.Generator().manual_seed(1)
    x = sample(OracleDenoiser(PLANE, STRAIGHT), x, grid, DDPM(), rng=noise)
    exact = PLANE.marginal(*grid.level(8))
    seen = torch.cat([x.mean(0) - exact.mean, (x.T.cov() - exact.covariance).flatten()]).norm().item()
    assert measure_order(DDPM(), PLANE, STRAIGHT, steps=(8, 16)).errors[0] == pytest.approx(seen, rel=0.03)


def test_a_mixture_has_no_affine_law() -> None:
    with pytest.raises(
        ValueError, match=r"DDPM.*exact from a cold start on a GaussianOracle only; got MixtureOracle"
    ):
        measure_order(DDPM(), MIXTURE, STRAIGHT)
    with pytest.raises(ValueError, match=r"exact_history=True"):
        measure_order(DDPM(), LINE, STRAIGHT, exact_history=True)


def test_order_is_a_least_squares_slope() -> None:
    """By hand: 4, 2, 1, 0 over 1.5, 0.5, -0.5, -1.5 is 6.5/5, which is not the mean of the slopes."""
    order = Order((8, 16, 32, 64), (16.0, 4.0, 2.0, 1.0))
    assert order.slopes == pytest.approx((2.0, 1.0, 1.0))
    assert order.order == pytest.approx(1.3)
    assert repr(order) == "Order(1.30: error 1.6e+01 at 8 steps, 4.0e+00 at 16, 2.0e+00 at 32, 1.0e+00 at 64)"
    with pytest.raises(ValueError, match=r"two or more numbers of steps"):
        Order((10,), (1.0,))
