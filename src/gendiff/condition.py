"""Conditions: what a network is told beside x_t, under names that are the same for every family."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from gendiff._checks import unknown


@final
class Condition(Mapping[str, Tensor]):
    """A flat, batch-first, read-only mapping from names to tensors; every value has the same number of rows.

    The names that families share are `text text_mask text_pooled size guidance channels control reference
    label`; a network of one's own may accept others. Nothing unbatched belongs here: what follows from shapes
    (position ids, grids) is derived at the call.

    >>> cond = Condition(label=torch.tensor([3, 7]))
    >>> cond.rows, dict(cond.select(slice(1)))
    (2, {'label': tensor([3])})
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Tensor] | None = None, /, **named: Tensor) -> None:
        merged = {**(values or {}), **named}
        for name, value in merged.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                given = "a scalar tensor" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"condition {name!r} must be a tensor with one row per sample, got {given}.")
        rows = {name: len(value) for name, value in merged.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"all values of a condition have one row per sample, got {rows}.")
        self._values = merged

    @classmethod
    def of(cls, cond: Mapping[str, Tensor] | None) -> "Condition":
        """The condition itself, or one made of any mapping; None is the empty one."""
        return cond if isinstance(cond, cls) else cls(cond)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise KeyError(unknown("condition", name, self._values))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Condition):
            return NotImplemented
        return set(self) == set(other) and all(
            torch.equal(value, other[name]) for name, value in self.items()
        )

    __hash__ = None  # tensors are compared by content, which may change

    def __repr__(self) -> str:
        parts = (f"{name}={list(value.shape)} {value.dtype}" for name, value in self.items())
        return f"Condition({', '.join(parts)})"

    @property
    def rows(self) -> int | None:
        """Number of samples; None for the empty condition, which fits any batch."""
        return len(next(iter(self.values()))) if self._values else None

    def select(self, index: slice | Tensor | Sequence[int]) -> "Condition":
        """The rows at an index."""
        index = index if isinstance(index, (slice, Tensor)) else list(index)  # a tuple would index dimensions
        return Condition({name: value[index] for name, value in self.items()})

    def replace(self, **values: Tensor) -> "Condition":
        """A copy with some values replaced or added."""
        return Condition({**self._values, **values})

    def to(self, device: torch.device | str) -> "Condition":
        """A copy on another device, without blocking the host."""
        return Condition({name: value.to(device, non_blocking=True) for name, value in self.items()})

    @classmethod
    def concat(cls, conditions: Sequence[Mapping[str, Tensor]]) -> "Condition":
        """The rows of several conditions, one after the other.

        >>> one, two = (Condition(label=torch.tensor([label])) for label in (1, 2))
        >>> Condition.concat([one, two])["label"]
        tensor([1, 2])
        """
        return cls._joined(conditions, torch.cat)

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, Tensor]]) -> "Condition":
        """One condition of the values of single samples, which have no batch dimension.

        >>> Condition.collate([{"label": torch.tensor(1)}, {"label": torch.tensor(2)}])["label"]
        tensor([1, 2])
        """
        return cls._joined(samples, torch.stack)

    @classmethod
    def _joined(
        cls, parts: Sequence[Mapping[str, Tensor]], join: Callable[[list[Tensor]], Tensor]
    ) -> "Condition":
        if not parts:
            raise ValueError("no condition given to join; check that the dataset or the list is not empty.")
        names = list(parts[0])
        for part in parts:
            if set(part) != set(names):
                raise ValueError(
                    f"conditions to join must have the same names, got {sorted(names)} and {sorted(part)}; "
                    f"codec.null(cond) gives the value that stands for a missing one."
                )
        for name in names:
            for value in (part[name] for part in parts):
                if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise TypeError(
                        f"condition {name!r} must be a tensor in every part, got {type(value).__name__}."
                    )
            shapes = {tuple(part[name].shape[join is torch.cat :]) for part in parts}
            if len(shapes) > 1:
                raise ValueError(
                    f"condition {name!r} has rows of shapes {sorted(shapes)}; pad them to one length, and "
                    f"give the mask that says what is padding."
                )
        return cls({name: join([part[name] for part in parts]) for name in names})
