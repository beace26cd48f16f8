"""What a dataset is told while one of its samples is loaded: the sample's own randomness."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import final

from gendiff.random import Rng

_current: ContextVar[Callable[[], Rng]] = ContextVar("sample_rng", default=lambda: Rng(0))


class BrokenSample(Exception):
    """Raised by a dataset for a sample that cannot be read and is to be skipped; a loader counts it.

    Args:
        id: of the sample.
        reason: what is wrong with it.
    """

    def __init__(self, id: str | int, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def sample_rng() -> Rng:
    """The randomness of the sample that is being loaded, for crops, flips and whatever else is drawn.

    Its numbers are a function of (seed, epoch, sample id, occurrence), so that they do not depend on workers,
    batches or an interruption. Every call starts over: two datasets that are zipped draw the same crop. Where
    no loader asks, as in `dataset[0]` in a notebook, it is an `Rng(0)`, the same at every call.

    >>> sample_rng().uniform("crop", (2,)).shape
    torch.Size([2])
    """
    return _current.get()().fold("data")


@final
class sampled_with:  # a class costs a sample half of what a generator would
    """While it is open, `sample_rng` gives children of what this function makes."""

    __slots__ = ("make", "token")

    def __init__(self, make: Callable[[], Rng]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.token = _current.set(self.make)

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)
