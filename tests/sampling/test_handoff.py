"""Runs in two stages: cut anywhere and go on to the same bits, on any schedule, or be refused."""

from dataclasses import replace

import pytest
import torch

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.math import GaussianOracle, LinearBeta, Rectified, VarianceExploding, grids
from gendiff.random import Rng
from gendiff.sampling import DDIM, DDPM, Euler, Heun, iterate, sample, split
from gendiff.sampling.linear import Memory
from tests.sampling.methods import METHODS

BETAS = LinearBeta()
GRID = grids.trailing(BETAS, 7)
LAW = GaussianOracle.isotropic(torch.tensor([0.4, -0.2]), 1.6)
EXACT = OracleDenoiser(LAW, BETAS)


def first_stage(x, high, solver, rng=None):
    *_, last = iterate(EXACT, x, high, solver, rng=rng)
    return last


@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_a_run_that_is_cut_anywhere_is_the_whole_run_bit_for_bit(solver, randn64) -> None:
    x = randn64(3, 2)
    whole = sample(EXACT, x, GRID, solver, rng=5)
    for cut in range(1, GRID.steps):
        high, low = split(GRID, at=GRID.times[cut - 1] - 1e-4)
        assert (high.steps, low.steps) == (cut, GRID.steps - cut)
        rng = Rng(5)
        last = first_stage(x, high, solver, rng)
        assert torch.equal(sample(EXACT, last.handoff, low, solver, rng=rng), whole)


def test_three_stages(randn64) -> None:
    x = randn64(3, 2)
    high, rest = split(GRID, at=0.7)
    middle, low = split(rest, at=0.3)
    handoff = first_stage(x, high, Heun()).handoff
    *_, last = iterate(EXACT, handoff, middle, Heun())
    assert torch.equal(sample(EXACT, last.handoff, low, Heun()), sample(EXACT, x, GRID, Heun()))


def test_the_first_part_evaluates_at_the_cut_and_above() -> None:
    """As a base model that stops at 0.8 of 1000 timesteps: it is given 200, the refiner what is below."""
    grid = grids.leading(BETAS, 40, offset=1)
    high, low = split(grid, at=201 / 1000)
    assert grid.schedule.timestep(high.t[:-1]).min() == 201
    assert split(grid, at=202 / 1000)[0] == high
    assert (high.steps, low.steps) == (32, 8)
    assert high.whole == low.whole == grid


@pytest.mark.parametrize("at", [0.0, 1e-4, 1.0 + 1e-9, 2.0])
def test_a_cut_at_an_end_is_refused(at) -> None:
    with pytest.raises(ValueError, match=r"leaves one part .* without a step.*cut between"):
        split(GRID, at=at)


@pytest.mark.parametrize("solver", [m for m in METHODS if not isinstance(m, (DDPM, Heun))], ids=repr)
@pytest.mark.parametrize("other", [VarianceExploding(0.005, 200.0), Rectified()], ids=["VE", "flow"])
def test_a_handoff_goes_to_the_conventions_of_another_schedule(solver, other, randn64) -> None:
    """These methods know no scale, so that the run goes on as if nothing had been converted."""
    if solver == DDIM(0.5):
        pytest.skip("its noise is another share of the posterior's on another schedule")
    grid = replace(GRID, times=GRID.times[1:])  # the flow schedule has no x/alpha at t = 1
    high, low = split(grid, at=0.5)
    last = first_stage(randn64(3, 2), high, solver, Rng(1))
    handoff, there = last.handoff.to(other), low.on(other)
    assert handoff.schedule == other
    alpha, sigma = other.level(handoff.t)
    assert float(alpha / sigma) == pytest.approx(float(BETAS.alpha(last.s) / BETAS.sigma(last.s)), rel=1e-9)
    assert last.handoff.to(BETAS) is last.handoff or last.handoff.to(BETAS).x_t is last.x
    ends = sample(OracleDenoiser(LAW, other), handoff, there, solver, rng=Rng(2))
    torch.testing.assert_close(
        ends, sample(EXACT, last.handoff, low, solver, rng=Rng(2)), rtol=1e-7, atol=1e-7
    )


def test_a_second_stage_that_does_not_fit_is_refused(randn64) -> None:
    high, low = split(GRID, at=0.5)
    handoff = first_stage(randn64(3, 2), high, Euler()).handoff
    flow = OracleDenoiser(LAW, Rectified())
    with pytest.raises(ValueError, match=r"handoff is on LinearBeta.*second stage on Rectified.*handoff.to"):
        sample(flow, handoff, grids.uniform(Rectified(), 4), Euler())
    with pytest.raises(ValueError, match=r"handoff is at t = 0\.429 but the second grid starts at 0\.286"):
        sample(EXACT, handoff, replace(low, times=low.times[1:], before=()), Euler())
    finer = split(grids.trailing(BETAS, 14), at=0.5)[1]
    assert finer.times[0] == handoff.t
    assert sample(EXACT, handoff, finer, Euler()).shape == (3, 2)  # nothing is remembered


