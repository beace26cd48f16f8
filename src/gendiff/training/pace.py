"""How far a run is, and how long the rest will take."""

import time
from collections.abc import Callable, Mapping
from typing import Any, final

from gendiff.training.wording import GAP, count, further, parts, span

Clock = Callable[[], float | int]


@final
class Pace:
    """How far a run is, and how long the rest takes at the mean rate since its first update.

    The first update is left out of the rate, since it compiles and warms up.

    Args:
        total: updates of the whole run, or None.
        done: updates made before.
        clock: seconds.

    >>> now = iter([0.0, 60.0, 64.0])
    >>> pace = Pace(total=100, done=50, clock=lambda: next(now))
    >>> pace.advance(1)  # at 60 s
    >>> pace.advance(2)
    >>> pace.left()  # 47 more, 2 in 4 s
    94.0
    """

    def __init__(self, total: int | None, done: int, clock: Clock = time.monotonic) -> None:
        self.total, self.done, self._clock = total, done, clock
        self._began = clock()
        self._ended: float | int | None = None
        self._first: tuple[float | int, int] | None = None

    def advance(self, count: int) -> None:
        self.done += count
        if self._first is None:
            self._first = self._clock(), self.done

    def left(self) -> float | int | None:
        """Seconds to the end, or None while nobody can say."""
        if self.total is None or self._first is None:
            return None
        at, done = self._first
        if self.done >= self.total:
            return 0.0
        if self.done <= done:
            return None
        return (self.total - self.done) * (self._clock() - at) / (self.done - done)

    def passed(self) -> float | int:
        """Seconds since the start, up to the end."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    def end(self) -> None:
        """Nothing comes any more."""
        self._ended = self._clock()

    def complete(self) -> bool:
        return self.total is not None and self.done >= self.total

    def steps(self) -> str:
        return count(self.done) if self.total is None else f"{count(self.done)}/{count(self.total)}"

    def time(self) -> str:
        """What is left, or what it took; empty while nobody can say."""
        if self._ended is not None or self.complete():
            return f"{'took' if self.complete() else 'after'} {span(self.passed())}"
        left = self.left()
        return "" if left is None else f"{span(left)} left"


def line(pace: Pace, row: Mapping[str, Any]) -> str:
    """A row in one line of plain ASCII."""
    whole = [] if not pace.total else [f"{100 * pace.done / pace.total:3.0f} %"]
    epoch = [f"epoch {row['epoch']:.2f}"] if "epoch" in row else []
    rest = [f"{name} {value}" for name, value in further(row).items()]
    told = [pace.steps(), *whole, *epoch, *parts(row).values(), *rest, pace.time()]
    return GAP.join(filter(None, told))
