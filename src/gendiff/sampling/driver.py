"""The loop: a generator that yields every step, and a function that runs it to the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import positive_batch
from gendiff.denoiser import Cond, Denoise, Denoised
from gendiff.math.grids import Grid
from gendiff.random import Randomness, as_rng
from gendiff.sampling.solver import Solver, State


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
    """

    i: int
    t: float
    s: float
    x: Float[Tensor, "B *dims"]
    denoised: Denoised
    state: State


def iterate(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    solver: Solver,
    *,
    cond: Cond = None,
    rng: Randomness | torch.Generator | int | None = None,
    grad: bool = False,
) -> Iterator[Step]:
    """Sample, yielding every step: the user's `for` loop is the progress bar, the preview and the early stop.

    Args:
        denoise: a `Denoiser`, a guider, or any wrapper round one.
        x: samples at the first time of the grid, [B, *]: unit noise for grids that start at t = 1 of a
            variance-preserving or flow schedule, `sigma·noise` for a variance-exploding one.
        grid: the times, on the schedule of `denoise`.
        solver: the method.
        cond: the condition given to every call.
        rng: randomness of stochastic methods: an `Rng`, a `torch.Generator` or a seed. Step n draws the n-th
            time from the stream "step".
        grad: whether gradients flow through the steps; off by default, whatever the caller's mode.

    Raises:
        ValueError: if the grid is on another schedule than the denoiser, or a stochastic method has no rng.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.full((1,), 3.0), 1e-3), Rectified())
    >>> from gendiff.sampling import Euler
    >>> steps = list(iterate(exact, torch.ones(1, 1), grids.uniform(Rectified(), 4), Euler()))
    >>> [(step.t, step.s) for step in steps][-1], steps[-1].x
    ((0.25, 0.0), tensor([[3.0000]], dtype=torch.float64))
    """
    positive_batch(x, "x")
    if grid.schedule != denoise.schedule:
        raise ValueError(
            f"the grid is on {grid.schedule!r} but the denoiser was made for {denoise.schedule!r}; "
            f"make the grid with schedule=denoise.schedule."
        )
    return _steps(denoise, solver.init(x, grid), solver, cond, None if rng is None else as_rng(rng), grad)


def _steps(
    denoise: Denoise, state: State, solver: Solver, cond: Cond, source: Randomness | None, grad: bool
) -> Iterator[Step]:
    """The loop itself, apart from `iterate`, so that this one refuses bad input when it is called."""
    carry: Any = None

    def ask_network(x: Tensor, t: Tensor) -> Denoised:
        nonlocal carry
        denoised = denoise(x, t, cond, carry)
        carry = denoised.carry
        return denoised

    def draw(x: Tensor, span: tuple[float, float]) -> Tensor:
        assert source is not None
        return source.normal("step", x.shape, dtype=x.dtype, device=x.device)

    while not state.done:
        i, (t, s) = state.i, map(float, state.grid.times[state.i : state.i + 2])
        with torch.set_grad_enabled(grad):
            state, denoised = solver.step(state, ask_network, draw if source is not None else None)
        yield Step(i, t, s, state.x, denoised, state)


def sample(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    solver: Solver,
    *,
    cond: Cond = None,
    rng: Randomness | torch.Generator | int | None = None,
    grad: bool = False,
) -> Float[Tensor, "B *dims"]:
    """Run `iterate` to the end of the grid and return the samples there; the arguments are the same.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> from gendiff.sampling import Heun
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), Rectified())
    >>> sample(exact, torch.ones(2, 1), grids.uniform(Rectified(), 8), Heun()).shape
    torch.Size([2, 1])
    """
    for step in iterate(denoise, x, grid, solver, cond=cond, rng=rng, grad=grad):
        x = step.x
    return x
