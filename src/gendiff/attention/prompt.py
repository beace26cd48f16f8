"""An image kept while its prompt is edited: attention of the edited rows by that of their source."""

from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff.attention.context import Context
from gendiff.attention.middleware import Middleware
from gendiff.attention.regional import only
from gendiff.attention.shared import by_part, from_reference, own_tokens
from gendiff.attention.site import Site
from gendiff.attention.temperature import moved


@final
class PromptToPrompt(Middleware):
    r"""Cross-attention of edited prompts made from that of their source, the first sample of each part.

    With probabilities P of the source and P' of an edited sample, token j of its text gets

    .. math:: P'_{ij} \leftarrow c_j \sum_s P_{is} M_{sj} \text{ where } \sum_s M_{sj} > 0, \quad
        \text{else } c_j P'_{ij}

    with the mapper M of `align` and weights c; as published, rows are not normalised again. A part of the
    batch is the source and then the edits in their order. The published windows are the first 0.4 to 1 of all
    steps, and only the conditional rows: `stack.add(..., on=Kind.CROSS, rows="cond", when=Steps(0, 40))`,
    with `SharedQK` beside it for the layout.

    * Word swap: `align(source, target, swap=True)`. Refinement: `align(source, target)`.
    * Reweighting: `weights`, with the mapper of equal prompts, or None for the probabilities of the row
      itself.

    Args:
        mapper: [source, target] of one edit or [edits, source, target]; None keeps each row's own.
        weights: factor c of each token, [target] or [edits, target]; a buffer that `set` changes.

    Raises:
        ValueError: for neither, mappers and weights that do not fit each other, the text or the batch, and
            sites that are not cross.

    References:
        Hertz et al. 2022, *Prompt-to-prompt image editing with cross attention control*, arXiv 2208.01626.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("probs",)
    needs: ClassVar[tuple[str, ...]] = ("rows", "text")

    def __init__(
        self,
        mapper: Float[Tensor, "*edits source target"] | None = None,
        weights: Float[Tensor, "*edits target"] | None = None,
    ) -> None:
        given = [x[None] if x.ndim == own else x for x, own in ((mapper, 2), (weights, 1)) if x is not None]
        sizes = {(len(x), x.shape[-1]) for x in given}
        if len(sizes) != 1 or (mapper is not None and mapper.shape[-1] != mapper.shape[-2]):
            raise ValueError(
                f"edits have a square mapper, weights or both of as many tokens, got "
                f"{', '.join(str(tuple(x.shape)) for x in (mapper, weights) if x is not None) or 'neither'}."
            )
        self.edits, self.text = sizes.pop()
        # the source's row: nothing is taken, and 1 is the weight
        self.mapper = None if mapper is None else torch.cat([torch.zeros_like(given[0][:1]), given[0]])
        self.weights = None if weights is None else torch.cat([torch.ones_like(given[-1][:1]), given[-1]])

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.mapper is None, self.weights is None

    def set(self, weights: Float[Tensor, "*edits target"]) -> None:
        """Write other weights into the buffer.

        Raises:
            ValueError: where it was made without some.
        """
        if self.weights is None:
            raise ValueError("this PromptToPrompt has no weights; make it with some, such as ones.")
        self.weights[1:].copy_(weights)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("cross",))

    def on_probs(self, site: Site, context: Context, probs: Tensor) -> Tensor:
        """The source's probabilities, by the mapper, times the weights."""
        if probs.shape[-1] != self.text:
            raise ValueError(
                f"the edits are of {self.text} tokens of text, and {site.name} sees {probs.shape[-1]}."
            )
        return by_part(probs, context, self._edited)

    def _edited(self, part: Tensor) -> Tensor:
        if len(part) != self.edits + 1:
            raise ValueError(
                f"a part of the batch is the source and {self.edits} edited samples, got {len(part)} samples."
            )
        if self.mapper is not None:
            mapper = moved(self, "mapper", part.device).to(part.dtype)
            taken = (mapper.sum(-2) > 0)[:, None, None, None]
            part = torch.where(taken, part[:1] @ mapper[:, None, None], part)
        if self.weights is not None:
            part = part * moved(self, "weights", part.device).to(part.dtype)[:, None, None, None]
        return part


