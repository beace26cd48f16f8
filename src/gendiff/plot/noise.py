"""Schedules: what they make of time."""

from collections.abc import Mapping

import numpy as np
import torch

from gendiff.math.schedules import Schedule
from gendiff.plot.figure import TIME, Picture, legend, picture, style

POINTS = 1001  # of a line
STEEP = 2.5  # a sigma beyond it makes its axis logarithmic
LOWEST = 1e-3  # sigma on such an axis


def schedules(
    *given: Schedule | Mapping[str, Schedule], clip: float | int = 15.0, title: str | None = None
) -> Picture:
    """Draw alpha, sigma and log-SNR over time.

    Args:
        given: schedules, which are called by their class, or by all they are where two are of one class;
            or a mapping that names them.
        clip: log-SNR beyond which lines are cut, > 0: at the data it is infinite, at pure noise it may be.
        title: above the picture.

    Returns:
        A figure with three axes, in that order.

    Raises:
        TypeError: for what is no schedule.
        ValueError: for none at all, and a clip out of range.

    >>> from gendiff.math import Rectified
    >>> picture = schedules(Rectified())
    >>> [float(axes.lines[0].get_ydata()[0]) for axes in picture.axes]
    [1.0, 0.0, 15.0]
    """
    if not 0 < clip < np.inf:
        raise ValueError(f"clip is a log-SNR above 0 at which lines are cut, got {clip}.")
    named = _named(given)
    t = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    figure = picture(10, 3.4, title)
    panels = figure.subplots(1, 3)
    for i, (name, schedule) in enumerate(named.items()):
        level = schedule.level(t)
        log_snr = schedule.log_snr(t).clamp(-clip, clip)
        for axes, values in zip(panels, (level.alpha, level.sigma, log_snr), strict=True):
            axes.plot(t.numpy(), values.numpy(), label=name, lw=1.8, **style(i))
    for axes, label in zip(panels, ("alpha", "sigma", "log-SNR"), strict=True):
        axes.set(title=label, xlabel=TIME, xlim=(0, 1))
        axes.grid(alpha=0.25)
    panels[0].set_ylim(-0.04, 1.04)
    if any(float(schedule.sigma(1.0)) > STEEP for schedule in named.values()):
        panels[1].set_yscale("log")
        panels[1].set_ylim(bottom=LOWEST)
    else:
        panels[1].set_ylim(-0.04, None)
    legend(figure, panels[0])
    return figure


def _named(given: tuple[Schedule | Mapping[str, Schedule], ...]) -> dict[str, Schedule]:
    """Schedules by name; of two that would have one name each is called by all it is."""
    plain = [one for one in given if not isinstance(one, Mapping)]
    kinds = [type(one).__name__ for one in plain]
    named: dict[str, Schedule] = {}
    for one in given:
        if isinstance(one, Mapping):
            named |= one
        else:
            kind = type(one).__name__
            named[kind if kinds.count(kind) == 1 else repr(one)] = one
    for name, schedule in named.items():
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"{name!r} is a {type(schedule).__name__}, not a schedule of gendiff.math, such as "
                f"Rectified() or ScaledLinearBeta()."
            )
    if not named:
        raise ValueError("there is no schedule to draw; give one, several, or {name: schedule}.")
    return named
