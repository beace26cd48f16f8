"""Progress: what a person sees of a run, as a bar, as lines of a log, or in a notebook."""

import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from tqdm import tqdm

from gendiff._checks import unknown
from gendiff.training.pace import Clock, Pace, line
from gendiff.training.wording import GAP, parts

KINDS = ("auto", "bar", "lines", "notebook", "none")
REDRAW = 0.1  # seconds between two drawings of a bar, at least


class Progress(ABC):
    """Something that shows how far a run is; it reads nothing from the device."""

    @abstractmethod
    def start(self, total: int | None, done: int, title: str) -> None:
        """Begin to show a run.

        Args:
            total: updates of the whole run, or None for a run without a known end.
            done: updates that an earlier part of the run has made.
            title: what the run is called.
        """

    @abstractmethod
    def advance(self, count: int = 1) -> None:
        """Count updates; called after every one of them, and cheap."""

    @abstractmethod
    def show(self, row: Mapping[str, Any]) -> None:
        """Take in a logged row; its `step` is where the run is."""

    @abstractmethod
    def picture(self, path: Path, title: str) -> None:
        """Show, or name, a PNG file that was just written."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a message."""

    @abstractmethod
    def close(self, text: str | None = None) -> None:
        """End, with a word on why if there is one; closing twice is closing once."""


@final
class Silent(Progress):
    """Shows nothing."""

    def start(self, total: int | None, done: int, title: str) -> None: ...

    def advance(self, count: int = 1) -> None: ...

    def show(self, row: Mapping[str, Any]) -> None: ...

    def picture(self, path: Path, title: str) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self, text: str | None = None) -> None: ...


@final
class Bar(Progress):
    """One line in a terminal that is drawn again and again, at most ten times a second.

    Args:
        stream: a text file where it is drawn; None is stderr.
        columns: its width; None is the terminal's.
        clock: seconds.
    """

    def __init__(self, stream: Any = None, columns: int | None = None, clock: Clock = time.monotonic) -> None:
        self._stream, self._columns, self._clock = stream, columns, clock
        self._line: _Line | None = None

    def start(self, total: int | None, done: int, title: str) -> None:
        self.close("interrupted")
        self._pace, self._row = Pace(total, done, self._clock), dict[str, Any]()
        self._drawn = self._shown = -float("inf")
        self.say(title)
        self._line = _Line(
            self._text, total=total or None, initial=done, file=self._to(), ncols=self._columns,
            dynamic_ncols=self._columns is None,
        )  # fmt: skip

    def advance(self, count: int = 1) -> None:
        if self._line is not None:
            self._pace.advance(count)
            if self._clock() - self._drawn >= REDRAW:
                self._draw()

    def show(self, row: Mapping[str, Any]) -> None:
        if self._line is not None:
            self._row.update(row)
            self._pace.done = row.get("step", self._pace.done)
            if self._clock() - self._shown >= REDRAW:  # whatever the last update drew: a pause may follow
                self._draw()
                self._shown = self._drawn

    def picture(self, path: Path, title: str) -> None:
        self.say(f"{title}: {path}")

    def say(self, text: str) -> None:
        tqdm.write(text, file=self._to())

    def close(self, text: str | None = None) -> None:
        line, self._line = self._line, None
        if line is not None:
            self._pace.end()
            line.n = self._pace.done
            line.close()
            if text is not None:
                self.say(text)

    def _draw(self) -> None:
        if self._line is not None:
            self._line.n, self._drawn = self._pace.done, self._clock()
            self._line.refresh()

    def _text(self, room: int | None) -> str:
        """As much as there is room for, the most wanted first, in a fixed order."""
        told = parts(self._row)
        told = {"steps": self._pace.steps(), **told, "time": self._pace.time()}
        wanted = ["steps", "loss", "time", "images_per_second", "learning_rate", "skipped", "memory_gb"]
        chosen: list[str] = []
        for name in wanted:
            more = [one for one in told if told[one] and (one in chosen or one == name)]
            if room is None or len(GAP.join(told[one] for one in more)) <= room:
                chosen = more
        return GAP.join(told[one] for one in chosen)

    def _to(self) -> Any:
        return sys.stderr if self._stream is None else self._stream


