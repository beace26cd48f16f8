"""Time laws: which noise levels an objective really trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from gendiff.math.predictions import Name, Prediction
from gendiff.math.schedules import Schedule
from gendiff.objectives import Objective, OnGrid, Stratified, TimeLaw, Uniform, Unweighted
from gendiff.plot.figure import COLOURS, LOG_SNR, TIME, Picture, ink, legend, picture

Law: TypeAlias = TimeLaw | Objective
SHARES = 20_000  # of a law, or somewhat more
POINTS = 800  # of a line
DRAWN = (0.002, 0.998)  # shares of a law between which its log-SNR is shown
SPIKE = 1.5  # times what 98 % of a line stay below, beyond which it leaves the picture
PILE = 3  # times the samples of its neighbour at an end of the times make a pile there


@final
@dataclass(frozen=True, eq=False)
class Density:
    """A law at rising times: the share u below each, their log-SNR, and weights, which are 1 on average."""

    t: NDArray[np.float64]
    u: NDArray[np.float64]
    log_snr: NDArray[np.float64]
    weight: NDArray[np.float64] | None
    piles: str


def times(
    laws: Law | Mapping[str, Law],
    schedule: Schedule,
    *,
    prediction: Prediction | Name | None = None,
    title: str | None = None,
) -> Picture:
    r"""Draw how often noise levels are trained, over time and over log-SNR, and how much they count.

    .. math:: p(t) = \frac{du}{dt},\qquad p(\lambda) = p(t)\,\left|\frac{dt}{d\lambda}\right|

    where u is the share of the law below t and λ the log-SNR. The weighting w of an objective makes it
    :math:`p\,w/E[w]`, whose area is 1 too; a dotted line then shows p alone.

    Args:
        laws: time laws or objectives, by name, or one of them. An objective without a time law has the one
            that it uses with this schedule.
        schedule: what gives times their levels.
        prediction: what the network predicts; needed for an objective with a weighting and no space, since a
            weight is that of an error in a space.
        title: above the picture.

    Returns:
        A figure with two axes, over t and over log-SNR.

    Raises:
        TypeError: for what is neither a time law nor an objective.
        ValueError: for none at all, a law that the schedule does not suit, and a prediction that is missing.

    >>> from gendiff.math import Rectified
    >>> picture = times({"uniform": Uniform(), "low": Uniform(0.0, 0.5)}, Rectified())
    >>> [round(float(line.get_ydata()[0]), 6) for line in picture.axes[0].lines]
    [1.0, 2.0]
    """
    named = laws if isinstance(laws, Mapping) else {type(laws).__name__: laws}
    if not named:
        raise ValueError("there is no time law to draw; give one, or {name: law}.")
    densities = {name: _density(name, law, schedule, prediction) for name, law in named.items()}
    weighted = any(density.weight is not None for density in densities.values())
    figure = picture(9, 3.8, title)
    over_t, over_log_snr = figure.subplots(1, 2)
    for i, (name, density) in enumerate(densities.items()):
        for axes, x in ((over_t, density.t), (over_log_snr, density.log_snr)):
            _draw(axes, x, density, name, COLOURS[i % len(COLOURS)])
    over_t.set(xlabel=TIME, xlim=(0, 1), ylabel="density × weighting, area 1" if weighted else "density")
    over_log_snr.set(xlabel=LOG_SNR)
    ends = np.array([np.interp(DRAWN, density.u, -density.log_snr) for density in densities.values()])
    over_log_snr.set_xlim(-ends[:, 1].max(), -ends[:, 0].min())
    for axes in (over_t, over_log_snr):
        axes.set_ylim(0, _top(axes))
        axes.grid(alpha=0.25)
    if weighted:
        over_t.add_line(Line2D([], [], color=ink(), ls=":", label="times alone, without the weighting"))
    legend(figure, over_t)
    return figure


def _density(name: str, law: Law, schedule: Schedule, prediction: Prediction | Name | None) -> Density:
    """The density of a law, from its quantiles at many shares; equal ones are a time of a table."""
    objective = law if isinstance(law, Objective) else None
    if objective is not None:
        law = objective.times or (Uniform() if schedule.size is None else OnGrid())
    while isinstance(law, Stratified):  # the same law, drawn with less variance
        law = law.law
    if not isinstance(law, TimeLaw):
        raise TypeError(
            f"{name!r} is a {type(law).__name__}; give a time law such as LogitNormal(), or an Objective."
        )
    size = schedule.size or 1
    count = size * -(-SHARES // size)  # as many for each entry of a table
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t, counts = np.unique(law.quantile(shares, schedule).numpy(), return_counts=True)
    u = (counts.cumsum() - counts / 2) / count
    weight = None if objective is None else _weight(name, objective, schedule, t, counts, prediction)
    # A law that is cut off at an end has samples piled up there, which is no density.
    cut = [len(t) > 2 and counts[end] > PILE * counts[inner] for end, inner in ((0, 1), (-1, -2))]
    piles = "".join(
        f", {counts[end] / count:.1%} at t = {t[end]:.3g}"
        for end, is_cut in zip((0, -1), cut, strict=True)
        if is_cut
    )
    kept = slice(int(cut[0]), len(t) - int(cut[1]))
    if len(t[kept]) < 2:
        raise ValueError(f"{name!r} has its times at {t.tolist()}, which is no density to draw.")
    log_snr = schedule.log_snr(torch.from_numpy(t)).numpy()
    return Density(t[kept], u[kept], log_snr[kept], None if weight is None else weight[kept], piles)


def _weight(
    name: str,
    objective: Objective,
    schedule: Schedule,
    t: NDArray[np.float64],
    counts: NDArray[np.int64],
    prediction: Prediction | Name | None,
) -> NDArray[np.float64] | None:
    """The weights at times that occur so often, over their mean; None where all are 1."""
    if isinstance(objective.weighting, Unweighted):
        return None
    space = prediction if objective.space is None else objective.space
    if space is None:
        raise ValueError(
            f"{name!r} weighs the error of what the network predicts: say what that is, such as "
            f"prediction='epsilon', or give the Objective a space."
        )
    weight = objective.weighting.weight(schedule.level(torch.from_numpy(t)), Prediction.of(space)).numpy()
    finite = np.isfinite(weight)
    return np.where(finite, weight, np.nan) / np.average(weight[finite], weights=counts[finite])


def _top(axes: Axes) -> float:
    """Room for all lines but for their spikes, beside which nothing else could be seen."""
    heights = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines]
    return 1.05 * max(min(np.nanmax(y), SPIKE * np.nanquantile(y, 0.98)) for y in heights)


def _draw(axes: Axes, x: NDArray[np.float64], density: Density, name: str, colour: str) -> None:
    """The density over x, which rises or falls with time."""
    finite = np.isfinite(x)
    along, p = x[finite], np.abs(np.gradient(density.u[finite], x[finite]))
    if len(along) > POINTS:  # evenly over the axis, not by share, so that tails have points too
        places = np.linspace(along[0], along[-1], POINTS)
        rising = np.sign(along[-1] - along[0])
        kept = np.unique(np.searchsorted(rising * along, rising * places).clip(max=len(along) - 1))
    else:
        kept = np.arange(len(along))
    shown = p if density.weight is None else p * density.weight[finite]
    label = f"{name}{density.piles}"
    axes.plot(along[kept], shown[kept], color=colour, lw=1.8, label=label)
    axes.fill_between(along[kept], shown[kept], color=colour, alpha=0.1, lw=0)
    if density.weight is not None:
        axes.plot(along[kept], p[kept], color=colour, lw=1.2, ls=":")
