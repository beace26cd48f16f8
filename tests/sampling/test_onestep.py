"""Euler, Heun, DDIM and DDPM against published formulas, written down anew, and the laws they must keep."""

import math
from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import (
    CosineBeta,
    GaussianOracle,
    Grid,
    LinearBeta,
    Rectified,
    VarianceExploding,
    ZeroTerminalSNR,
    grids,
)
from gendiff.sampling import DDIM, DDPM, Euler, Heun, iterate, sample

SCHEDULES = [LinearBeta(), CosineBeta(), ZeroTerminalSNR(LinearBeta()), Rectified(), VarianceExploding()]
ON = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
GRIDS = [(1.0, 0.6), (0.6, 0.599), (0.3, 0.01), (0.02, 0.001)]


def unit(value=1.0):
    return torch.full((1, 1), value, dtype=torch.float64)


def moved(solver, grid, x=0.0, x0=0.0, eps=0.0, noise=0.0, log_var=None):
    """Where one step moves x, being told (x0, eps)."""
    log_var = None if log_var is None else unit(log_var)
    denoised = Denoised(unit(x0), unit(eps), log_var=log_var)
    return solver.tell(solver.init(unit(x), grid), denoised, unit(noise)).x.item()


@ON
@pytest.mark.parametrize("solver", [DDIM(), DDIM(0.3), DDIM(1.0), DDPM(), DDPM("fixed_small_log")], ids=repr)
@pytest.mark.parametrize("ends", GRIDS)
def test_a_step_keeps_the_marginal_of_every_point(solver, schedule, ends) -> None:
    """Told the true x0 and eps of x_t ~ N(alpha x0, sigma²), a step ends at x_s ~ N(alpha x0, sigma²).

    That is the definition of these methods (Song et al. 2021, lemma 1). x_t = alpha x0 + sigma eps, and steps
    are affine: the mean is the answer to x0 alone, the standard deviation that to eps and to fresh noise.
    """
    grid = Grid(schedule, ends)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((a.item(), s.item()) for a, s in map(grid.level, (0, 1)))
    mean = moved(solver, grid, x=alpha_t, x0=1.0)
    kept = moved(solver, grid, x=sigma_t, eps=1.0)
    fresh = moved(solver, grid, noise=1.0)
    assert mean == pytest.approx(alpha_s, rel=1e-9)
    assert math.hypot(kept, fresh) == pytest.approx(sigma_s, rel=1e-9)
    assert (fresh > 0) == (solver != DDIM())


@ON
def test_ddim_with_eta_of_one_is_ddpm(schedule, randn64) -> None:
    """Step by step with one noise, since mean and variance are the same function of (x_t, x0)."""
    law = GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    denoise, grid = OracleDenoiser(law, schedule), grids.uniform(schedule, 5)
    runs = (iterate(denoise, schedule.sigma(1.0) * randn64(4, 2), grid, DDIM(1.0), rng=1),)
    x = next(runs[0]).x  # one step in common, so that x is a sample of the method
    rest = Grid(schedule, grid.times[1:])
    one, other = (list(iterate(denoise, x, rest, solver, rng=2)) for solver in (DDIM(1.0), DDPM()))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)


def test_ddim_is_equation_12_of_song(randn64) -> None:
    """With eq. 16 for sigma, from ᾱ alone."""
    schedule, x, eps, noise = LinearBeta(), *randn64(3, 4, 2)
    for eta, (t, s) in [(0.0, (0.9, 0.5)), (0.5, (0.9, 0.5)), (1.0, (0.2, 0.1))]:
        bar_t, bar_s = (schedule.alpha(u).item() ** 2 for u in (t, s))
        std = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        x0 = (x - math.sqrt(1 - bar_t) * eps) / math.sqrt(bar_t)
        expected = math.sqrt(bar_s) * x0 + math.sqrt(1 - bar_s - std**2) * eps + std * noise
        solver, grid = DDIM(eta), Grid(schedule, (t, s))
        told = solver.tell(solver.init(x, grid), Denoised(x0, eps), noise)
        torch.testing.assert_close(told.x, expected, rtol=1e-9, atol=1e-9)