def test_what_is_remembered_belongs_to_its_solver_and_its_grid(randn64) -> None:
    solver = next(m for m in METHODS if type(m).__name__ == "DPMpp")
    high, low = split(GRID, at=0.5)
    handoff = first_stage(randn64(3, 2), high, solver).handoff
    assert handoff.solver_state is not None
    with pytest.raises(ValueError, match=r"of no use to Euler\(\) on that grid.*cold\(\)"):
        sample(EXACT, handoff, low, Euler())
    other = split(grids.trailing(BETAS, 14), at=0.5)[1]
    with pytest.raises(ValueError, match=r"on another grid"):
        sample(EXACT, handoff, other, solver)
    for grid, method in ((low, Euler()), (other, solver)):
        alone = sample(EXACT, handoff.x_t, replace(grid, before=()), method)
        cold = sample(EXACT, handoff.cold(), replace(grid, before=()), method)
        assert torch.equal(cold, alone)


@pytest.mark.parametrize("solver", [m for m in METHODS if not getattr(m, "churn", 0)], ids=repr)
def test_a_part_of_a_grid_without_a_handoff_is_a_cold_start(solver, randn64) -> None:
    """Nothing is remembered there. (Churn, left out, counts the steps of the whole.)"""
    _, low = split(GRID, at=0.5)
    x = randn64(3, 2)
    alone = sample(EXACT, x, replace(low, before=()), solver, rng=1)
    torch.testing.assert_close(sample(EXACT, x, low, solver, rng=1), alone, rtol=1e-12, atol=1e-12)


def test_a_handoff_says_where_it_stands(randn64) -> None:
    x = randn64(3, 2)
    high, low = split(GRID, at=0.5)
    last = first_stage(x, high, Euler())
    assert (last.handoff.t, last.handoff.x_t is last.x) == (low.times[0], True)
    assert torch.equal(last.handoff.noise, last.denoised.eps)
    again = first_stage(x, split(grids.trailing(LinearBeta(), 7), at=0.5)[0], Euler())
    assert again.handoff.schedule_fingerprint == last.handoff.schedule_fingerprint
    other = first_stage(x, split(grids.trailing(BETAS, 8), at=0.5)[0], Euler())
    assert other.handoff.schedule_fingerprint != last.handoff.schedule_fingerprint


def test_a_grid_on_another_schedule_has_the_same_log_snrs() -> None:
    high, low = split(grids.trailing(BETAS, 9), at=0.5)
    for part in (high, low):
        there = part.on(VarianceExploding(0.005, 200.0))
        torch.testing.assert_close(
            there.schedule.log_snr(there.t), BETAS.log_snr(part.t), rtol=1e-6, atol=1e-6
        )
        assert (len(there.before), len(there.after)) == (len(part.before), len(part.after))


def test_networks_of_both_stages_are_called_at_their_times(randn64) -> None:
    calls = []

    def stage(name):
        def network(x, timestep, cond):
            calls.append((name, timestep[0].item()))
            return 0.5 * x

        return Denoiser(network, BETAS, "epsilon")

    high, low = split(GRID, at=0.5)
    *_, last = iterate(stage("base"), randn64(2, 3), high, Euler())
    sample(stage("refiner"), last.handoff, low, Euler())
    assert [name for name, _ in calls] == ["base"] * 4 + ["refiner"] * 3
    assert [t for _, t in calls] == BETAS.timestep(GRID.t[:-1]).tolist()


def test_what_is_remembered_scales_as_its_name_says(randn64) -> None:
    """Registers whose names begin with x_ are samples, and are converted as x is; answers are not."""
    other, x = VarianceExploding(0.005, 200.0), randn64(3, 2)
    handoff = first_stage(x, split(GRID, at=0.5)[0], Euler()).handoff
    kept = Memory(0, {"x_first": x, "x0_1": x, "eps_1": x})
    there = replace(handoff, solver_state=kept).to(other)
    factor = float(other.alpha(there.t) / BETAS.alpha(handoff.t))
    assert abs(factor - 1) > 0.01
    registers = there.solver_state.registers
    torch.testing.assert_close(registers["x_first"], factor * x)
    torch.testing.assert_close(there.x_t, factor * handoff.x_t)
    assert torch.equal(registers["x0_1"], x)
    assert torch.equal(registers["eps_1"], x)
