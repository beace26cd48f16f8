"""A dataset in memory, of which a loader takes a whole micro-batch by one indexing."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset


@final
class Tensors(Dataset[dict[str, Any]]):
    """Samples that are the rows of tensors, such as small pictures, latents or embeddings.

    Nothing is drawn when one is loaded, and nothing can fail, so that a `Loader` indexes whole micro-batches
    in place of collating samples one by one; the batches are the same.

    Args:
        columns: by name: tensors [N, *] on the CPU, or sequences of N strings. `weight`, [N], is how much a
            sample counts in the loss, 1 by default.
        ids: what the samples are known by: N integers or strings, no two the same; 0 … N - 1 by default.

    Raises:
        ValueError: no columns, columns of different lengths, ids that do not fit, or weights that are not
            finite numbers [N].
        TypeError: a column of another type, or a tensor on another device.

    >>> data = Tensors({"image": torch.zeros(3, 1, 8, 8), "caption": ["a fox", "an owl", "a bear"]})
    >>> len(data), data[1]["caption"], data.batch([2, 0])["caption"], data.batch([2, 0])["id"]
    (3, 'an owl', ['a bear', 'a fox'], tensor([2, 0]))
    """

    def __init__(
        self, columns: Mapping[str, Tensor | Sequence[str]], ids: Sequence[str] | Sequence[int] | None = None
    ) -> None:
        sizes = {name: _rows(name, column) for name, column in columns.items()}
        if not sizes or "id" in sizes:
            raise ValueError(
                f"the columns are {sorted(sizes)}; give at least one, such as {{'image': ...}}, "
                f"and `ids` apart."
            )
        size = next(iter(sizes.values()))
        weight = columns.get("weight", torch.ones(1).expand(size))
        if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.isfinite().all():
            raise ValueError(
                "the column 'weight' is reserved for how much a sample counts: finite numbers, [N]."
            )
        self.columns, self.weight = dict(columns), weight.float()
        self.ids = range(size) if ids is None else ids
        if len({*sizes.values(), len(self.ids)}) != 1 or len(set(self.ids)) != size:
            raise ValueError(
                f"columns and ids have one entry a sample, and ids no entry twice, got {sizes} and "
                f"{len(self.ids)} ids, {len(set(self.ids))} of them different."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": self.ids[index], **{name: column[index] for name, column in self.columns.items()}}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What `collate` makes of these samples."""
        rows = torch.tensor(indices)
        batch = {
            name: column[rows] if isinstance(column, Tensor) else [column[index] for index in indices]
            for name, column in self.columns.items()
        }
        ids = [self.ids[index] for index in indices]
        known = ids if isinstance(ids[0], str) else torch.tensor(ids)
        return {"id": known, **batch, "weight": self.weight[rows]}


def _rows(name: str, column: object) -> int:
    if isinstance(column, Tensor) and column.device.type == "cpu" and column.ndim:
        return len(column)
    if (
        isinstance(column, Sequence)
        and not isinstance(column, str)
        and all(isinstance(s, str) for s in column)
    ):
        return len(column)
    what = f"a tensor {list(column.shape)} on {column.device}" if isinstance(column, Tensor) else type(column)
    raise TypeError(
        f"column {name!r} is {what}; accepted are tensors [N, *] on the CPU, from where a trainer "
        f"moves what it takes, and sequences of N strings."
    )