def test_ddpm_is_algorithm_2_of_ho(randn64) -> None:
    """Between neighbours of the table, from betas alone: the mean of eq. 11, both variances of 3.2."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    x, eps, noise = randn64(3, 4, 2)
    for i in (1, 500, 999):
        x0 = (x - (1 - bar[i]).sqrt() * eps) / bar[i].sqrt()
        mean = (x - betas[i] / (1 - bar[i]).sqrt() * eps) / (1 - betas[i]).sqrt()
        small = (1 - bar[i - 1]) / (1 - bar[i]) * betas[i]
        for name, variance in {"fixed_small": small, "fixed_large": betas[i]}.items():
            solver, grid = DDPM(name), Grid(LinearBeta(), ((i + 1) / 1000, i / 1000))
            told = solver.tell(solver.init(x, grid), Denoised(x0, eps), noise)
            torch.testing.assert_close(told.x, mean + variance.sqrt() * noise, rtol=1e-8, atol=1e-8)


def test_learned_variances_read_the_channels() -> None:
    """`learned` is the log variance; `learned_range` runs from the small at -1 to the large at 1."""
    grid = Grid(LinearBeta(), (0.5, 0.3))
    assert moved(DDPM("learned"), grid, noise=1.0, log_var=-3.0) == pytest.approx(math.exp(-1.5))
    low, middle, high = (moved(DDPM("learned_range"), grid, noise=1.0, log_var=raw) for raw in (-1, 0, 1))
    assert low == pytest.approx(moved(DDPM("fixed_small"), grid, noise=1.0))
    assert high == pytest.approx(moved(DDPM("fixed_large"), grid, noise=1.0))
    assert middle == pytest.approx(math.sqrt(low * high))
    with pytest.raises(ValueError, match=r"DDPM.*'learned_range'.* needs variance channels of the network"):
        moved(DDPM("learned_range"), grid, noise=1.0)
    assert moved(DDPM(), grid, noise=1.0, log_var=5.0) == moved(DDPM(), grid, noise=1.0)


@ON
def test_euler_is_ddim_without_noise(schedule, randn64) -> None:
    grid, x, x0, eps = Grid(schedule, (0.8, 0.3)), *randn64(3, 4, 2)
    told = [s.tell(s.init(x, grid), Denoised(x0, eps)).x for s in (Euler(), DDIM())]
    assert torch.equal(*told)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(grid.level, (0, 1))
    x_t = alpha_t * x0 + sigma_t * eps
    ode = x_t + (alpha_s - alpha_t) * x0 + (sigma_s - sigma_t) * eps
    torch.testing.assert_close(told[0], ode)


def karras_heun(x, sigmas, x0):
    """Algorithm 1 of Karras et al. 2022 without churn, line by line."""
    for sigma, after in pairwise(sigmas):
        d = (x - x0(x, sigma)) / sigma
        guess = x + (after - sigma) * d
        if after != 0:
            other = (guess - x0(guess, after)) / after
            guess = x + (after - sigma) * (d + other) / 2
        x = guess
    return x


def flow_heun(x, times, velocity):
    """Heun's method for dx/dt = v, Euler's for the step to t = 0."""
    for t, s in pairwise(times):
        v = velocity(x, t)
        guess = x + (s - t) * v
        x = guess if s == 0 else x + (s - t) * (v + velocity(guess, s)) / 2
    return x


def test_heun_is_the_published_method(randn64) -> None:
    """In sigma on the variance-exploding schedule, in t on the straight path; Euler likewise, on one step."""
    law = GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    schedule, z = VarianceExploding(), randn64(4, 2)
    grid = grids.karras(schedule, 6)
    expected = karras_heun(80 * z, grid.levels.sigma.tolist(), lambda x, sigma: law.x0(x, 1.0, sigma))
    torch.testing.assert_close(sample(OracleDenoiser(law, schedule), 80 * z, grid, Heun()), expected)
    grid = grids.uniform(Rectified(), 6).shifted(2.0)

    def velocity(x, t):
        return law.eps(x, 1 - t, t) - law.x0(x, 1 - t, t)

    flowed = sample(OracleDenoiser(law, Rectified()), z, grid, Heun())
    torch.testing.assert_close(flowed, flow_heun(z, grid.times, velocity))
    t, s = grid.times[:2]
    first = next(iterate(OracleDenoiser(law, Rectified()), z, grid, Euler())).x
    torch.testing.assert_close(first, z + (s - t) * velocity(z, t))


def test_heun_asks_twice_but_for_the_step_to_the_data(randn64) -> None:
    grid, asked = grids.uniform(Rectified(), 3), []
    state = Heun().init(randn64(1, 1), grid)
    while (query := Heun().ask(state)) is not None:
        asked.append((state.i, query.t.item()))
        state = Heun().tell(state, Denoised(query.x, query.x))
    t = grid.times
    assert asked == [(0, t[0]), (0, t[1]), (1, t[1]), (1, t[2]), (2, t[2])]


class OneDevice(TorchFunctionMode):
    """Refuses to mix devices, as a GPU does and meta does not, and to copy between them, which waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        met = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        assert len({value.device for value in met if value.ndim}) <= 1, func
        if func is torch.Tensor.to:
            assert result.device == met[0].device, "a copy to another device"
        return result


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_coefficients_reach_the_device_of_the_samples_without_a_copy(variance) -> None:
    x = torch.empty(2, 3, device="meta")
    denoised = Denoised(x, x, log_var=x if variance.startswith("learned") else None)
    for solver in (DDPM(variance), DDIM(0.5), Euler(), Heun()):
        state = solver.init(x, Grid(LinearBeta(), (0.5, 0.3, 0.0)))
        with OneDevice():
            while not state.done:
                state = solver.tell(state, denoised, x)
        assert state.x.device.type == "meta"


def test_solvers_are_values_and_refuse_what_they_do_not_know() -> None:
    assert Euler() == Euler()
    assert hash(DDIM(0.5)) == hash(DDIM(eta=0.5))
    assert DDIM(0.5) != DDIM(1) == DDIM(1.0)
    assert DDPM() != DDPM("fixed_large")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta lies in \[0, 1\] \(0 is deterministic, 1 is DDPM\), got"):
            DDIM(eta)
    with pytest.raises((ValueError, TypeError), match="fixed_smal"):
        DDPM("fixed_smal")
