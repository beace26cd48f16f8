"""Solvers whose every step is a linear combination: nearly all, from DDPM to UniPC."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from gendiff.denoiser import Denoised
from gendiff.math.grids import Grid
from gendiff.sampling.path import Path
from gendiff.sampling.solver import Query, Solver, State, moment_at, required
from gendiff.sampling.stage import ANSWER, Plan, Stage, combined


@final
@dataclass(frozen=True, eq=False)
class Memory:
    """What a linear solver keeps between two evaluations.

    Attributes:
        stage: number of finished evaluations of the step, 0 between two steps.
        registers: what was kept, by name.
    """

    stage: int
    registers: dict[str, Tensor]


class LinearSolver(Solver):
    """A solver that says what it does as a table, made once for a grid.

    Its coefficients are computed in float64 on the host and touch no tensor, so that a run has no step that
    waits for the device; the table can lie on a device in place of the host (`engine="graph"`).
    """

    @abstractmethod
    def plan(self, path: Path) -> Plan:
        """The evaluations of every step of a path."""

    @final
    def prepare(self, grid: Grid) -> tuple[Solver, Plan]:
        plan = self.continued(grid)
        if _remembers(plan[1][0][0]):  # nothing is: a part of a grid is then a grid of its own
            return self.continued(replace(grid, before=()))
        return plan

    @final
    def continued(self, grid: Grid) -> tuple[Solver, Plan]:
        """The plan of a part of a grid, for one who has the memory of the steps before it."""
        first = len(grid.before)
        return self, self.plan(Path.of(grid))[first : first + grid.steps]

    @final
    def step_of(self, state: State) -> tuple[Stage, ...]:
        """The evaluations of the current step."""
        return self.plan_of(state)[state.i]

    @final
    def plan_of(self, state: State) -> Plan:
        """The evaluations of all steps of a state's grid."""
        whose, plan = state.plan or (None, ())
        if whose != self:  # a state that another solver began
            _, plan = self.prepare(state.grid)
        return plan

    @final
    def stage(self, state: State) -> Stage:
        """The evaluation that is due."""
        return self.step_of(state)[0 if state.memory is None else state.memory.stage]

    @final
    def ask(self, state: State, noise: Float[Tensor, "B *dims"] | None = None) -> Query | None:
        if state.done:
            return None
        stage = self.stage(state)
        registers = {"x": state.x} if noise is None else {"x": state.x, "noise": noise}
        if "noise" in stage.query:
            required(noise, self)
        return Query(combined(stage.query, registers), moment_at(stage.at.t))

    @final
    def tell(self, state: State, denoised: Denoised, noise: Float[Tensor, "B *dims"] | None = None) -> State:
        stage = self.stage(state)
        registers = {"x": state.x, "x0": denoised.x0, "eps": denoised.eps}
        if stage.noisy:
            registers["noise"] = required(noise, self)
            if stage.spread is not None:
                registers["noise"] = registers["noise"] * stage.spread.deviation(_channels(denoised, self))
        if state.memory is not None:
            registers |= state.memory.registers
        x = combined(stage.x, registers)
        kept = {name: combined(combination, registers) for name, combination in stage.keep.items()}
        number = 1 + (0 if state.memory is None else state.memory.stage)
        if number < len(self.step_of(state)):
            return replace(state, x=x, memory=Memory(number, kept))
        return state.advance(x, Memory(0, kept) if kept else None)

    @final
    def needs_noise(self, state: State) -> bool:
        return not state.done and self.stage(state).noisy

    @final
    def stirs(self, state: State) -> bool:
        return not state.done and "noise" in self.stage(state).query

    @final
    def span(self, state: State) -> tuple[float, float]:
        return self.stage(state).span or super().span(state)


def _remembers(stage: Stage) -> bool:
    return any(name not in ANSWER for part in (stage.x, stage.query, *stage.keep.values()) for name in part)


def _channels(denoised: Denoised, solver: Solver) -> Tensor:
    if denoised.log_var is None:
        raise ValueError(
            f"{solver!r} needs variance channels of the network, and this one has none: make the denoiser "
            f"with learned_variance=True, or use a 'fixed_*' variance."
        )
    return denoised.log_var
