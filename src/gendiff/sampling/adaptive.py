"""Embedded Runge-Kutta pairs whose steps are as long as a tolerance allows."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff.denoiser import Denoised
from gendiff.math.grids import Grid
from gendiff.math.numeric import Number
from gendiff.sampling.path import Path, Point
from gendiff.sampling.solver import Query, Solver, State, moment_at

Pair: TypeAlias = Literal[2, 3, 5]


class Tableau(NamedTuple):
    """A Butcher tableau with two rows of weights: of the order that is kept, and of one less."""

    nodes: tuple[float, ...]
    inner: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    lower: tuple[float, ...]


PAIRS: dict[int, Tableau] = {
    2: Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2), (1.0, 0.0)),
    3: Tableau(
        (0.0, 1 / 2, 3 / 4, 1.0),
        ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (7 / 24, 1 / 4, 1 / 3, 1 / 8),
    ),
    5: Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    ),
}


@final
@dataclass(frozen=True)
class PID:
    r"""Step size control by the last three errors (Söderlind 2003, eq. 30).

    .. math:: \frac{h'}h = \text{limit}\bigl(\text{safety}\; e_n^{-\beta_1} e_{n-1}^{-\beta_2}
              e_{n-2}^{-\beta_3}\bigr),\qquad
              k\beta = (k_P + k_I + k_D,\ -k_P - 2k_D,\ k_D),\qquad \text{limit}(f) = 1 + \arctan(f-1)

    with k the order of the pair and e errors relative to the tolerance.

    Args:
        p, i, d: the coefficients, i > 0; (0, 1, 0) is the elementary controller.
        safety: factor on every step, in (0, 1].
    """

    p: Number = 0.0
    i: Number = 1.0
    d: Number = 0.0
    safety: Number = 0.9

    def __post_init__(self) -> None:
        if not (self.i > 0 and 0 < self.safety <= 1):
            raise ValueError(
                f"a PID controller has i > 0 (1 alone is the elementary one) and a safety factor in (0, 1], "
                f"got i={self.i} and safety={self.safety}."
            )

    def factor(self, errors: tuple[float, ...], order: int) -> float:
        """The next step over the present one, from up to three errors, newest first."""
        exponents = (self.p + self.i + self.d, -self.p - 2 * self.d, self.d)
        errors += errors[-1:] * (3 - len(errors))
        logs = (power * math.log(max(error, 1e-10)) for power, error in zip(exponents, errors, strict=True))
        return 1 + math.atan(self.safety * math.exp(min(-sum(logs) / order, 50.0)) - 1)


@final
@dataclass(frozen=True, eq=False)
class Progress:
    """Where an adaptive run stands.

    Attributes:
        angle: atan2(sigma, alpha) of the samples.
        step: length of the next attempt, an angle, > 0.
        slopes: of the present attempt, as far as they are known.
        errors: relative to the tolerance, of the last accepted steps, newest first.
        accepted: number of accepted steps.
        rejected: number of attempts whose error was too large.
    """

    angle: float
    step: float
    slopes: tuple[Tensor, ...] = ()
    errors: tuple[float, ...] = ()
    accepted: int = 0
    rejected: int = 0


@final
@dataclass(frozen=True)
class Adaptive(Solver):
    r"""An embedded Runge-Kutta pair that chooses its steps by a tolerance.

    Scaled to :math:`\alpha^2+\sigma^2 = 1` every schedule has one probability-flow ODE in the angle
    :math:`\varphi = \operatorname{atan2}(\sigma, \alpha)`, whose slope is the velocity and which is singular
    at neither end:

    .. math:: \frac{d\tilde x}{d\varphi} = \cos\varphi\;\hat\epsilon - \sin\varphi\;\hat x_0,\qquad
              \tilde x = \frac{x}{\sqrt{\alpha^2+\sigma^2}}

    An attempt is accepted where the difference of both orders, e = RMS((x - x') / (atol + rtol·max|x|)), is
    at most 1 for every sample of the batch; a batch therefore shares its steps. The times of the grid are
    landed on, and steps are free between them: `Grid(schedule, [1.0, schedule.t_min, 0.0])` leaves all to the
    method. The step to the data, where no network is evaluated, is one of Euler's; a grid of the two ends
    alone is refused, since it says not where that begins.

    The host reads one number an attempt, for which it waits: this is the only solver that synchronises, and
    it cannot be captured in a graph.

    Args:
        rtol: relative tolerance of a step, >= 0.
        atol: absolute one, in units of x/sqrt(alpha² + sigma²), >= 0; not both 0.
        order: of the solution that is kept: 2 (Euler and Heun, 2 evaluations an attempt), 3 (Bogacki &
            Shampine 1989, 4) or 5 (Dormand & Prince 1980, 7).
        first: first step that is tried, an angle, in (0, inf).
        control: how steps follow from errors.
        budget: attempts after which a run is given up.

    Raises:
        ValueError: for numbers out of these ranges; while it runs, for errors that are not finite, and when
            the budget is spent.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, LinearBeta
    >>> from gendiff.sampling import iterate
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.ones(1), 0.5), LinearBeta())
    >>> grid = Grid(LinearBeta(), [1.0, 0.001, 0.0])
    >>> first, last = iterate(exact, torch.zeros(1, 1, dtype=torch.float64), grid, Adaptive(rtol=1e-3))
    >>> first.state.memory.accepted, first.state.memory.rejected
    (6, 0)
    """

    rtol: Number = 1e-2
    atol: Number = 1e-3
    order: Pair = 3  # pyright: ignore[reportIncompatibleVariableOverride]  (a choice here)
    first: Number = 0.05
    control: PID = field(default_factory=PID)
    budget: int = 1000

    def __post_init__(self) -> None:
        if self.order not in PAIRS:
            raise ValueError(f"there are pairs of order {', '.join(map(str, PAIRS))}, got {self.order}.")
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(
                f"tolerances are at least 0 and not both 0, got rtol={self.rtol} and atol={self.atol}."
            )
        if not (0 < self.first < math.inf and self.budget >= 1):
            raise ValueError(
                f"the first step is a positive angle and the budget at least one attempt, got "
                f"first={self.first} and budget={self.budget}."
            )

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """It remembers no answers."""
        return self.order

    @property
    def evaluations(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of an attempt."""
        return len(self.tableau.nodes)

    @property
    def tableau(self) -> Tableau:
        """The pair."""
        return PAIRS[self.order]

    def prepare(self, grid: Grid) -> Path:
        path = Path.of(grid)
        if path.points[-1].sigma == 0 and path.steps == 1:
            raise ValueError(
                f"an adaptive method ends with a step to the data, and a grid of two times does not say from "
                f"where: give Grid(schedule, [{grid.times[0]}, schedule.t_min, 0.0]) or another last time "
                f"before 0."
            )
        return path

    def ask(self, state: State, noise: Float[Tensor, "B *dims"] | None = None) -> Query | None:
        if state.done:
            return None
        t, s = self._ends(state)
        if s.sigma == 0:
            return Query(state.x, moment_at(t.t))
        memory = self._memory(state, t)
        point = self._point(state, memory)
        inner = self.tableau.inner[len(memory.slopes)]
        x = state.x / self._radius(state, memory)
        return Query(
            _moved(x, -self._length(memory, s), inner, memory.slopes) * _norm(point), moment_at(point.t)
        )

    def tell(self, state: State, denoised: Denoised, noise: Float[Tensor, "B *dims"] | None = None) -> State:
        t, s = self._ends(state)
        memory = self._memory(state, t)
        if s.sigma == 0:
            return state.advance(s.alpha * denoised.x0, replace(memory, slopes=()))
        angle = _angle(self._point(state, memory))
        slope = math.cos(angle) * denoised.eps - math.sin(angle) * denoised.x0
        memory = replace(memory, slopes=(*memory.slopes, slope))
        if len(memory.slopes) < len(self.tableau.nodes):
            return replace(state, memory=memory)
        return self._judged(state, memory, s)

    def _judged(self, state: State, memory: Progress, s: Point) -> State:
        """The state after an attempt: moved on, or where it was with a shorter step."""
        length, radius = self._length(memory, s), self._radius(state, memory)
        x = state.x / radius
        moved = _moved(x, -length, self.tableau.weights, memory.slopes)
        other = _moved(x, -length, self.tableau.lower, memory.slopes)
        error = self._error(x, moved, other, state)
        attempts = memory.accepted + memory.rejected + 1
        if error > 1:
            if attempts >= self.budget:
                raise ValueError(self._spent(state, memory))
            shorter = length * PID(safety=self.control.safety).factor((error,), self.order)
            return replace(
                state, memory=replace(memory, step=shorter, slopes=(), rejected=memory.rejected + 1)
            )
        errors = (error, *memory.errors)[:3]
        step = length * self.control.factor(errors, self.order)
        landed = length >= memory.angle - _angle(s)
        if landed:  # a step that was cut short to land says little of the next
            step = max(step, memory.step)
        angle = _angle(s) if landed else memory.angle - length
        after = Progress(angle, step, (), errors, memory.accepted + 1, memory.rejected)
        if landed:
            return state.advance(moved * _norm(s), after)
        if attempts >= self.budget:
            raise ValueError(self._spent(state, memory))
        return replace(state, x=moved * self._radius(state, after), memory=after)

    def _error(self, x: Tensor, moved: Tensor, other: Tensor, state: State) -> float:
        """The error of the worst sample over the tolerance; the one thing that the host reads."""
        scale = self.atol + self.rtol * torch.maximum(x.abs(), moved.abs())
        ratio = ((moved - other) / scale).nan_to_num(nan=math.inf, posinf=math.inf)
        error = float(ratio.flatten(1).square().mean(1).sqrt().max())
        if not math.isfinite(error):
            raise ValueError(
                f"the error of a step between t = {float(state.t[state.i]):g} and "
                f"{float(state.t[state.i + 1]):g} is not finite: the network returned NaN or infinity, or a "
                f"tolerance is 0 where the samples are."
            )
        return error

    def _spent(self, state: State, memory: Progress) -> str:
        done, missed = memory.accepted, memory.rejected
        return (
            f"{self.budget} attempts did not reach t = {float(state.t[state.i + 1]):g} ({done} accepted, "
            f"{missed} rejected before the last); give a larger rtol or atol, a higher order, or a larger "
            f"budget."
        )

    def _ends(self, state: State) -> tuple[Point, Point]:
        first = len(state.grid.before) + state.i
        t, s = self._path(state).points[first : first + 2]
        return t, s

    def _path(self, state: State) -> Path:
        return state.plan if isinstance(state.plan, Path) else self.prepare(state.grid)

    def _memory(self, state: State, t: Point) -> Progress:
        if isinstance(state.memory, Progress):
            return state.memory
        return Progress(_angle(t), float(self.first))

    def _length(self, memory: Progress, s: Point) -> float:
        """The length of the attempt, which ends at s at the latest, and not in a sliver before it."""
        left = memory.angle - _angle(s)
        return left if memory.step >= left * (1 - 1e-9) else memory.step

    def _point(self, state: State, memory: Progress) -> Point:
        """Where the due evaluation is."""
        _, s = self._ends(state)
        length = self._length(memory, s)
        return self._at(state, memory.angle - self.tableau.nodes[len(memory.slopes)] * length)

    def _at(self, state: State, angle: float) -> Point:
        """The point of an angle; an end of the grid's step where it is one, exactly."""
        ends = self._ends(state)
        for end in ends:
            if abs(angle - _angle(end)) <= 1e-12:
                return end
        return self._path(state).between(math.log(math.cos(angle)) - math.log(math.sin(angle)))

    def _radius(self, state: State, memory: Progress) -> float:
        return _norm(self._at(state, memory.angle))


def _angle(point: Point) -> float:
    return math.atan2(point.sigma, point.alpha)


def _norm(point: Point) -> float:
    return math.hypot(point.sigma, point.alpha)


def _moved(x: Tensor, length: float, weights: tuple[float, ...], slopes: tuple[Tensor, ...]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=length * weight)
    return x
