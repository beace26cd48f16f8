"""Prompts for regions of the image; which tokens of a layer are the image's."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn import functional

from gendiff.attention.context import Context
from gendiff.attention.middleware import Middleware
from gendiff.attention.site import Site
from gendiff.attention.temperature import moved


@final
class Regional(Middleware):
    r"""Tokens of the image in a region see only the text that is meant for it.

    Added to the scores of image token i and text token j is 0 where it may be seen, else minus infinity. It
    may be seen where i is in no region, j in no span, or both belong to the same region. A token in several
    regions sees the spans of all of them. At joint and single sites the text sees the image by the same rule;
    text sees all text, and the image all of the image.

    For a pipeline with guidance limit it to the rows that have the prompt: `stack.add(..., rows="cond")`.

    Args:
        masks: where each region is, booleans or coverages in [0, 1], [regions, height, width] of any size.
            They are averaged over the cells of a layer's grid; the frames of a video share them.
        spans: first token and the one behind the last of each region's text.
        threshold: share of a cell that a region covers at least where the cell is in it, in (0, 1].

    Attributes:
        masks: the buffer of masks; write other regions of the same size into it in place.

    Raises:
        ValueError: for numbers of masks and spans that differ, empty spans, spans behind the text, and sites
            where no text is seen.

    References:
        Chen et al. 2024, *Training-free regional prompting for diffusion transformers*, arXiv 2411.02395, has
        such masks at joint sites (and separates the texts and the regions of each other too).

    >>> left = torch.zeros(1, 8, 8)
    >>> left[..., :4] = 1
    >>> Regional(left, [(1, 4)]).allowed(torch.Size([1, 1, 2]), 6).int()  # left cell, right cell; six tokens
    tensor([[1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    >>> Regional(torch.cat([left, 1 - left]), [(1, 4), (4, 5)]).allowed(torch.Size([1, 1, 2]), 6).int()
    tensor([[1, 1, 1, 1, 0, 1],
            [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        masks: Shaped[Tensor, "regions height width"],
        spans: Sequence[tuple[int, int]],
        threshold: float | int = 0.5,
    ) -> None:
        if len(masks) != len(spans) or not len(spans):
            raise ValueError(
                f"each region has a mask and a span, got {len(masks)} masks and {len(spans)} spans."
            )
        wrong = [span for span in spans if not 0 <= span[0] < span[1]]
        if wrong:
            raise ValueError(f"a span goes from its first token to the one behind its last, got {wrong[0]}.")
        if not 0 < threshold <= 1:
            raise ValueError(f"a threshold is a share of a cell in (0, 1], got {threshold}.")
        self.masks, self.spans = masks.float(), torch.tensor([list(span) for span in spans])
        self.end, self.threshold = max(stop for _, stop in spans), threshold

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("cross", "joint", "single"))

    def allowed(self, grid: Sequence[int], text: int) -> Bool[Tensor, "tokens text"]:
        """Which tokens of an image of this grid (frames, height, width) see which tokens of the text."""
        frames, height, width = grid
        cover = functional.adaptive_avg_pool2d(self.masks[None], (height, width))[0].flatten(1)
        inside = (cover >= self.threshold).repeat(1, frames)
        place = torch.arange(text, device=self.spans.device)
        meant = (place >= self.spans[:, :1]) & (place < self.spans[:, 1:])
        same = (inside[:, :, None] & meant[:, None]).any(0)
        return same | ~inside.any(0)[:, None] | ~meant.any(0)

    def on_bias(self, site: Site, context: Context, q: Tensor, k: Tensor) -> Tensor | None:
        """Minus infinity where image and text do not belong together."""
        moved(self, "masks", q.device)
        moved(self, "spans", q.device)
        queries, keys = q.shape[-2], k.shape[-2]
        rows, columns = image_tokens(site, context, queries)
        image = rows.stop - rows.start
        crossing = site.kind == "cross"
        text = keys if crossing else context.text or 0
        if self.end > text:
            raise ValueError(f"a span ends at token {self.end}, and {site.name} sees {text} tokens of text.")
        seen = self.allowed(context.grid(site, image), text)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        if crossing:
            return bias
        rest = slice(0, text) if columns.start else slice(image, image + text)
        to_text = _block(bias, rows, rest, queries, keys)
        return to_text if queries == image else to_text + _block(bias.mT, rest, columns, queries, keys)


def _block(bias: Tensor, rows: slice, columns: slice, queries: int, keys: int) -> Tensor:
    """A block of scores among zeros."""
    return functional.pad(bias, (columns.start, keys - columns.stop, rows.start, queries - rows.stop))


def image_tokens(site: Site, context: Context, queries: int) -> tuple[slice, slice]:
    """Where the image is among the queries of a layer, and among its keys, by the number of queries.

    Keys that a middleware appends stand behind. A joint layer of one output has the image alone as queries.

    Raises:
        ValueError: where text is among them and its length is not known, or leaves no image.
    """
    if site.text not in ("first", "last"):
        return slice(0, queries), slice(0, queries)
    text, alone = context.text, site.kind == "joint" and site.outputs == 1
    if text is None or not 0 < text < (queries + text if alone else queries):
        raise ValueError(
            f"{site.name} has the text among its {queries} tokens, and the network was given a text of "
            f"{text} tokens; say how long it is with stack.context.text."
        )
    total = queries + text if alone else queries
    keys = slice(text, total) if site.text == "first" else slice(0, total - text)
    return (slice(0, queries) if alone else keys), keys


def only(middleware: Middleware, sites: Sequence[Site], kinds: Sequence[str]) -> None:
    """Refuse sites of other kinds than these.

    Raises:
        ValueError: with the first that is refused, and what is accepted.
    """
    wrong = next((site for site in sites if site.kind not in kinds), None)
    if wrong is not None:
        raise ValueError(
            f"{type(middleware).__name__} works at sites of kind {', '.join(kinds)}, and {wrong.name} is "
            f"{wrong.kind}; select others, as on=Kind.{kinds[0].upper()}."
        )
