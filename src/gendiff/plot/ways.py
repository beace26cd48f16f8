"""The ways that states take along a grid: exactly, and under a solver."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gendiff.denoiser import Cond, Denoise, OracleDenoiser
from gendiff.math.grids import Grid
from gendiff.math.laws import Law
from gendiff.math.mixtures import MixtureOracle
from gendiff.plot.figure import numbers
from gendiff.sampling import Heun, Solver, iterate

FINE = 200  # points of an exact way
NEAR = 1e-3  # of the last step's time: as near to the data as a law without a density there is followed


@final
@dataclass(frozen=True, eq=False)
class Way:
    """Times, states of d values there [n, B, d], and whether the end is reached and no noise was added."""

    name: str
    t: NDArray[np.float64]
    x: NDArray[np.float64]
    comparable: bool

    def error(self, other: "Way") -> float | None:
        """The root mean square of the distance to another way at the end, where that means something."""
        if not (self.comparable and other.comparable):
            return None
        return float(np.sqrt(((self.x[-1] - other.x[-1]) ** 2).sum(-1).mean()))


def states(x: Tensor) -> NDArray[np.float64]:
    """States [B, *] as [B, d]."""
    return numbers(x, "x").reshape(len(x), -1)


def solved(
    name: str, denoise: Denoise, x: Tensor, grid: Grid, solver: Solver, cond: Cond, seed: int | None
) -> Way:
    """The way under a solver, a state for each time of the grid."""
    start = solver.init(x, grid)
    steps = list(iterate(denoise, x, grid, solver, cond=cond, rng=seed))
    noisy = any(solver.needs_noise(state) for state in (start, *(step.state for step in steps[:-1])))
    return Way(name, grid.t.numpy(), np.stack([states(x), *(states(step.x) for step in steps)]), not noisy)


def law_of(denoise: Denoise) -> Law | None:
    """The law of the data, where it is known."""
    oracle = denoise.oracle if isinstance(denoise, OracleDenoiser) else None
    return oracle if isinstance(oracle, Law) else None


def fine_times(law: Law, grid: Grid) -> Float[Tensor, "n"]:
    """Many times from the first of a grid to its last, or nearly there where the law has no density at it."""
    first, *_, before, last = grid.times if grid.steps > 1 else (*grid.times[:1], *grid.times)
    if float(grid.levels.sigma[-1]) == 0 and float(law.components.eigenvalues.min()) == 0:
        last = NEAR * before
    return torch.linspace(first, last, FINE, dtype=torch.float64)


def exact_way(denoise: Denoise, x: Tensor, grid: Grid, exact: bool | Grid | None, cond: Cond) -> Way | None:
    """The way of the probability-flow ODE; None where it is not known and not insisted on.

    Raises:
        ValueError: if it is insisted on and not known, or a grid in its place has other ends.
    """
    if isinstance(exact, Grid):
        if (exact.times[0], exact.times[-1]) != (grid.times[0], grid.times[-1]):
            raise ValueError(
                f"the grid of the exact way goes from {exact.times[0]} to {exact.times[-1]} and that of the "
                f"solvers from {grid.times[0]} to {grid.times[-1]}; their ends must be equal."
            )
        return solved(f"Heun, {exact.steps:,} steps", denoise, x, exact, Heun(), cond, None)
    law = law_of(denoise) if exact in (None, True) else None
    if law is None or (isinstance(law, MixtureOracle) and law.size > 1):
        if exact:
            raise ValueError(
                "the exact way is known for the OracleDenoiser of a Gaussian, or of a mixture in one "
                "dimension; give a finer grid as exact=, which Heun's method then follows."
            )
        return None
    t = fine_times(law, grid)
    start, levels = grid.level(0), grid.schedule.level(t)
    many = x.detach().double().cpu().repeat(len(t), *[1] * (x.ndim - 1))
    alpha, sigma = (value.repeat_interleave(len(x)) for value in levels)
    ends = states(law.flow(many, start.alpha, start.sigma, alpha, sigma)).reshape(len(t), len(x), -1)
    return Way("exact", t.numpy(), ends, float(t[-1]) == grid.times[-1])
