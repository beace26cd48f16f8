"""Datasets made of datasets: side by side (Zip) and one after the other (Mix)."""

import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, final

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from gendiff._philox import ranged
from gendiff.data.context import BrokenSample
from gendiff.data.order import occurrences, permutation
from gendiff.random import Rng

Id = str | int


@final
class Zip(Dataset[dict[str, Any]]):
    """Samples that belong together, by their id without its extension: `cats/1.jpg` and `cats/1.png`.

    With a base, its sample gets one more value of each other dataset, under the name that it is given here:
    `Zip(photos, control=edges)`. Without one the samples stay apart:
    `Zip(win=..., lose=...)` gives `{"id": ..., "weight": ..., "win": {...}, "lose": {...}}`.

    All of them draw the same numbers from `sample_rng`, so that they are cropped and flipped alike. Ids,
    order and groups are those of the base, or of the first.

    Args:
        base: whose samples get more values.
        others: by name; beside a base their samples have one value, apart from `id` and `weight`, as
            those of `Folder(..., only="image")` have.

    Raises:
        ValueError: for datasets that do not have partners for each other's samples, listing these, for ids
            that are the same without their extension and, when a sample is loaded, for images of different
            shapes, keys that are there twice, and weights that differ.
        TypeError: for nothing to zip, and when a sample of the others has not one value.

    >>> photos, edges = [{"image": torch.zeros(3, 8, 8)}], [{"image": torch.ones(3, 8, 8)}]
    >>> sorted(Zip(photos, control=edges)[0]), sorted(Zip(win=photos, lose=edges)[0])
    (['control', 'id', 'image'], ['id', 'lose', 'weight', 'win'])
    """

    def __init__(self, base: Any = None, /, **others: Any) -> None:
        if not others or (base is None and len(others) < 2):
            raise TypeError("there is nothing to zip; give Zip(photos, control=edges) or Zip(win=…, lose=…).")
        self.base, self.others = base, others
        first = next(iter(others.values())) if base is None else base
        self.ids = _ids(first)
        where = _places(self.ids, "the first dataset")
        self._rows = {
            name: list(range(len(self.ids)))
            if one is first
            else _partners(where, _places(_ids(one), repr(name)), name)
            for name, one in others.items()
        }
        for optional in ("order", "groups"):
            if hasattr(first, optional):
                setattr(self, optional, getattr(first, optional))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        id = self.ids[index]
        parts = {
            name: self._part(id, name, one, self._rows[name][index]) for name, one in self.others.items()
        }
        if self.base is None:
            return _side_by_side(id, parts)
        sample = {"id": id, **self.base[index]}
        for name, part in parts.items():
            if name in sample:
                raise ValueError(f"sample {id!r} has {name!r} already; give the other dataset another name.")
            sample[name] = _only_value(part, name)
        _check_shapes({key: value for key, value in sample.items() if key == "image" or key in parts}, id)
        return sample

    def __repr__(self) -> str:
        base = [] if self.base is None else [repr(self.base)]
        return f"Zip({', '.join([*base, *(f'{name}={one!r}' for name, one in self.others.items())])})"

    def _part(self, id: Id, name: str, dataset: Any, row: int) -> Mapping[str, Any]:
        try:
            return dataset[row]
        except BrokenSample as error:
            raise BrokenSample(id, f"its {name!r}, {error}") from error


