"""Linear multistep methods on the noise: LMS in the ratio sigma/alpha, and PNDM in steps of equal length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final, get_args

from gendiff._checks import unknown
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.lookup import point_at
from gendiff.sampling.onestep import along, to
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import SAMPLE, Combination, Plan, Stage

Warmup: TypeAlias = Literal["euler", "improved_euler", "runge_kutta"]
ADAMS_BASHFORTH = (  # of equal steps, newest first (Hairer, Nørsett & Wanner 1993, table III.1.1)
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
LARGEST_ORDER = 6  # the weights of more grow past use


@final
@dataclass(frozen=True)
class LMS(LinearSolver):
    r"""Linear multistep: Adams-Bashforth in the ratio, for :math:`d(x/\alpha) = \epsilon\,d\rho`.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_j \hat\epsilon_j \int_{\rho_t}^{\rho_s}
              \prod_{k \ne j} \frac{\rho-\rho_k}{\rho_j-\rho_k}\,d\rho, \qquad \rho = \sigma/\alpha

    over the last `order` answers, fewer in the first steps. The polynomials are integrated exactly, where
    k-diffusion and diffusers use quadrature. Answers at alpha = 0, where the ratio is infinite, get no
    weight, and a step from there is Euler's; the order is that of a path that begins below.

    Args:
        order: number of answers that a step uses, 1 (Euler) to 6.

    Raises:
        ValueError: for another order.

    References:
        Hairer, Nørsett & Wanner 1993, *Solving ordinary differential equations I*, eq. III.5.4 (Adams methods
        of variable steps).

    >>> LMS().order, LMS().start_order
    (4, 2)
    """

    order: int = 4  # pyright: ignore[reportIncompatibleVariableOverride]  (a choice here)
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.order <= LARGEST_ORDER:
            raise ValueError(
                f"LMS has an order from 1 (Euler) to {LARGEST_ORDER}, got {self.order}; 4 is the usual one."
            )

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its first step is Euler's, which alone costs the second power of a step."""
        return min(self.order, 2)

    def plan(self, path: Path) -> Plan:
        return tuple((self._stage(path.points, i),) for i in range(path.steps))

    def _stage(self, points: Sequence[Point], i: int) -> Stage:
        t, s = points[i : i + 2]
        keep = kept(min(i + 1, self.order - 1))
        if not (t.alpha and s.alpha):
            return Stage(t, to(s), keep)
        past = [points[i - j] for j in range(min(i + 1, self.order)) if points[i - j].alpha]
        weights = adams([(point.ratio - t.ratio) / (s.ratio - t.ratio) for point in past])
        return Stage(t, along(t, s, dict(zip(NAMES, weights, strict=False))), keep)


@final
@dataclass(frozen=True)
class PNDM(LinearSolver):
    r"""Pseudo numerical methods for diffusion models (Liu et al. 2022): PLMS and F-PNDM.

    Fourth-order Adams-Bashforth weights of equal steps make one noise of the last four, and DDIM's step
    transfers the sample with it (eq. 11 and 12):

    .. math:: \bar\epsilon = \tfrac1{24}(55\hat\epsilon_t - 59\hat\epsilon_{1} + 37\hat\epsilon_{2}
              - 9\hat\epsilon_{3}), \qquad
              x_s = \frac{\alpha_s}{\alpha_t}x_t + \Bigl(\sigma_s - \frac{\alpha_s}{\alpha_t}\sigma_t\Bigr)
              \bar\epsilon

    The weights average over time and the transfer over sigma/alpha, so that the order is 2 (theorem 3.1), of
    grids whose times are at equal distances.

    Args:
        warmup: how it begins. "improved_euler": the first step evaluates twice, then two and three answers
            are used (PLMS; Stable Diffusion's `skip_prk_steps`: the second timestep is visited twice).
            "runge_kutta": the first three steps are pseudo Runge-Kutta of four evaluations, at the middle of
            their times (eq. 13; F-PNDM). "euler": one answer, then two and three.

    Raises:
        ValueError: for another name.

    >>> PNDM().order, PNDM().evaluations, PNDM("runge_kutta")
    (2, 1, PNDM(warmup='runge_kutta'))
    """

    warmup: Warmup = "improved_euler"
    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1  # more while it begins

    def __post_init__(self) -> None:
        if self.warmup not in get_args(Warmup):
            raise ValueError(unknown("warmup", self.warmup, get_args(Warmup)))

    def plan(self, path: Path) -> Plan:
        return tuple(self._stages(path, i) for i in range(path.steps))

    def _stages(self, path: Path, i: int) -> tuple[Stage, ...]:
        t, s = path.points[i : i + 2]
        keep = kept(min(i + 1, 3))
        if not t.alpha:
            return (Stage(t, to(s), keep),)
        if self.warmup == "improved_euler" and i == 0 and path.steps > 1:  # the second time is visited
            return _improved_euler(t, s)
        if self.warmup == "runge_kutta" and i < 3 and s.sigma:
            return _runge_kutta(path, t, s, keep)
        weights = ADAMS_BASHFORTH[min(i, 3)]
        return (Stage(t, along(t, s, dict(zip(NAMES, weights, strict=False))), keep),)


