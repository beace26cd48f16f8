"""Schedules and time laws: the lines are the closed forms."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gendiff.math import CosineBeta, LinearBeta, Rectified, ScaledLinearBeta, VarianceExploding
from gendiff.math.schedules import Schedule
from gendiff.objectives import (
    LogitNormal,
    LogNormal,
    MinSNR,
    Objective,
    OnGrid,
    Stratified,
    TimeLaw,
    Uniform,
)
from gendiff.plot import schedules, times
from gendiff.plot.figure import Picture


def lines(picture: Picture, axes: int) -> list[tuple[NDArray, NDArray]]:
    return [np.asarray(line.get_xydata()).T for line in picture.axes[axes].lines if len(line.get_xdata())]


def labels(picture: Picture) -> list[str]:
    return [text.get_text() for one in picture.legends for text in one.get_texts()]


def test_the_panels_of_a_schedule_are_alpha_sigma_and_the_log_snr() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)  # LinearBeta, on its own knots, from the words of the paper
    picture = schedules(Rectified(), LinearBeta(), clip=8.0)
    (t, alpha), (_, alpha_bar) = lines(picture, 0)
    np.testing.assert_allclose(alpha, 1 - t)
    np.testing.assert_allclose(alpha_bar[1:] ** 2, np.cumprod(1 - betas))
    (_, sigma), (_, noise) = lines(picture, 1)
    np.testing.assert_allclose(sigma, t)
    np.testing.assert_allclose(noise[1:] ** 2, 1 - np.cumprod(1 - betas))
    (_, log_snr), _ = lines(picture, 2)
    inner = t[1:-1]
    np.testing.assert_allclose(log_snr[1:-1], np.clip(2 * np.log((1 - inner) / inner), -8, 8), atol=1e-12)
    assert (log_snr[0], log_snr[-1]) == (8, -8)
    assert [axes.get_title() for axes in picture.axes] == ["alpha", "sigma", "log-SNR"]


def test_schedules_are_called_by_name_class_or_all_they_are() -> None:
    assert labels(schedules(Rectified(), CosineBeta())) == ["Rectified", "CosineBeta"]
    both = schedules(CosineBeta(), CosineBeta(size=50), {"mine": Rectified()})
    assert labels(both) == ["CosineBeta(size=1000)", "CosineBeta(size=50)", "mine"]
    styles = {(line.get_color(), line.get_linestyle()) for line in both.axes[0].lines}
    assert len(styles) == 3


def test_sigma_of_an_exploding_schedule_is_drawn_by_its_logarithm() -> None:
    assert schedules(VarianceExploding()).axes[1].get_yscale() == "log"
    assert schedules(Rectified()).axes[1].get_yscale() == "linear"


def normal(x: NDArray, mean: float, std: float) -> NDArray:
    return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def test_densities_of_the_laws_are_the_closed_forms() -> None:
    laws = {
        "u": Uniform(),
        "n": LogitNormal(0.5, 0.8),
        "s": LogitNormal(shift=3.0),
        "e": LogNormal(-1.0, 1.1),
    }
    picture = times({**laws, "strata": Stratified(Uniform())}, Rectified())
    u, n, s, e, strata = lines(picture, 0)
    np.testing.assert_allclose(u[1], 1, rtol=1e-6)
    np.testing.assert_allclose(strata[1], 1, rtol=1e-6)
    for (t, p), mean, std in ((n, 0.5, 0.8), (s, math.log(3.0), 1.0), (e, -1.0, 1.1)):
        logit = np.log(t / (1 - t))  # sigma/alpha is t/(1 - t): the log-normal law is logit-normal here
        inner = slice(2, -2)
        np.testing.assert_allclose(
            p[inner], (normal(logit, mean, std) / (t * (1 - t)))[inner], rtol=0.01, atol=1e-3
        )
    inner = slice(5, -5)
    for (x, p), mean, std in zip(
        lines(picture, 1)[1:4], (-1.0, -2 * math.log(3), 2.0), (1.6, 2.0, 2.2), strict=True
    ):
        np.testing.assert_allclose(p[inner], normal(x, mean, std)[inner], rtol=0.01, atol=1e-4)
    x, p = lines(picture, 1)[0]
    logistic = 1 / (1 + np.exp(-x / 2))
    np.testing.assert_allclose(p[inner], (logistic * (1 - logistic) / 2)[inner], rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("size", [4, 777, 1000])
def test_the_times_of_a_table_are_equally_likely(size: int) -> None:
    schedule = LinearBeta(size=size)
    picture = times(Objective(), schedule)
    (t, p), *_ = lines(picture, 0)
    np.testing.assert_allclose(p, 1, rtol=1e-9)
    assert set(np.round(t * size, 6)) <= set(range(1, size + 1))
    x, density = lines(picture, 1)[0]
    log_snr = schedule.log_snr(torch.arange(1, size + 1, dtype=torch.float64) / size).numpy()
    for level, value in list(zip(x, density, strict=True))[1:-1]:
        i = int(np.argmin(np.abs(log_snr - level)))
        h1, h2 = log_snr[i - 1] - log_snr[i], log_snr[i] - log_snr[i + 1]  # of one share of 1/N each
        assert value == pytest.approx((h1 / h2 + h2 / h1) / (h1 + h2) / size, rel=1e-6)


def test_a_weighting_multiplies_the_density_and_leaves_the_area() -> None:
    objective = Objective(weighting=MinSNR(5.0))
    picture = times({"weighted": objective}, ScaledLinearBeta(), prediction="epsilon")
    (t, weighted), (same_t, plain) = lines(picture, 0)
    np.testing.assert_array_equal(t, same_t)
    every = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weight = np.minimum(1, 5 / np.exp(ScaledLinearBeta().log_snr(every).numpy()))
    np.testing.assert_allclose(
        weighted / plain, np.interp(t, every.numpy(), weight) / weight.mean(), rtol=1e-6
    )
    for axes in (0, 1):
        x, p = lines(picture, axes)[0]
        assert abs(np.trapezoid(p, x)) == pytest.approx(1, abs=0.01)
    assert "times alone, without the weighting" in labels(picture)
    other = times(Objective(weighting=MinSNR(5.0), space="x0"), ScaledLinearBeta())
    assert lines(other, 0)[0][1].max() != pytest.approx(weighted.max(), rel=0.1)


def test_samples_piled_up_at_an_end_are_told_and_not_drawn() -> None:
    schedule = ScaledLinearBeta()
    picture = times({"wide": LogNormal(0.0, 3.0)}, schedule)
    beyond = float(schedule.log_snr(1.0)) / -2 / 3  # in deviations
    share = 0.5 * math.erfc(beyond / math.sqrt(2))
    assert f", {share:.1%} at t = 1" in labels(picture)[0]
    assert lines(picture, 1)[0][1].max() == pytest.approx(normal(np.zeros(1), 0, 6.0)[0], rel=0.01)


class Point(TimeLaw):
    def quantile(self, u: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        return 0 * u + 0.5


@pytest.mark.parametrize(
    ("make", "says", "kind"),
    [
        (lambda: schedules(), "no schedule", ValueError),
        (lambda: schedules(Rectified(), clip=0.0), "clip", ValueError),
        (lambda: times({}, Rectified()), "no time law", ValueError),
        (lambda: times(OnGrid(), Rectified()), "OnGrid needs a table", ValueError),
        (lambda: times(Point(), Rectified()), r"times at \[0.5\]", ValueError),
        (
            lambda: times({"a": Objective(weighting=MinSNR())}, LinearBeta()),
            "'a' weighs.*prediction=",
            ValueError,
        ),
        (
            lambda: times(Objective(weighting=MinSNR()), LinearBeta(), prediction="v0"),
            "v0",
            (ValueError, TypeError),
        ),
        (lambda: schedules({"mine": "linear"}), "linear|uniform|law|given", TypeError),
        (lambda: times({"a": "uniform"}, Rectified()), "linear|uniform|law|given", TypeError),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str, kind: Any) -> None:
    with pytest.raises(kind, match=says):
        make()
