"""The one pattern language, for names of parameters, modules and layers: dotted globs over whole segments.

A name is segments with dots between them, `unet.down_blocks.0.attn1.to_q.weight`; so is a pattern:

- `*` is any characters within one segment, none included: `attn*` is `attn`, `attn1`, `attn2`;
- `**`, alone between dots, is any number of whole segments, none included;
- `?` is one character, `[0-9]` one of a set, `[!0-9]` one that is not in it;
- anything else is itself, and a pattern covers the whole name: `block.1` is neither `block.10` nor
  `block.1.bias`;
- `|`, with or without spaces round it, stands between alternatives, of which some may cover nothing.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import translate
from functools import cache

SEGMENT = re.compile(r"(?:[^\[\]]|\[!?[^\[\]!][^\[\]]*\])+")
FINISHED = re.compile(r"(?!)")  # what stands behind the end of a pattern fits no segment
SHOWN = 5  # names that an error lists


def match(pattern: str, name: str) -> bool:
    """Whether a pattern covers a whole name.

    Args:
        pattern: a dotted glob; the module's docstring has the rules.
        name: dotted segments.

    Raises:
        ValueError: for what is no pattern: an empty one, one with an empty segment or an open set, or `**`
            beside other characters.

    >>> match("**.attn*.to_[qkv].weight", "down_blocks.0.attn1.to_q.weight")
    True
    >>> match("block.1", "block.10"), match("**.bias | norm*.**", "norm_out.weight")
    (False, True)
    """
    return _covers(pattern, name)


def select(pattern: str, names: Iterable[str], what: str = "names") -> list[str]:
    """The names that a pattern covers, in the order given.

    Args:
        pattern: a dotted glob; the module's docstring has the rules.
        names: dotted segments each.
        what: what the names are of, for the error.

    Raises:
        ValueError: where it covers none, with the nearest names, and the looser pattern that would have
            covered some; and for what is no pattern.

    >>> select("*.bias", ["conv.weight", "conv.bias", "block.0.bias"])
    ['conv.bias']
    >>> select("*.bias", ["block.0.bias"])
    Traceback (most recent call last):
        ...
    ValueError: the pattern '*.bias' matches none of 1 names; '**.bias' would match 1 of them: ...
    """
    names = list(names)
    check(pattern)
    found = [name for name in names if _covers(pattern, name)]
    if not found:
        raise ValueError(_nothing_matched(pattern, names, what))
    return found


def check(pattern: str) -> None:
    """Raise a ValueError for text that is no pattern, and a TypeError for what is no text."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"a pattern is text, got {type(pattern).__name__} {pattern!r}; '|' stands between alternatives: "
            f"'**.bias | **.norm.*'."
        )
    _compiled(pattern)


@cache
def _compiled(pattern: str) -> tuple[tuple[re.Pattern[str] | None, ...], ...]:
    """The alternatives, each a sequence of segments; None stands for `**`."""
    return tuple(_alternative(part.strip(), pattern) for part in pattern.split("|"))


def _alternative(part: str, pattern: str) -> tuple[re.Pattern[str] | None, ...]:
    where = f"in the pattern {pattern!r}" if part != pattern else "as a pattern"
    if not part:
        raise ValueError(f"nothing stands {where}; '**' matches every name.")
    for segment in part.split("."):
        if not segment:
            raise ValueError(f"{part!r} {where} has an empty segment; write one dot between two segments.")
        if not SEGMENT.fullmatch(segment):
            raise ValueError(
                f"the segment {segment!r} of {part!r} {where} has an open or empty set; write sets such as "
                f"[0-9] or [qkv], without a dot or '|' in them."
            )
        if "**" in segment and segment != "**":
            raise ValueError(
                f"'**' stands alone between dots, got the segment {segment!r} of {part!r} {where}; '*' is "
                f"what matches within a segment."
            )
    return tuple(None if one == "**" else re.compile(translate(one)) for one in part.split("."))


def _covers(pattern: str, name: str) -> bool:
    segments = name.split(".") if name else []
    return any(_walk(alternative, segments) for alternative in _compiled(pattern))


def _walk(pattern: Sequence[re.Pattern[str] | None], segments: Sequence[str]) -> bool:
    """Whether the segments fit; a misfit goes back to the last `**` only, which takes one segment more."""
    place = at = taken = 0
    last = -1
    while at < len(segments):
        one = pattern[place] if place < len(pattern) else FINISHED
        if one is None:
            last, taken = place, at
            place += 1
        elif one.match(segments[at]):
            place, at = place + 1, at + 1
        elif last >= 0:
            taken += 1
            place, at = last + 1, taken
        else:
            return False
    return all(one is None for one in pattern[place:])


def _nothing_matched(pattern: str, names: list[str], what: str) -> str:
    text = f"the pattern {pattern!r} matches none of {len(names)} {what}"
    for loose in _looser(pattern):
        count = sum(_covers(loose, name) for name in names)
        if count:
            text += (
                f"; {loose!r} would match {count} of them: a pattern covers the whole name, '*' stays within "
                f"one segment, and '**' is any number of segments"
            )
            break
    plain = re.sub(r"\[[^\]]*\]|[*?]", "", pattern)
    near = get_close_matches(re.sub(r"\.+", ".", plain).strip(". "), names, n=SHOWN, cutoff=0.3)
    listed = ", ".join(map(repr, near or names[:SHOWN]))
    return f"{text}. {'Nearest' if near else 'Some'} names: {listed or 'none, for no names were given'}."


def _looser(pattern: str) -> Iterable[str]:
    """Patterns that were perhaps meant: `**` for a `*`, and any number of segments before or behind."""
    alternatives = [part.strip().split(".") for part in pattern.split("|")]

    def joined(change: list[list[str]]) -> str:
        return " | ".join(".".join(segments) for segments in change)

    for index, segments in enumerate(alternatives):
        for place, segment in enumerate(segments):
            if segment == "*":
                wider = [*segments[:place], "**", *segments[place + 1 :]]
                yield joined([*alternatives[:index], wider, *alternatives[index + 1 :]])
    wide = [["**" if segment == "*" else segment for segment in segments] for segments in alternatives]
    yield joined(wide)
    yield joined([[*segments, "**"] for segments in wide])
    yield joined([["**", *segments] for segments in wide])
    yield joined([["**", *segments, "**"] for segments in wide])
