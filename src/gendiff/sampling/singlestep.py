"""DPM-Solver and DPM-Solver++, singlestep: Runge-Kutta methods that forget everything after a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

from gendiff.sampling.dpm import RULES, SolverType
from gendiff.sampling.exponential import Integral, Predict, Rule, added, check_choice, check_order
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import Combination, Plan, Stage

BASE = "_base"  # registers of the answer that a block of evaluations starts from


@dataclass(frozen=True)
class Singlestep(LinearSolver):
    """What the singlestep methods share: the fields, which `SinglestepDPMpp` describes, and the plan.

    They say what the polynomial in λ goes through, `predict`.
    """

    predict: ClassVar[Predict]
    order: int = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    solver: SolverType = "midpoint"
    blocks: bool = False
    lower_order_final: bool = True
    sde: bool = False

    def __post_init__(self) -> None:
        check_order(self, self.order, 3)
        check_choice("solver", self.solver, SolverType)

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The order; 2 at most of the law, and where blocks end in a step of order 1."""
        return min(self.order, 2) if self.sde or (self.blocks and self.lower_order_final) else self.order

    @property
    def evaluations(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The order, or one where blocks are of steps of the grid."""
        return 1 if self.blocks else self.order

    @final
    def plan(self, path: Path) -> Plan:
        return _plan(path, Integral(self.predict, self.sde), self)


@final
@dataclass(frozen=True)
class SinglestepDPMpp(Singlestep):
    r"""DPM-Solver++ singlestep: `order` evaluations in every step, at equal distances in λ.

    .. math:: u = \frac{\sigma_m}{\sigma_t} x_t + \alpha_m(1 - e^{-h/2})\,x_0(x_t), \qquad
              x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s(1 - e^{-h})\,x_0(u) \qquad (\text{order 2})

    Order 3 has its second and third evaluation after h/3 and 2h/3. With `blocks` there is one evaluation in a
    step of the grid, and `order` steps make one of the above, wherever the points are; this is what the
    schedulers of diffusers do. A remainder makes a shorter block, and a block to the data (sigma = 0) ends
    with a step of order 1.

    With `sde` and order 2 it is DPM-Solver++(SDE), `dpmpp_sde` of k-diffusion and DPMSolverSDE of diffusers:
    two evaluations and two increments of one Brownian motion in a step, of order 2 in law.

    Args:
        order: 1 (DDIM), 2 or 3.
        solver: the last integral of order 2 and 3: `midpoint`, which has one inner answer, or `heun`, the
            exact one of the polynomial through all.
        blocks: whether the inner evaluations are at the next points of the grid.
        lower_order_final: of blocks, whether the grid ends in shorter ones, the last of order 1 or 2; the
            whole is then of order 2 at most.
        sde: whether to solve the reverse-time SDE in place of the probability-flow ODE.

    Raises:
        ValueError: if the order is not 1, 2 or 3, or `solver` is unknown.

    References:
        Lu et al. 2022b, *DPM-Solver++*, algorithm 1 (2S); Lu et al. 2022a, algorithms 1 and 2.

    >>> SinglestepDPMpp(3).evaluations, SinglestepDPMpp(3, blocks=True).evaluations
    (3, 1)
    """

    predict: ClassVar[Predict] = "x0"


@final
@dataclass(frozen=True)
class SinglestepDPM(Singlestep):
    r"""DPM-Solver singlestep, DPM-Solver-1, -2 and -3: `order` evaluations in every step.

    .. math:: u = \frac{\alpha_m}{\alpha_t} x_t - \sigma_m(e^{h/2} - 1)\,\epsilon(x_t), \qquad
              x_s = \frac{\alpha_s}{\alpha_t} x_t - \sigma_s(e^{h} - 1)\,\epsilon(u) \qquad (\text{order 2})

    The twin of `SinglestepDPMpp` in the noise prediction, with the same fields.

    Raises:
        ValueError: if the order is not 1, 2 or 3, or `solver` is unknown.

    References:
        Lu et al. 2022a, *DPM-Solver*, algorithms 1 and 2; appendix D.1 for `heun`.

    >>> SinglestepDPM(2).order, SinglestepDPM(2).evaluations
    (2, 2)
    """

    predict: ClassVar[Predict] = "eps"


def sizes(steps: int, order: int, lower_order_final: bool, to_data: bool) -> list[int]:
    """How many steps of the grid make a block: the order list of diffusers, cut where it starts anew.

    Args:
        steps: number of steps of the grid.
        order: of the method.
        lower_order_final: whether the last blocks are shorter.
        to_data: whether the grid ends at sigma = 0.

    >>> sizes(7, 3, True, to_data=False), sizes(6, 3, True, to_data=False), sizes(6, 3, False, to_data=True)
    ([3, 3, 1], [3, 2, 1], [3, 2, 1])
    """
    whole, rest = divmod(steps, order)
    result = [order] * whole + [rest] * (rest > 0)
    if lower_order_final and rest == 0 and order > 1:
        result[-1:] = [order - 1, 1]
    if to_data and result[-1] > 1:
        result[-1:] = [result[-1] - 1, 1]
    return result


def _plan(path: Path, integral: Integral, solver: Singlestep) -> Plan:
    rule = RULES[solver.solver]
    if not solver.blocks:
        steps = ((t, *_inner(path, t, s, solver.order), s) for t, s in pairwise(path.points))
        return tuple(_block(points, integral, rule, "exact") for points in steps)
    stages, at = tuple[Stage, ...](), 0
    for size in sizes(path.steps, solver.order, solver.lower_order_final, path.points[-1].sigma == 0):
        stages += _block(path.points[at : at + size + 1], integral, rule, rule)
        at += size
    return tuple((stage,) for stage in stages)


def _inner(path: Path, t: Point, s: Point, order: int) -> list[Point]:
    """The points that cut a step into `order` equal parts in λ; none in a step that is infinite or empty."""
    h = s.log_ratio - t.log_ratio
    if h == 0 or math.isinf(h):
        return []
    return [path.between(t.log_ratio + h * k / order) for k in range(1, order)]


def _block(points: Sequence[Point], integral: Integral, rule: Rule, inner: Rule) -> tuple[Stage, ...]:
    """Evaluations at all points but the last; each moves on from the first, by all that is known by then."""
    base, *later = points
    if math.isinf(base.log_ratio) and len(later) > 1:  # pure noise: no polynomial starts there
        return _block(points[:2], integral, rule, inner) + _block(later, integral, rule, inner)
    name = integral.predict
    first = integral.first(base, later[0])
    kept: dict[str, Combination] = {f"x0{BASE}": {"x0": 1.0}, f"eps{BASE}": {"eps": 1.0}}
    kept |= {"w": {"noise": 1.0}} if integral.sde else {}
    stages = [Stage(base, first, kept if later[1:] else {}, span=_span(integral, base, later[0]))]
    for i, (t, s) in enumerate(pairwise(later), 1):
        last = s is points[-1]
        answers, which = {name: t}, rule if last else inner
        if i == 2:
            answers, which = ({f"{name}_1": later[0], name: t} if rule == "exact" else answers), "exact"
        kept = {} if last else {f"{f}{BASE}": {f"{f}{BASE}": 1.0} for f in ("x0", "eps")}
        if not last and rule == "exact":
            kept[f"{name}_1"] = {name: 1.0}
        x = added(integral.first(base, s, BASE), integral.higher(base, s, f"{name}{BASE}", answers, which))
        if integral.sde:
            deviation, share = x.pop("noise"), integral.share(base, t, s)
            w = {"w": math.sqrt(share), "noise": math.sqrt(1 - share)}
            x = added(x, w, deviation)
            kept |= {} if last else {"w": w}
        stages.append(Stage(t, x, kept, span=_span(integral, t, s)))
    return tuple(stages)


def _span(integral: Integral, t: Point, s: Point) -> tuple[float, float] | None:
    """The times of the fresh noise, which are not those of the step."""
    return (t.t, s.t) if integral.sde else None