NAMES = ("eps", *(f"eps_{j}" for j in range(1, LARGEST_ORDER)))  # of the answers, newest first


def kept(count: int) -> dict[str, Combination]:
    """The memory that holds the last answers: the present one becomes `eps_1`, that one `eps_2`.

    >>> kept(2)
    {'eps_1': {'eps': 1.0}, 'eps_2': {'eps_1': 1.0}}
    """
    return {NAMES[j + 1]: {NAMES[j]: 1.0} for j in range(count)}


def adams(nodes: Sequence[float]) -> list[float]:
    r"""The integrals over [0, 1] of the Lagrange polynomials of some nodes: exact weights of an Adams method.

    >>> adams([0.0, -1.0])  # Adams-Bashforth of equal steps
    [1.5, -0.5]
    """
    weights: list[float] = []
    for j, node in enumerate(nodes):
        coefficients = [1.0]  # of rising powers
        for k, other in enumerate(nodes):
            if k != j:
                lower, higher = [-other * c for c in coefficients] + [0.0], [0.0, *coefficients]
                coefficients = [(a + b) / (node - other) for a, b in zip(lower, higher, strict=True)]
        weights.append(math.fsum(c / (power + 1) for power, c in enumerate(coefficients)))
    return weights


def _improved_euler(t: Point, s: Point) -> tuple[Stage, ...]:
    """The noise at t and at DDIM's guess for s count half (eq. 22); the second is not remembered."""
    guess = Stage(t, to(s), keep={"x_t": SAMPLE, "eps_1": {"eps": 1.0}})
    moved = along(t, s, {"eps_1": 0.5, "eps": 0.5})
    return guess, Stage(s, _from("x_t", moved), keep={"eps_1": {"eps_1": 1.0}})


def _runge_kutta(path: Path, t: Point, s: Point, keep: dict[str, Combination]) -> tuple[Stage, ...]:
    """Four evaluations, the inner two half-way in time; the first is remembered (eq. 13)."""
    middle = point_at(path, (t.t + s.t) / 2, t)
    memory: dict[str, Combination] = {name: {name: 1.0} for name in (*keep, "x_t")}

    def summed(weight: float) -> dict[str, Combination]:
        return memory | {"eps_sum": {"eps_sum": 1.0, "eps": weight}}

    first = Stage(t, to(middle), keep=keep | {"x_t": SAMPLE, "eps_sum": {"eps": 1 / 6}})
    second = Stage(middle, _from("x_t", along(t, middle, {"eps": 1.0})), keep=summed(1 / 3))
    third = Stage(middle, _from("x_t", along(t, s, {"eps": 1.0})), keep=summed(1 / 3))
    last = along(t, s, {"eps_sum": 1.0, "eps": 1 / 6})
    return first, second, third, Stage(s, _from("x_t", last), keep={name: {name: 1.0} for name in keep})


def _from(register: str, moved: Combination) -> Combination:
    """A move of the sample in another register."""
    return {register if name == "x" else name: factor for name, factor in moved.items()}
