"""Layers of an original release as rows of the layers of the live model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

Templates: TypeAlias = dict[str, tuple[str, ...]]
"""By the name of an original layer, the live layers whose weights are stacked in it; `{i}` is any number."""


@final
@dataclass(frozen=True)
class Rows:
    """Rows start to stop of the weight of a layer of the live model."""

    layer: str
    start: int
    stop: int


@final
@dataclass(frozen=True)
class Original:
    """A layer of the original naming.

    Attributes:
        name: its dotted name there.
        rows: of the live model's layers, which its weight stacks in this order.
    """

    name: str
    rows: tuple[Rows, ...]


def layers(table: Mapping[str, str], original: str = "", live: str = "") -> Templates:
    """Templates of a table, whose entries stand below two modules.

    >>> layers({"qkv": "to_q to_k"}, "blocks.{i}", "layers.{i}.attn")
    {'blocks.{i}.qkv': ('layers.{i}.attn.to_q', 'layers.{i}.attn.to_k')}
    """
    return {
        below(original, name): tuple(below(live, part) for part in parts.split())
        for name, parts in table.items()
    }


def below(module: str, name: str) -> str:
    """The name of a part of a module, or of the root, which is nameless."""
    return f"{module}.{name}" if module else name


def fill(templates: Templates, widths: Mapping[str, int], swapped: Iterable[str] = ()) -> dict[str, Original]:
    """The original layers whose parts the live model has, every one.

    Args:
        templates: of the family.
        widths: rows of the weight of each live layer.
        swapped: live layers whose two halves stand in the other order in the original.

    >>> fill({"b.{i}.kv": ("l.{i}.k", "l.{i}.v")}, {"l.0.k": 4, "l.0.v": 4, "l.1.k": 4})
    {'b.0.kv': Original(name='b.0.kv', rows=(Rows(layer='l.0.k', start=0, stop=4), \
Rows(layer='l.0.v', start=0, stop=4)))}
    """
    swapped, numbers = set(swapped), _numbers(widths)
    found: dict[str, Original] = {}
    for template, parts in templates.items():
        for i in numbers[parts[0]] if "{i}" in parts[0] else [""]:
            names = [part.format(i=i) for part in parts]
            if all(name in widths for name in names):
                name = template.format(i=i)
                rows = (row for one in names for row in _rows(one, widths[one], one in swapped))
                found[name] = Original(name, tuple(rows))
    return found


def _rows(layer: str, width: int, swapped: bool) -> tuple[Rows, ...]:
    half = width // 2
    if swapped:
        return Rows(layer, half, width), Rows(layer, 0, half)
    return (Rows(layer, 0, width),)


def _numbers(names: Iterable[str]) -> dict[str, list[str]]:
    """By each name with `{i}` in the place of one of its numbers, what stands there."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        segments = name.split(".")
        for place, segment in enumerate(segments):
            if segment.isdigit():
                found[".".join([*segments[:place], "{i}", *segments[place + 1 :]])].append(segment)
    return found
