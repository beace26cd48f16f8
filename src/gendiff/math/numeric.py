"""Elementary functions that keep their relative precision where the textbook form loses it."""

import math
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Number: TypeAlias = float | int  # beartype reads float literally


def log1mexp(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 - exp(x)) for x <= 0, within a few ulp everywhere (Mächler 2012, eq. 7).

    >>> log1mexp(torch.tensor([-1e-20, -1.0, -50.0], dtype=torch.float64))
    tensor([-4.6052e+01, -4.5868e-01, -1.9287e-22], dtype=torch.float64)
    """
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def log_ndtr(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Log of the normal distribution function, with its relative precision in both tails.

    >>> log_ndtr(torch.tensor([-40.0, 0.0]))
    tensor([-8.0461e+02, -6.9315e-01])
    """
    return torch.special.log_ndtr(x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def numbers(x: Float[Tensor, "..."]) -> list[float]:
    """The values of a tensor of any shape, as Python's numbers.

    >>> numbers(torch.tensor([0.5, 1.0]))
    [0.5, 1.0]
    """
    return x.flatten().tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def beta_quantile(p: Number, a: Number, b: Number) -> float:
    """The p-quantile of the beta law: x with I_x(a, b) = p, by bisection to the last digit.

    Args:
        p: probability, in [0, 1].
        a: first parameter, > 0.
        b: second parameter, > 0.

    >>> round(beta_quantile(0.5, 2.0, 2.0), 12)
    0.5
    """
    if not (0 <= p <= 1 and a > 0 and b > 0):
        raise ValueError(f"a beta quantile needs p in [0, 1] and positive a and b, got p={p}, a={a}, b={b}.")
    if p in (0.0, 1.0):
        return float(p)
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _beta_cdf(middle, a, b) < p else (low, middle)
        if high - low < 1e-16 * high:
            break
    return (low + high) / 2


def _beta_cdf(x: float, a: Number, b: Number) -> float:
    """I_x(a, b), by the continued fraction on the side where it converges fast (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    value = 0.0
    for m in range(120, 0, -1):  # from the tail inwards
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = even / (1 + odd / (1 + value))
    first = -(a + b) * x / (a + 1)
    return math.exp(log_front) / (a * (1 + first / (1 + value)))
