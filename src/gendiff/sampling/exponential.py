r"""Exponential integrators: the linear part of the diffusion equation exactly, the network by a polynomial.

With :math:`\lambda = \log(\alpha/\sigma)` the probability-flow ODE from t to s has the two exact solutions
(Lu et al. 2022a, proposition 3.1; Lu et al. 2022b, proposition 4.1)

.. math::

    x_s = \frac{\sigma_s}{\sigma_t} x_t + \sigma_s \int_{\lambda_t}^{\lambda_s} e^{\lambda}\, x_0(\lambda)\,
          d\lambda
    \qquad
    x_s = \frac{\alpha_s}{\alpha_t} x_t - \alpha_s \int_{\lambda_t}^{\lambda_s} e^{-\lambda}\,
          \epsilon(\lambda)\, d\lambda

and the reverse-time SDE two more, which differ by a factor in the exponent or before the integral. All
methods of this family put a polynomial in :math:`\lambda` through known answers of the network in place of
:math:`x_0` or :math:`\epsilon`; they differ in where the answers come from. The integrals stand here, once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final, get_args

from gendiff._checks import unknown
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path, Point
from gendiff.sampling.stage import Combination, Plan, Stage

Predict: TypeAlias = Literal["x0", "eps"]
Rule: TypeAlias = Literal["exact", "midpoint", "plain"]


@final
@dataclass(frozen=True)
class Integral:
    r"""One step of the exact solution with a polynomial in :math:`\lambda` through answers of the network.

    With v = (λ - λ_t)/h, h = λ_s - λ_t, and basis polynomials :math:`\ell_j` of the nodes, a step is

    .. math:: x_s = \alpha_s x_0 + \sigma_s \epsilon
                    - c \sum_{j\ge1} (f_j - f_0) \int_0^1 z e^{z(1-v)}\, \ell_j(v)\, dv

    with f the predicted quantity, and (z, c) = (-h, α_s) for x0 and (h, σ_s) for eps. For the SDE h is
    doubled in the first and c in the second, and the first-order part has the fresh noise of `first`.

    A polynomial has no infinite interval to live on: a step from pure noise (alpha = 0) or to the data
    (sigma = 0) is of first order, and an answer at pure noise is left out of the later ones.

    Attributes:
        predict: the answer that is taken for a polynomial.
        sde: whether the reverse-time SDE is solved, in place of the probability-flow ODE.
    """

    predict: Predict
    sde: bool = False

    def first(self, t: Point, s: Point, suffix: str = "") -> dict[str, float]:
        r"""The step with a constant answer: DDIM for the ODE, for the SDE as below.

        .. math::
            x_s &= \alpha_s x_0 + \sigma_s e^{-h} \epsilon + \sigma_s \sqrt{1 - e^{-2h}}\, z
            \quad\text{(x0)} \\
            x_s &= \alpha_s x_0 + \sigma_s (2 - e^{h}) \epsilon + \sigma_s \sqrt{e^{2h} - 1}\, z
            \quad\text{(eps)}

        The second has no limit at either end; there the first is taken (Lu et al. 2022b, section 6).

        Args:
            t: where the answer is from.
            s: where the step goes.
            suffix: what is appended to `x0` and `eps` to make the names of the answer's registers.
        """
        x0, eps = f"x0{suffix}", f"eps{suffix}"
        if not self.sde:
            return {x0: s.alpha, eps: s.sigma}
        h = s.log_ratio - t.log_ratio
        if self.predict == "x0" or math.isinf(h):
            kept, variance = math.exp(-h), -math.expm1(-2 * h)
        else:
            kept, variance = 2 - math.exp(h), math.expm1(2 * h)
        return {x0: s.alpha, eps: s.sigma * kept, "noise": s.sigma * math.sqrt(variance)}

    def carried(self, t: Point, s: Point) -> float:
        """What the sample at t counts for, where the ODE's step is written with it in place of the pair."""
        return s.sigma / t.sigma if self.predict == "x0" else s.alpha / t.alpha

    def share(self, t: Point, m: Point, s: Point) -> float:
        """The share of the noise's variance from t to s that falls on the way to m, between them."""
        h, part = s.log_ratio - t.log_ratio, m.log_ratio - t.log_ratio
        share = math.expm1(-2 * part) / math.expm1(-2 * h)
        return share * math.exp(-2 * (h - part)) if self.predict == "x0" else share

    def higher(
        self, t: Point, s: Point, base: str, others: Mapping[str, Point], rule: Rule = "exact"
    ) -> dict[str, float]:
        """What a polynomial adds to the step with a constant answer.

        Args:
            t: where the step starts and the answer `base` is from.
            s: where it goes.
            base: register of the answer at t.
            others: registers of further answers, with where they are from. Those infinitely far away or at
                the place of one before are left out.
            rule: of two answers, the integral of v: `exact`; `midpoint`, half of that of 1 (Lu et al. 2022a,
                algorithm 1); `plain`, half of z (B(h) = h of Zhao et al. 2023). More are always exact.
        """
        h = s.log_ratio - t.log_ratio
        if h == 0 or math.isinf(h):
            return {}
        nodes: dict[str, float] = {}
        for name, point in others.items():
            v = (point.log_ratio - t.log_ratio) / h
            if math.isfinite(v) and v != 0 and v not in nodes.values():
                nodes[name] = v
        factor = 2 if self.sde else 1
        z, scale = (-factor * h, -s.alpha) if self.predict == "x0" else (h, -factor * s.sigma)
        integrals = moments(z, len(nodes) + 1)
        if len(nodes) == 1 and rule != "exact":
            integrals[1] = (integrals[0] if rule == "midpoint" else z) / 2
        terms = {
            name: scale * sum(c * integral for c, integral in zip(basis, integrals, strict=True))
            for name, basis in zip(nodes, _bases(list(nodes.values())), strict=True)
        }
        return {base: -sum(terms.values()), **terms} if terms else {}

    def move(
        self, t: Point, s: Point, past: Mapping[str, Point], rule: Rule = "exact", suffix: str = ""
    ) -> dict[str, float]:
        """The whole step: `first` and `higher`, from an answer whose registers end in `suffix`."""
        return added(self.first(t, s, suffix), self.higher(t, s, f"{self.predict}{suffix}", past, rule))


