"""The loss of a run over its steps, with its learning rate."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gendiff.plot import log as logs
from gendiff.plot.figure import COLOURS, Picture, legend, loss_scale, numbers, picture

Number: TypeAlias = float | int
FEW = 60  # rows that are drawn as points


def loss(
    source: logs.Log, *, smooth: Number = 0.05, log: bool | None = None, title: str | None = None
) -> Picture:
    """Draw the loss over the steps of a run, and the learning rate below it where the log has one.

    The strong line is the mean over the rows in a window round each step, so that it does not lag behind; at
    both ends of the run the window ends with it. Steps whose loss is not finite are marked on the axis.

    Args:
        source: the folder of a run, its `log.jsonl`, or rows of one; those without "loss" are passed over.
            "learning_rate" is a number, or a list with one for each parameter group.
        smooth: width of the window as a share of the run, in [0, 1); 0 draws the losses alone.
        log: logarithmic losses; None decides by their range.
        title: above the picture.

    Raises:
        FileNotFoundError: where there is no log.
        ValueError: for rows without a loss, or a share out of range.

    >>> rows = [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
    >>> loss(rows, smooth=0).axes[0].lines[0].get_xdata().tolist()
    [10.0, 20.0, 30.0]
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth is a share of the run in [0, 1), such as 0.05, got {smooth}.")
    rows = logs.read(source)
    steps, losses = logs.column(rows, "step"), logs.column(rows, "loss")
    if not np.isfinite(losses).any():
        raise ValueError(f"none of the {len(rows)} losses of the log is finite: there is nothing to draw.")
    rates = _rates(rows)
    figure = picture(7.5, 4.0 if rates is None else 4.8, title)
    parts = 1 if rates is None else 2
    axes, *below = figure.subplots(parts, 1, sharex=True, squeeze=False, height_ratios=[4, 1][:parts])[:, 0]
    _draw_losses(axes, steps, losses, smooth)
    loss_scale(axes, losses[np.isfinite(losses)], log)
    axes.set(ylabel="loss")
    if rates is not None:
        _draw_rates(below[0], steps, rates)
    for ax in (axes, *below):
        ax.grid(alpha=0.25)
        ax.margins(x=0.01)
    (below or [axes])[-1].set(xlabel="step")
    legend(figure, axes, *below)
    return figure


def smoothed(steps: NDArray[np.float64], values: NDArray[np.float64], share: Number) -> NDArray[np.float64]:
    """Means of the finite values within half a share of the run on either side; NaN where there is none.

    >>> smoothed(np.arange(4.0), np.array([1.0, 3.0, np.nan, 5.0]), 0.7).tolist()
    [2.0, 2.0, 4.0, 5.0]
    """
    half = share * (steps[-1] - steps[0]) / 2 * (1 + 1e-9)
    first, last = np.searchsorted(steps, steps - half), np.searchsorted(steps, steps + half, side="right")
    finite = np.isfinite(values)
    # Not differences of running sums: one loss of 1e20 would take the digits of all that follow.
    windows = [values[a:b][finite[a:b]] for a, b in zip(first, last, strict=True)]
    return np.array([window.mean() if len(window) else np.nan for window in windows])


def _draw_losses(axes: Axes, steps: NDArray[np.float64], losses: NDArray[np.float64], smooth: Number) -> None:
    finite = np.isfinite(losses)
    marker: dict[str, Any] = {"marker": ".", "ms": 5} if len(steps) <= FEW else {}
    faint: dict[str, Any] = {"lw": 0.8, "alpha": 0.45} if smooth else {"lw": 1.5}
    axes.plot(steps, np.where(finite, losses, np.nan), color=COLOURS[0], label="as logged", **faint, **marker)
    if smooth:
        label = f"mean over {100 * smooth:g}% of the run"
        axes.plot(steps, smoothed(steps, losses, smooth), color=COLOURS[0], lw=2, label=label)
    if not finite.all():
        bad, on_axis = steps[~finite], axes.get_xaxis_transform()
        label = f"not finite ({len(bad)})"
        axes.plot(bad, 0 * bad, "x", color=COLOURS[1], transform=on_axis, clip_on=False, label=label)


def _draw_rates(axes: Axes, steps: NDArray[np.float64], rates: NDArray[np.float64]) -> None:
    """Learning rates, a line for each parameter group, without a legend where there is one."""
    for group, rate in enumerate(rates.T):
        label = f"learning rate {group}" if len(rates.T) > 1 else None
        axes.plot(steps, rate, color=COLOURS[(2 + group) % len(COLOURS)], label=label)
    axes.set(ylabel="learning\nrate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def _rates(rows: Sequence[logs.Row]) -> NDArray[np.float64] | None:
    """Learning rates [rows, groups]; None where the log has none."""
    given: list[Any] = [row.get("learning_rate") for row in rows]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in given if value is not None]
    if not lists:
        return None
    groups = len(lists[0])
    if any(len(one) != groups for one in lists):
        raise ValueError(
            f"'learning_rate' has one number for each parameter group, got {sorted({len(x) for x in lists})} "
            f"numbers in rows of one log; give the rows of one run."
        )
    filled = [[np.nan] * groups if value is None else value for value in given]
    return numbers(filled, "'learning_rate' of a log").reshape(len(rows), groups)
