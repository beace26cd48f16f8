"""Captured steps do what eager ones do; here without the capture, which is in `tests/gpu`."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import Clip, GaussianOracle, LinearBeta, Rectified, grids
from gendiff.random import Rng
from gendiff.sampling import DDPM, Bounded, Euler, Graphs, Heun, Known, iterate, sample, split
from gendiff.sampling.solver import Solver
from tests.sampling.methods import METHODS

BETAS = LinearBeta()
GRID = grids.trailing(BETAS, 6)


class Net(nn.Module):
    """A network with weights and a condition."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.calls = 0

    def forward(self, x, timestep, cond):
        self.calls += 1
        return torch.tanh(self.linear(x) + timestep[:, None] / 1000 + cond["label"][:, None])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def conditions(value: float, rows: int = 2):
    return {"label": torch.full((rows,), value, dtype=torch.float64)}


def guided(denoiser, value=0.5, scale=3.0, **settings):
    branches = {"cond": conditions(value), "uncond": conditions(0.0, 1)}
    return Guider(denoiser, branches, partial(cfg, scale=scale), **settings)


@pytest.mark.parametrize("solver", METHODS, ids=repr)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "edm"])
def test_steps_from_tables_are_the_eager_steps(solver: Solver, prediction, net, randn64) -> None:
    denoiser, x, engine = Denoiser(net, BETAS, prediction), randn64(2, 3), Graphs(capture=False)
    eager = list(iterate(denoiser, x, GRID, solver, cond=conditions(0.5), rng=2))
    static = list(iterate(denoiser, x, GRID, solver, cond=conditions(0.5), rng=2, engine=engine))
    for mine, other in zip(static, eager, strict=True):
        assert (mine.i, mine.t, mine.s) == (other.i, other.t, other.s)
        torch.testing.assert_close(mine.x, other.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.denoised.x0, other.denoised.x0, rtol=1e-11, atol=1e-11)
    kept = static[2].state.memory.registers if static[2].state.memory else {}
    for name, value in kept.items():
        torch.testing.assert_close(value, eager[2].state.memory.registers[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_a_wrong_factor_in_a_table_is_seen(solver, net, randn64, monkeypatch) -> None:
    from gendiff.sampling import table

    def bent(stack, x0, eps, rows, index):
        table.mix_with_torch(stack, 1.001 * x0, 1.002 * eps, rows, index)

    monkeypatch.setattr(table, "mixer", lambda device, outputs: bent)
    denoiser, x = Denoiser(net, BETAS, "v"), randn64(2, 3)
    eager = sample(denoiser, x, GRID, solver, cond=conditions(0.5), rng=2)
    static = sample(denoiser, x, GRID, solver, cond=conditions(0.5), rng=2, engine=Graphs(capture=False))
    assert (eager - static).abs().max() > 1e-6


def test_one_program_serves_other_prompts_grids_and_solvers(net, randn64) -> None:
    denoiser, engine = Denoiser(net, BETAS, "v"), Graphs(capture=False)
    for value, scale, steps, solver in [
        (0.5, 3.0, 6, Euler()),
        (-0.2, 3.0, 4, Euler()),
        (0.1, 3.0, 50, DDPM()),
    ]:
        guider, x, grid = guided(denoiser, value, scale), randn64(2, 3), grids.trailing(BETAS, steps)
        eager = sample(guider, x, grid, solver, rng=1)
        torch.testing.assert_close(
            sample(guider, x, grid, solver, rng=1, engine=engine), eager, rtol=1e-11, atol=1e-11
        )
        assert len(engine.programs) == 1
    sample(guided(denoiser, scale=4.0), randn64(2, 3), GRID, Euler(), engine=engine)  # a number is a constant
    assert len(engine.programs) == 2
    engine.clear()
    assert not engine.programs


def test_two_runs_at_once_are_refused(net, randn64) -> None:
    guider, engine, x = guided(Denoiser(net, BETAS, "v")), Graphs(capture=False), randn64(2, 3)
    first = iterate(guider, x, GRID, Euler(), engine=engine)
    next(first)
    expected = sample(guider, x, GRID, Euler())
    torch.testing.assert_close(sample(guider, x, GRID, Euler(), engine=engine), expected)
    with pytest.raises(RuntimeError, match=r"another run .* began before this one ended"):
        next(first)
    runs = (iterate(guider, x, GRID, Euler(), engine=Graphs(capture=False)) for _ in range(2))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.x, two.x)


def test_scales_that_are_tensors_are_given_anew(net, randn64) -> None:
    denoiser, engine, x = Denoiser(net, BETAS, "v"), Graphs(capture=False), randn64(2, 3)
    for scale in (torch.tensor([1.5, 2.5]), torch.tensor([0.5, 7.5])):
        guider = guided(denoiser, scale=scale)
        static = sample(guider, x, GRID, Euler(), engine=engine)
        torch.testing.assert_close(static, sample(guider, x, GRID, Euler()), rtol=1e-11, atol=1e-11)
    assert len(engine.programs) == 1


def test_what_belongs_to_the_user_is_not_written_to(net, randn64) -> None:
    denoiser, engine = Denoiser(net, BETAS, "v"), Graphs(capture=False)
    first, second = guided(denoiser, 0.5), guided(denoiser, -0.5)
    x, noise = randn64(2, 3), randn64(2, 3)
    before = x.clone()
    sample(first, x, GRID, Euler(), engine=engine)
    sample(second, noise, GRID, Euler(), engine=engine)
    assert first.branches["cond"][1]["label"].tolist() == [0.5, 0.5]
    assert torch.equal(x, before)
    steps = [step.x for step in iterate(first, x, GRID, Euler(), engine=engine)]
    assert all(not torch.equal(a, b) for a, b in pairwise(steps))  # copies, not one buffer


def test_wrappers_are_taken_apart(net, randn64) -> None:
    denoiser, engine, x = Denoiser(net, BETAS, "v"), Graphs(capture=False), randn64(2, 3)
    keep = torch.tensor([[1.0, 0.0, 0.4]], dtype=torch.float64)
    for kind in ("soft", "differential"):
        for data in (randn64(2, 3), randn64(2, 3)):
            known = Known(data, keep, kind)(Bounded(guided(denoiser), Clip(0.8)))
            static = sample(known, x, GRID, Heun(), engine=engine)
            torch.testing.assert_close(static, sample(known, x, GRID, Heun()), rtol=1e-10, atol=1e-10)
            assert torch.equal(static[:, 0], data[:, 0])
    assert len(engine.programs) == 2


def test_intervals_of_guidance(net, randn64) -> None:
    denoiser, engine, x = Denoiser(net, BETAS, "v"), Graphs(capture=False), randn64(2, 3)
    guider = guided(denoiser, when={"uncond": (0.3, 0.7)}, batching="separate")
    eager = sample(guider, x, GRID, Euler())
    calls, net.calls = net.calls, 0
    static = sample(guider, x, GRID, Euler(), engine=engine)
    torch.testing.assert_close(static, eager, rtol=1e-11, atol=1e-11)
    assert calls == net.calls == 6 + 3  # times 1, 5/6 … 1/6, of which three lie in the interval


def test_a_run_that_is_handed_over_goes_on(net, randn64) -> None:
    denoiser, engine, x = Denoiser(net, BETAS, "v"), Graphs(capture=False), randn64(2, 3)
    high, low = split(GRID, at=0.5)
    for solver in METHODS:
        rng, again = Rng(1), Rng(1)
        settings = {"cond": conditions(0.5), "engine": engine}
        *_, last = iterate(denoiser, x, high, solver, rng=rng, **settings)
        ends = sample(denoiser, last.handoff, low, solver, rng=rng, **settings)
        whole = sample(denoiser, x, GRID, solver, cond=conditions(0.5), rng=again)
        torch.testing.assert_close(ends, whole, rtol=1e-11, atol=1e-11)


def test_programs_are_made_anew_where_what_they_rest_on_has_changed(net, randn64) -> None:
    denoiser, engine, x = Denoiser(net, BETAS, "v"), Graphs(limit=2, capture=False), randn64(2, 3)

    def run(grid=GRID, x=x):
        return sample(denoiser, x, grid, Euler(), cond=conditions(0.5, len(x)), engine=engine)

    run()
    first = next(iter(engine.programs.values()))
    with torch.no_grad():
        net.linear.weight.mul_(0.5)  # in place: the same program reads it
    run()
    assert list(engine.programs.values()) == [first]
    net.linear.weight = nn.Parameter(net.linear.weight * 2)
    run()
    assert len(engine.programs) == 2
    run(x=randn64(5, 3))
    assert len(engine.programs) == 2
    assert first not in engine.programs.values()
    run(grids.trailing(BETAS, 100))  # more rows than the table had
    assert len(engine.programs) == 2


def test_an_opaque_denoiser_is_captured_as_it_is(randn64) -> None:
    exact = OracleDenoiser(GaussianOracle.isotropic(torch.tensor([0.4]), 1.6), Rectified())
    engine, grid, x = Graphs(capture=False), grids.uniform(Rectified(), 5, 0.9), randn64(4, 1)
    for _ in range(2):
        static = sample(exact, x, grid, Heun(), engine=engine)
        torch.testing.assert_close(static, sample(exact, x, grid, Heun()), rtol=1e-12, atol=1e-12)
    assert len(engine.programs) == 1


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"engine": "graph"}, ValueError, r"need a CUDA device, and x is on cpu; use engine='eager'"),
        ({"engine": "grph"}, ValueError, r"unknown engine 'grph'; did you mean 'graph'"),
        ({"engine": Graphs(capture=False), "grad": True}, ValueError, r"no gradients flow through captured"),
        ({"engine": Graphs(capture=False), "solver": DDPM()}, ValueError, r"adds noise in every step"),
        (
            {"engine": Graphs(capture=False), "solver": DDPM("learned"), "rng": 1},
            ValueError,
            r"variance channels",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(settings, error, says, net, randn64) -> None:
    settings = {"solver": Euler(), "cond": conditions(0.5), **settings}
    solver = settings.pop("solver")
    with pytest.raises(error, match=says):
        sample(Denoiser(net, BETAS, "v"), randn64(2, 3), GRID, solver, **settings)
