"""Where words stand among the tokens of a prompt."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gendiff._checks import unknown

Tokens: TypeAlias = Mapping[str, Sequence[int]] | Sequence[int] | None


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


def kept(tokens: Tokens) -> tuple[tuple[str, ...], list[list[int]], tuple[int, ...] | None]:
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
