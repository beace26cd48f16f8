"""Maps of which image tokens look at which words, gathered while a model samples."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

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

TEXTUAL = ("cross", "joint", "single")
Tokens: TypeAlias = Mapping[str, Sequence[int]] | Sequence[int] | None
_numbers = itertools.count()


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
        chunk: number of queries whose probabilities are in memory at a time.

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
        chunk: int = 512,
    ) -> None:
        self.words, self._groups, self.tokens = _kept(tokens)
        if reduce not in ("mean", "sum"):
            raise ValueError(unknown("reduction", reduce, ("mean", "sum")))
        if chunk < 1 or (size is not None and min(size) < 1):
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
        weight = torch.ones_like(sums.count) if limits.window is None else limits.window.open(context).float()
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


def seen(q: Tensor, k: Tensor, call: Call, columns: slice | Tensor, chunk: int = 512) -> Tensor:
    """How much each query sees of some keys: probabilities [queries, keys], the mean over batch and heads.

    Args:
        q: queries [B, heads, S, D].
        k: keys [B, heads, K, D]; fewer heads than the queries where groups of those share one.
        call: what the kernel is asked for.
        columns: which keys.
        chunk: number of queries whose probabilities are in memory at a time.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    parts: list[Tensor] = []
    for start in range(0, q.shape[2], chunk):
        rows = slice(start, start + chunk)
        probs = probabilities(q[:, :, rows], k, call.part(slice(None), rows, q, k))
        parts.append(probs[..., columns].mean((0, 1)))
    return torch.cat(parts)


def words_of(tokenizer: Any, prompt: str, words: Sequence[str]) -> dict[str, list[int]]:
    """Where words stand in a prompt, by the places of their tokens, for `Capture(tokens=...)`.

    Args:
        tokenizer: one of transformers, which pads at the end.
        prompt: what the text encoder is given.
        words: words or phrases of it; every occurrence counts.

    Raises:
        ValueError: for a word that the prompt has not, or whose tokens are cut off; for a tokenizer that
            pads in front, whose places depend on the padding.
    """
    if getattr(tokenizer, "padding_side", "right") == "left":
        raise ValueError(
            f"{type(tokenizer).__name__} pads in front of the text; give the places of the tokens."
        )
    longest = getattr(tokenizer, "model_max_length", None)
    limit = longest if isinstance(longest, int) and longest < 10**6 else None
    ids = list(tokenizer(prompt).input_ids)
    found = {word: _places(tokenizer, prompt, word, ids) for word in words}
    for word, places in found.items():
        if not places:
            raise ValueError(unknown("word of the prompt", word, re.findall(r"\w+", prompt)))
        if limit is not None and max(places) >= limit - 1:  # the last one is the end token's
            raise ValueError(f"{word!r} is token {max(places)}, behind the {limit} that the tokenizer keeps.")
    return found


def _places(tokenizer: Any, prompt: str, word: str, ids: list[int]) -> list[int]:
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        hits = [hit.span() for hit in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
        return [i for i, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in hits)]
    part = list(tokenizer(word, add_special_tokens=False).input_ids)
    starts = [i for i in range(len(ids)) if part and ids[i : i + len(part)] == part]
    return [i for start in starts for i in range(start, start + len(part))]


def _kept(tokens: Tokens) -> tuple[tuple[str, ...], list[list[int]], tuple[int, ...] | None]:
    """Words, for each of them the columns among those kept, and the places of what is kept."""
    if tokens is None:
        return (), [], None
    if not isinstance(tokens, Mapping | Sequence):
        raise TypeError(
            f"tokens are places in the text, or those of words, got {type(tokens).__name__}: "
            f"Capture(tokens=words_of(tokenizer, prompt, ['cat', 'hat']))."
        )
    several = [list(one) for one in tokens.values()] if isinstance(tokens, Mapping) else [list(tokens)]
    flat = [place for one in several for place in one]
    if not all(several) or not several or min(flat) < 0:
        raise ValueError(f"tokens are places >= 0 in the text, at least one for a map, got {tokens}.")
    ends = list(itertools.accumulate(map(len, several)))
    groups = [list(range(end - len(one), end)) for one, end in zip(several, ends, strict=True)]
    return (tuple(tokens), groups, tuple(flat)) if isinstance(tokens, Mapping) else ((), [], tuple(flat))


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
