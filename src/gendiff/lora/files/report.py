"""What a file held, and what was put on a model: tables for a terminal and a notebook."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

from gendiff._tables import as_html, as_text
from gendiff.lora.adapter import Adapter
from gendiff.lora.handle import LoraHandle
from gendiff.lora.plan import LoraPlan

COLUMNS = ("component", "layers", "algorithm", "rank", "lora_alpha", "alpha from")
Sources = Mapping[str, Mapping[str, str]]


@final
@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What a file holds for some networks; prints as a table.

    Attributes:
        format: whose names it has: "diffusers", "peft", "kohya", "original", or several of them.
        adapters: by component.
        unmatched: keys that are for no layer, which `ignore` allowed.
        alpha_source: by component and layer, who says alpha: "tensor", "metadata" in the header, "config"
            beside the file, "assumed" by `missing_alpha`, or "none" where the algorithm has none.
    """

    format: str
    adapters: Mapping[str, Adapter] = field(repr=False)
    unmatched: tuple[str, ...]
    alpha_source: Sources = field(repr=False)

    def __getitem__(self, component: str) -> Adapter:
        return self.adapters[component]

    def __repr__(self) -> str:
        return _text(self.format, self._plans(), self.alpha_source, self.unmatched)

    def _repr_html_(self) -> str:
        return _html(self.format, self._plans(), self.alpha_source, self.unmatched)

    def _plans(self) -> dict[str, LoraPlan]:
        return {name: one.plan for name, one in self.adapters.items()}


@final
@dataclass(frozen=True, eq=False)
class LoadReport:
    """What of a file was put on networks; prints as a table.

    Attributes:
        format: see `AdapterFile`.
        matched: by component, the layers that have an adapter now.
        unmatched: keys that are for no layer, which `ignore` allowed.
        alpha_source: see `AdapterFile`.
        handles: by component, of the adapters.
    """

    format: str
    matched: Mapping[str, tuple[str, ...]] = field(repr=False)
    unmatched: tuple[str, ...]
    alpha_source: Sources = field(repr=False)
    handles: Mapping[str, LoraHandle] = field(repr=False)

    def __repr__(self) -> str:
        return _text(self.format, self._plans(), self.alpha_source, self.unmatched)

    def _repr_html_(self) -> str:
        return _html(self.format, self._plans(), self.alpha_source, self.unmatched)

    def _plans(self) -> dict[str, LoraPlan]:
        return {name: one.plan for name, one in self.handles.items()}


def _rows(plans: Mapping[str, LoraPlan], sources: Sources) -> list[tuple[str, ...]]:
    return [
        (
            component,
            f"{len(plan)} of {plan.layers}",
            plan.rows[0].algorithm,
            _said(row.rank for row in plan.rows),
            _said(row.lora_alpha for row in plan.rows),
            _said(sources[component].values()),
        )
        for component, plan in plans.items()
    ]


def _said(values: Iterable[float | int | str]) -> str:
    """Values, the commonest first, with their counts where there are several.

    >>> _said([8, 8, 4.0]), _said([2])
    ('8 (2), 4 (1)', '2')
    """
    counts = Counter(value if isinstance(value, str) else f"{value:g}" for value in values).most_common()
    if len(counts) == 1:
        return counts[0][0]
    text = ", ".join(f"{value} ({count})" for value, count in counts[:4])
    return f"{text}, ..." if len(counts) > 4 else text


def _notes(format: str, unmatched: tuple[str, ...]) -> list[str]:
    notes = [f"in the names of {format}"]
    if unmatched:
        notes.append(f"{len(unmatched)} keys left out, such as {unmatched[0]!r}")
    return notes


def _text(format: str, plans: Mapping[str, LoraPlan], sources: Sources, unmatched: tuple[str, ...]) -> str:
    return "\n".join([as_text(COLUMNS, _rows(plans, sources)), *_notes(format, unmatched)])


def _html(format: str, plans: Mapping[str, LoraPlan], sources: Sources, unmatched: tuple[str, ...]) -> str:
    return as_html(COLUMNS, _rows(plans, sources), _notes(format, unmatched))
