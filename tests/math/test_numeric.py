"""Elementary functions against mpmath with 50 digits, scipy and closed forms."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gendiff.math.numeric import beta_quantile, log1mexp, log_ndtr, numbers

mp = mpmath.mp.clone()  # a context of our own: the precision of mpmath's is global
mp.dps = 50
ULP = torch.finfo(torch.float64).eps


def value(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@given(st.floats(-300, 2.8).map(lambda power: -(10**power)))
def test_log1mexp_is_right_to_a_few_ulp(x: float) -> None:
    exact = mp.log(-mp.expm1(mp.mpf(x))) if x > -1 else mp.log1p(-mp.exp(mp.mpf(x)))
    assert abs(log1mexp(value(x)).item() / exact - 1) < 8 * ULP


@pytest.mark.parametrize("x", [-math.log(2), -0.6931, -0.6932, -0.5, -1.0, -36.0, -37.0, -700.0])
def test_log1mexp_where_its_forms_meet(x: float) -> None:
    exact = mp.log1p(-mp.exp(mp.mpf(x)))
    assert abs(log1mexp(value(x)).item() / exact - 1) < 8 * ULP


def test_log1mexp_at_its_ends() -> None:
    assert log1mexp(torch.tensor([0.0, -math.inf])).tolist() == [-math.inf, 0.0]


@given(st.floats(-1e4, 8))
def test_log_ndtr_in_both_tails(x: float) -> None:
    upper = mp.erfc(mp.mpf(x) / mp.sqrt(2)) / 2
    exact = mp.log1p(-upper) if x > 0 else mp.log(mp.erfc(-mp.mpf(x) / mp.sqrt(2)) / 2)
    assert abs(log_ndtr(value(x)).item() / exact - 1) < 1e-13


def test_numbers_are_pythons_in_reading_order() -> None:
    assert numbers(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == [1.0, 2.0, 3.0, 4.0]
    assert numbers(torch.tensor(0.5)) == [0.5]


PARAMETER = st.floats(0.2, 30)


@settings(max_examples=30)  # a quantile is a bisection in Python
@given(st.floats(1e-6, 1 - 1e-6), PARAMETER, PARAMETER)
def test_beta_quantile_equals_scipy(p: float, a: float, b: float) -> None:
    theirs = stats.beta.ppf(p, a, b)
    assert beta_quantile(p, a, b) == pytest.approx(theirs, rel=1e-7)  # scipy itself has no more digits


@settings(max_examples=10)
@given(st.floats(1e-12, 1 - 1e-6))
def test_beta_quantile_in_closed_form(p: float) -> None:
    assert beta_quantile(p, 0.5, 0.5) == pytest.approx(math.sin(math.pi * p / 2) ** 2, rel=1e-11)
    assert beta_quantile(p, 3.0, 1.0) == pytest.approx(p ** (1 / 3), rel=1e-12)
    assert beta_quantile(p, 1.0, 3.0) == pytest.approx(-math.expm1(math.log1p(-p) / 3), rel=1e-11)


@pytest.mark.parametrize(
    ("p", "a", "b"), [(0.3, 0.6, 0.6), (1e-9, 0.6, 0.6), (0.9999, 2.0, 5.0), (0.01, 80, 60)]
)
def test_beta_quantile_inverts_the_integral(p: float, a: float, b: float) -> None:
    x = mp.mpf(beta_quantile(p, a, b))
    density = x ** (a - 1) * (1 - x) ** (b - 1) / mp.beta(a, b)
    error_of_x = (mp.betainc(a, b, 0, x, regularized=True) - p) / density
    assert abs(error_of_x / x) < 1e-12


def test_beta_quantile_at_its_ends() -> None:
    assert [beta_quantile(0.0, 0.6, 0.6), beta_quantile(1.0, 0.6, 0.6)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("p", "a", "b"), [(-0.1, 1, 1), (1.1, 1, 1), (math.nan, 1, 1), (0.5, 0, 1), (0.5, 1, -1)]
)
def test_beta_quantile_refuses_what_is_no_law(p: float, a: float, b: float) -> None:
    with pytest.raises(
        ValueError, match=rf"needs p in \[0, 1\] and positive a and b, got p={p}, a={a}, b={b}"
    ):
        beta_quantile(p, a, b)
