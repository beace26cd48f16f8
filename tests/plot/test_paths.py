"""Solver paths: lines are the states of the loop, and the exact way ends where the closed form does."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.math import GaussianOracle, LinearBeta, MixtureOracle, Rectified, VarianceExploding, grids
from gendiff.plot import solver_paths
from gendiff.plot.figure import Picture
from gendiff.sampling import DDPM, Euler, Heun, iterate

LINE = torch.tensor([[-1.5], [0.3], [1.0]], dtype=torch.float64)
PLANE = torch.tensor([[-1.5, 1.0], [0.3, 0.2]], dtype=torch.float64)
BOTH = {"Euler": Euler(), "Heun": Heun()}
MODES = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)


def gaussian(size: int, schedule: Any) -> OracleDenoiser:
    return OracleDenoiser(GaussianOracle.isotropic(torch.full((size,), 2.0), 0.5), schedule)


def mixture(spread: float, d: int = 1) -> OracleDenoiser:
    law = MixtureOracle(torch.ones(2) / 2, MODES.repeat(1, d), spread * torch.eye(d).repeat(2, 1, 1))
    return OracleDenoiser(law, Rectified())


def lines(picture: Picture) -> list[NDArray[np.float64]]:
    return [np.asarray(line.get_xydata()) for line in picture.axes[0].lines]


def labels(picture: Picture) -> list[str]:
    return [text.get_text() for one in picture.legends for text in one.get_texts()]


def states(denoise: Any, x: Tensor, grid: Any, solver: Any, **options: Any) -> NDArray:
    return torch.stack([x, *(step.x for step in iterate(denoise, x, grid, solver, **options))]).numpy()


def test_lines_are_the_states_of_the_loop_and_the_exact_way_is_the_closed_form() -> None:
    denoise, grid = gaussian(1, Rectified()), grids.uniform(Rectified(), 5)
    picture = solver_paths(denoise, LINE, grid, BOTH)
    found = lines(picture)
    assert len(found) == 9
    for i, (start, line) in enumerate(zip(LINE[:, 0].tolist(), found[:3], strict=True)):
        t, x = line.T
        # x_t = (1 - t)·2 + s(t)·z with s² = (1 - t)²/4 + t², and z is kept along the flow
        spread = np.hypot((1 - t) / 2, t)
        np.testing.assert_allclose(x, 2 * (1 - t) + spread * start, atol=1e-12)
        assert (t[0], t[-1]) == (1, 0)
        assert x[-1] == pytest.approx(2 + start / 2), i
    for k, solver in enumerate(BOTH.values()):
        expected = states(denoise, LINE, grid, solver)
        for i in range(3):
            np.testing.assert_array_equal(found[3 + 3 * k + i], np.stack([grid.times, expected[:, i, 0]], 1))
        error = math.sqrt(np.mean((expected[-1] - (2 + LINE.numpy() / 2)) ** 2))
        assert labels(picture)[1 + k] == f"{list(BOTH)[k]} (error {error:.2g})"
    assert picture.axes[0].get_xlim()[0] > 1 > 0 > picture.axes[0].get_xlim()[1]


def test_in_a_plane_the_ways_are_drawn_in_it() -> None:
    denoise, grid = gaussian(2, Rectified()), grids.uniform(Rectified(), 5)
    picture = solver_paths(denoise, PLANE, grid, {"Heun": Heun()})
    exact, _, first, second, starts = lines(picture)
    np.testing.assert_allclose(exact[-1], 2 + PLANE[0] / 2)
    np.testing.assert_allclose(np.stack([first, second], 1), states(denoise, PLANE, grid, Heun()))
    np.testing.assert_array_equal(starts, PLANE)
    assert picture.axes[0].get_aspect() == 1


def test_the_shade_is_the_density_at_each_time() -> None:
    denoise, grid = gaussian(1, Rectified()), grids.uniform(Rectified(), 5)
    axes = solver_paths(denoise, LINE, grid, BOTH).axes[0]
    (image,) = axes.images
    opacity, (low, high) = np.asarray(image.get_array())[..., 3], axes.get_ylim()
    assert image.get_extent() == [1.0, 0.0, low, high]
    x = np.linspace(low, high, len(opacity))
    for column, t in zip(opacity.T[::20], np.linspace(1, 0, opacity.shape[1])[::20], strict=True):
        density = np.exp(-((x - 2 * (1 - t)) ** 2) / (2 * ((1 - t) ** 2 / 4 + t**2)))
        np.testing.assert_allclose(column / column.max(), density / density.max(), atol=1e-9)


def test_noise_that_outgrows_the_data_is_its_own_unit() -> None:
    schedule = VarianceExploding(0.01, 50.0)
    denoise, grid, start = gaussian(1, schedule), grids.uniform(schedule, 6), 50 * LINE
    found = lines(solver_paths(denoise, start, grid, {"Heun": Heun()}))
    expected = states(denoise, start, grid, Heun())[:, :, 0]
    sigma = schedule.sigma(grid.t).numpy()
    for i in range(3):
        np.testing.assert_allclose(found[3 + i][:, 1], expected[:, i] / np.hypot(1, sigma))
        np.testing.assert_allclose(found[i][0, 1], found[3 + i][0, 1])
    np.testing.assert_allclose(found[0][-1, 1], 2 + 0.5 * (start[0, 0] - 2) / math.hypot(0.5, 50.0))


def test_a_mixture_on_a_line_is_followed_to_its_monotone_map() -> None:
    picture = solver_paths(mixture(0.01), LINE, grids.uniform(Rectified(), 40), {"Heun": Heun()})
    found = lines(picture)
    for i in range(3):
        assert found[3 + i][-1, 1] == pytest.approx(found[i][-1, 1], abs=3e-3)
    # points without a density: the way goes as near as there is one, and says nothing of errors
    points = solver_paths(mixture(0.0), LINE, grids.uniform(Rectified(), 8), {"Heun": Heun()})
    np.testing.assert_allclose([line[-1, 1] for line in lines(points)[:3]], [-1, 1, 1], atol=2e-3)
    assert labels(points) == ["exact", "Heun"]


def test_a_finer_grid_stands_for_a_flow_that_is_not_known() -> None:
    denoise, coarse, fine = mixture(0.1, 2), grids.uniform(Rectified(), 3), grids.uniform(Rectified(), 9)
    assert labels(solver_paths(denoise, PLANE, coarse, {"Euler": Euler()})) == ["Euler", "start"]
    picture = solver_paths(denoise, PLANE, coarse, {"Euler": Euler()}, exact=fine)
    np.testing.assert_allclose(lines(picture)[0], states(denoise, PLANE, fine, Heun())[:, 0])
    assert labels(picture)[0] == "Heun, 9 steps"


def test_stochastic_methods_have_the_same_noise_and_no_error() -> None:
    denoise, grid = gaussian(1, LinearBeta()), grids.trailing(LinearBeta(), 5)
    picture = solver_paths(denoise, LINE, grid, {"a": DDPM(), "b": DDPM(), "Euler": Euler()}, seed=3)
    found = lines(picture)
    np.testing.assert_array_equal(found[3:6], found[6:9])
    np.testing.assert_array_equal(found[3][:, 1], states(denoise, LINE, grid, DDPM(), rng=3)[:, 0, 0])
    assert labels(picture)[1:3] == ["a", "b"]
    assert labels(picture)[3].startswith("Euler (error ")


def test_a_network_is_drawn_without_what_is_not_known_of_it() -> None:
    denoise = Denoiser(lambda x, timestep, cond: 0 * x, Rectified(), "flow")
    picture = solver_paths(denoise, LINE.float(), grids.uniform(Rectified(), 3), {"Euler": Euler()})
    assert len(lines(picture)) == 3
    assert not picture.axes[0].images
    np.testing.assert_allclose(lines(picture)[0][:, 1], -1.5)


GRID = grids.uniform(Rectified(), 3)
ORACLE = gaussian(1, Rectified())


@pytest.mark.parametrize(
    ("make", "says", "kind"),
    [
        (
            lambda: solver_paths(ORACLE, torch.ones(2, 3), GRID, BOTH),
            "one or two values.*sample_grid",
            ValueError,
        ),
        (lambda: solver_paths(ORACLE, torch.ones(0, 1), GRID, BOTH), r"\(0, 1\)", ValueError),
        (lambda: solver_paths(ORACLE, LINE, GRID, {}), "no solver", ValueError),
        (lambda: solver_paths(ORACLE, LINE, GRID, {"Heun": Heun}), "solvers|Heun", TypeError),
        (lambda: solver_paths(mixture(0.1, 2), PLANE, GRID, BOTH, exact=True), "finer grid", ValueError),
        (
            lambda: solver_paths(ORACLE, LINE, GRID, BOTH, exact=grids.uniform(Rectified(), 9, end=0.1)),
            "ends",
            ValueError,
        ),
        (lambda: solver_paths(ORACLE, LINE, GRID, {"DDPM": DDPM()}), "rng", ValueError),
        (lambda: solver_paths(ORACLE, LINE, grids.trailing(LinearBeta(), 3), BOTH), "schedule", ValueError),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str, kind: Any) -> None:
    with pytest.raises(kind, match=says):
        make()
