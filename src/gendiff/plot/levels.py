"""The loss by noise level: where a network is good, and where it still learns."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gendiff.plot import log as logs
from gendiff.plot.figure import COLOURS, LOG_SNR, Array, Picture, ink, legend, loss_scale, numbers, picture

Number: TypeAlias = float | int
Phases: TypeAlias = Mapping[str, tuple[Number, Number]]
Numbers: TypeAlias = Array | Sequence[Number]
PHASES: Phases = {"first tenth": (0.0, 0.1), "last quarter": (0.75, 1.0)}
MARKERS = ("o", "s", "^", "D", "v", "P")
CENTRES = np.arange(-10.5, 11.0)  # where the levels are drawn; the first and the last are open


class Levels(NamedTuple):
    """Losses by level: number of samples, mean, and its standard error where it is known."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    error: NDArray[np.float64] | None


def loss_by_level(
    source: logs.Log | tuple[Numbers, Numbers],
    phases: Phases = PHASES,
    *,
    least: int = 20,
    log: bool | None = None,
    title: str | None = None,
) -> Picture:
    r"""Draw the mean loss by noise level, early and late in training.

    A level is a unit of log-SNR; what lies below -10 or above 10 makes two more. Bars behind the lines show
    where the samples were. From single samples, a band shows the standard error :math:`s/\sqrt n` of a mean.

    Args:
        source: the folder of a run, its `log.jsonl`, rows of one (those without "levels" are passed over), or
            (log_snr, loss): levels of samples and their losses, in the order of training.
        phases: by name, shares (from, to) of the training in [0, 1]. A row of a log that is partly about a
            phase is counted to it; the legend has the steps.
        least: samples that a level needs for a point.
        log: logarithmic losses; None decides by their range.
        title: above the picture.

    Raises:
        FileNotFoundError: where there is no log.
        ValueError: for rows without levels, lengths that do not agree, and too few samples for any point.

    >>> import torch
    >>> picture = loss_by_level((torch.zeros(40), torch.ones(40)), {"all": (0, 1)})
    >>> picture.axes[0].lines[0].get_xydata().tolist()
    [[0.5, 1.0]]
    """
    for name, (start, end) in phases.items():
        if not 0 <= start < end <= 1:
            raise ValueError(f"phase {name!r} is a share (from, to) of [0, 1], got {(start, end)}.")
    if not phases:
        raise ValueError("there is no phase to draw; all of training is {'all': (0, 1)}.")
    single = isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Mapping)
    found, count = (_of_samples if single else _of_log)(source, phases)
    least = max(least, 1)
    most = int(max(level.count.max() for level in found.values()))
    if most < least:
        raise ValueError(
            f"no level has the {least} samples that a point needs, the most is {most}; train longer, give "
            f"longer phases, or ask for less with least=."
        )
    figure = picture(7.5, 4.6, title)
    axes = figure.add_subplot(xlabel=LOG_SNR, ylabel="mean loss")
    _draw_lines(axes, found, least)
    loss_scale(axes, np.concatenate([level.mean[level.count >= least] for level in found.values()]), log)
    axes.grid(alpha=0.25)
    legend(figure, axes, _draw_counts(axes, count))
    return figure


def _draw_lines(axes: Axes, found: Mapping[str, Levels], least: int) -> None:
    """A line for each phase through the levels that have enough samples; the legend tells of others."""
    for i, (name, level) in enumerate(found.items()):
        part = level.count >= least
        x, mean = CENTRES[part], level.mean[part]
        label = name if part.any() else f"{name}: too few samples"
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, marker=MARKERS[i % len(MARKERS)], ms=4, color=colour, label=label)
        if level.error is not None:
            error = level.error[part]
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.25, lw=0)


def _draw_counts(axes: Axes, count: NDArray[np.float64]) -> Axes:
    """Bars behind the lines, on axes of their own, and the ticks of the levels that occur."""
    behind = axes.twinx()
    label = f"where the {count.sum():,.0f} samples were"
    behind.bar(CENTRES, count, width=0.9, color=ink(), alpha=0.12, lw=0, label=label)
    behind.set_ylim(0, 3 * count.max())
    behind.yaxis.set_visible(False)
    behind.spines[:].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    first, last = CENTRES[np.flatnonzero(count)[[0, -1]]]
    ticks = {edge: f"{edge:.0f}".replace("-", "−") for edge in range(-8, 9, 2) if first - 1 < edge < last + 1}
    ticks |= {x: name for x, name in ((-10.5, "< −10"), (10.5, "> 10")) if x in (first, last)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(first - 0.6, last + 0.6)
    return behind


def _of_samples(source: Any, phases: Phases) -> tuple[dict[str, Levels], NDArray[np.float64]]:
    """The levels of every phase, and all counts, from samples in the order of training."""
    log_snr, losses = (numbers(value, name) for value, name in zip(source, ("log_snr", "loss"), strict=True))
    if log_snr.ndim != 1 or log_snr.shape != losses.shape or len(losses) == 0:
        raise ValueError(
            f"(log_snr, loss) are two lists of one length, a number a sample, got shapes {log_snr.shape} and "
            f"{losses.shape}; give LossTerms.log_snr and LossTerms.loss of all batches, concatenated."
        )
    if np.isnan(log_snr).any():
        raise ValueError(f"{int(np.isnan(log_snr).sum())} of the log_snr are NaN, which is no noise level.")
    level = np.digitize(log_snr, logs.EDGES)
    found = {}
    for name, share in phases.items():
        part = slice(*(round(end * len(losses)) for end in share))
        found[f"{name} (samples {part.start + 1:,}–{part.stop:,})"] = _statistics(level[part], losses[part])
    return found, np.bincount(level, minlength=len(CENTRES)).astype(np.float64)


def _statistics(level: NDArray[np.int64], losses: NDArray[np.float64]) -> Levels:
    size = len(CENTRES)
    count = np.bincount(level, minlength=size).astype(np.float64)
    mean = np.bincount(level, losses, size) / np.maximum(count, 1)
    squares = np.bincount(level, (losses - mean[level]) ** 2, size)
    return Levels(count, mean, np.sqrt(squares / np.maximum(count * (count - 1), 1)))


def _of_log(source: Any, phases: Phases) -> tuple[dict[str, Levels], NDArray[np.float64]]:
    """The levels of every phase, and all counts, from a log; phases of the same rows are one."""
    rows = [row for row in logs.read(source) if "levels" in row]
    if not rows:
        raise ValueError(
            "no row of the log has 'levels', which a loss has whose LossTerms say log_snr; return them from "
            "compute_loss, or give (log_snr, loss) in place of the log."
        )
    about = logs.spans(rows)
    names: dict[tuple[int, ...], list[str]] = {}
    for name, share in phases.items():
        names.setdefault(tuple(logs.within(rows, share)), []).append(name)
    found = {}
    for which, called in names.items():
        losses, count = logs.levels([rows[i] for i in which])
        steps = f"steps {about[which[0]][0] + 1:,.0f}–{about[which[-1]][1]:,.0f}"
        found[f"{' and '.join(called)} ({steps})"] = Levels(count, losses / np.maximum(count, 1), None)
    return found, logs.levels(rows)[1]
