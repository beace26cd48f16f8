"""Churn against algorithm 2 of Karras et al. 2022, and DPM-Solver-2 against the midpoint rule."""

import math
from itertools import pairwise

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import Grid, LinearBeta, Rectified, VarianceExploding, grids
from gendiff.sampling import DPM2, Euler, Heun, Path, Stage, iterate, sample
from tests.sampling.orders import ALL, ALL_GAUSSIAN, FEW, FEW_GAUSSIAN, LINE, PLANE, Bent, Skewed, short

CHURN = {"churn": 3.0, "noise": 1.01, "ratio_min": 0.05, "ratio_max": 50.0}


def karras_stochastic(x, ratios, x0, noises, second, churn, noise, ratio_min, ratio_max):
    """Algorithm 2 line by line in y = x/alpha, with Heun's step, the midpoint's in log sigma, or Euler's."""
    for i, (sigma, after) in enumerate(pairwise(ratios)):
        inside = ratio_min <= sigma <= ratio_max
        gamma = min(churn / (len(ratios) - 1), math.sqrt(2) - 1) if inside else 0.0
        hat = sigma + gamma * sigma
        if gamma:
            x = x + noise * math.sqrt(hat**2 - sigma**2) * next(noises)
        d = (x - x0(x, hat)) / hat
        if after == 0 or second == "euler":
            x = x + (after - hat) * d
        elif second == "heun":
            guess = x + (after - hat) * d
            x = x + (after - hat) * (d + (guess - x0(guess, after)) / after) / 2
        else:
            middle = math.sqrt(hat * after)
            guess = x + (middle - hat) * d
            x = x + (after - hat) * (guess - x0(guess, middle)) / middle
        assert i < len(ratios)
    return x


METHODS = {"euler": Euler, "heun": Heun, "midpoint": DPM2}


@pytest.mark.parametrize("kind", METHODS)
def test_churn_is_algorithm_2(kind, randn64) -> None:
    """Noise in the range only; the network sees the noised sample at the raised level."""
    schedule, z = VarianceExploding(0.002, 200.0), randn64(4, 2)
    grid = grids.karras(schedule, 8, sigma_max=80.0, sigma_min=0.01)
    generator = torch.Generator().manual_seed(1)
    noises = iter(lambda: torch.randn(4, 2, generator=generator, dtype=torch.float64), None)
    x = 80 * z
    expected = karras_stochastic(
        x, grid.levels.sigma.tolist(), lambda x, sigma: PLANE.x0(x, 1.0, sigma), noises, kind, **CHURN
    )
    rng = torch.Generator().manual_seed(1)
    made = sample(OracleDenoiser(PLANE, schedule), x, grid, METHODS[kind](**CHURN), rng=rng)
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("solver", [Euler(churn=3), DPM2(churn=3)], ids=repr)
def test_churn_is_the_same_on_every_schedule(solver, randn64) -> None:
    """Methods in x/alpha make the same y on a variance-preserving schedule and on the flow one."""
    made = []
    for schedule in (LinearBeta(), Rectified(), VarianceExploding(0.002, 200.0)):
        grid = grids.from_sigmas(schedule, [40.0, 10.0, 2.0, 0.5, 0.1, 0.0])
        x = randn64(1, 1) * 0 + 40.0 * grid.levels.alpha[0]
        rng = torch.Generator().manual_seed(1)
        made.append(sample(OracleDenoiser(LINE, schedule), x, grid, solver, rng=rng))
    torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(made[0], made[2], rtol=1e-6, atol=1e-8)


def test_churn_above_the_schedule_is_cut_at_its_end(randn64) -> None:
    """From just below t = 1 the level is raised to t = 1, whose ratio says how much noise that takes."""
    schedule = LinearBeta()
    path = Path.of(Grid(schedule, [0.99, 0.5, 0.1]))
    (first,), (second,) = Euler(churn=100).plan(path)
    top, alpha = schedule.level(1.0), path.points[0].alpha
    assert first.at.t == pytest.approx(1.0)
    added = (top.sigma / top.alpha).item() ** 2 - path.points[0].ratio ** 2
    assert first.query["noise"] == pytest.approx(top.alpha.item() * math.sqrt(added))
    assert first.query["x"] == pytest.approx(top.alpha.item() / alpha)
    assert second.at.ratio == pytest.approx(math.sqrt(2) * path.points[1].ratio)
    for start in (Grid(schedule, [1.0, 0.5]), Grid(Rectified(), [1.0, 0.5])):  # nothing is noisier; alpha = 0
        ((stage,),) = Euler(churn=100).plan(Path.of(start))
        assert not stage.noisy
        assert stage.at.t == 1.0


