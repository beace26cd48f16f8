"""What set_timesteps works out: the moves of a run, and where each of its timesteps is among them."""

from typing import final

import torch

from gendiff.interop.diffusers.scheduler_methods import begun_later, with_eta
from gendiff.interop.diffusers.scheduler_moves import Move, moves_of
from gendiff.interop.diffusers.schedules import Settings, bound_in, prediction_in
from gendiff.interop.diffusers.table_runs import table_of
from gendiff.interop.diffusers.tables import Ask
from gendiff.math.bounds import Bound
from gendiff.math.numeric import Number
from gendiff.sampling import PNDM
from gendiff.sampling.fused import Fused
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path


@final
class Run:
    """A solver on the table of a run.

    Args:
        settings: the class that is replaced.
        ask: what the run is asked for.
        method: the solver.
    """

    def __init__(self, settings: Settings, ask: Ask, method: LinearSolver) -> None:
        table = table_of(settings, ask)
        self.levels, self.path, self.steps = table.levels, table.path, len(table.timesteps)
        # one step is one evaluation
        self.method = PNDM("euler") if method == PNDM() and self.steps == 1 else method
        self.prediction = prediction_in(settings)
        self.bound: Bound | None = bound_in(settings)
        self.learned_variance = settings["variance_type"] in ("learned", "learned_range")
        self._plans: dict[tuple[Number | None, int], tuple[Move, ...]] = {}
        self._fused: dict[tuple[Number | None, int], tuple[Fused, tuple[str, ...]]] = {}
        moves = self.moves()
        self.points = (*(move.at for move in moves), self.path.points[-1])
        stamps = [move.timestep for move in moves]
        whole = self.levels.row.integer and all(stamp.is_integer() for stamp in stamps)
        self.timesteps = torch.tensor(stamps, dtype=torch.int64 if whole else torch.float32)
        self.stamps: list[float] = self.timesteps.tolist()

    def moves(self, eta: Number | None = None, origin: int = 0) -> tuple[Move, ...]:
        """The moves; with a memory that begins at the evaluation `origin`."""
        if (eta, origin) not in self._plans:
            self._plans[eta, origin] = self._planned(eta, origin)
        return self._plans[eta, origin]

    def fused(self, eta: Number | None = None, origin: int = 0) -> tuple[Fused, tuple[str, ...]]:
        """All that an evaluation computes: the sample, the memory (its names) and the answer."""
        key = eta, origin
        if key not in self._fused:
            moves = self.moves(eta, origin)
            names = tuple(sorted({name for move in moves for name in move.keep}))
            rows = [[m.x, *(m.keep.get(name, {}) for name in names), m.x0] for m in moves]
            self._fused[key] = Fused(rows), names
        return self._fused[key]

    def index_of(self, timestep: float) -> int:
        """The first evaluation at a timestep that begins a step."""
        matches = [i for i, stamp in enumerate(self.stamps) if stamp == timestep]
        if not matches:
            raise ValueError(
                f"{timestep:g} is none of the {len(self.stamps)} timesteps of this run, which go from "
                f"{self.stamps[0]:g} to {self.stamps[-1]:g}; pass those of scheduler.timesteps."
            )
        return next((i for i in matches if self.moves()[i].first), matches[0])

    def begun_at(self, index: int) -> bool:
        """Whether a run can begin at an evaluation and moves nothing there, for it is the middle of a step.

        Raises:
            ValueError: where it cannot.
        """
        moves = self.moves()
        if not 0 <= index < len(moves):
            raise ValueError(
                f"this run has {len(moves)} evaluations, and number {index} is asked for; set_timesteps "
                f"begins another."
            )
        if moves[index].first:
            return False
        if index + 1 == len(moves) or moves[index + 1].at != moves[index].at:
            raise ValueError(
                f"evaluation {index} is the middle of a step of {self.method!r}, which needs its beginning; "
                f"begin at a multiple of scheduler.order = {self.method.evaluations}."
            )
        return True

    def _planned(self, eta: Number | None, origin: int) -> tuple[Move, ...]:
        solver, path = with_eta(self.method, eta), self.path
        if not origin:
            return moves_of(solver.plan(path), self.levels, self.prediction)
        whole = self.moves(eta)
        if not whole[origin].remembers:
            return whole
        end = len(whole)
        if getattr(solver, "blocks", False):  # what is left of a block is a shorter one
            forgets = (i for i in range(origin + 1, end) if not whole[i].remembers)
            end = next(forgets, end)
        points = path.points[sum(move.first for move in whole[:origin]) :]
        points = points[: 1 + sum(move.first for move in whole[origin:end])]
        rest = begun_later(solver, path.steps).plan(Path(points, path.between))
        moves = (*whole[:origin], *moves_of(rest, self.levels, self.prediction), *whole[end:])
        if len(moves) != len(whole):
            raise ValueError(
                f"{solver!r} has more evaluations in its first steps, and cannot begin within them: begin at "
                f"the first evaluation, or after these."
            )
        return moves