@final
class SharedQK(Middleware):
    r"""Every row attends as its part's reference does: :math:`\text{softmax}(q_{ref} k_{ref}^\top)\,v`.

    It puts the probabilities of the reference in the place of the row's own, without computing them. Text
    keeps its queries and keys. Prompt-to-prompt does it at up to 16×16 tokens in a window of the first steps:
    `stack.add(SharedQK(256), on=Kind.SELF, rows="cond", when=Steps(0, 20))`. Without a limit, at the later
    layers of the way up, it is the attention part of plug-and-play.

    Args:
        tokens: layers with more of the image are left as they are; None is no limit.
        reference: place of the reference among the samples of each part.

    Raises:
        ValueError: at cross sites, and for a reference that a part has not.

    References:
        Hertz et al. 2022, arXiv 2208.01626; Tumanyan et al. 2022, *Plug-and-play diffusion features for
        text-driven image-to-image translation*, arXiv 2211.12572.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("kv", "probs", "queries")
    needs: ClassVar[tuple[str, ...]] = ("rows",)

    def __init__(self, tokens: int | None = 256, reference: int = 0) -> None:
        self.tokens, self.reference = tokens, reference

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.tokens, self.reference

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self", "joint", "single", "temporal"))

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's queries and keys."""
        rows, columns = own_tokens(site, context, q, k)
        if self.tokens is not None and rows.stop - rows.start > self.tokens:
            return q, k, v
        q = from_reference(q, rows, context, self.reference)
        return q, from_reference(k, columns, context, self.reference), v


def align(source: Sequence[int], target: Sequence[int], swap: bool = False) -> Float[Tensor, "source target"]:
    """The mapper of `PromptToPrompt` from two texts as token ids, by their longest common subsequence.

    Common tokens are mapped to each other. Between them, what differs is new in the target and keeps its own
    attention, or with `swap` takes that of the tokens it replaces: token by token where they are as many,
    else each replaced token's is spread evenly.

    Args:
        source: ids of the source's tokens, padding and all.
        target: those of the edited text.
        swap: whether tokens between common ones replace each other.

    Raises:
        ValueError: for texts of different lengths; pad both, as the text encoder's tokenizer does.

    >>> align([9, 1, 2, 8, 8], [9, 1, 5, 2, 8]).int()  # a word comes in between
    tensor([[1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0]], dtype=torch.int32)
    >>> align([9, 1, 2, 8], [9, 1, 5, 8], swap=True).diagonal()
    tensor([1., 1., 1., 1.])
    """
    if len(source) != len(target):
        raise ValueError(
            f"both texts are padded to one length, got {len(source)} and {len(target)} tokens; tokenize them "
            f"with padding='max_length'."
        )
    mapper = torch.zeros(len(source), len(target))
    i = j = 0
    for a, b in [*_common(source, target), (len(source), len(target))]:
        if swap and a - i == b - j:
            mapper[range(i, a), range(j, b)] = 1
        elif swap and b > j:
            mapper[i:a, j:b] = 1 / (b - j)
        if a < len(source):
            mapper[a, b] = 1
        i, j = a + 1, b + 1
    return mapper


def _common(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
    """Places of a longest common subsequence: each pair the earliest, so that ends of texts are paired."""
    longest = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            here = longest[i + 1][j + 1] + 1 if source[i] == target[j] else 0
            longest[i][j] = max(here, longest[i + 1][j], longest[i][j + 1])
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while longest[i][j]:
        places = ((a, i + j + skipped - a) for skipped in count() for a in range(i, i + skipped + 1))
        i, j = next(
            (a, b)
            for a, b in places
            if a < len(source)
            and b < len(target)
            and source[a] == target[b]
            and longest[a + 1][b + 1] + 1 == longest[i][j]
        )
        pairs.append((i, j))
        i, j = i + 1, j + 1
    return pairs
