"""What the order tests of the families share: which cases fall short, and solvers made wrong."""

from dataclasses import dataclass, replace
from typing import Any

from gendiff.math import GaussianOracle
from gendiff.sampling import LinearSolver, Path
from gendiff.testing.solvers import LAWS, SCHEDULES, measure_order

LINE, PLANE, MIXTURE = LAWS
BETAS, STRAIGHT, EXPLODING = SCHEDULES
ALLOWED = 0.15
BELOW = 0.9
FEW = ((LINE, BETAS), (PLANE, STRAIGHT), (MIXTURE, EXPLODING))
ALL = tuple((law, schedule) for law in LAWS for schedule in SCHEDULES)
FEW_GAUSSIAN = ((LINE, STRAIGHT), (PLANE, EXPLODING))
ALL_GAUSSIAN = tuple(case for case in ALL if isinstance(case[0], GaussianOracle))


def short(solver, cases, steps=(64, 128), start=BELOW, kinds=("cold",)):
    """The cases (law, schedule) whose finest slope is below the declared order less 0.15.

    They are measured from a `start` below t = 1, for methods in the ratio sigma/alpha, which need alpha > 0,
    for churn and for an exact past, which need room.
    """
    result = []
    for law, schedule in cases:
        for kind in kinds:
            declared = solver.order if kind == "warm" else solver.start_order
            measured = measure_order(
                solver, law, schedule, steps=steps, start=start, exact_history=kind == "warm"
            )
            if not measured.slopes[-1] >= declared - ALLOWED:
                case = f"{type(law).__name__}({law.size}) {type(schedule).__name__} {kind}"
                result.append(f"{case}: declared {declared}, measured {measured}")
    return result


@dataclass(frozen=True)
class Bent(LinearSolver):
    """A solver some of whose weights are moved from one register to another, their sum kept."""

    solver: Any
    source: str
    target: str
    share: float = 0.1

    @property
    def order(self):
        return self.solver.order

    @property
    def start_order(self):
        return self.solver.start_order

    @property
    def evaluations(self):
        return self.solver.evaluations

    def plan(self, path: Path):
        def bent(stage):
            if not {self.source, self.target} <= stage.x.keys():
                return stage
            moved = self.share * stage.x[self.source]
            x = {
                **stage.x,
                self.source: stage.x[self.source] - moved,
                self.target: stage.x[self.target] + moved,
            }
            return replace(stage, x=x)

        return tuple(tuple(map(bent, stages)) for stages in self.solver.plan(path))


@dataclass(frozen=True)
class Skewed(Bent):
    """A solver that is given points between in the wrong place."""

    source: str = ""
    target: str = ""

    def plan(self, path: Path):
        return self.solver.plan(Path(path.points, lambda log_ratio: path.between(log_ratio + self.share)))
