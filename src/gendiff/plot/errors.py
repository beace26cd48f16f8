"""How good solvers are for what they cost: their error over evaluations of the network, on a known law."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from gendiff.math.grids import Grid
from gendiff.math.schedules import Schedule
from gendiff.plot.figure import Picture, legend, picture, style
from gendiff.sampling import Solver
from gendiff.testing.solvers import Oracle, measure_order

EVALUATIONS = (6, 12, 24, 48, 96, 192)  # multiples of 6: whole steps for methods of 1, 2 and 3 evaluations


def solver_errors(
    solvers: Mapping[str, Solver],
    law: Oracle,
    schedule: Schedule,
    *,
    evaluations: Sequence[int] = EVALUATIONS,
    grid: Callable[[int], Grid] | None = None,
    title: str | None = None,
) -> Picture:
    """Draw the error of solvers over the number of times that they evaluate the network, both logarithmic.

    The error of a deterministic method is the root mean square distance between where samples end and where
    the probability-flow ODE takes them; that of a stochastic one is the distance between the mean and
    covariance that it ends with and the true ones, which is exact and needs a Gaussian. Grey lines have the
    slopes of the orders 1, 2 and 3.

    Args:
        solvers: the methods, by name.
        law: of the data, with a known exact flow.
        schedule: the schedule.
        evaluations: of the network; a method takes as many whole steps as they allow.
        grid: from a number of steps to the times; uniform ones from 1 to 0.02 by default.
        title: above the picture.

    Raises:
        ValueError: for no solver, fewer than two numbers of evaluations, or one that allows no step.

    >>> import torch
    >>> from gendiff.math import GaussianOracle, Rectified
    >>> from gendiff.sampling import Euler, Heun
    >>> law = GaussianOracle.isotropic(torch.zeros(1), 1.6)
    >>> drawn = solver_errors({"Euler": Euler(), "Heun": Heun()}, law, Rectified(), evaluations=(4, 8))
    >>> [line.get_xdata().tolist() for line in drawn.axes[0].lines[:2]]
    [[4, 8], [4, 8]]
    """
    if not solvers or len(set(evaluations)) < 2:
        raise ValueError(
            f"errors are drawn of at least one solver at two or more numbers of evaluations, got "
            f"{sorted(solvers)} and {tuple(evaluations)}; give {{'Heun': Heun()}}, for instance."
        )
    figure = picture(7.0, 4.6, title)
    axes = figure.subplots()
    for i, (name, solver) in enumerate(solvers.items()):
        steps = tuple(sorted({n // solver.evaluations for n in evaluations}))
        if steps[0] < 1:
            raise ValueError(
                f"{min(evaluations)} evaluations allow no step of {name!r}, which takes {solver.evaluations}."
            )
        measured = measure_order(solver, law, schedule, steps=steps, grid=grid)
        spent = [n * solver.evaluations for n in steps]
        axes.plot(spent, measured.errors, marker="o", ms=3.5, label=name, **style(i))
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="error at the end")
    axes.xaxis.set_major_locator(FixedLocator(sorted(evaluations)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    _draw_slopes(axes)
    legend(figure, axes)
    return figure


def _draw_slopes(axes: Axes) -> None:
    """Lines of the slopes 1, 2 and 3 from the upper left corner of what is drawn."""
    points = np.concatenate([np.asarray(line.get_xydata()) for line in axes.lines])
    (left, low), (right, high) = points.min(0), points.max(0)
    x = np.array([left, right])
    for order in (1, 2, 3):
        y = high * (x / left) ** -order
        axes.plot(x, y, color="0.6", lw=0.7, zorder=0)
        end = right if y[1] > low else left * (high / low) ** (1 / order)
        place = end, high * (end / left) ** -order
        axes.annotate(f"order {order}", place, color="0.5", fontsize=8, va="bottom")
    axes.set_ylim(low / 1.5, high * 1.5)
