"""Progress in a notebook: plain HTML that stays readable in a saved file, without widgets and scripts."""

import base64
import io
import time
from collections import deque
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, final

from PIL import Image

from gendiff.training.drawing import Curve, chart
from gendiff.training.pace import Clock, Pace, line
from gendiff.training.progress import Progress, in_notebook
from gendiff.training.wording import further, learning_rate, number, rate

REDRAW = 1.0  # seconds between two drawings while nothing is logged
NARROW, WIDEST = 480, 800  # pixels that a picture is shown with
MESSAGES = 8  # as many of the last ones are shown
COLUMNS = 7  # of the table
FONT = "13px/1.6 system-ui, sans-serif"
PLAIN = "border: none; background: transparent; color: inherit; font: inherit;"


@final
class Notebook(Progress):
    """A block of HTML below the cell: bar, time left, curves of loss and learning rate, numbers, samples.

    Every `start` makes a new block; one that is still open is marked as interrupted. The last picture stands
    in a block of its own, below, so that it is sent once and not with every change of the numbers.

    Args:
        clock: seconds.

    Raises:
        ImportError: without IPython.
        ValueError: in a process that is no notebook's kernel.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        try:
            from IPython.display import display
        except ImportError as error:
            raise ImportError(
                "progress='notebook' needs IPython: pip install ipykernel, or use progress='auto'."
            ) from error
        if not in_notebook():
            raise ValueError("progress='notebook' needs a notebook's kernel to show it; use progress='auto'.")
        self._display, self._clock, self._open = display, clock, False

    def start(self, total: int | None, done: int, title: str) -> None:
        self.close("interrupted")
        self._pace, self._title, self._state = Pace(total, done, self._clock), title, "running"
        self._row, self._said = dict[str, Any](), deque[str](maxlen=MESSAGES)
        self._loss, self._rate = Curve(), Curve()
        self._block: Any = None
        self._sheet: Any = None
        self._drawn = self._shown = -float("inf")
        self._open = True
        self._draw()

    def advance(self, count: int = 1) -> None:
        if self._open:
            self._pace.advance(count)
            if self._clock() - self._drawn >= REDRAW:
                self._draw()

    def show(self, row: Mapping[str, Any]) -> None:
        if not self._open:
            return
        self._row.update(row)
        self._pace.done = row.get("step", self._pace.done)
        if row.get("loss") is not None:
            self._loss.add(self._pace.done, row["loss"])
        if row.get("learning_rate") not in (None, []):
            self._rate.add(self._pace.done, _highest(row["learning_rate"]))
        if self._clock() - self._shown >= REDRAW / 10:  # whatever the last update drew: a pause may follow
            self._draw()
            self._shown = self._drawn

    def picture(self, path: Path, title: str) -> None:
        if self._open:
            caption, data = escape(title), _embedded(path)
            style = "max-width: 100%; height: auto;"
            html = (
                f'<div style="font: {FONT}; margin-top: 6px;"><div>{caption}</div>'
                f'<img alt="{caption}" style="{style}" src="data:image/png;base64,{data}"></div>'
            )
            self._sheet = self._put(self._sheet, html, f"{title}: {path}")

    def say(self, text: str) -> None:
        if self._open:
            self._said.append(text)
            self._draw()
        else:
            print(text)

    def close(self, text: str | None = None) -> None:
        if self._open:
            self._pace.end()
            self._state = text or ("finished" if self._pace.complete() else "stopped")
            self._draw()
            self._open = False

    def _draw(self) -> None:
        self._drawn = self._clock()
        plain = line(self._pace, self._row)
        self._block = self._put(self._block, self._html(), f"{self._title} ({self._state})  {plain}")

    def _put(self, handle: Any, html: str, plain: str) -> Any:
        """Show, or replace what a handle shows; the plain text is for what shows no HTML."""
        bundle = {"text/html": html, "text/plain": plain}
        if handle is None:
            return self._display(bundle, raw=True, display_id=True)
        handle.update(bundle, raw=True)
        return handle

    def _html(self) -> str:
        pace, several = self._pace, isinstance(self._row.get("learning_rate"), list | tuple)
        share = "" if not pace.total else f"{100 * pace.done / pace.total:.0f} %"
        told = " · ".join(filter(None, [pace.steps(), share, pace.time()]))
        extent = f'value="{pace.done}" max="{pace.total}"' if pace.total else ""
        several = several and len(set(self._row["learning_rate"])) > 1
        title = "highest learning rate" if several else "learning rate"
        curves = [
            chart("loss, and its running mean", self._loss.points(), (520, 234), smoothed=True, zero=False),
            chart(title, self._rate.points(), (280, 234), smoothed=False, zero=True),
        ]
        said = "".join(f"<div>{escape(text)}</div>" for text in self._said)
        bar = f'<progress {extent} style="width: 320px; max-width: 60%; vertical-align: middle;"></progress>'
        return (
            f'<div style="font: {FONT}; max-width: 820px;">'
            f"<div><b>{escape(self._title)}</b> · {escape(self._state)}</div>"
            f"<div>{bar} {escape(told)}</div>"
            f"<div>{''.join(curves)}</div>{_table(_cells(self._row))}{said}</div>"
        )


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a row, by the heads of their columns."""
    forms = {
        "epoch": ("epoch", lambda value: f"{value:,.2f}"),
        "loss": ("loss", number),
        "learning_rate": ("learning rate", learning_rate),
        "images_per_second": ("images/s", lambda value: rate(value).split()[0]),
        "memory_gb": ("memory", lambda value: f"{value:.1f} GB"),
        "skipped": ("skipped", number),
    }
    known = {head: form(row[name]) for name, (head, form) in forms.items() if row.get(name) not in (None, [])}
    return {**known, **{name.replace("_", " "): value for name, value in further(row).items()}}


def _table(cells: Mapping[str, str]) -> str:
    """A table of several pairs of rows, if it would be too wide."""
    named, style = (
        list(cells.items()),
        f'style="{PLAIN} padding: 0 18px 2px 0; text-align: left; white-space: nowrap;"',
    )
    rows = []
    for at in range(0, len(named), COLUMNS):
        some = named[at : at + COLUMNS]
        heads = "".join(f"<th {style}><b>{escape(head)}</b></th>" for head, _ in some)
        values = "".join(f"<td {style}>{escape(value)}</td>" for _, value in some)
        rows.append(f'<tr style="{PLAIN}">{heads}</tr><tr style="{PLAIN}">{values}</tr>')
    return (
        f'<table style="{PLAIN} border-collapse: collapse; margin: 0;">{"".join(rows)}</table>'
        if rows
        else ""
    )


def _embedded(path: Path) -> str:
    """A PNG file in base64, made narrower if it is wide, and larger by a whole factor if it is small."""
    with Image.open(path, formats=["PNG"]) as image:
        if image.width > WIDEST:
            height = max(1, round(image.height * WIDEST / image.width))
            image = image.convert("RGB").resize((WIDEST, height), Image.Resampling.LANCZOS)
        elif (factor := min(8, NARROW // max(1, image.width))) > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        held = io.BytesIO()
        image.save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode("ascii")


def _highest(value: Any) -> float | int:
    return max(value) if isinstance(value, list | tuple) else value