def moments(z: float, count: int) -> list[float]:
    r"""The integrals :math:`M_k = z\int_0^1 e^{z(1-v)} v^k\,dv = z\,k!\,\varphi_{k+1}(z)` for k < count.

    Integration by parts, :math:`M_0 = e^z - 1,\ M_k = k M_{k-1}/z - 1`, halves the error where
    :math:`|z| > 2k` and multiplies it where :math:`|z| < k`; there the series
    :math:`z\sum_m z^m k!/(m+k+1)!` is taken, whose terms fall.

    References:
        Hochbruck & Ostermann 2010, *Exponential integrators*, eq. 2.10, for the functions φ.

    >>> [round(m, 12) for m in moments(1.0, 2)]  # e - 1 and e - 2
    [1.718281828459, 0.718281828459]
    >>> moments(1e-9, 3)[2] * 3e9  # z/3 for small z
    1.00000000025
    """
    result: list[float] = []
    for k in range(count):
        if k and abs(z) >= k + 2:
            result.append(k * result[-1] / z - 1)
        else:
            result.append(_series(z, k) if k else math.expm1(z))
    return result


def _series(z: float, k: int) -> float:
    term, total, m = z / (k + 1), 0.0, 0
    while abs(term) > 1e-18 * abs(total):
        total += term
        m += 1
        term *= z / (m + k + 1)
    return total


def _bases(nodes: Sequence[float]) -> list[list[float]]:
    """Of every node, the polynomial that is 1 there and 0 at the others and at 0: ascending coefficients."""
    result: list[list[float]] = []
    for j, node in enumerate(nodes):
        basis = [0.0, 1 / node]
        for other in (*nodes[:j], *nodes[j + 1 :]):
            shifted, scaled = [0.0, *basis], [-other * c for c in basis] + [0.0]
            basis = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        result.append(basis)
    return result


