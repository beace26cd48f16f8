"""The loop: what it yields, refuses, draws and leaks, and that a loop of the user's own is the same."""

import copy
import itertools
import weakref

import pytest
import torch
from torch import nn

from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.math import CosineBeta, GaussianOracle, Grid, LinearBeta, MixtureOracle, Rectified, grids
from gendiff.random import Rng
from gendiff.sampling import DDIM, DDPM, Euler, Heun, iterate, sample

BETAS = LinearBeta()
GRID = grids.trailing(BETAS, 5)
SOLVERS = pytest.mark.parametrize("solver", [Euler(), Heun(), DDIM(0.5), DDPM()], ids=repr)


def halves(x, timestep, cond):
    """A network of exact arithmetic, so that a batch and its parts give the same bits."""
    return 0.5 * x + 0.25


DENOISE = Denoiser(halves, BETAS, "epsilon")


@SOLVERS
def test_every_step_is_yielded_and_the_last_is_the_sample(solver, randn64) -> None:
    x = randn64(3, 2)
    steps = list(iterate(DENOISE, x, GRID, solver, rng=7))
    assert [(step.i, step.t, step.s) for step in steps] == [
        (i, t, s) for i, (t, s) in enumerate(itertools.pairwise(GRID.times))
    ]
    assert torch.equal(sample(DENOISE, x, GRID, solver, rng=7), steps[-1].x)
    assert all(step.state.x is step.x and step.state.i == step.i + 1 for step in steps)
    assert [step.state.done for step in steps] == [False] * 4 + [True]


def test_a_step_carries_what_the_network_said_in_it(randn64) -> None:
    x = randn64(3, 2)
    for step in iterate(DENOISE, x, GRID, Euler()):
        said = DENOISE(x, step.t)
        assert torch.equal(step.denoised.x0, said.x0)
        alpha, sigma = (value.item() for value in BETAS.level(step.s))
        torch.testing.assert_close(step.x, alpha * said.x0 + sigma * said.eps)
        x = step.x


def test_the_loop_may_be_left_early(randn64) -> None:
    x, calls = randn64(3, 2), []

    def counted(x, timestep, cond):
        calls.append(timestep[0].item())
        return halves(x, timestep, cond)

    for step in iterate(Denoiser(counted, BETAS, "epsilon"), x, GRID, Euler()):
        if step.i == 1:
            break
    assert calls == [999.0, 799.0]


def test_a_grid_of_another_schedule_is_refused(randn64) -> None:
    with pytest.raises(
        ValueError, match=r"the grid is on CosineBeta.* made for LinearBeta.*schedule=denoise"
    ):
        sample(DENOISE, randn64(3, 2), grids.trailing(CosineBeta(), 5), Euler())
    with pytest.raises(ValueError, match=r"at least one sample"):
        sample(DENOISE, torch.ones(0, 2), GRID, Euler())
    equal = grids.trailing(LinearBeta(), 5)  # another object of the same content will do
    assert sample(DENOISE, randn64(3, 2), equal, Euler()).shape == (3, 2)


@pytest.mark.parametrize("solver", [DDIM(0.5), DDPM()], ids=repr)
def test_a_stochastic_method_needs_randomness(solver, randn64) -> None:
    with pytest.raises(ValueError, match=r"(DDIM|DDPM)\(.*\) adds noise in every step: pass rng=Rng\(seed\)"):
        sample(DENOISE, randn64(3, 2), GRID, solver)
    state = solver.init(randn64(3, 2), GRID)
    with pytest.raises(ValueError, match=r"(DDIM|DDPM)\(.*\) adds noise in this step, so tell needs"):
        solver.tell(state, DENOISE(state.x, 1.0))


def test_the_sources_of_randomness(randn64) -> None:
    x = randn64(3, 2)
    seeded = sample(DENOISE, x, GRID, DDPM(), rng=3)
    assert torch.equal(sample(DENOISE, x, GRID, DDPM(), rng=Rng(3)), seeded)
    assert not torch.equal(sample(DENOISE, x, GRID, DDPM(), rng=4), seeded)
    drawn, noises = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    state = DDPM().init(x, GRID)
    for t in GRID.times[:-1]:
        noise = torch.randn(3, 2, generator=noises, dtype=x.dtype)
        state = DDPM().tell(state, DENOISE(state.x, t), noise)
    assert torch.equal(sample(DENOISE, x, GRID, DDPM(), rng=drawn), state.x)