class _Line(tqdm):
    """tqdm's drawing, with our own text and without its thread and its estimate of time."""

    monitor_interval = 0

    def __init__(self, text: Callable[[int | None], str], **options: Any) -> None:
        self._text = text
        form = "{text}" if options["total"] is None else "{percentage:3.0f}%|{bar}| {text}"
        super().__init__(bar_format=form, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        width = values["ncols"]  # "100%||" and a blank are 7, a bar is no bar below 8
        return {**values, "text": self._text(None if width is None else width - 15)}


@final
class Lines(Progress):
    """A plain line for a logged row, for files and machines that nobody watches.

    Rows that come sooner than `every` after a printed one are left out, but for the last.

    Args:
        stream: a text file where they go; None is stderr.
        every: seconds between two lines, at least.
        clock: seconds.
    """

    def __init__(self, stream: Any = None, every: float | int = 10.0, clock: Clock = time.monotonic) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._open = False

    def start(self, total: int | None, done: int, title: str) -> None:
        self.close("interrupted")
        self._pace, self._open = Pace(total, done, self._clock), True
        self._printed, self._held = -float("inf"), None
        self.say(title)

    def advance(self, count: int = 1) -> None:
        if self._open:
            self._pace.advance(count)

    def show(self, row: Mapping[str, Any]) -> None:
        if self._open:
            self._pace.done = row.get("step", self._pace.done)
            self._held: str | None = line(self._pace, row)
            if self._pace.complete() or self._clock() - self._printed >= self._every:
                self._print()

    def picture(self, path: Path, title: str) -> None:
        self.say(f"{title}: {path}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self._stream is None else self._stream, flush=True)

    def close(self, text: str | None = None) -> None:
        if self._open:
            self._open = False
            self._print()
            if text is not None:
                self.say(text)

    def _print(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._printed = self._clock()
            self.say(held)


@final
class Guarded(Progress):
    """Another progress that cannot stop the run: its first failure is warned of, all of them are counted."""

    def __init__(self, inner: Progress) -> None:
        self.inner, self.failures = inner, 0

    def start(self, total: int | None, done: int, title: str) -> None:
        self._try(self.inner.start, total, done, title)

    def advance(self, count: int = 1) -> None:
        self._try(self.inner.advance, count)

    def show(self, row: Mapping[str, Any]) -> None:
        self._try(self.inner.show, row)

    def picture(self, path: Path, title: str) -> None:
        self._try(self.inner.picture, path, title)

    def say(self, text: str) -> None:
        self._try(self.inner.say, text)

    def close(self, text: str | None = None) -> None:
        self._try(self.inner.close, text)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                warnings.warn(
                    f"the progress display failed: {type(error).__name__}: {error}. Training goes on; its "
                    f"further failures are counted in progress.failures and not told.",
                    RuntimeWarning,
                    stacklevel=3,
                )


def progress_for(kind: str = "auto") -> Progress:
    """The display of that name, kept from stopping the run.

    Args:
        kind: "bar", "lines", "notebook" or "none"; "auto" is a notebook's where there is one, a bar where
            stderr is a terminal, and lines elsewhere.

    Raises:
        ValueError: for another name.
        ImportError: for "notebook" without IPython.

    >>> progress_for("none").say("nobody hears this")
    """
    if kind not in KINDS:
        raise ValueError(unknown("progress", kind, KINDS))
    if kind == "none":
        return Silent()
    if kind == "notebook" or (kind == "auto" and in_notebook()):
        from gendiff.training.notebook import Notebook

        return Guarded(Notebook())
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return Guarded(Bar() if kind == "bar" or (kind == "auto" and terminal) else Lines())


def in_notebook() -> bool:
    """Whether this is an IPython kernel; asking does not import IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
