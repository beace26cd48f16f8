"""UniPC: a multistep predictor whose every step is corrected by the next answer, at no further evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

from gendiff.sampling.exponential import (
    Integral,
    Predict,
    Rule,
    added,
    check_choice,
    check_order,
    memory,
    rising,
)
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path
from gendiff.sampling.stage import Combination, Plan, Stage

Variant: TypeAlias = Literal["bh1", "bh2"]
RULES: dict[str, Rule] = {"bh1": "plain", "bh2": "midpoint"}


@final
@dataclass(frozen=True)
class UniPC(LinearSolver):
    r"""Unified predictor-corrector of Zhao et al. 2023.

    The predictor UniP-p is the exponential Adams method of order p. When the answer at its result is known,
    the corrector UniC-p repeats the step with a polynomial through that answer too, and the next step starts
    from the corrected sample:

    .. math:: x_s^c = \frac{\sigma_s}{\sigma_t} x_t^c + \sigma_s\int_{\lambda_t}^{\lambda_s} e^\lambda
              P(\lambda)\,d\lambda, \qquad P(\lambda_{t-j}) = x_0(x_{t-j}),\ P(\lambda_s) = x_0(x_s)

    Args:
        p: order of the predictor, 1 or more, p of UniPC-p; the corrector gains one.
        variant: which half weight stands where the polynomial is a line, in the predictor of order 2 and the
            corrector of order 1: `bh2`, of e^z - 1, or `bh1`, of z. All others are exact, so that the two
            variants are the same.
        predict: the answer that is a polynomial, `x0` or `eps`.
        corrector: whether to correct; without, this is a multistep method of order p.
        disable_corrector: numbers of steps, from 0, whose result is not corrected.
        lower_order_final: whether the last steps have order 2 and 1, as published; the whole is then of
            order 2 at most.

    Raises:
        ValueError: if p is below 1, a name is unknown or a number of a step is below 0.

    References:
        Zhao et al. 2023, *UniPC*, algorithms 1 and 2, eq. 3 and 5; theorem 3.1 for the order.

    >>> UniPC(2).order, UniPC(3, corrector=False).order
    (3, 3)
    """

    p: int = 2
    variant: Variant = "bh2"
    predict: Predict = "x0"
    corrector: bool = True
    disable_corrector: tuple[int, ...] = ()
    lower_order_final: bool = False
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_order(self, self.p)
        check_choice("variant", self.variant, Variant)
        check_choice("predict", self.predict, Predict)
        if any(step < 0 for step in self.disable_corrector):
            raise ValueError(
                f"disable_corrector lists numbers of steps, from 0 for the first, got "
                f"{self.disable_corrector}; corrector=False disables all."
            )

    @property
    def order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """p + 1 with the corrector, p without."""
        return self.p + self.corrector

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One more than the first step's, which is 1 and is corrected."""
        return min(self.order, 2 + self.corrector)

    def plan(self, path: Path) -> Plan:
        orders = rising(path.steps, self.p)
        if self.lower_order_final:
            orders = [min(order, path.steps - i) for i, order in enumerate(orders)]
        stages, wanted = list[tuple[Stage]](), 0
        for i in reversed(range(path.steps)):  # what a step keeps is what the later ones want
            stages.append((self._stage(path, orders, i, min(wanted, i + 1)),))
            wanted = max(wanted, orders[i - 1] if self._corrects(i) else orders[i] - 1)
        return tuple(reversed(stages))

    def _stage(self, path: Path, orders: Sequence[int], i: int, kept: int) -> Stage:
        """The correction of the last step, and this step's prediction from what it gives."""
        name, integral = self.predict, Integral(self.predict)
        t, s = path.points[i : i + 2]
        past = {f"{name}_{j}": path.points[i - j] for j in range(1, orders[i])}
        x = integral.move(t, s, past, RULES[self.variant])
        change = self._correction(path, orders, i)
        x = added(x, change, integral.carried(t, s)) if change else x
        return Stage(t, x, memory(name, kept))

    def _corrects(self, i: int) -> bool:
        """Whether the sample that the i-th step starts from is corrected."""
        return self.corrector and i > 0 and i - 1 not in self.disable_corrector

    def _correction(self, path: Path, orders: Sequence[int], i: int) -> Combination:
        """The corrected sample that the i-th step starts from less the predicted one.

        Both come from one sample by one constant answer, so that they differ by their polynomials alone, and
        the sample before need not be kept.
        """
        if not self._corrects(i):
            return {}
        name, integral, rule = self.predict, Integral(self.predict), RULES[self.variant]
        t, s = path.points[i - 1 : i + 1]
        known = {f"{name}_{j}": path.points[i - j] for j in range(1, orders[i - 1] + 1)}
        base, *_ = known
        del known[base]
        corrected = integral.higher(t, s, base, known | {name: s}, rule)
        return added(corrected, integral.higher(t, s, base, known, rule), -1.0)