@final
class Mix(Dataset[Any]):
    r"""Several datasets in fixed shares, such as a subject and its class in prior preservation.

    The j-th sample (j = 0, 1, …) of a dataset of share p stands at :math:`(j + 1/2)/p`, and the epoch is read
    in the order of these numbers. Of K datasets, the first n samples of an epoch hold one of share p
    :math:`pn \pm (1/2 + p\,(K - 2)/2)` times; with two datasets any stretch has the shares to within one.

    Each dataset comes in permutations of its own. An epoch ends when the one that lasts longest has been seen
    once; the others are repeated, in fresh permutations. Where the last repetition is cut off, its samples
    are spread over the dataset's groups as the dataset is, so that every epoch has as many of each group.
    Micro-batches are made of one group, and with several groups their shares hold on average.

    Args:
        parts: pairs of a dataset and its share, above 0; the shares sum to 1.

    Attributes:
        ids: "0/<id>" of the first dataset's samples, "1/<id>" of the second's, and so on.
        groups: those of the datasets, where equal ones are taken to be one shape, as those of image datasets
            are; 0 for datasets that have none.

    Raises:
        ValueError: for no parts, empty ones, and shares that are not above 0 or do not sum to 1.

    >>> both = Mix([([{"x": 0.0}], 0.25), ([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], 0.75)])
    >>> [both[i]["id"][0] for i in both.order(seed=0, epoch=0).tolist()]
    ['1', '0', '1', '1']
    """

    def __init__(self, parts: Sequence[tuple[Any, float | int]]) -> None:
        self.datasets, self.shares = [one for one, _ in parts], [float(share) for _, share in parts]
        total = math.fsum(self.shares)
        if not all(share > 0 for share in self.shares) or abs(total - 1) > 1e-6:
            proper = [round(share / total, 4) for share in self.shares] if total > 0 else "above 0"
            raise ValueError(
                f"shares are above 0 and sum to 1, got {self.shares}, which sum to {total:g}; give {proper}."
            )
        sizes = [len(one) for one in self.datasets]
        if 0 in sizes:
            raise ValueError(f"dataset {sizes.index(0)} is empty; check where it looks for its samples.")
        self._starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        self.ids = [f"{k}/{id}" for k, one in enumerate(self.datasets) for id in _ids(one)]
        self.groups = [int(group) for one in self.datasets for group in _groups(one)]

    def __len__(self) -> int:
        """Samples of all datasets; an epoch has as many as `order` gives."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        part = next(k for k, end in enumerate(self._starts[1:]) if index < end)
        try:
            sample = self.datasets[part][index - self._starts[part]]
        except BrokenSample as error:
            raise BrokenSample(self.ids[index], error.reason) from error
        return {**sample, "id": self.ids[index]}

    def __repr__(self) -> str:
        parts = zip(self.datasets, self.shares, strict=True)
        return f"Mix([{', '.join(f'({one!r}, {share:g})' for one, share in parts)}])"

    def order(self, seed: SupportsIndex, epoch: SupportsIndex) -> Int64[Tensor, "n"]:
        """The indices of an epoch, a function of (seed, epoch); as many in every epoch, and of each group."""
        seed, epoch = ranged("seed", seed, 0, 2**64), ranged("epoch", epoch, 0, 2**32)
        sizes = [len(self._cycle(part, seed, epoch, 0)) for part in range(len(self.datasets))]
        end = max((size - 0.5) / share for size, share in zip(sizes, self.shares, strict=True))
        times, indices = list[Tensor](), list[Tensor]()
        for part, (size, share) in enumerate(zip(sizes, self.shares, strict=True)):
            time = torch.arange(max(size, math.ceil(end * share) + 1), dtype=torch.float64).add_(0.5) / share
            times.append(time[time <= end])
            indices.append(self._drawn(part, seed, epoch, len(times[-1])))
        return torch.cat(indices)[torch.cat(times).argsort(stable=True)]

    def _drawn(self, part: int, seed: int, epoch: int, count: int) -> Int64[Tensor, "n"]:
        """`count` samples of a dataset: whole permutations, and a part of the last one."""
        cycles = list[Tensor]()
        while count > 0:
            cycle = self._cycle(part, seed, epoch, len(cycles))
            cycles.append(cycle if len(cycle) <= count else self._share_of(cycle, count))
            count -= len(cycle)
        return torch.cat(cycles)

    def _cycle(self, part: int, seed: int, epoch: int, cycle: int) -> Int64[Tensor, "n"]:
        """The n-th sequence of a dataset in an epoch: its own, or a permutation."""
        dataset, start = self.datasets[part], self._starts[part]
        if hasattr(dataset, "order"):
            low, high = Rng(seed).fold("mix").fold(part).bits(f"cycle {cycle}", (2,)).tolist()
            return dataset.order(low | high << 32, epoch) + start
        return permutation(seed, epoch, len(dataset), f"mix {part} {cycle}") + start

    def _share_of(self, cycle: Int64[Tensor, "n"], count: int) -> Int64[Tensor, "m"]:
        """The first samples of each group, as many as its part of `count`, by largest remainders."""
        labels = torch.tensor(self.groups)[cycle].unique(return_inverse=True)[1]
        exact = labels.bincount().to(torch.float64) * count / len(cycle)
        quota = exact.floor().to(torch.int64)
        quota[(quota - exact).argsort(stable=True)[: count - int(quota.sum())]] += 1
        return cycle[occurrences(labels) < quota[labels]]


def _side_by_side(id: Id, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    _check_shapes({name: part["image"] for name, part in parts.items() if "image" in part}, id)
    weights = {name: part.get("weight", 1.0) for name, part in parts.items()}
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"the parts of sample {id!r} have the weights {weights}; a sample has one: equal ones."
        )
    bare = {name: {key: v for key, v in part.items() if key != "weight"} for name, part in parts.items()}
    return {"id": id, "weight": next(iter(weights.values())), **bare}


def _only_value(part: Mapping[str, Any], name: str) -> Any:
    values = {key: value for key, value in part.items() if key not in ("id", "weight")}
    if len(values) != 1:
        raise TypeError(
            f"a sample of {name!r} has {sorted(values)}, but is to give one value; give a dataset with one, "
            f"such as Folder(..., only='image')."
        )
    return next(iter(values.values()))


def _check_shapes(values: Mapping[str, Any], id: Id) -> None:
    shapes = {
        name: tuple(value.shape[1:])
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim == 3
    }
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the images of sample {id!r} have different shapes, {shapes}; give the datasets one size, "
            f"or one area and files of one aspect ratio."
        )


def _ids(dataset: Any) -> list[Id]:
    ids = getattr(dataset, "ids", None)
    return list(range(len(dataset)) if ids is None else ids)


def _groups(dataset: Any) -> Iterator[SupportsIndex]:
    groups = getattr(dataset, "groups", None)
    return iter([0] * len(dataset) if groups is None else groups)


def _places(ids: Sequence[Id], name: str) -> dict[Id, int]:
    """Index by id without extension."""
    places = dict[Id, int]()
    for index, id in enumerate(ids):
        stem = posixpath.splitext(id)[0] if isinstance(id, str) else id
        if stem in places:
            raise ValueError(
                f"{ids[places[stem]]!r} and {id!r} of {name} are the same without their extension, so that "
                f"their partners are not certain; rename one of them."
            )
        places[stem] = index
    return places


def _partners(base: Mapping[Id, int], other: Mapping[Id, int], name: str) -> list[int]:
    """The row of the other dataset for each of the base."""
    for has, lacks, where in ((base, other, f"in {name!r}"), (other, base, "in the first dataset")):
        alone = [id for id in has if id not in lacks]
        if alone:
            raise ValueError(
                f"{len(alone)} samples have no partner {where}: {', '.join(map(repr, alone[:10]))}"
                f"{' …' if len(alone) > 10 else ''}; ids have to be equal apart from their extension. "
                f"Add what is missing (a folder has what it left out in `broken`), or remove what is alone."
            )
    return [other[id] for id in base]
