"""Errors of solvers over their cost: the numbers drawn are those measured."""

import pytest
import torch

from gendiff.math import GaussianOracle, Rectified, grids
from gendiff.plot import solver_errors
from gendiff.sampling import DDPM, Euler, Heun
from gendiff.testing.solvers import measure_order

LAW = GaussianOracle.isotropic(torch.tensor([0.4]), 1.6)
STRAIGHT = Rectified()


def test_what_is_drawn_was_measured() -> None:
    solvers = {"Euler": Euler(), "Heun": Heun(), "DDPM": DDPM()}
    picture = solver_errors(solvers, LAW, STRAIGHT, evaluations=(6, 12, 24), title="cost")
    (axes,) = picture.axes
    for line, (name, solver) in zip(axes.lines, solvers.items(), strict=False):
        steps = tuple(n // solver.evaluations for n in (6, 12, 24))
        assert line.get_label() == name
        assert line.get_xdata().tolist() == [6, 12, 24]
        assert line.get_ydata().tolist() == list(measure_order(solver, LAW, STRAIGHT, steps=steps).errors)
    assert (axes.get_xscale(), axes.get_yscale(), picture.get_suptitle()) == ("log", "log", "cost")


def test_reference_lines_have_the_slopes_that_they_name() -> None:
    (axes,) = solver_errors({"Euler": Euler()}, LAW, STRAIGHT, evaluations=(8, 16)).axes
    assert [text.get_text() for text in axes.texts] == ["order 1", "order 2", "order 3"]
    for order, line in enumerate(axes.lines[1:], start=1):
        (x, further), (y, lower) = line.get_xdata(), line.get_ydata()
        assert y / lower == pytest.approx((further / x) ** order)


def test_a_grid_of_ones_own() -> None:
    def squeezed(steps):
        return grids.uniform(STRAIGHT, steps, end=0.1).shifted(2.0)

    (axes,) = solver_errors({"Heun": Heun()}, LAW, STRAIGHT, evaluations=(8, 16), grid=squeezed).axes
    measured = measure_order(Heun(), LAW, STRAIGHT, steps=(4, 8), grid=squeezed)
    assert axes.lines[0].get_ydata().tolist() == list(measured.errors)


@pytest.mark.parametrize(
    ("solvers", "evaluations", "says"),
    [
        ({}, (6, 12), "at least one solver"),
        ({"Euler": Euler()}, (6, 6), "two or more numbers of evaluations"),
        ({"Heun": Heun()}, (1, 6), "1 evaluations allow no step of 'Heun', which takes 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(solvers, evaluations, says) -> None:
    with pytest.raises(ValueError, match=says):
        solver_errors(solvers, LAW, STRAIGHT, evaluations=evaluations)
