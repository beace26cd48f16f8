"""The data order: which samples stand in which micro-batch, as a pure function of (seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, SupportsIndex, final, overload

import torch
from jaxtyping import Int64
from torch import Tensor

from gendiff._philox import ranged
from gendiff.random import Rng


def permutation(
    seed: SupportsIndex, epoch: SupportsIndex, size: SupportsIndex, name: str = "samples"
) -> Int64[Tensor, "n"]:
    """A random order of 0 … size - 1, the same on every platform: the ranks of 64-bit Philox words.

    Args:
        seed: 0 … 2^64 - 1.
        epoch: 0 … 2^32 - 1.
        size: number of entries, >= 0.
        name: permutations of different names are independent.

    Raises:
        ValueError: for a number out of its range.

    >>> permutation(0, 0, 5).tolist() == permutation(0, 0, 5).tolist() != permutation(0, 1, 5).tolist()
    True
    """
    size = ranged("size", size, 0, 2**33)
    rng = Rng(seed).fold("order").fold(ranged("epoch", epoch, 0, 2**32))
    low, high = rng.bits(name, (2, size))
    # Two words, since among 32-bit ones ties are common from 2^16 on, and a tie would keep its order.
    return low.bitwise_or_(high.bitwise_left_shift_(32)).argsort(stable=True)


def occurrences(indices: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """How often each entry has stood before itself in the sequence.

    >>> occurrences(torch.tensor([7, 5, 7, 7, 5])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = indices.argsort(stable=True)
    _, runs = indices[order].unique_consecutive(return_counts=True)
    firsts = runs.cumsum(0) - runs
    counts = torch.empty_like(indices)
    counts[order] = torch.arange(len(indices)) - firsts.repeat_interleave(runs)
    return counts


def block(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The first entry and the number of entries of a rank, when `size` are dealt out in contiguous blocks.

    >>> [block(5, 3, rank) for rank in range(3)]
    [(0, 2), (2, 2), (4, 1)]
    """
    each, rest = divmod(size, ranks)
    return rank * each + min(rank, rest), each + (rank < rest)


@final
@dataclass(frozen=True)
class Plan:
    """One micro-batch of one rank, before anything is loaded.

    Attributes:
        indices: what to load, always `batch_size` entries: the real ones first, then padding, which repeats
            them (or, on a rank without any, those of the other ranks).
        occurrences: which of its sample's appearances in the epoch each entry is.
        rows: real entries of this rank, 0 … batch_size.
        total: real entries over all ranks.
        epoch: its epoch.
        index: its number in the epoch.
        last: whether it is the last of the epoch.
    """

    indices: tuple[int, ...]
    occurrences: tuple[int, ...]
    rows: int
    total: int
    epoch: int
    index: int
    last: bool


@final
@dataclass(frozen=True, eq=False)
class Plans(Sequence[Plan]):
    """The plans of an epoch, each made when it is asked for; slices are tuples.

    Attributes:
        epoch: its number.
        entries: indices of all samples, [n], those of a global micro-batch side by side.
        counts: occurrence of each, [n].
        starts: where each global micro-batch starts in them, [m].
        sizes: how many entries it has, [m].
        batch_size: entries of a plan.
        ranks: number of processes.
        rank: whose plans they are.
    """

    epoch: int
    entries: Int64[Tensor, "n"]
    counts: Int64[Tensor, "n"]
    starts: Int64[Tensor, "m"]
    sizes: Int64[Tensor, "m"]
    batch_size: int
    ranks: int
    rank: int

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Plan, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        places = range(len(self))[index]
        return self._plan(places) if isinstance(places, int) else tuple(map(self._plan, places))

    def _plan(self, index: int) -> Plan:
        start, size = int(self.starts[index]), int(self.sizes[index])
        first, rows = block(size, self.ranks, self.rank)
        own = slice(start + first, start + first + rows) if rows else slice(start, start + size)
        indices, counts = (
            tuple(islice(cycle(column[own].tolist()), self.batch_size))
            for column in (self.entries, self.counts)
        )
        return Plan(indices, counts, rows, size, self.epoch, index, index == len(self) - 1)


@final
class Order:
    """The micro-batches of every epoch, for one rank.

    A global micro-batch is ranks·batch_size consecutive entries of the epoch's sequence, and a rank has the
    block of them that is its own. One process that accumulates four micro-batches, and two that accumulate
    two, therefore see the same samples in an update. A short last micro-batch is dealt out as evenly as
    possible and padded: every rank has the same number of micro-batches, and every entry is there once.

    The sequence is what `dataset.order(seed, epoch)` gives, otherwise a permutation. With `dataset.groups`, a
    global micro-batch is filled from one group, each group has a short last one of its own, and the
    micro-batches are shuffled over the groups; the samples of an update then depend on ranks·batch_size.

    Args:
        dataset: has a length; `order` and `groups` (the group of every index) are optional.
        batch_size: entries of a micro-batch of one rank, >= 1.
        seed: 0 … 2^64 - 1.
        ranks: number of processes, >= 1.
        rank: this process, 0 … ranks - 1.
        shuffle: if False, the sequence is 0, 1, …, and `dataset.order` is not asked; with groups,
            micro-batches come in the order of their first samples.

    Attributes:
        samples: entries of an epoch.

    Raises:
        ValueError: for an empty dataset, numbers out of their ranges, groups that do not fit the dataset, or
            a `dataset.order` with an index out of range. `epoch` raises it where `dataset.order` leads to
            another number of entries or of micro-batches than in epoch 0.
        TypeError: for a dataset without length, or a `dataset.order` that is no method that gives int64.

    >>> order = Order(range(10), batch_size=2, seed=0, ranks=2, rank=1)
    >>> len(order), order.samples, order.epoch(0)[2].rows, order.epoch(0)[2].total
    (3, 10, 1, 2)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: SupportsIndex,
        seed: SupportsIndex,
        *,
        ranks: SupportsIndex = 1,
        rank: SupportsIndex = 0,
        shuffle: bool = True,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"an order needs a dataset with a length, got {type(dataset).__name__}; give it `__len__`."
            )
        self.batch_size = ranged("batch_size", batch_size, 1, 2**31)
        self.seed = ranged("seed", seed, 0, 2**64)
        self.ranks = ranged("ranks", ranks, 1, 2**31)
        self.rank = ranged("rank", rank, 0, self.ranks)
        self._size, self._shuffle = len(dataset), shuffle
        if self._size == 0:
            raise ValueError("the dataset is empty; check where it looks for its samples.")
        self._own = getattr(dataset, "order", None) if shuffle else None
        if self._own is not None and not callable(self._own):
            raise TypeError(
                f"dataset.order is {self._own!r}; it is reserved for a method, order(seed, epoch), that "
                f"gives the sequence of an epoch; rename it."
            )
        self._groups = _groups_of(dataset)
        sequence = torch.arange(self._size) if self._own is None else self._sequence(0)
        self.samples = len(sequence)
        self._batches = len(self._cut(sequence)[1])

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self._batches

    def epoch(self, epoch: SupportsIndex) -> Plans:
        """The micro-batches of an epoch, in their order."""
        epoch = ranged("epoch", epoch, 0, 2**32)
        sequence = self._sequence(epoch)
        positions, starts, sizes = self._cut(sequence)
        if (len(sequence), len(starts)) != (self.samples, self._batches):
            raise ValueError(
                f"epoch {epoch} has {len(sequence)} samples in {len(starts)} micro-batches, but epoch 0 has "
                f"{self.samples} in {self._batches}; `dataset.order` has to give equally many in every "
                f"epoch, and equally many of every group."
            )
        if len(starts) > 1 and self._groups is not None:
            if self._shuffle:
                turn = permutation(self.seed, epoch, len(starts), "batches")
            else:
                turn = positions[starts].argsort(stable=True)
            starts, sizes = starts[turn], sizes[turn]
        counts = occurrences(sequence)
        return Plans(
            epoch,
            sequence[positions],
            counts[positions],
            starts,
            sizes,
            self.batch_size,
            self.ranks,
            self.rank,
        )

    def _sequence(self, epoch: int) -> Int64[Tensor, "n"]:
        if self._own is None:
            return permutation(self.seed, epoch, self._size) if self._shuffle else torch.arange(self._size)
        given = self._own(self.seed, epoch)
        if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.ndim != 1:
            raise TypeError(
                f"dataset.order(seed, epoch) gave {_describe(given)}; it has to give indices, an int64 "
                f"tensor [n]."
            )
        if len(given) == 0 or not 0 <= int(given.min()) <= int(given.max()) < self._size:
            raise ValueError(
                f"dataset.order({self.seed}, {epoch}) gave {_describe(given)} with values outside 0 … "
                f"{self._size - 1}, or none at all; the dataset has {self._size} samples."
            )
        return given.cpu()

    def _cut(
        self, sequence: Int64[Tensor, "n"]
    ) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"], Int64[Tensor, "m"]]:
        """Places in the sequence, group by group; where in them each global micro-batch starts; its size."""
        if self._groups is None:
            positions, counts = torch.arange(len(sequence)), [len(sequence)]
        else:
            labels = self._groups[sequence]
            positions, counts = labels.argsort(stable=True), labels.unique(return_counts=True)[1].tolist()
        span, starts, end = self.ranks * self.batch_size, [], 0
        for count in counts:
            starts.append(torch.arange(end, end + count, span))
            end += count
        ends = torch.tensor(counts).cumsum(0).repeat_interleave(torch.tensor([len(one) for one in starts]))
        first = torch.cat(starts)
        return positions, first, (ends - first).clamp_max(span)


def _groups_of(dataset: Any) -> Int64[Tensor, "n"] | None:
    """The group of every index; None where there is only one."""
    given = getattr(dataset, "groups", None)
    if given is None:
        return None
    if not isinstance(given, Tensor):
        given = torch.tensor([ranged("a group", group, -(2**63), 2**63) for group in given])
    if given.is_floating_point() or given.shape != (len(dataset),):
        raise ValueError(
            f"dataset.groups is {_describe(given)} but the dataset has {len(dataset)} samples; it has to "
            f"give the group of every index, an integer."
        )
    return None if bool((given == given[0]).all()) else given.to("cpu", torch.int64)


def _describe(value: object) -> str:
    return (
        f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