def test_without_churn_nothing_changed() -> None:
    """Heun's table as it was before there was churn, float by float."""
    path = Path.of(grids.uniform(LinearBeta(), 5))
    for stages, (t, s) in zip(Heun().plan(path), pairwise(path.points), strict=True):
        to = {"x0": s.alpha, "eps": s.sigma}
        half = {"x0": (s.alpha - t.alpha) / 2, "eps": (s.sigma - t.sigma) / 2}
        pair = Stage(t, to, keep={"x_half": {"x": 1.0, **half}}), Stage(s, {"x_half": 1.0, **half})
        assert stages == (pair if s.sigma else (Stage(t, to),))
    assert Heun(churn=40, ratio_min=1e9).plan(path) == Heun().plan(path)


def test_orders() -> None:
    assert short(DPM2(), FEW, steps=(32, 64)) == []
    assert short(Skewed(DPM2(), share=0.02), FEW[:1], steps=(32, 64))


CHURNED = pytest.mark.parametrize("solver", [Euler(churn=3), Heun(churn=3), DPM2(churn=3)], ids=repr)


@CHURNED
def test_churn_keeps_the_order_of_the_law(solver) -> None:
    """From below t = 1: noise of the level's own size adds no error; a tenth more is one that stays."""
    assert short(solver, FEW_GAUSSIAN[:1], steps=(24, 48), start=0.9) == []
    louder = type(solver)(churn=3, noise=1.1)
    assert short(louder, FEW_GAUSSIAN[:1], steps=(24, 48), start=0.9)


@pytest.mark.slow
@CHURNED
def test_churn_keeps_the_order_on_all_laws(solver) -> None:
    assert short(solver, ALL_GAUSSIAN, start=0.9) == []
    assert short(type(solver)(), ALL) == []


def test_a_wrong_half_of_heun_with_churn_is_caught() -> None:
    assert short(Bent(Heun(churn=3), "eps", "x0"), FEW_GAUSSIAN[:1], steps=(16, 32), start=0.9)


def test_churn_at_its_largest_does_not_converge() -> None:
    """The documented limit: gamma stays at 0.41 however short the steps are, and so does the error."""
    assert short(Heun(churn=1e9), FEW_GAUSSIAN[:1], steps=(16, 32), start=0.9)


def test_midpoint_is_eulers_where_the_mean_is_an_end(randn64) -> None:
    """From alpha = 0 and to the data, without NaN."""
    grid, x = grids.uniform(Rectified(), 3), randn64(4, 2)
    steps = list(iterate(OracleDenoiser(PLANE, Rectified()), x, grid, DPM2()))
    assert steps[-1].x.isfinite().all()
    assert [len(stages) for stages in DPM2().plan(Path.of(grid))] == [1, 2, 1]
    euler = next(iterate(OracleDenoiser(PLANE, Rectified()), x, grid, Euler())).x
    assert torch.equal(steps[0].x, euler)


def test_wrong_numbers_are_refused() -> None:
    for wrong in ({"churn": -1}, {"churn": math.inf}, {"noise": 0.0}, {"noise": math.nan}):
        with pytest.raises(ValueError, match=r"churn is at least 0 .* and noise above 0"):
            Heun(**wrong)
    for wrong in ({"ratio_min": -1.0}, {"ratio_min": 2.0, "ratio_max": 1.0}):
        with pytest.raises(ValueError, match=r"0 <= ratio_min <= ratio_max, got"):
            DPM2(**wrong)
    assert repr(Heun()) == "Heun()"
    assert repr(Euler(churn=2, noise=1.003)) == "Euler(churn=2, noise=1.003)"
    assert Heun() != Heun(churn=1)
    with pytest.raises(ValueError, match=r"Heun\(churn=40\) adds noise in every step: pass rng"):
        sample(
            OracleDenoiser(PLANE, LinearBeta()), torch.zeros(1, 2), Grid(LinearBeta(), [0.5, 0.1]), Heun(40)
        )