@SOLVERS
def test_a_split_batch_gets_the_same_bits(solver, randn64) -> None:
    x, ids = randn64(5, 2).float(), ["a", "b", "c", "d", "e"]
    whole = sample(DENOISE, x, GRID, solver, rng=Rng(1, ids=ids))
    for cut in (1, 3):
        parts = [
            sample(DENOISE, x[part], GRID, solver, rng=Rng(1, ids=ids[part]))
            for part in (slice(cut), slice(cut, None))
        ]
        assert torch.equal(torch.cat(parts), whole)


def own_loop(solver, state, rng):
    """The loop that a user would write."""
    while (query := solver.ask(state)) is not None:
        denoised = DENOISE(query.x, query.t)
        noise = rng.normal("step", query.x.shape, dtype=query.x.dtype) if solver.needs_noise(state) else None
        state = solver.tell(state, denoised, noise)
    return state


@SOLVERS
def test_a_loop_of_ones_own_is_the_driver_bit_for_bit(solver, randn64) -> None:
    x = randn64(3, 2)
    state = own_loop(solver, solver.init(x, GRID), Rng(2))
    assert torch.equal(state.x, sample(DENOISE, x, GRID, solver, rng=2))
    assert state.done
    with pytest.raises(ValueError, match=r"the grid of 5 steps is done; init starts another run"):
        solver.step(state, DENOISE)


@SOLVERS
def test_a_copied_state_is_a_copied_run(solver, randn64) -> None:
    """Cut anywhere, also between the two evaluations of Heun's method."""
    state, rng = solver.init(randn64(3, 2), GRID), Rng(2)
    expected = own_loop(solver, state, Rng(2)).x
    for _ in range(3):
        query = solver.ask(state)
        noise = rng.normal("step", query.x.shape, dtype=query.x.dtype) if solver.needs_noise(state) else None
        state = solver.tell(state, DENOISE(query.x, query.t), noise)
    assert (state.memory is not None) == isinstance(solver, Heun)
    twin, twin_rng = copy.deepcopy(state), copy.deepcopy(rng)
    assert torch.equal(own_loop(solver, state, rng).x, expected)
    assert torch.equal(own_loop(solver, twin, twin_rng).x, expected)
    assert (twin.i, twin.grid) == (state.i, state.grid)


def test_a_run_keeps_no_step_but_the_last(randn64) -> None:
    alive = []

    def network(x, timestep, cond):
        alive.append(weakref.ref(out := 0.5 * x))
        assert sum(one() is not None for one in alive) <= 3
        return out

    sample(Denoiser(network, BETAS, "epsilon"), randn64(3, 2), grids.trailing(BETAS, 9), Euler())
    assert len(alive) == 9


@SOLVERS
def test_two_runs_of_one_solver_leak_nothing(solver, randn64) -> None:
    x, y, other = randn64(3, 2), randn64(4, 1), grids.leading(BETAS, 5)
    alone = sample(DENOISE, x, GRID, solver, rng=1), sample(DENOISE, y, other, solver, rng=2)
    runs = iterate(DENOISE, x, GRID, solver, rng=1), iterate(DENOISE, y, other, solver, rng=2)
    *_, (first, second) = zip(*runs, strict=True)
    assert torch.equal(first.x, alone[0])
    assert torch.equal(second.x, alone[1])
    with pytest.raises(AttributeError):
        solver.memory = 1  # a solver is frozen: there is nowhere to keep anything


def test_gradients_are_off_unless_asked_for(randn64) -> None:
    x = randn64(3, 2).requires_grad_()
    for step in iterate(DENOISE, x, GRID, Heun()):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad
    with torch.no_grad():
        for step in iterate(DENOISE, x, GRID, Heun(), grad=True):
            assert not torch.is_grad_enabled()
            assert step.x.requires_grad


@pytest.mark.parametrize("solver", [Heun(), DDPM()], ids=repr)
def test_the_gradient_of_a_sample_is_its_finite_difference(solver) -> None:
    law = MixtureOracle(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.3]], [[0.2]]])
    )
    grid, x = grids.uniform(Rectified(), 3), torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)

    def end(x):
        return sample(OracleDenoiser(law, Rectified()), x, grid, solver, rng=3, grad=True)

    assert torch.autograd.gradcheck(end, x.requires_grad_())


