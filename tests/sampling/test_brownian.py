"""One Brownian motion per sample, and the strong order of the solvers that follow it."""

import math
from itertools import pairwise

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import grids
from gendiff.random import Rng
from gendiff.sampling import Path
from gendiff.sampling.brownian import Brownian
from gendiff.sampling.dpm import DPM, DPMpp
from gendiff.sampling.singlestep import SinglestepDPMpp
from gendiff.testing.solvers import LAWS, SCHEDULES


def test_increments_are_unit_and_independent() -> None:
    """40,000 of each of six uneven intervals: correlations and variances within five standard errors."""
    x, times = torch.zeros(400, 100), (1.0, 0.93, 0.5, 0.499, 0.2, 0.013, 0.0)
    noise = Brownian(Rng(0, ids=range(400)))
    z = torch.stack([noise.increment(x, span).flatten() for span in pairwise(times)])
    assert (z.double().cov() - torch.eye(6)).abs().max() < 5 * math.sqrt(2 / 40_000)
    assert z.mean(dim=1).abs().max() < 5 / 200


def test_any_grid_sees_the_same_path() -> None:
    """Increments of a fine grid add up to those of a coarse one, and to those of a deeper construction."""
    x, fine = torch.zeros(2, 3, dtype=torch.float64), torch.linspace(1, 0, 33, dtype=torch.float64).tolist()
    noise = Brownian(Rng(3, ids=["a", "b"]))
    small = torch.stack([noise.increment(x, span) for span in pairwise(fine)]) / math.sqrt(32)
    for first, last in ((0, 32), (7, 8), (5, 31)):
        width = math.sqrt(fine[first] - fine[last])
        whole = noise.increment(x, (fine[first], fine[last])) * width
        assert torch.allclose(small[first:last].sum(0), whole, atol=1e-12)
    exact = (0.75, 0.125)
    assert torch.equal(Brownian(3, depth=3).increment(x, exact), Brownian(3, depth=30).increment(x, exact))
    assert torch.equal(noise.increment(x, exact), -noise.increment(x, exact[::-1]))


def test_it_is_a_function_of_key_and_interval() -> None:
    """Other draws, another order and another split of the batch change no bit."""
    x, span, rng = torch.zeros(4, 2, 3), (0.71, 0.36), Rng(0, ids=range(4))
    fresh = Brownian(rng).increment(x, span)
    used = Brownian(rng)
    for other in ((1.0, 0.9), (0.5, 0.1), (0.7, 0.71)):
        used.increment(x, other)
    rng.normal("step", (4, 2))
    assert torch.equal(used.increment(x, span), fresh)
    parts = [Brownian(rng[:1]).increment(x[:1], span), Brownian(rng[1:]).increment(x[1:], span)]
    assert torch.equal(torch.cat(parts), fresh)
    assert torch.equal(used.increment(x[..., :2], span), Brownian(rng).increment(x[..., :2], span))
    assert fresh.dtype == torch.float32


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 to 40 halvings, got 0"):
        Brownian(0, depth=0)
    with pytest.raises(ValueError, match=r"0\.5 and 0\.5001 are the same at 4 halvings; give a larger depth"):
        Brownian(0, depth=4).increment(torch.zeros(1), (0.5, 0.5001))
    with pytest.raises(ValueError, match=r"times lie in \[0, 1\], got 999"):
        Brownian(0).increment(torch.zeros(1), (999.0, 0.0))


def ended(solver, schedule, law, steps, noise):
    grid = grids.uniform(schedule, steps, 0.75, 0.125)
    x = law.marginal(*grid.level(0)).draw(32, torch.Generator().manual_seed(0))
    state, denoise = solver.init(x, grid), OracleDenoiser(law, schedule)
    while not state.done:
        state, _ = solver.step(state, denoise, noise)
    return state.x


def strong_slope(solver, schedule, noise):
    """Of the root mean square distance, sample by sample, to the same method with 512 steps."""
    law = LAWS[1]
    exact = ended(solver, schedule, law, 512, noise)
    coarse, fine = (
        (ended(solver, schedule, law, n, noise) - exact).square().mean().sqrt() for n in (32, 128)
    )
    return math.log(coarse / fine) / math.log(4)


SOLVERS = [DPMpp(2, sde=True), SinglestepDPMpp(2, sde=True)]
MORE = [DPMpp(1, sde=True), DPM(2, sde=True)]


@pytest.mark.parametrize(
    "solver", [*SOLVERS, *(pytest.param(solver, marks=pytest.mark.slow) for solver in MORE)], ids=repr
)
def test_the_strong_order_is_1(solver) -> None:
    """Along one Brownian path more steps converge to one sample, as fast as increments alone allow."""
    noise = Brownian(Rng(0, ids=range(32)), depth=16)
    assert strong_slope(solver, SCHEDULES[1], noise.increment) > 1 - 0.15


def test_independent_noise_has_no_strong_order() -> None:
    """The measure itself: without one path behind them, more steps do not approach one sample."""
    generator = torch.Generator().manual_seed(0)

    def noise(x, span):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    assert abs(strong_slope(DPMpp(2, sde=True), SCHEDULES[1], noise)) < 0.2


def test_the_increments_of_a_step_do_not_overlap() -> None:
    """Each evaluation's noise is that of the way to the next one."""
    path = Path.of(grids.uniform(SCHEDULES[1], 4, 0.75, 0.125))
    for order in (2, 3):
        for stages, (t, s) in zip(
            SinglestepDPMpp(order, sde=True).plan(path), pairwise(path.points), strict=True
        ):
            ends = [stage.at.t for stage in stages] + [s.t]
            assert [stage.span for stage in stages] == list(pairwise(ends))
            assert ends[0] == t.t
