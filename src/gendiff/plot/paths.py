"""Solvers at work: the ways of the same states under several methods, beside the exact one."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from torch import Tensor

from gendiff.denoiser import Cond, Denoise
from gendiff.math.grids import Grid
from gendiff.math.laws import Law
from gendiff.plot.figure import COLOURS, Picture, ink, legend, picture
from gendiff.plot.ways import Way, exact_way, fine_times, law_of, solved
from gendiff.sampling import Solver

FAR = 2.0  # root of alpha² + sigma² beyond which states are drawn in units of it
MARKERS = ("o", "s", "^", "D", "v", "P")
SHADE = 0.3  # opacity of the density where it is highest
CELLS = 160  # of the density, along each axis


def solver_paths(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    solvers: Mapping[str, Solver],
    *,
    exact: bool | Grid | None = None,
    cond: Cond = None,
    seed: int | None = None,
    title: str | None = None,
) -> Picture:
    """Draw the ways of states with one value over time, or of states with two values in their plane.

    The exact way is that of the probability-flow ODE from the same x. Where it is drawn and a solver adds no
    noise, the legend has the root mean square of that solver's error at the end. Where the law of the data is
    known, its density is shaded: at every time, or at the last one in a plane.

    Args:
        denoise: a denoiser or a wrapper round one. The exact way is known for an `OracleDenoiser` of a
            Gaussian, or of a mixture in one dimension.
        x: states at the first time of the grid, [B, *], of one or two values each.
        grid: the times of the solvers.
        solvers: the methods, by name.
        exact: whether the exact way is drawn; None where it is known. A finer grid stands for it with Heun's
            method on that.
        cond: the condition given to every call.
        seed: of the noise that stochastic methods add, the same for each of them.
        title: above the picture.

    Returns:
        A figure with one axes. Where noise outgrows the data (variance exploding), states are drawn divided
        by the root of alpha² + sigma².

    Raises:
        TypeError: for what is no solver.
        ValueError: for no solver, states of three or more values, and an exact way that is not known.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> from gendiff.sampling import Euler
    >>> denoise = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), Rectified())
    >>> picture = solver_paths(denoise, torch.ones(3, 1), grids.uniform(Rectified(), 4), {"Euler": Euler()})
    >>> picture.axes[0].lines[-1].get_xdata().tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if len(x) == 0 or x[0].numel() not in (1, 2):
        raise ValueError(
            f"states with one or two values can be drawn, got x of shape {tuple(x.shape)}; for images, look "
            f"at sample_grid of the steps of `iterate`."
        )
    if not solvers:
        raise ValueError("there is no solver to draw; give {'Heun': Heun()}.")
    for name, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise TypeError(f"{name!r} is a {type(solver).__name__}, not a solver such as Heun().")
    ways = [solved(name, denoise, x, grid, solver, cond, seed) for name, solver in solvers.items()]
    truth = exact_way(denoise, x, grid, exact, cond)
    line = x[0].numel() == 1
    figure = picture(7.5 if line else 6.4, 4.8 if line else 6.6, title)
    axes = figure.add_subplot()
    if truth is not None:
        _draw(axes, truth, grid, truth.name, color=ink(), lw=1.6, alpha=0.8)
    for i, way in enumerate(ways):
        error = None if truth is None else way.error(truth)
        label = way.name if error is None else f"{way.name} (error {error:.2g})"
        marker = MARKERS[i % len(MARKERS)]
        _draw(axes, way, grid, label, color=COLOURS[i % len(COLOURS)], lw=1.1, marker=marker, ms=3.5)
    _frame(axes, ways, grid)
    law = law_of(denoise)
    if law is not None:
        _shade(axes, law, grid)
    legend(figure, axes)
    return figure


def _unit(grid: Grid, t: NDArray[np.float64]) -> NDArray[np.float64]:
    """What states are divided by at every time: 1, unless the noise outgrows the data."""
    size = torch.hypot(*grid.schedule.level(torch.from_numpy(t))).numpy()
    return size if math.hypot(*map(float, grid.level(0))) > FAR else np.ones_like(size)


def _draw(axes: Axes, way: Way, grid: Grid, label: str, **style: Any) -> None:
    """One line for each state."""
    x = way.x / _unit(grid, way.t)[:, None, None]
    lines = axes.plot(*((way.t, x[..., 0]) if x.shape[-1] == 1 else (x[..., 0], x[..., 1])), **style)
    lines[0].set_label(label)


def _frame(axes: Axes, ways: list[Way], grid: Grid) -> None:
    """Limits and labels: the data are on the right, where sampling ends, as on an axis of log-SNR."""
    unit = _unit(grid, grid.t.numpy())
    divided = " / √(alpha² + sigma²)" if unit[0] > FAR else ""
    if ways[0].x.shape[-1] == 1:
        start, end = grid.times[0], grid.times[-1]
        room = 0.02 * (start - end)
        axes.set(xlim=(start + room, end - room), xlabel="t (noise ← → data)", ylabel=f"x{divided}")
        axes.set_ylim(axes.get_ylim())
        return
    axes.plot(*(ways[0].x[0] / unit[0]).T, "o", color=ink(), ms=6, mfc="none", ls="", label="start")
    axes.set(xlabel=f"first value{divided}", ylabel=f"second value{divided}", aspect="equal")
    centres, reach = zip(
        *((sum(ends) / 2, ends[1] - ends[0]) for ends in (axes.get_xlim(), axes.get_ylim())), strict=True
    )
    (left, right), (low, high) = ((centre - max(reach) / 2, centre + max(reach) / 2) for centre in centres)
    axes.set(xlim=(left, right), ylim=(low, high))


def _shade(axes: Axes, law: Law, grid: Grid) -> None:
    """The density behind the ways, over its highest value at each time; in a plane, that of the last time."""
    t, (low, high) = fine_times(law, grid), axes.get_ylim()
    up = torch.linspace(low, high, CELLS, dtype=torch.float64)
    if law.size == 1:
        left, right = map(float, (grid.times[0], grid.times[-1]))
        points = (up[:, None] * torch.from_numpy(_unit(grid, t.numpy()))).reshape(-1, 1)
        level = [value.repeat(CELLS) for value in grid.schedule.level(t)]
        log_p = law.log_prob(points, *level).reshape(CELLS, len(t))
        share = (log_p - log_p.amax(0)).exp()
    elif float(t[-1]) == grid.times[-1]:
        left, right = axes.get_xlim()
        across = torch.linspace(left, right, CELLS, dtype=torch.float64)
        points = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 2)
        log_p = law.log_prob(points * float(_unit(grid, t[-1:].numpy())[0]), *grid.level(-1))
        share = (log_p - log_p.amax()).exp().reshape(CELLS, CELLS)
    else:  # the data are single points, which have no density
        return
    colour = np.empty((*share.shape, 4))
    colour[..., :3], colour[..., 3] = to_rgb(ink()), SHADE * share.numpy()
    extent = (left, right, low, high)
    axes.imshow(
        colour, extent=extent, origin="lower", aspect=axes.get_aspect(), interpolation="bilinear", zorder=0
    )
