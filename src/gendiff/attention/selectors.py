"""Which sites: kinds, stages, depths and names, combined by & | ~."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, TypeAlias, final

from gendiff import _patterns
from gendiff._checks import unknown
from gendiff.attention.site import STAGES, Site

KINDS = ("self", "cross", "joint", "single", "temporal")


class Selector:
    """A set of sites, told by a rule; `&`, `|` and `~` combine them.

    Args:
        rule: whether a site is in it.
        text: how it is written.
        patterns: name patterns in it, for the error where nothing matches.
    """

    def __init__(self, rule: Callable[[Any], bool], text: str, patterns: tuple[str, ...] = ()) -> None:
        self.rule, self.text, self.patterns = rule, text, patterns

    def __call__(self, site: Any) -> bool:
        """Whether a site, or what else is selected by it, is in it."""
        return self.rule(site)

    def __and__(self, other: "Selector | str") -> "Selector":
        right = selector(other)
        return Selector(
            lambda site: self(site) and right(site),
            f"{self._part()} & {right._part()}",
            self.patterns + right.patterns,
        )

    def __or__(self, other: "Selector | str") -> "Selector":
        right = selector(other)
        return Selector(
            lambda site: self(site) or right(site),
            f"{self.text} | {right.text}",
            self.patterns + right.patterns,
        )

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> "Selector":
        return Selector(lambda site: not self(site), f"~{self._part()}", self.patterns)

    def _part(self) -> str:
        joined = (" | " in self.text or " & " in self.text) and not self.text.startswith("~(")
        return f"({self.text})" if joined else self.text

    def __repr__(self) -> str:
        return self.text


def match(pattern: str) -> Selector:
    """The sites whose name a pattern covers: dotted globs, `**` for any number of segments.

    >>> match("mid_block.**") & ~Kind.CROSS
    match('mid_block.**') & ~Kind.CROSS
    """
    _patterns.check(pattern)
    return Selector(lambda site: _patterns.match(pattern, site.name), f"match({pattern!r})", (pattern,))


def _of(what: str, attribute: str, value: str) -> Selector:
    return Selector(lambda site: getattr(site, attribute) == value, f"{what}.{value.upper()}")


@final
class Kind:
    """Sites by what attends to what."""

    SELF: ClassVar[Selector] = _of("Kind", "kind", "self")
    CROSS: ClassVar[Selector] = _of("Kind", "kind", "cross")
    JOINT: ClassVar[Selector] = _of("Kind", "kind", "joint")
    SINGLE: ClassVar[Selector] = _of("Kind", "kind", "single")
    TEMPORAL: ClassVar[Selector] = _of("Kind", "kind", "temporal")

    def __new__(cls, name: str) -> Selector:  # pyright: ignore[reportInconsistentConstructor]
        """The kind of a name, as `Kind("cross")`."""
        if name not in KINDS:
            raise ValueError(unknown("kind", name, KINDS))
        return _of("Kind", "kind", name)


@final
class Stage:
    """Sites by the part of the model that they are in."""

    DOWN: ClassVar[Selector] = _of("Stage", "stage", "down")
    MID: ClassVar[Selector] = _of("Stage", "stage", "mid")
    UP: ClassVar[Selector] = _of("Stage", "stage", "up")
    DOUBLE: ClassVar[Selector] = _of("Stage", "stage", "double")
    SINGLE: ClassVar[Selector] = _of("Stage", "stage", "single")
    REFINER: ClassVar[Selector] = _of("Stage", "stage", "refiner")
    BLOCK: ClassVar[Selector] = _of("Stage", "stage", "block")

    def __new__(cls, name: str) -> Selector:  # pyright: ignore[reportInconsistentConstructor]
        """The stage of a name, as `Stage("up")`."""
        if name not in STAGES:
            raise ValueError(unknown("stage", name, STAGES))
        return _of("Stage", "stage", name)


@final
class Depth:
    """Sites by their place in the model."""

    def __new__(cls, low: float | int, high: float | int) -> Selector:  # pyright: ignore[reportInconsistentConstructor]
        """Those at a depth in [low, high], where the first site has 0 and the last 1."""
        if not 0 <= low <= high <= 1:
            raise ValueError(f"depths lie in [0, 1], the low one first, got {low} to {high}.")
        return Selector(lambda site: low <= site.depth <= high, f"Depth({low:g}, {high:g})")


On: TypeAlias = "Selector | str | Iterable[Site] | None"


def selector(on: "Selector | str") -> Selector:
    """A selector, also from the pattern of a name."""
    if isinstance(on, Selector):
        return on
    if isinstance(on, str):
        return match(on)
    raise TypeError(
        f"sites are selected by a Selector or the pattern of a name, got {type(on).__name__} {on!r}."
    )


def selected(sites: Sequence[Site], on: On) -> tuple[Site, ...]:
    """The sites that are meant; None means all.

    Raises:
        ValueError: where nothing is, with what there is and the nearest names.
    """
    if on is None:
        found = tuple(sites)
    elif isinstance(on, Selector | str):
        rule = selector(on)
        found = tuple(site for site in sites if rule(site))
    else:
        names = {site.name for site in on}
        found = tuple(site for site in sites if site.name in names)
        missing = names - {site.name for site in found}
        if missing:
            raise ValueError(f"the model has no sites {sorted(missing)}; they are those of another model.")
    if not found:
        raise ValueError(_nothing(sites, on))
    return found


def _nothing(sites: Sequence[Site], on: On) -> str:
    if not sites:
        return "the model has no attention layer that takes a processor."
    kinds, stages = ({getattr(site, what) for site in sites} for what in ("kind", "stage"))
    text = (
        f"nothing matches {on if not isinstance(on, str) else repr(on)} among {len(sites)} sites: of kinds "
        f"{', '.join(sorted(kinds))}, in stages {', '.join(sorted(stages))}"
    )
    patterns = selector(on).patterns if isinstance(on, Selector | str) else ()
    names = [site.name for site in sites]
    parts = list(dict.fromkeys(part for name in names for part in (*_beginnings(name), *name.split("."))))
    near = [
        part
        for pattern in patterns
        for part in get_close_matches(pattern.replace("*", "").strip("."), parts, n=3, cutoff=0.5)
    ]
    return f"{text}. {'Nearest' if near else 'Some'} names: {', '.join(map(repr, near or names[:4]))}."


def _beginnings(name: str) -> list[str]:
    """A dotted name and what it begins with, `a.b` and `a` for `a.b`."""
    segments = name.split(".")
    return [".".join(segments[:count]) for count in range(1, len(segments) + 1)]
