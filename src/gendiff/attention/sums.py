"""What a capture of maps gathers at one layer, in memory that stays where it is."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from gendiff.attention.site import Site


@final
class Sums:
    """What was gathered at one site, in tensors that stay where they are: a replayed graph adds to them.

    Args:
        site: the site.
        tokens: places of the tokens among those of the text; None is all.
        peers: the sums of every site of the capture.

    Attributes:
        total: sum of the maps [tokens, H, W], float32.
        count: how many maps it is the sum of, float32 scalar.
        columns: the places, on the device; None is all.
    """

    def __init__(self, site: Site, tokens: Sequence[int] | None, peers: Mapping[str, "Sums"]) -> None:
        self.site, self.tokens, self.peers = site.name, tokens, peers
        self.width = site.heads, site.head_dim
        self.total, self.count = torch.zeros(0), torch.zeros(())
        self.columns: Tensor | None = None
        self._clean, self._met = self.total._version, False

    @property
    def used(self) -> bool:
        """Whether anything was added since it was made or cleared; nothing is read from the device."""
        return self.total._version != self._clean

    def ready(self, text: int, height: int, width: int, device: torch.device) -> bool:
        """Take memory for maps of that size, where there is none.

        While a graph is traced this runs at once and is no part of it. Sites as wide that were not met yet
        get the same size, so that layers alike find what they need, and share one graph.

        Raises:
            IndexError: for a token behind the text's end.
            RuntimeError: while a CUDA graph is being captured, which would hold the memory.
            ValueError: where maps of another size were gathered already.
        """
        self._met = True
        kept = text if self.tokens is None else len(self.tokens)
        shape = (kept, height, width)
        if tuple(self.total.shape) == shape and self.total.device == device:
            return True
        if self.tokens is not None and max(self.tokens) >= text:
            raise IndexError(
                f"the text has {text} tokens at {self.site}, and token {max(self.tokens)} is asked."
            )
        if self.used:
            raise ValueError(
                f"the maps of {self.site} were {tuple(self.total.shape)} before and are {shape} now; call "
                f"reset() in between, or give the Capture a size that all are brought to."
            )
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a Capture takes its memory in its first call, which is one before a CUDA graph."
            )
        for sums in self.peers.values():
            if sums is self or not (sums.width != self.width or sums.used or sums._met):
                sums._make(shape, device)
        return True

    # what torch.compiler.assume_constant_result sets, which loads the compiler for it
    ready._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

    def _make(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total, self.count = torch.zeros(shape, device=device), torch.zeros((), device=device)
        self.columns = None if self.tokens is None else torch.tensor(self.tokens, device=device)
        self._clean = self.total._version

    def clear(self) -> None:
        """Begin again, in the same memory."""
        self.total.zero_()
        self.count.zero_()
        self._clean, self._met = self.total._version, False
