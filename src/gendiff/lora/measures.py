"""What an adapter changes, as a record that prints as tables; `gendiff.lora.measure` makes it."""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar, final

from gendiff._checks import unknown
from gendiff._tables import as_html, as_text

Key = TypeVar("Key", bound=Hashable)

COLUMNS = ("layers", "rank", "|ΔW|", "|ΔW|/|W|", "effective rank", "share of highest")
GROUPS = (
    *("self attention", "cross attention", "joint attention", "single attention", "temporal attention"),
    *("attention", "feed-forward", "conv", "other"),
)
STAGES = ("down_blocks", "mid_block", "up_blocks", "conv_out")  # UNets list the middle behind the way up
SHOWN = 20  # layers that a table lists, unless these are not many more


@final
@dataclass(frozen=True)
class Measured:
    r"""What an adapter changes in a layer, or in a part of the model.

    Attributes:
        name: of the layer, or of the part.
        group: self, cross, joint, single or temporal attention, or attention where it is not known which;
            feed-forward, conv, or other.
        block: the block of the model.
        layers: how many there are.
        rank: of the adapter; of several layers the mean.
        norm: :math:`\lVert \Delta W \rVert_F`; of several layers that of all as one vector.
        weight_norm: :math:`\lVert W \rVert_F`, where the weights are known.
        effective_rank: of :math:`\Delta W`, the exponential of the entropy of its singular values as shares
            of their sum (Roy & Vetterli 2007, definition 1): r for r equal values, 1 where one is far above
            the rest. Of several layers the mean.
        highest: share of the highest singular value in :math:`\lVert \Delta W \rVert_F^2`. Of several layers
            the mean.
    """

    name: str
    group: str
    block: str
    layers: int
    rank: float
    norm: float
    weight_norm: float | None
    effective_rank: float
    highest: float

    @property
    def ratio(self) -> float | None:
        r"""The relative change, :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`."""
        return self.norm / self.weight_norm if self.weight_norm else None

    def _cells(self) -> tuple[str, ...]:
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g}"
        numbers = (f"{self.effective_rank:.1f}", f"{self.highest:.0%}")
        return (self.name, str(self.layers), f"{self.rank:.3g}", f"{self.norm:.3g}", ratio, *numbers)


@final
@dataclass(frozen=True)
class Measures:
    """What an adapter changes, layer by layer; prints as a table, and `gendiff.plot.adapter` draws it.

    Attributes:
        rows: one a layer, in the order of the model.
    """

    rows: tuple[Measured, ...]

    @property
    def total(self) -> Measured:
        """All layers."""
        return _pooled("all", self.rows)

    @property
    def groups(self) -> tuple[Measured, ...]:
        """By what layers do: kinds of attention, feed-forward, conv, other."""
        parts = self.apart(lambda row: row.group, lambda row: GROUPS.index(row.group))
        return tuple(_pooled(name, part.rows) for name, part in parts.items())

    @property
    def blocks(self) -> tuple[Measured, ...]:
        """By block of the model."""
        parts = self.apart(lambda row: row.block, stage)
        return tuple(_pooled(name, part.rows) for name, part in parts.items())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, layer: str) -> Measured:
        for row in self.rows:
            if row.name == layer:
                return row
        raise KeyError(unknown("layer of the adapter", layer, [row.name for row in self.rows]))

    def apart(
        self, key: Callable[[Measured], Key], order: Callable[[Measured], int]
    ) -> "dict[Key, Measures]":
        """Its layers by a key, in an order, and where that says nothing in the order of the model."""
        found: dict[Key, list[Measured]] = {}
        for row in sorted(self.rows, key=order):
            found.setdefault(key(row), []).append(row)
        return {name: Measures(tuple(rows)) for name, rows in found.items()}

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        parts = {"group": self.groups, "block": self.blocks}
        tables = [(what, [row._cells() for row in rows]) for what, rows in parts.items()]
        most = sorted(self.rows, key=lambda row: row.ratio or row.norm, reverse=True)[:SHOWN]
        shown = self.rows if len(self) <= 2 * SHOWN else most
        what = "layer" if shown is self.rows else f"the {SHOWN} layers of {len(self)} that change most"
        tables.append((what, [row._cells() for row in (*shown, self.total)]))
        return [((what, *COLUMNS), rows) for what, rows in tables]

    def __repr__(self) -> str:
        return "\n\n".join(as_text(head, rows) for head, rows in self._tables())

    def _repr_html_(self) -> str:
        return "".join(as_html(head, rows) for head, rows in self._tables())


def stage(row: Measured) -> int:
    """The place of a layer's block in a UNet; 0 elsewhere, where layers are listed in their order."""
    stem = row.block.split(".")[0]
    return STAGES.index(stem) + 1 if stem in STAGES else 0


def _pooled(name: str, rows: Iterable[Measured]) -> Measured:
    rows = list(rows)
    sizes = [row.weight_norm for row in rows if row.weight_norm is not None]

    def mean(attribute: str) -> float:
        return sum(getattr(row, attribute) for row in rows) / len(rows)

    return Measured(
        name=name,
        group="",
        block="",
        layers=len(rows),
        rank=mean("rank"),
        norm=math.hypot(*(row.norm for row in rows)),
        weight_norm=math.hypot(*sizes) if len(sizes) == len(rows) else None,
        effective_rank=mean("effective_rank"),
        highest=mean("highest"),
    )
