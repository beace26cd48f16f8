"""Maps of which image tokens look at which words, gathered while a model samples."""

import itertools
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gendiff._checks import unknown
from gendiff.attention.context import Context
from gendiff.attention.kernels import Call, probabilities
from gendiff.attention.middleware import Middleware
from gendiff.attention.run import Attachment, layer_of
from gendiff.attention.site import Site
from gendiff.attention.sums import Sums
from gendiff.attention.words import Tokens, kept

TEXTUAL = ("cross", "joint", "single")
MOST = 2**25  # probabilities in memory at a time, float32: 128 MB
_numbers = itertools.count()


@final
class Capture(Middleware):
    r"""The probabilities with which image tokens attend to the tokens of the text, as maps [tokens, H, W].

    With the query :math:`q_x` of the image's token x and all keys of a layer, the map of token k is
    :math:`\text{softmax}_j(q_x k_j^\top / \sqrt{d})_k`, the mean over heads, rows of the batch, frames, steps
    and sites. At cross sites all keys are text; at joint and single sites the softmax is over both streams,
    and the text's columns at the image's rows are kept. Sites without text are passed over.

    Maps are computed beside the layer, a piece of the queries at a time: its kernel and its output stay what
    they are. Sums lie in tensors that are written in place, so that compiled steps and replayed CUDA graphs
    gather too.

    The layer's own mask, causal order and scale count, and so do the queries, keys and biases that other
    middlewares made; what they do to probabilities does not.

    Args:
        tokens: places of the tokens in the text, or for each word its places (see `words_of`), for one map a
            word; None is every token.
        rows: the part of the batch that is looked at, one of the context's rows; None is all of it.
        reduce: "mean" over heads, steps and sites, or their "sum".
        size: height and width to which every map is brought, bilinear, before it is added; None keeps the
            grid of each site, whose size may then change after a `reset` only.
        chunk: number of queries whose probabilities are in memory at a time; None is as many as have 32
            million of them.

    Raises:
        ValueError: for no token, an unknown reduction, a chunk or a size below 1.

    The paper sums over heads, sites and steps: `reduce="sum"` at the cross sites of a UNet. Tang et al.,
    "What the DAAM: Interpreting Stable Diffusion Using Cross Attention" (2022), arXiv 2210.04885.

    >>> Capture(tokens={"cat": [2], "hat": [5, 6]}).words
    ('cat', 'hat')
    """

    def __init__(
        self,
        tokens: Tokens = None,
        *,
        rows: str | None = None,
        reduce: Literal["mean", "sum"] = "mean",
        size: tuple[int, int] | None = None,
        chunk: int | None = None,
    ) -> None:
        self.words, self._groups, self.tokens = kept(tokens)
        if reduce not in ("mean", "sum"):
            raise ValueError(unknown("reduction", reduce, ("mean", "sum")))
        if (chunk is not None and chunk < 1) or (size is not None and min(size) < 1):
            raise ValueError(f"chunk and both parts of size are numbers >= 1, got {chunk} and {size}.")
        self.rows, self.reduce, self.size, self.chunk = rows, reduce, size, chunk
        self._sums: dict[str, Sums] = {}
        self._mark = f"_capture{next(_numbers)}"

    def __repr__(self) -> str:
        kept = ", ".join(self.words) or ("all tokens" if self.tokens is None else f"tokens {self.tokens}")
        return f"Capture({kept}; {self.reduce} at {len(self._sums)} sites)"

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled or captured step depends on."""
        return self.tokens, self.rows, self.reduce, self.size, self.chunk

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose maps it keeps."""
        return tuple(self._sums)

    # ---- gathering

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        """Give every site its sums.

        Raises:
            ValueError: for sites without text, unknown rows, or a site that it is at already.
        """
        textual = [site for site in sites if site.kind in TEXTUAL and site.text != "none"]
        if not textual:
            raise ValueError(
                f"a Capture keeps what the image sees in the text, and none of {len(sites)} sites has text "
                f"among its keys; choose on=Kind.CROSS, or Kind.JOINT | Kind.SINGLE."
            )
        if self.rows is not None and self.rows not in context.rows:
            raise ValueError(unknown("rows", self.rows, context.rows))
        layers = {site.name: layer_of(site.module) for site in sites}
        for site in sites:
            layer = layers[site.name]
            if layer is not None and any(one.middleware is self for one in layer.attachments):
                raise ValueError(f"this Capture is at {site.name} already; use another, or remove it first.")
        for site in sites:
            layer, sums = layers[site.name], None
            if site in textual:
                sums = self._sums.setdefault(site.name, Sums(site, self.tokens, self._sums))
            site.state[self._mark] = sums  # a look-up by name would be a graph for every layer

    def on_heads(self, site: Site, context: Context, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add this call's map; the heads stay as they are."""
        sums: Sums | None = site.state[self._mark]
        if sums is not None:
            with torch.no_grad():
                self._add(sums, site, context, q, k)
        return out

    def _add(self, sums: Sums, site: Site, context: Context, q: Tensor, k: Tensor) -> None:
        limits, call = _limits(site, self)
        rows = self.rows or limits.rows
        if limits.rows not in (None, rows):
            raise ValueError(f"a Capture of the rows {rows!r} was added to {site.name} for {limits.rows!r}.")
        image, first, text = _spans(site, context, q, k)
        part = slice(None) if rows is None else context.rows_of(rows, len(q))
        call = call.part(part, image, q, k)
        q, k = q[part][:, :, image], k[part]
        grid = context.grid(site, q.shape[2], line=True)
        sums.ready(text, *(self.size or (grid.height, grid.width)), q.device)
        columns = slice(first, first + text) if sums.columns is None else sums.columns + first
        new = seen(q, k, call, columns, self.chunk).T.unflatten(1, tuple(grid)).mean(1)
        new = new * q.shape[1] if self.reduce == "sum" else new
        new = _resized(new, self.size or tuple(new.shape[1:]))
        if limits.window is None:
            sums.total.add_(new)
            sums.count.add_(1)
        else:
            weight = limits.window.open(context).float()
            sums.total.add_(new * weight)
            sums.count.add_(weight)

    # ---- what was gathered

    def maps(self, size: tuple[int, int] | None = None) -> Float[Tensor, "tokens height width"]:
        """The maps over all sites and steps.

        Args:
            size: height and width, bilinear; None is that of the largest site.

        Returns:
            A map for each token, or for each word the mean of its tokens', float32.

        Raises:
            ValueError: where nothing was gathered, or the sites have texts of different lengths.
        """
        found = {name: self._of(sums) for name, sums in self._sums.items() if bool(sums.count > 0)}
        if not found:
            raise ValueError("nothing was gathered yet: run the model while the Capture is on a stack.")
        lengths = {len(one): name for name, one in found.items()}
        if len(lengths) > 1:
            raise ValueError(
                f"the texts of the sites have different lengths, such as {lengths}; see them one by one with "
                f"of(site), or give the tokens that are wanted."
            )
        largest = max((one.shape[1:] for one in found.values()), key=lambda one: one.numel())
        every = torch.stack([_resized(one, size or largest) for one in found.values()])
        return every.sum(0) if self.reduce == "sum" else every.mean(0)

    def of(self, site: str) -> Float[Tensor, "tokens height width"]:
        """The maps at one site, over all steps, of the size that they have there.

        Raises:
            ValueError: for a site that it is not at.
        """
        if site not in self._sums:
            raise ValueError(unknown("site of this Capture", site, self._sums))
        return self._of(self._sums[site])

    def _of(self, sums: Sums) -> Tensor:
        one = sums.total.clone() if self.reduce == "sum" else sums.total / sums.count
        return one if not self.words else torch.stack([one[group].mean(0) for group in self._groups])

    def reset(self) -> None:
        """Forget what was gathered; the memory stays, so that a captured graph goes on adding to it."""
        for sums in self._sums.values():
            sums.clear()


def seen(q: Tensor, k: Tensor, call: Call, columns: slice | Tensor, chunk: int | None = None) -> Tensor:
    """How much each query sees of some keys: probabilities [queries, keys], the mean over batch and heads.

    Args:
        q: queries [B, heads, S, D].
        k: keys [B, heads, K, D]; fewer heads than the queries where groups of those share one.
        call: what the kernel is asked for.
        columns: which keys.
        chunk: number of queries whose probabilities are in memory at a time; None is as many as have 32
            million of them.
    """
    chunk = chunk or max(1, MOST // (q.shape[0] * q.shape[1] * k.shape[2]))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    parts: list[Tensor] = []
    for start in range(0, q.shape[2], chunk):
        rows = slice(start, start + chunk)
        probs = probabilities(q[:, :, rows], k, call.part(slice(None), rows, q, k))
        parts.append(probs[..., columns].mean((0, 1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _spans(site: Site, context: Context, q: Tensor, k: Tensor) -> tuple[slice, int, int]:
    """Which queries are the image's, and where the text is among the keys: its first token and its length."""
    keys = k.shape[2]
    if site.kind == "cross":
        return slice(None), 0, keys
    text = context.text
    if text is None or text >= keys:
        raise ValueError(
            f"at {site.name} text and image are in one sequence, and the network was given no text whose "
            f"length says where the one ends; select other sites."
        )
    first = 0 if site.text == "first" else keys - text
    if q.shape[2] != keys:  # queries of the image alone
        return slice(None), first, text
    return slice(text, None) if first == 0 else slice(None, first), first, text


def _limits(site: Site, middleware: Middleware) -> tuple[Attachment, Call]:
    """The rows and the window that a middleware was added with, and what the layer asked its kernel for."""
    layer = layer_of(site.module)
    for one in layer.attachments if layer is not None else ():
        if one.middleware is middleware and layer is not None:
            return one, layer.call or Call()
    raise RuntimeError(f"{middleware} runs at {site.name} and is not on it.")


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
