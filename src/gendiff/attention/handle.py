"""What every attachment returns: the way to take it off again."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, final

import torch


@final
class Handle:
    """Something that was attached; `remove` takes it off, and so does the end of a `with` block.

    Args:
        undo: takes it off.
        what: what it is, for messages.
        of: the object that was attached.

    Attributes:
        middleware: the object that was attached.
        attached: whether it still is.

    >>> events = []
    >>> with Handle(lambda: events.append("off"), "a patch"):
    ...     events.append("on")
    >>> events
    ['on', 'off']
    """

    def __init__(self, undo: Callable[[], None], what: str, of: Any = None) -> None:
        self._undo, self._what, self.middleware, self.attached = undo, what, of, True

    def remove(self) -> None:
        """Take it off; a second time changes nothing."""
        if self.attached:
            changeable()
            self.attached = False
            self._undo()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({self._what}{'' if self.attached else ', removed'})"


def changeable() -> None:
    """Refuse a change while a CUDA graph is being captured, which would hold half of it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attention is changed while a CUDA graph is being captured; attach and remove outside of it."
        )
