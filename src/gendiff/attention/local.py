"""Attention within a window of the image or video."""

from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from gendiff.attention.context import Context, Grid
from gendiff.attention.middleware import Middleware
from gendiff.attention.regional import image_tokens, only
from gendiff.attention.site import Site


@final
class SlidingWindow(Middleware):
    r"""Each token of the image sees the tokens of a window round it, and no others.

    Along an axis of length n, token i sees the `size` tokens from :math:`\min(\max(i - \lfloor size/2
    \rfloor, 0), n - size)` on: a window at the border is moved inside and stays as large. An axis that is no
    longer than the window is seen whole, and where all are, the layer computes just what it does without.
    Text sees all and is seen by all, and so are keys that another middleware appends.

    It is a mask of all tokens by all tokens: what neighbourhood attention says, not how fast it is. At
    temporal sites the axis is that of the frames.

    Args:
        size: tokens along each axis, or (frames, height, width).

    Raises:
        ValueError: for sizes below 1, cross sites, tokens that are no grid, and layers with fewer keys than
            queries.

    References:
        Hassani et al. 2023, *Neighborhood attention transformer*, arXiv 2204.07143.

    >>> SlidingWindow(3).seen(Grid(1, 1, 5), torch.device("cpu")).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, size: int | tuple[int, int, int]) -> None:
        self.size = Grid(size, size, size) if isinstance(size, int) else Grid(*size)
        if min(self.size) < 1:
            raise ValueError(f"a window has at least one token along each axis, got {size}.")

    @property
    def signature(self) -> tuple[Any, ...]:
        return tuple(self.size)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self", "joint", "single", "temporal"))

    def seen(self, grid: Grid, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which tokens of a grid see which."""
        frames, height, width = (
            _axis(length, size, device) for length, size in zip(grid, self.size, strict=True)
        )
        seen = (
            frames[:, None, None, :, None, None]
            & height[:, None, None, :, None]
            & width[None, :, None, None, :]
        )
        return seen.flatten(3).flatten(0, 2)

    def on_bias(self, site: Site, context: Context, q: Tensor, k: Tensor) -> Tensor | None:
        """Minus infinity outside of the window."""
        queries, keys = q.shape[-2], k.shape[-2]
        if keys < queries:
            raise ValueError(
                f"SlidingWindow places keys as it does queries, and {site.name} has {queries} queries and "
                f"{keys} keys; take off what removes keys there."
            )
        rows, columns = image_tokens(site, context, queries)
        grid = context.grid(site, rows.stop - rows.start)
        if all(size >= length for size, length in zip(self.size, grid, strict=True)):
            return None
        seen = self.seen(grid, q.device)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        around = (columns.start, keys - columns.stop, rows.start, queries - rows.stop)
        return functional.pad(bias, around)


def _axis(length: int, size: int, device: torch.device) -> Bool[Tensor, "length length"]:
    """Which places along an axis see which."""
    place = torch.arange(length, device=device)
    first = (place - size // 2).clamp(0, max(length - size, 0))[:, None]
    return (place >= first) & (place < first + size)
