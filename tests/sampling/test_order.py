"""Solvers have the order they declare, measured on exact laws; and the measure catches those that do not."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import GaussianOracle, LinearBeta, Rectified, grids
from gendiff.sampling import DDIM, DDPM, Euler, Heun, Query, Solver, sample
from gendiff.testing.solvers import LAWS, SCHEDULES, Order, check_solver, measure_order

LINE, PLANE, MIXTURE = LAWS
SOLVERS = [Euler(), DDIM(), Heun(), DDIM(eta=0.5), DDPM(), DDPM("fixed_large")]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_declared_order_is_the_measured_one(solver) -> None:
    """Deterministic methods against the exact flow, stochastic ones against the exact marginal: all within 0.15."""
    check_solver(solver)


@dataclass(frozen=True)
class Tilted(Solver):
    """Heun's method whose second evaluation counts 0.4 in place of 0.5."""

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def ask(self, state):
        return Heun().ask(state)

    def tell(self, state, denoised, noise=None):
        if state.memory is not None:
            first = state.memory.first
            denoised = denoised.replace(
                x0=0.8 * denoised.x0 + 0.2 * first.x0, eps=0.8 * denoised.eps + 0.2 * first.eps
            )
        return Heun().tell(state, denoised, noise)


@dataclass(frozen=True)
class Adams(Solver):
    """Adams-Bashforth over three answers, x0 a polynomial in alpha and eps one in sigma; starts as Euler's method."""

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
    with pytest.raises(AssertionError, match=r"in 9 of 9 cases.*FAILS.*GaussianOracle\(2\) Rectified cold") as caught:
        check_solver(Tilted(), steps=(16, 32))
    table = str(caught.value).splitlines()[1:]
    assert len(table) == 9
    assert all("declared 2, measured Order(1." in row for row in table)


def test_order_and_start_order_of_a_multistep_method_are_told_apart() -> None:
    cold, warm = (
        measure_order(Adams(), LINE, Rectified(), steps=(64, 128), exact_history=exact) for exact in (False, True)
    )
    assert cold.order == pytest.approx(2, abs=0.15)
    assert warm.order == pytest.approx(3, abs=0.15)
    check_solver(Adams(), schedules=[Rectified()])
    with pytest.raises(AssertionError, match=r"FAILS  GaussianOracle\(1\) Rectified cold +declared 3"):
        check_solver(Adams(start_order=3), schedules=[Rectified()])
    with pytest.raises(AssertionError, match=r"FAILS  GaussianOracle\(1\) Rectified from exact history +declared 2"):
        check_solver(Adams(order=2), schedules=[Rectified()])


@dataclass(frozen=True)
class Cold(Solver):
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
    with pytest.raises(AssertionError, match=r"in 6 of 6 cases"):
        check_solver(Cold(), steps=(16, 32))
    assert measure_order(Cold(), LINE, LinearBeta(), steps=(32, 64)).order < 0.5


def test_the_law_read_off_a_run_is_the_law_of_samples(randn64) -> None:
    """The affine map against Monte Carlo: 100,000 samples of 8 steps of DDPM have the error that is measured."""
    grid = grids.uniform(Rectified(), 8, 1.0, 0.02)
    x = randn64(100_000, 2)
    noise = torch.Generator().manual_seed(1)
    x = sample(OracleDenoiser(PLANE, Rectified()), x, grid, DDPM(), rng=noise)
    exact = PLANE.marginal(*grid.level(8))
    seen = torch.cat([x.mean(0) - exact.mean, (x.T.cov() - exact.covariance).flatten()]).norm().item()
    assert measure_order(DDPM(), PLANE, Rectified(), steps=(8, 16)).errors[0] == pytest.approx(seen, rel=0.03)


def test_a_mixture_has_no_affine_law() -> None:
    with pytest.raises(ValueError, match=r"DDPM.*exact from a cold start on a GaussianOracle only; got MixtureOracle"):
        measure_order(DDPM(), MIXTURE, Rectified())
    with pytest.raises(ValueError, match=r"exact_history=True"):
        measure_order(DDPM(), LINE, Rectified(), exact_history=True)


def test_order_is_a_least_squares_slope() -> None:
    """Against numbers made by hand, with a perturbation that a chain of two-point slopes would weigh otherwise."""
    order = Order((10, 20, 40), (8.0, 2.0, 1.0))
    assert order.slopes == pytest.approx((2.0, 1.0))
    assert order.order == pytest.approx(1.5)
    assert repr(order) == "Order(1.50: error 8.0e+00 at 10 steps, 2.0e+00 at 20, 1.0e+00 at 40)"
    with pytest.raises(ValueError, match=r"two or more numbers of steps"):
        Order((10,), (1.0,))


def test_the_laws_are_no_accident() -> None:
    """On a unit Gaussian every VP flow is straight and Euler is exact: such a law would measure nothing."""
    unit = GaussianOracle.isotropic(torch.zeros(1), 1.0)
    errors = measure_order(Euler(), unit, LinearBeta(), steps=(8, 16)).errors
    assert max(errors) < 0.02
    assert all(max(measure_order(Euler(), law, SCHEDULES[0], steps=(8, 16)).errors) > 0.05 for law in LAWS)
    assert replace(Adams(), order=2) != Adams()