def added(first: Combination, second: Combination, factor: float = 1.0) -> dict[str, float]:
    """The sum of two combinations, the second times a factor."""
    result = dict(first)
    for name, value in second.items():
        result[name] = result.get(name, 0.0) + factor * value
    return result


def rising(steps: int, order: int) -> list[int]:
    """The orders that a cold start allows: 1, 2, … and then `order`."""
    return [min(order, i + 1) for i in range(steps)]


def lowered(orders: Sequence[int], lower_order_final: bool, euler_at_final: bool) -> list[int]:
    """Orders that fall to 2 and 1 at the end of fewer than 15 steps, or to 1 in the last alone."""
    left = range(len(orders), 0, -1)
    if lower_order_final and len(orders) < 15:
        return [min(pair) for pair in zip(orders, left, strict=True)]
    return [*orders[:-1], 1] if euler_at_final else list(orders)


def multistep(path: Path, integral: Integral, orders: Sequence[int], rule: Rule = "exact") -> Plan:
    """The plan of steps through past answers, as many as the order of a step says."""
    name, steps = integral.predict, list[tuple[Stage]]()
    for i, order in enumerate(orders):
        t, s = path.points[i : i + 2]
        past = {f"{name}_{j}": path.points[i - j] for j in range(1, order)}
        wanted = max(orders[i + 1 :], default=1) - 1
        kept = memory(name, min(wanted, i + 1))
        steps.append((Stage(t, integral.move(t, s, past, rule), kept),))
    return tuple(steps)


def memory(name: str, count: int) -> dict[str, Combination]:
    """The last answers, as many as `count`, the one just given the first."""
    return {f"{name}_{j}": {f"{name}_{j - 1}" if j > 1 else name: 1.0} for j in range(1, count + 1)}


def check_order(solver: object, order: int, highest: int | None = None) -> None:
    """Raise a ValueError unless a method is there for this order."""
    if order < 1 or (highest is not None and order > highest):
        accepted = "1 or more" if highest is None else f"1 to {highest}"
        hint = "" if highest is None else "; Exponential has any order"
        raise ValueError(f"the order of {type(solver).__name__} is {accepted}, got {order}{hint}.")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise a ValueError unless the value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(unknown(name, value, get_args(choices)))


@final
@dataclass(frozen=True)
class Exponential(LinearSolver):
    r"""Exponential Adams multistep: the polynomial through the last answers, of any order.

    .. math:: x_s = \alpha_s x_0 + \sigma_s\epsilon + \text{integral of } \sum_j (f_j - f_0)\,\ell_j(\lambda)

    Order 1 is DDIM; order 2 with `x0` is DPM-Solver++(2M) of type `heun`; with `eps` it is DEIS. It starts
    with order 1 and rises, so that a run from a cold start is of order 2.

    On a path from pure noise, where alpha = 0, the first steps are long in λ however fine the grid, so that
    no polynomial in λ is better there than order 2 (`x0`) or 1 (`eps`); the orders hold from alpha > 0.

    Args:
        order: number of answers the polynomial goes through, 1 or more.
        predict: the answer that is a polynomial: `x0`, which guidance disturbs less, or `eps`.

    Raises:
        ValueError: if the order is below 1, or `predict` is neither.

    References:
        Zhang & Chen 2023, *Fast sampling of diffusion models with exponential integrator*, eq. 15;
        Hochbruck & Ostermann 2010, *Exponential integrators*, eq. 2.57.

    >>> Exponential(4).order, Exponential(4).start_order, Exponential(4).evaluations
    (4, 2, 1)
    """

    order: int = 3  # pyright: ignore[reportIncompatibleVariableOverride]
    predict: Predict = "x0"
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_order(self, self.order)
        check_choice("predict", self.predict, Predict)

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At most 2, since the first step is of order 1."""
        return min(self.order, 2)

    def plan(self, path: Path) -> Plan:
        return multistep(path, Integral(self.predict), rising(path.steps, self.order))
