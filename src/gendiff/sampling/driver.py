"""The loop: a generator that yields every step, and a function that runs it to the end."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import positive_batch, unknown
from gendiff.condition import Condition
from gendiff.denoiser import Cond, Denoise, Denoised
from gendiff.math.grids import Grid
from gendiff.random import Randomness, as_rng
from gendiff.sampling.brownian import Brownian
from gendiff.sampling.graphs import Graphs, graphs_of
from gendiff.sampling.handoff import Handoff
from gendiff.sampling.solver import Draw, Solver, State, check_schedule

Noise = Randomness | Brownian | torch.Generator | int
Engine = Graphs | Literal["eager", "graph"] | str


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One finished step of a sampler.

    Attributes:
        i: number of the step, from 0.
        t: time it started at.
        s: time it ended at.
        x: samples at s, [B, *].
        denoised: what the network last said in it; `denoised.x0` is a preview of the result.
        state: the solver's state after it.
        solver: the method.
    """

    i: int
    t: float
    s: float
    x: Float[Tensor, "B *dims"]
    denoised: Denoised
    state: State
    solver: Solver

    @property
    def handoff(self) -> Handoff:
        """What a second stage needs to go on from here exactly; given to `sample` in place of x."""
        return Handoff(
            self.x, self.s, self.denoised.eps, self.state.memory, self.solver, self.state.grid.whole
        )


def iterate(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"] | Handoff,
    grid: Grid,
    solver: Solver,
    *,
    cond: Cond = None,
    rng: Noise | None = None,
    grad: bool = False,
    engine: Engine = "eager",
) -> Iterator[Step]:
    """Sample, yielding every step: the user's `for` loop is the progress bar, the preview and the early stop.

    Args:
        denoise: a `Denoiser`, a guider, or any wrapper round one.
        x: samples at the first time of the grid, [B, *]: unit noise for grids that start at t = 1 of a
            variance-preserving or flow schedule, `sigma·noise` for a variance-exploding one. Or the `handoff`
            of the last step of an earlier stage.
        grid: the times, on the schedule of `denoise`.
        solver: the method.
        cond: the condition given to every call.
        rng: randomness of stochastic methods: an `Rng`, a `torch.Generator` or a seed, of which step n draws
            the n-th time from the stream "step"; or a `Brownian` motion.
        grad: whether gradients flow through the steps; off by default, whatever the caller's mode.
        engine: "graph" captures a step in a CUDA graph and replays it, with the same result; the graph is
            kept as long as the denoiser, and used again for other conditions and grids. `Graphs` of your own
            are kept by you.

    Raises:
        ValueError: if the grid is on another schedule than the denoiser, a stochastic method has no rng, or a
            handoff does not fit the grid.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.full((1,), 3.0), 1e-3), Rectified())
    >>> from gendiff.sampling import Euler
    >>> steps = list(iterate(exact, torch.ones(1, 1), grids.uniform(Rectified(), 4), Euler()))
    >>> [(step.t, step.s) for step in steps][-1], steps[-1].x
    ((0.25, 0.0), tensor([[3.0000]], dtype=torch.float64))
    """
    positive_batch(x.x_t if isinstance(x, Handoff) else x, "x")
    check_schedule(denoise, grid)
    state = x.begin(grid, solver) if isinstance(x, Handoff) else solver.init(x, grid)
    draw = None if rng is None else _drawing(rng)
    if engine == "eager":
        return _steps(denoise, state, solver, cond, draw, grad)
    graphs = _graphs(engine, denoise, grad)
    return (
        _step_of(denoise, solver, after, denoised)
        for after, denoised in graphs.run(denoise, state, solver, Condition.of(cond), draw)
    )


def _steps(
    denoise: Denoise, state: State, solver: Solver, cond: Cond, draw: Draw | None, grad: bool
) -> Iterator[Step]:
    """The loop itself, apart from `iterate`, so that this one refuses bad input when it is called."""
    carry: Any = None

    def ask_network(x: Tensor, t: Tensor) -> Denoised:
        nonlocal carry
        denoised = denoise(x, t, cond, carry)
        carry = denoised.carry
        return denoised

    while not state.done:
        with torch.set_grad_enabled(grad):
            state, denoised = solver.step(state, ask_network, draw)
            step = _step_of(denoise, solver, state, denoised)
        state = step.state
        yield step


def sample(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"] | Handoff,
    grid: Grid,
    solver: Solver,
    *,
    cond: Cond = None,
    rng: Noise | None = None,
    grad: bool = False,
    engine: Engine = "eager",
) -> Float[Tensor, "B *dims"]:
    """Run `iterate` to the end of the grid and return the samples there; the arguments are the same.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> from gendiff.sampling import Heun
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), Rectified())
    >>> sample(exact, torch.ones(2, 1), grids.uniform(Rectified(), 8), Heun()).shape
    torch.Size([2, 1])
    """
    ends = x.x_t if isinstance(x, Handoff) else x
    for step in iterate(denoise, x, grid, solver, cond=cond, rng=rng, grad=grad, engine=engine):
        ends = step.x  # the step itself is let go: a list of them would keep every answer
    return ends


def _drawing(rng: Noise) -> Draw:
    if isinstance(rng, Brownian):
        return rng.increment
    source = as_rng(rng)

    def draw(x: Tensor, span: tuple[float, float]) -> Tensor:
        return source.normal("step", x.shape, dtype=x.dtype, device=x.device)

    return draw


def _graphs(engine: "Graphs | str", denoise: Denoise, grad: bool) -> Graphs:
    if grad:
        raise ValueError("no gradients flow through captured steps; use engine='eager' with grad=True.")
    if isinstance(engine, Graphs):
        return engine
    if engine != "graph":
        raise ValueError(unknown("engine", engine, ["eager", "graph"]))
    return graphs_of(denoise)


def _step_of(denoise: Denoise, solver: Solver, state: State, denoised: Denoised) -> Step:
    """The step that a state is the end of."""
    i = state.i - 1
    t, s = map(float, state.grid.times[i : i + 2])
    if state.done and s == 0:
        state = replace(state, x=finished(denoise, state.x))
    return Step(i, t, s, state.x, denoised, state, solver)


def finished(denoise: Denoise, x: Tensor) -> Tensor:
    """A sample at the data, as the outermost wrapper with a `finish` leaves it."""
    while not hasattr(denoise, "finish"):
        if not hasattr(denoise, "denoise"):
            return x
        denoise = getattr(denoise, "denoise")  # noqa: B009 (not every denoiser has one)
    return getattr(denoise, "finish")(x)  # noqa: B009
