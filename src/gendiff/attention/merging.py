"""Fewer tokens for self-attention: alike ones merged, or keys and values sampled."""

import inspect
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from gendiff.attention.context import Context, Grid
from gendiff.attention.middleware import Middleware
from gendiff.attention.regional import only
from gendiff.attention.site import Site


class Plan(NamedTuple):
    """Which tokens are merged into which.

    Attributes:
        kept: tokens that stay, [B, kept].
        gone: tokens that are merged, [B, gone].
        into: the number of the destination of each, [B, gone].
        places: the destinations, [destinations].
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    places: Tensor


@final
class TokenMerging(Middleware):
    r"""Tokens that resemble another are merged into it before a layer, and given its answer after.

    Every second token along height and width is a destination. Of the others, those whose cosine similarity
    to their nearest destination is greatest, `ratio` of all tokens, are replaced by it; a destination becomes
    the mean of itself and what is merged into it. After the layer each of them says what it says. Similarity
    is that of the layer's input.

    The published destinations are one at random in each 2×2 window; here they are its first, so that a run
    repeats exactly. The published use is ratio=0.5 at the sites of the highest resolution. A ratio of 0
    changes nothing.

    Between the two hooks the middleware holds the plan of the layer that runs, in Python; nothing is left of
    it after. What it changes is the number of tokens, so that the stack refuses to limit it to rows or steps.

    Args:
        ratio: share of all tokens that is merged, in [0, 0.75], and no more than there are beside the
            destinations; it fixes shapes, and is no buffer.

    Raises:
        ValueError: for other ratios, sites that are not self, and layers that have positions of tokens as an
            argument or add their own input, which knows no merging.

    References:
        Bolya & Hoffman 2023, *Token merging for fast Stable Diffusion*, arXiv 2303.17604.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("kv",)

    def __init__(self, ratio: float | int) -> None:
        if not 0 <= ratio <= 0.75:
            raise ValueError(f"a share of tokens in [0, 0.75] can be merged, got {ratio}.")
        self.ratio = ratio
        self._plan: Plan | None = None

    @property
    def signature(self) -> tuple[Any, ...]:
        return (self.ratio,)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self",))
        for site in sites:
            if site.family != "unet" or _placed(site) or site.module.residual_connection:
                raise ValueError(
                    f"TokenMerging works at self-attention that neither adds its own input nor knows places "
                    f"of tokens, as UNets have it, and {site.name} ({site.processor}) does; select others."
                )

    def on_inputs(
        self, site: Site, context: Context, hidden: Tensor, other: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Merge."""
        tokens = hidden.shape[1]
        grid = context.grid(site, tokens)
        count = min(int(self.ratio * tokens), tokens - len(destinations(grid)))
        if count == 0:
            return hidden, other
        self._plan = plan(hidden, grid, count)
        return merge(hidden, self._plan), other

    def on_output(self, site: Site, context: Context, out: Any) -> Any:
        """Unmerge."""
        found, self._plan = self._plan, None
        return out if found is None else unmerge(out, found)


def _placed(site: Site) -> bool:
    """Whether the layer is given places of tokens, which merged ones have not."""
    given = inspect.signature(type(site.module.processor).__call__).parameters
    return any("rotary" in name for name in given)


def destinations(grid: Grid) -> list[int]:
    """Tokens that others are merged into: the first of each 2×2 window."""
    frames, height, width = grid
    return [
        (f * height + y) * width + x
        for f in range(frames)
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]


def plan(hidden: Tensor, grid: Grid, count: int) -> Plan:
    """Which `count` tokens of [B, tokens, channels] are merged, by bipartite soft matching."""
    place = torch.arange(hidden.shape[1], device=hidden.device).reshape(grid)
    even = torch.zeros_like(place, dtype=torch.bool)
    even[:, ::2, ::2] = True
    order = even.flatten().logical_not().to(torch.uint8).argsort(dim=0, stable=True)  # destinations first
    number = len(destinations(grid))
    places, rest = order[:number], order[number:]
    unit = functional.normalize(hidden.detach().float(), dim=-1)
    best, into = (unit[:, rest] @ unit[:, places].mT).max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    gone, kept = ranked[:, :count], ranked[:, count:]
    return Plan(rest[kept], rest[gone], into.gather(1, gone), places)


def merge(hidden: Tensor, plan: Plan) -> Tensor:
    """[B, kept and destinations, channels]: what is merged is in the mean of its destination."""
    # a product, whose sums have one order, unlike those of a scatter
    chosen = functional.one_hot(plan.into, len(plan.places)).to(hidden.dtype)
    total = hidden[:, plan.places] + chosen.mT @ _take(hidden, plan.gone)
    mean = total / (1 + chosen.sum(1))[..., None]
    return torch.cat([_take(hidden, plan.kept), mean], 1)


def unmerge(out: Tensor, plan: Plan) -> Tensor:
    """[B, tokens, channels] from what `merge` left; what was merged gets its destination's."""
    kept, places = out.split([plan.kept.shape[1], len(plan.places)], 1)
    parts = torch.cat([kept, places, _take(places, plan.into)], 1)
    where = torch.cat([plan.kept, plan.places.expand(len(out), -1), plan.gone], 1)
    return _take(parts, where.argsort(1))


def _take(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))


@final
class DownsampledKV(Middleware):
    """Keys and values of every `factor`-th token along height and width; all queries stay.

    A factor of 1 changes nothing. The published use is 2 at 64×64 latents' highest resolution and more at
    larger ones. It changes the number of keys, so that the stack refuses to limit it to rows or steps.

    Args:
        factor: distance of the tokens that are kept, at least 1; it fixes shapes, and is no buffer.

    Raises:
        ValueError: for other factors, sites that are not self, and tokens that are no grid.

    References:
        Smith et al. 2024, *ToDo: token downsampling for efficient generation of high-resolution images*,
        arXiv 2402.13573.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("kv",)

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise ValueError(f"every factor-th token is kept, so that a factor is at least 1, got {factor}.")
        self.factor = factor

    @property
    def signature(self) -> tuple[Any, ...]:
        return (self.factor,)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self",))

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep some of the keys and values."""
        if self.factor == 1:
            return q, k, v
        grid, by = context.grid(site, k.shape[-2]), self.factor
        k, v = (x.unflatten(-2, tuple(grid))[..., ::by, ::by, :].flatten(-4, -2) for x in (k, v))
        return q, k, v
