"""DPM-Solver and DPM-Solver++, multistep."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

from gendiff.sampling.exponential import (
    Integral,
    Predict,
    check_choice,
    check_order,
    lowered,
    multistep,
    rising,
)
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path
from gendiff.sampling.stage import Plan

SolverType: TypeAlias = Literal["midpoint", "heun"]
RULES: dict[str, Literal["exact", "midpoint"]] = {"midpoint": "midpoint", "heun": "exact"}


@dataclass(frozen=True)
class Multistep(LinearSolver):
    """What DPM-Solver and DPM-Solver++ share: the fields, which `DPMpp` describes, and the plan.

    They say what the polynomial in λ goes through, `predict`.
    """

    predict: ClassVar[Predict]
    order: int = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    solver: SolverType = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    sde: bool = False
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_order(self, self.order, 3)
        check_choice("solver", self.solver, SolverType)

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At most 2, since the first step is of order 1."""
        return min(self.order, 2)

    @final
    def plan(self, path: Path) -> Plan:
        orders = lowered(rising(path.steps, self.order), self.lower_order_final, self.euler_at_final)
        return multistep(path, Integral(self.predict, self.sde), orders, RULES[self.solver])


@final
@dataclass(frozen=True)
class DPMpp(Multistep):
    r"""DPM-Solver++ multistep: the data prediction is a polynomial in λ through the last answers.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s(1 - e^{-h})
                    \left[ x_0 + \frac{h}{2 h_1} (x_0 - x_0^{(1)}) \right]
              \qquad (\text{order 2, midpoint})

    With h and :math:`h_1` the steps in λ, this one and the one before. `heun` is the exact integral of the
    line through both; order 3 is the exact integral of the parabola through three, `Exponential(3)`. (What is
    published in code as order 3 gives half of its second difference, and converges with order 2.)

    With `sde` the reverse-time SDE is solved: `order` then is what the drift is approximated with, and
    `start_order` is that of the law.

    Args:
        order: 1 (DDIM), 2 or 3.
        solver: which integral order 2 takes, `midpoint` or `heun`.
        lower_order_final: whether the last steps are of order 2 and 1 where there are fewer than 15 in all.
        euler_at_final: whether the last step is of order 1, however many there are; the whole is then of
            order 2 at most.
        sde: whether to solve the reverse-time SDE in place of the probability-flow ODE.

    Raises:
        ValueError: if the order is not 1, 2 or 3, or `solver` is unknown.

    References:
        Lu et al. 2022b, *DPM-Solver++*, algorithm 2 (2M), eq. 18 (SDE).

    >>> DPMpp().order, DPMpp(3).start_order, DPMpp(sde=True).evaluations
    (2, 2, 1)
    """

    predict: ClassVar[Predict] = "x0"


@final
@dataclass(frozen=True)
class DPM(Multistep):
    r"""DPM-Solver multistep: the noise prediction is a polynomial in λ through the last answers.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t - \sigma_s(e^{h} - 1)
                    \left[ \epsilon + \frac{h}{2 h_1} (\epsilon - \epsilon^{(1)}) \right]
              \qquad (\text{order 2, midpoint})

    The twin of `DPMpp`, which has the same fields; guidance disturbs it more. A step to the data (sigma = 0)
    or from pure noise is DDIM's, with `sde` that of `DPMpp(sde=True)`.

    Raises:
        ValueError: if the order is not 1, 2 or 3, or `solver` is unknown.

    References:
        Lu et al. 2022a, *DPM-Solver*, eq. 3.6; Lu et al. 2022b, *DPM-Solver++*, eq. 17 (SDE).

    >>> DPM(3).order, DPM(order=4)
    Traceback (most recent call last):
    ValueError: the order of DPM is 1 to 3, got 4; Exponential has any order.
    """

    predict: ClassVar[Predict] = "eps"
