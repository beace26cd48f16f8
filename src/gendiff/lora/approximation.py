"""An adapter that was made to be like something else, and how like it is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

from gendiff._checks import unknown
from gendiff._tables import as_html, as_text
from gendiff.lora.adapter import Adapter
from gendiff.lora.factoring import Change, Product, change_of, distance, norm, parts_of
from gendiff.lora.plan import LoraPlan, Planned

COLUMNS = ("layer", "rank", "norm", "error", "of the rank")


@final
@dataclass(frozen=True)
class Fitted:
    r"""How a layer of an adapter differs from what was to be said, in Frobenius norms of matrices.

    Attributes:
        name: of the layer.
        rank: of what was made.
        norm: of what was to be said: the weighted sum of changes, or the difference of two weights.
        lost: of the difference between this and what was made.
        lost_by_rank: of the difference between what the method asks for and what was made; ties, dare and
            linear ask for another matrix than the sum.
    """

    name: str
    rank: int
    norm: float
    lost: float
    lost_by_rank: float

    @property
    def error(self) -> float:
        """What is lost as a share of the norm."""
        return _share(self.lost, self.norm)


Layer: TypeAlias = tuple[Planned, dict[str, Tensor], Fitted]


@final
@dataclass(frozen=True)
class Errors:
    """The relative errors of an approximation, by layer; prints as a table.

    Attributes:
        rows: one a layer.
    """

    rows: tuple[Fitted, ...]

    @property
    def total(self) -> float:
        """The relative error of all layers as one long vector."""
        return self._pooled().error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, layer: str) -> float:
        for row in self.rows:
            if row.name == layer:
                return row.error
        raise KeyError(unknown("layer of the adapter", layer, [row.name for row in self.rows]))

    def _pooled(self) -> Fitted:
        length = [
            math.hypot(*(getattr(row, name) for row in self.rows))
            for name in ("norm", "lost", "lost_by_rank")
        ]
        return Fitted(f"all {len(self.rows)}", sum(row.rank for row in self.rows), *length)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                str(row.rank),
                f"{row.norm:.3g}",
                f"{row.error:.2g}",
                f"{_share(row.lost_by_rank, row.norm):.2g}",
            )
            for row in (*self.rows, self._pooled())
        ]

    def __repr__(self) -> str:
        return as_text(COLUMNS, self._rows())

    def _repr_html_(self) -> str:
        return as_html(COLUMNS, self._rows())


@final
@dataclass(frozen=True, eq=False)
class Approximation:
    """An adapter and how far it is from what it was to be.

    Attributes:
        adapter: for `inject`, a file, or more algebra.
        errors: by layer, and of all as `errors.total`.
        others: names of weights of an extraction that differ too, and that the adapter does not have.
    """

    adapter: Adapter
    errors: Errors
    others: tuple[str, ...] = ()

    def __repr__(self) -> str:
        more = f", {len(self.others)} other weights differ" if self.others else ""
        return (
            f"Approximation({len(self.adapter)} layers, {self.adapter.plan.parameters:,} parameters, error "
            f"{self.errors.total:.2g}{more})"
        )


def fitted(row: Planned, made: Product, goal: Change, asked: Change | None = None) -> Layer:
    """What was made of a layer as parts of an adapter, with the error that these parts have.

    Args:
        row: the layer, at the rank and scale of what was made.
        made: its matrix.
        goal: what was to be said.
        asked: what the method says instead.
    """
    parts = parts_of(row, made)
    said = change_of(row, parts)
    lost = distance(said, goal)
    by_rank = lost if asked is None else distance(said, asked)
    return row, parts, Fitted(row.name, row.rank, norm(goal), lost, by_rank)


def assembled(
    layers: Iterable[Layer],
    targets: int,
    metadata: dict[str, str] | None = None,
    others: tuple[str, ...] = (),
) -> Approximation:
    """The layers as one adapter."""
    found = list(layers)
    plan = LoraPlan(tuple(row for row, _, _ in found), targets)
    adapter = Adapter(plan, {row.name: parts for row, parts, _ in found}, metadata or {})
    return Approximation(adapter, Errors(tuple(error for _, _, error in found)), others)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
