"""What every picture shares: the figure, its colours and its legend, and numbers out of tensors."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, TypeAlias, final

import numpy as np
from jaxtyping import Shaped
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from gendiff.plot.text import width

Array: TypeAlias = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."]
# Okabe & Ito's colours, which the colour-blind tell apart; without yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
LOG_SNR = "log-SNR (noise ← → data)"
TIME = "t (data ← → noise)"
SHARPNESS = 2  # pixels of a picture in a notebook for each one of its size on the page


@final
class Picture(Figure):
    """A matplotlib figure that a notebook shows when a cell returns it.

    It is not one of pyplot's, which keeps every figure until it is closed and which only shows figures once
    it was imported. Everything that a `Figure` can do it can do: `picture.savefig("loss.pdf")`,
    `picture.axes[0].set_ylim(0, 1)`.

    >>> Picture(figsize=(2, 1))._repr_png_()[1]
    {'width': 200, 'height': 100}
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """What IPython asks for: a PNG and the size at which it is shown."""
        file = BytesIO()
        self.savefig(file, format="png", dpi=SHARPNESS * self.dpi)
        wide, high = (round(inches * self.dpi) for inches in self.get_size_inches())
        return file.getvalue(), {"width": wide, "height": high}


def picture(wide: float | int, high: float | int, title: str | None) -> Picture:
    """An empty picture of that size in inches, whose parts are kept apart."""
    made = Picture(figsize=(wide, high), layout="constrained")
    if title is not None:
        made.suptitle(title)
    return made


def style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th of several lines; the first twelve differ."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def ink() -> str:
    """The colour of text, which stands out from the background whatever style the user has set."""
    return rcParams["text.color"]


def legend(figure: Figure, *axes: Axes) -> None:
    """One legend below all axes, where it hides nothing."""
    found = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    if not found:
        return
    handles, labels = zip(*found, strict=True)
    room, needs = figure.get_size_inches()[0], [width(label, 10) + 0.8 for label in labels]
    columns = len(labels) if sum(needs) < room else max(1, int(room / max(needs)))
    made = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text in made.get_texts():
        text.set_parse_math(False)  # names are the user's: a "$" in them is a dollar


def loss_scale(axes: Axes, losses: NDArray[np.float64], log: bool | None) -> None:
    """Scale the axis of losses: from 0, or logarithmic where that is asked for or they span a decade."""
    finite = losses[np.isfinite(losses)]
    positive = len(finite) > 0 and bool((finite > 0).all())
    if log and not positive:
        raise ValueError(
            "log=True needs losses above 0, and some are not; leave log out, which decides by their range."
        )
    if log or (log is None and positive and finite.max() >= 10 * finite.min()):
        axes.set_yscale("log")
        within = finite.max() < 100 * finite.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif positive:
        axes.set_ylim(bottom=0)


def numbers(value: Array | Sequence[Any], name: str) -> NDArray[np.float64]:
    """Real numbers of the host as float64, or an error that names what holds none."""
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} holds numbers, got {type(value).__name__}: {error}.") from error
