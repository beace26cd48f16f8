"""What the order tests of the families share: which cases fall short, and solvers made wrong."""

from dataclasses import dataclass, replace
from typing import Any

from gendiff.math import GaussianOracle
from gendiff.sampling import LinearSolver, Path
from gendiff.testing.solvers import LAWS, SCHEDULES, measure_order

LINE, PLANE, MIXTURE = LAWS
BETAS, STRAIGHT, EXPLODING = SCHEDULES
ALLOWED = 0.15


BELOW = {BETAS: 1.0, STRAIGHT: 0.9, EXPLODING: 1.0}
FEW = ((LINE, BETAS), (PLANE, STRAIGHT), (MIXTURE, EXPLODING))
ALL = tuple((law, schedule) for law in LAWS for schedule in SCHEDULES)
FEW_GAUSSIAN = ((LINE, STRAIGHT), (PLANE, EXPLODING))
ALL_GAUSSIAN = tuple(case for case in ALL if isinstance(case[0], GaussianOracle))


def short(solver, cases, steps=(64, 128), start=None, kinds=("cold",)):
    """The cases (law, schedule) whose finest slope is below the declared order less 0.15.

    Methods in the ratio sigma/alpha are measured from below alpha = 0, and churn from below t = 1: `start`
    says where, or `BELOW` on each schedule.
    """
    result = []
    for law, schedule in cases:
        for kind in kinds:
            declared = solver.order if kind == "warm" else solver.start_order
            first = BELOW[schedule] if start is None else start
            measured = measure_order(
                solver, law, schedule, steps=steps, start=first, exact_history=kind == "warm"
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