class Narrow(nn.Module):
    """A network in bfloat16 with variance channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.bfloat16))
        self.seen = set()

    def forward(self, x, timestep, cond):
        self.seen.add(x.dtype)
        return torch.cat([self.weight * x, x.clamp(-1, 1)], 1)


@pytest.mark.parametrize("solver", [Euler(), Heun(), DDIM(1.0), DDPM(), DDPM("learned_range")], ids=repr)
def test_a_network_in_bfloat16_gives_samples_in_float32(solver, randn64) -> None:
    """And x in bfloat16 is x in float32 from the first step on: no product, no noise is rounded to 8 bits."""
    network = Narrow()
    denoise, x = Denoiser(network, BETAS, "v", learned_variance=True), randn64(3, 2).bfloat16()
    xs = [step.x for step in iterate(denoise, x, GRID, solver, rng=1)]
    assert all(x.dtype == torch.float32 for x in xs)
    assert network.seen == {torch.bfloat16}
    assert torch.equal(xs[-1], sample(denoise, x.float(), GRID, solver, rng=1))


class Counted:
    """Randomness that counts its draws."""

    def __init__(self) -> None:
        self.draws, self.rng = [], Rng(0)

    def normal(self, name, shape, **settings):
        self.draws.append(name)
        return self.rng.normal(name, shape, **settings)

    def uniform(self, name, shape, **settings):
        raise AssertionError

    def integers(self, name, high, shape, **settings):
        raise AssertionError

    def fold(self, name):
        raise AssertionError


@pytest.mark.parametrize("solver", [DDIM(0.5), DDPM(), DDPM("fixed_large")], ids=repr)
def test_the_step_to_the_data_draws_nothing_and_is_x0(solver, randn64) -> None:
    x, rng = randn64(3, 2), Counted()
    *_, last = iterate(DENOISE, x, GRID, solver, rng=rng)
    assert rng.draws == ["step"] * 4
    torch.testing.assert_close(last.x, last.denoised.x0, rtol=1e-12, atol=1e-12)
    rng = Counted()
    sample(DENOISE, x, grids.trailing(BETAS, 5, end=BETAS.t_min), solver, rng=rng)
    assert rng.draws == ["step"] * 5
    rng = Counted()
    sample(DENOISE, x, GRID, Heun(), rng=rng)
    assert not rng.draws


@SOLVERS
def test_nothing_is_evaluated_at_the_data(solver, randn64) -> None:
    times = []

    def recorded(x, timestep, cond):
        times.append(timestep[0].item() / 1000)
        return halves(x, timestep, cond)

    grid = Grid(Rectified(), (1.0, 0.4, 0.0))
    sample(Denoiser(recorded, Rectified(), "flow"), randn64(1, 1), grid, solver, rng=0)
    assert times == pytest.approx([1.0, 0.4, 0.4] if isinstance(solver, Heun) else [1.0, 0.4])
    with pytest.raises(ValueError, match=r"t = 0 is exactly the data"):
        DENOISE(randn64(1, 1), 0.0)


def test_the_condition_reaches_every_call_and_the_carry_the_next() -> None:
    conds, carries = [], []

    class Remembers:
        schedule = BETAS

        def __call__(self, x_t, t, cond=None, carry=None):
            conds.append(cond)
            carries.append(carry)
            return Denoised(x_t, x_t, carry=len(carries))

    cond = {"label": torch.ones(2)}
    for _ in range(2):
        sample(Remembers(), torch.ones(2, 1), GRID, Heun(), cond=cond)
        assert all(given is cond for given in conds)
        assert carries == [None, *range(1, 9)]
        carries.clear()


def test_images_and_odd_shapes(randn64) -> None:
    """Everything is elementwise in the shape: any [B, *] gives what its rows, flattened, give."""
    x = randn64(2, 3, 2, 2)
    shaped = sample(DENOISE, x, GRID, DDIM(1.0), rng=Rng(0, ids=[1, 2]))
    flat = sample(DENOISE, x.reshape(2, -1), GRID, DDIM(1.0), rng=Rng(0, ids=[1, 2]))
    assert torch.equal(shaped.reshape(2, -1), flat)
    assert sample(DENOISE, x[:, 0, 0, 0], GRID, DDPM(), rng=0).shape == (2,)


def test_a_run_ends_where_the_law_of_the_data_is(generator) -> None:
    """All of it at once: Heun from pure noise gives the mean and covariance of a Gaussian of data."""
    law = GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    x = torch.randn(20_000, 2, generator=generator)
    x = sample(OracleDenoiser(law, BETAS), x, grids.trailing(BETAS, 40), Heun())
    torch.testing.assert_close(x.mean(0), law.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), law.covariance, rtol=0, atol=0.03)


def test_bad_input_is_refused_at_the_call_and_before_the_network_runs() -> None:
    def never(*_):
        raise AssertionError("the network was run")

    never.schedule = GRID.schedule
    x = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="the grid is on"):
        iterate(Denoiser(halves, Rectified(), "flow"), x, GRID, Euler())
    with pytest.raises(ValueError, match="pass rng=Rng"):
        next(iterate(never, x, GRID, DDPM()))
