"""What a solver is: a frozen set of choices that turns one state into the next and holds nothing itself.

A solver is asked where the network should be evaluated and told what it said, so that a loop of ours, a loop
of the user's and a scheduler that is fed outputs share one implementation. All formulas are in (alpha, sigma)
at both ends of a step, in float64: that needs no derivative of the schedule and is singular at neither end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import working_dtype
from gendiff.denoiser import Denoise, Denoised
from gendiff.math.grids import Grid
from gendiff.math.schedules import Level

Draw: TypeAlias = Callable[[Tensor, tuple[float, float]], Tensor]


class Query(NamedTuple):
    """Where a solver wants the network evaluated: x at time t, a scalar tensor on the host."""

    x: Float[Tensor, "B *dims"]
    t: Float64[Tensor, ""]


@final
@dataclass(frozen=True, eq=False)
class State:
    """Where a solver stands: everything it knows, so that copying the state copies the run.

    Attributes:
        x: samples at time grid.t[i], [B, *].
        grid: the times and the schedule.
        i: number of finished steps.
        memory: what a solver keeps between two evaluations; None at the start of a step of a one-step method.
        plan: what a solver worked out for the grid before the first step.
    """

    x: Float[Tensor, "B *dims"]
    grid: Grid
    i: int = 0
    memory: Any = None
    plan: Any = None

    @property
    def t(self) -> Float64[Tensor, "N"]:
        """The times of the grid, on the host."""
        return self.grid.t

    @property
    def done(self) -> bool:
        """Whether the last time of the grid is reached."""
        return self.i == self.grid.steps

    @property
    def ends(self) -> tuple[Level, Level]:
        """The levels at both ends of the current step, float64 on the CPU."""
        return self.grid.level(self.i), self.grid.level(self.i + 1)

    def advance(self, x: Tensor, memory: Any = None) -> "State":
        """The state after the current step."""
        return replace(self, x=x, i=self.i + 1, memory=memory)


class Solver(ABC):
    """A method that moves samples along a grid; subclasses are frozen dataclasses and say how good they are.

    Class attributes:
        order: global order of convergence, from exact history.
        start_order: order from a cold start.
        evaluations: evaluations of the network in a step.
    """

    order: ClassVar[int]
    start_order: ClassVar[int]
    evaluations: ClassVar[int]

    @final
    def init(self, x: Float[Tensor, "B *dims"], grid: Grid) -> State:
        """The state before the first step.

        Args:
            x: samples at the first time of the grid, [B, *]; unit noise there where alpha is 0 or nearly.
                They are kept in at least float32, whatever the network computes in.
            grid: the times.
        """
        return State(x.to(working_dtype(x)), grid, plan=self.prepare(grid))

    def prepare(self, grid: Grid) -> Any:
        """What is worked out once for a grid, the `plan` of every state; nothing, unless a method says so."""
        return None

    @abstractmethod
    def ask(self, state: State, noise: Float[Tensor, "B *dims"] | None = None) -> Query | None:
        """Where the network is to be evaluated next; None when the grid is done.

        Args:
            state: where the run stands.
            noise: what `tell` will be given, where `stirs(state)`; a method that never stirs may leave the
                argument out.
        """

    @abstractmethod
    def tell(self, state: State, denoised: Denoised, noise: Float[Tensor, "B *dims"] | None = None) -> State:
        """The state after an answer to `ask`. `noise` is unit Gaussian, needed where `needs_noise(state)`."""

    def needs_noise(self, state: State) -> bool:
        """Whether the next `tell` adds noise. False unless a stochastic method says otherwise."""
        return False

    def stirs(self, state: State) -> bool:
        """Whether `ask` noises the samples before the network is given them, as churn does."""
        return False

    def span(self, state: State) -> tuple[float, float]:
        """The times between which the noise of the next `tell` is an increment of a Brownian motion."""
        t, s = state.grid.times[state.i : state.i + 2]
        return float(t), float(s)

    @final
    def step(
        self,
        state: State,
        denoise: Callable[[Tensor, Tensor], Denoised],
        draw: Draw | None = None,
    ) -> tuple[State, Denoised]:
        """One step of the grid: ask, evaluate and tell until the step is finished.

        Args:
            state: a state that is not done.
            denoise: `denoise(x, t) -> Denoised`.
            draw: `draw(x, (t, s)) -> noise`, unit Gaussian noise like x for the way from t to s; needed by
                stochastic methods.

        Returns:
            The next state and the last thing the network said.
        """
        if state.done:
            raise ValueError(f"the grid of {state.grid.steps} steps is done; init starts another run.")
        i = state.i
        while state.i == i:
            noise = self._noise(state, draw)  # before the network is run for nothing
            query = self.ask(state, noise) if self.stirs(state) else self.ask(state)
            assert query is not None
            denoised = denoise(query.x, query.t)
            state = self.tell(state, denoised, noise)
        return state, denoised  # pyright: ignore[reportPossiblyUnboundVariable]

    @final
    def _noise(self, state: State, draw: Draw | None) -> Tensor | None:
        if not self.needs_noise(state):
            return None
        if draw is None:
            raise ValueError(f"{self!r} adds noise in every step: pass rng=Rng(seed) or a torch.Generator.")
        return draw(state.x, self.span(state))


def required(noise: Tensor | None, solver: Solver) -> Tensor:
    """The noise, or a ValueError that says who needs it."""
    if noise is None:
        raise ValueError(f"{solver!r} adds noise in this step, so tell needs unit Gaussian noise like x.")
    return noise


def moment_at(t: float) -> Float64[Tensor, ""]:
    """A time on the host, which no device has to wait for."""
    return torch.tensor(t, dtype=torch.float64)


def check_schedule(denoise: Denoise, grid: Grid) -> None:
    """Raise a ValueError unless the grid is on the schedule of the denoiser."""
    if grid.schedule != denoise.schedule:
        raise ValueError(
            f"the grid is on {grid.schedule!r} but the denoiser was made for {denoise.schedule!r}; make the "
            f"grid with schedule=denoise.schedule."
        )
