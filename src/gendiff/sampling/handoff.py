"""Runs in two stages: a grid cut in two, and what the first stage hands to the second."""

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from gendiff.math.grids import Grid
from gendiff.math.numeric import numbers
from gendiff.math.schedules import Schedule
from gendiff.sampling.linear import LinearSolver, Memory
from gendiff.sampling.solver import Solver, State


def split(grid: Grid, at: float | int) -> tuple[Grid, Grid]:
    """Cut a grid in two: the first part evaluates the network at all times >= `at`, the second below.

    A solver does in each part what it does there in the whole: a run over both, with the handoff of the first
    given to the second, is the run over the grid, bit for bit, whatever the method.

    Args:
        grid: the whole, or a part of one.
        at: the time, in (0, 1). Of a table of N betas, timestep i is the time (i + 1)/N.

    Raises:
        ValueError: if one of the parts would be empty.

    >>> from gendiff.math import Rectified, grids
    >>> high, low = split(grids.uniform(Rectified(), 4), at=0.4)
    >>> high.times, low.times
    ((1.0, 0.75, 0.5, 0.25), (0.25, 0.0))
    """
    times = tuple(numbers(grid.t))
    cut = sum(t >= at for t in times)
    if not 0 < cut < len(times) - 1:
        raise ValueError(
            f"a cut at t = {at} leaves one part of the grid without a step: its steps start at times from "
            f"{times[0]:g} to {times[-2]:g}; cut between them."
        )
    first = replace(grid, times=times[: cut + 1], after=times[cut + 1 :] + grid.after)
    second = replace(grid, times=times[cut:], before=grid.before + times[:cut])
    return first, second


@final
@dataclass(frozen=True, eq=False)
class Handoff:
    """Where a run stands between two stages: enough to go on exactly, or to be refused.

    Attributes:
        x_t: the samples, [B, *].
        t: their time.
        noise: the noise in them, as the network last said it, [B, *].
        solver_state: what the solver remembers; None of one-step methods.
        solver: whose memory that is.
        grid: the whole grid of the run.
    """

    x_t: Float[Tensor, "B *dims"]
    t: float
    noise: Float[Tensor, "B *dims"]
    solver_state: Any
    solver: Solver
    grid: Grid

    @property
    def schedule(self) -> Schedule:
        """The schedule that t is on."""
        return self.grid.schedule

    @property
    def schedule_fingerprint(self) -> str:
        """A short name of the schedule and the times, the same for equal ones."""
        text = f"{self.schedule!r} {self.grid.times}"
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def to(self, schedule: Schedule) -> "Handoff":
        r"""The same samples on another schedule, at equal log-SNR: :math:`x' = x\,\alpha'/\alpha`.

        This converts between variance-preserving, variance-exploding and flow conventions. The second stage's
        grid is `grid.on(schedule)` of the first's.
        """
        if schedule == self.schedule:
            return self
        i = numbers(self.grid.t).index(self.t)
        grid = self.grid.on(schedule)
        factor = float(grid.levels.alpha[i] / self.grid.levels.alpha[i])
        memory = self.solver_state
        if isinstance(memory, Memory):
            kept = memory.registers.items()
            memory = replace(memory, registers={k: v * factor if k.startswith("x_") else v for k, v in kept})
        elif memory is not None:
            raise ValueError(f"what {self.solver!r} remembers cannot be converted; hand over .cold() first.")
        t = float(grid.times[i])
        return replace(self, x_t=self.x_t * factor, t=t, solver_state=memory, grid=grid)

    def cold(self) -> "Handoff":
        """The handoff without the solver's memory: the second stage starts anew, with any solver or grid."""
        return replace(self, solver_state=None)

    def begin(self, grid: Grid, solver: Solver) -> State:
        """The state of a second stage.

        Raises:
            ValueError: if the grid is on another schedule or starts elsewhere, or if what is remembered
                belongs to another solver or another grid.
        """
        if grid.schedule != self.schedule:
            raise ValueError(
                f"the handoff is on {self.schedule!r}, the second stage on {grid.schedule!r}; convert it "
                f"with handoff.to(grid.schedule), and make the second grid by grid.on(schedule) of the first."
            )
        if float(grid.times[0]) != self.t:
            raise ValueError(
                f"the handoff is at t = {self.t:g} but the second grid starts at {float(grid.times[0]):g}; "
                f"make both with split(grid, at=...)."
            )
        state = solver.init(self.x_t, grid)
        if self.solver_state is None:
            return state
        if solver != self.solver or grid.whole != self.grid:
            which = "that" if grid.whole == self.grid else "another"
            raise ValueError(
                f"what {self.solver!r} remembers of its grid of {self.grid.steps} steps is of no use to "
                f"{solver!r} on {which} grid; make both grids with split(grid, at=...) and keep the "
                f"solver, or start anew with handoff.cold()."
            )
        plan = solver.continued(grid) if isinstance(solver, LinearSolver) else state.plan
        return replace(state, memory=self.solver_state, plan=plan)
