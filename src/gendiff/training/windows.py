"""Windows: the micro-batches of one update, and the number of samples that its gradient is divided by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, final

from gendiff._checks import unknown
from gendiff.data.loader import Micro

Policy = Literal["carry", "short", "drop"]
POLICIES = ("carry", "short", "drop")


@final
@dataclass(frozen=True)
class Window:
    """The micro-batches of one update.

    Attributes:
        micros: this process's micro-batches, in order.
    """

    micros: tuple[Micro, ...]

    @property
    def samples(self) -> int:
        """N, the real samples on all processes: what the sum of the losses is divided by."""
        return sum(micro.total for micro in self.micros)

    @property
    def end(self) -> tuple[int, int]:
        """(epoch, micro-batch) that comes after it."""
        last = self.micros[-1]
        return (last.epoch + 1, 0) if last.last else (last.epoch, last.index + 1)


def windows(micros: Iterable[Micro], length: int, policy: Policy | str = "carry") -> Iterator[Window]:
    """Group a stream of micro-batches into windows.

    A window is complete before its first backward pass, so that its divisor is known then. What the end of
    the stream leaves over is a short window, unless the policy is "drop".

    Args:
        micros: the stream, over as many epochs as it has.
        length: micro-batches of a window, >= 1.
        policy: what the end of an epoch does to a window: "carry" lets it go on into the next epoch, "short"
            closes it, "drop" leaves out what it has.

    >>> from gendiff.data import Loader
    >>> loader = Loader([{"x": 0.0}] * 3, batch_size=1)
    >>> [len(w.micros) for w in windows(loader.stream(epochs=2), 2)]
    [2, 2, 2]
    >>> [len(w.micros) for w in windows(loader.stream(epochs=2), 2, "short")]
    [2, 1, 2, 1]
    """
    _check(length, policy)
    held: list[Micro] = []
    for micro in micros:
        held.append(micro)
        if len(held) == length or (micro.last and policy == "short"):
            yield Window(tuple(held))
            held.clear()
        elif micro.last and policy == "drop":
            held.clear()
    if held:
        yield Window(tuple(held))


def count(micros: int, length: int, policy: Policy | str, epochs: int) -> int:
    """The number of windows of some epochs of `micros` micro-batches.

    >>> [count(3, 2, policy, epochs=3) for policy in POLICIES]
    [5, 6, 3]
    """
    _check(length, policy)
    if policy == "carry":
        return -(-micros * epochs // length)
    return epochs * (-(-micros // length) if policy == "short" else micros // length)


def _check(length: int, policy: str) -> None:
    if length < 1:
        raise ValueError(f"a window has at least one micro-batch, got {length}.")
    if policy not in POLICIES:
        raise ValueError(unknown("windows", policy, POLICIES))
