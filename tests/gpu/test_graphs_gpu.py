"""Sampling on a GPU: captured steps equal eager ones, and no step waits for the device."""

from functools import partial

import pytest
import torch
from torch import nn

from gendiff.denoiser import Denoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import LinearBeta, Rectified, grids
from gendiff.random import Rng
from gendiff.sampling import Graphs, Known, iterate, sample, split
from tests.sampling.methods import METHODS

pytestmark = pytest.mark.gpu
BETAS = LinearBeta()
SOLVERS = pytest.mark.parametrize("solver", METHODS, ids=repr)


class Net(nn.Module):
    """A small convolutional network with a condition, in its own precision."""

    accepts = frozenset({"text"})

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.text = nn.Linear(8, 32)
        self.to("cuda", dtype)

    def forward(self, x, timestep, cond):
        told = self.text(cond["text"].to(x.dtype)) + (timestep[:, None] / 1000).to(x.dtype)
        return self.last(torch.nn.functional.silu(self.first(x) + told[..., None, None]))


@pytest.fixture
def case():
    """A guider, samples, and another guider of other conditions."""
    torch.manual_seed(0)
    net, x = Net(torch.bfloat16).eval(), torch.randn(2, 4, 16, 16, device="cuda")
    denoiser = Denoiser(net, BETAS, "v")

    def guided(seed):
        text = torch.randn(3, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        branches = {"cond": {"text": text[:2]}, "uncond": {"text": text[2:]}}
        return Guider(denoiser, branches, partial(cfg, scale=3.0))

    return guided(1), x, guided(2)


@SOLVERS
def test_a_captured_run_is_the_eager_run_bit_for_bit(solver, case) -> None:
    guider, x, other = case
    engine = Graphs()
    for denoise, steps in ((guider, 7), (other, 11)):
        grid = grids.trailing(BETAS, steps)
        eager = [step.x for step in iterate(denoise, x, grid, solver, rng=3)]
        graph = [step.x for step in iterate(denoise, x, grid, solver, rng=3, engine=engine)]
        for mine, theirs in zip(graph, eager, strict=True):
            assert torch.equal(mine, theirs)
    (program,) = engine.programs.values()
    assert len(program.graphs) == 1


@SOLVERS
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_no_step_waits_for_the_device(solver, engine, case) -> None:
    guider, x, _ = case
    grid = grids.trailing(BETAS, 6)
    sample(guider, x, grid, solver, rng=Rng(3, device="cuda"), engine=engine)  # captures
    steps = iterate(guider, x, grid, solver, rng=Rng(3, device="cuda"), engine=engine)
    next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_graph_for_every_set_of_branches(case) -> None:
    guider, x, _ = case
    some = Guider(guider.denoise, dict(guider.branches), guider.combine, when={"uncond": (0.3, 0.7)})
    engine, grid = Graphs(), grids.trailing(BETAS, 8)
    graph = sample(some, x, grid, METHODS[0], engine=engine)
    assert torch.equal(graph, sample(some, x, grid, METHODS[0]))
    (program,) = engine.programs.values()
    assert len(program.graphs) == 2


def test_graphs_go_with_their_denoiser(case) -> None:
    guider, x, other = case
    from gendiff.sampling.graphs import _OWN

    grid, before = grids.trailing(BETAS, 4), len(_OWN)
    first = sample(guider, x, grid, METHODS[0], engine="graph")
    assert torch.equal(first, sample(guider, x, grid, METHODS[0]))
    assert len(_OWN) == before + 1
    assert torch.equal(sample(other, x, grid, METHODS[0], engine="graph"), sample(other, x, grid, METHODS[0]))
    assert len(_OWN) == before + 1


def test_weights_that_change_in_place_are_read(case) -> None:
    guider, x, _ = case
    engine, grid = Graphs(), grids.trailing(BETAS, 4)
    sample(guider, x, grid, METHODS[0], engine=engine)
    with torch.no_grad():
        guider.denoise.backbone.first.weight.mul_(1.5)
    assert torch.equal(
        sample(guider, x, grid, METHODS[0], engine=engine), sample(guider, x, grid, METHODS[0])
    )
    (program,) = engine.programs.values()
    assert len(program.graphs) == 1


def test_inpainting_in_two_captured_stages(case) -> None:
    guider, x, _ = case
    keep = torch.zeros(1, 1, 16, 16, device="cuda")
    keep[..., :8] = 1
    x0, engine = torch.randn_like(x), Graphs()
    known, high_low = Known(x0, keep), split(grids.trailing(BETAS, 10), at=0.4)
    *_, last = iterate(known(guider), x, high_low[0], METHODS[1], engine=engine)
    ends = sample(known(guider), last.handoff, high_low[1], METHODS[1], engine=engine)
    assert torch.equal(ends[..., :8], x0[..., :8])
    assert torch.equal(ends, sample(known(guider), x, grids.trailing(BETAS, 10), METHODS[1]))


def test_flow_in_single_precision() -> None:
    torch.manual_seed(0)
    denoiser, x = (
        Denoiser(Net(torch.float32).eval(), Rectified(), "flow"),
        torch.randn(1, 4, 16, 16, device="cuda"),
    )
    text = {"text": torch.randn(1, 8, device="cuda")}
    grid = grids.uniform(Rectified(), 9).shifted(3.0)
    for solver in METHODS:
        eager = sample(denoiser, x, grid, solver, cond=text, rng=1)
        assert torch.equal(sample(denoiser, x, grid, solver, cond=text, rng=1, engine="graph"), eager)


def test_a_time_on_the_device_is_looked_up_there(case) -> None:
    guider, x, _ = case
    t = torch.full((), 0.5, dtype=torch.float64, device="cuda")
    expected = guider(x, t)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer = guider(x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(answer.x0, expected.x0)
    assert torch.equal(answer.x0, guider(x, 0.5).x0)
