"""The loader: micro-batches as a pure function of (dataset, seed, epoch, number), however they are loaded."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import Any, SupportsIndex, final

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gendiff._philox import ranged, sample_keys
from gendiff.data.collate import collate as collate_samples
from gendiff.data.context import BrokenSample
from gendiff.data.micro import (
    Collate,
    Id,
    Micro,
    Sample,
    generators_kept,
    micro_at_once,
    micro_of,
    named,
    seeded,
)
from gendiff.data.order import Order, Plan, block
from gendiff.data.tensors import Tensors
from gendiff.random import Rng


@final
class Loader:
    """Micro-batches of a dataset, in an order and with randomness that depend on (seed, epoch) alone.

    Neither the number of workers nor an interruption changes them. While a sample is loaded, `sample_rng`
    gives its own randomness, and the global CPU generators of torch, NumPy and `random` are seeded from the
    same key, for transforms that draw from those; afterwards they are as they were. Generators that a dataset
    makes for itself are its own affair.

    A dataset with indices is loaded in the sequence of an `Order`, whole micro-batches in one worker, those
    of `Tensors` by one indexing. Its
    samples are known by their own `id`, else by `dataset.ids[i]`, else by i. A sample for which it raises
    `BrokenSample` is replaced by a copy of one that can be read, with weight 0, and is reported.

    A dataset that can only be iterated over is read by every rank in its own order, whatever `shuffle` says,
    and each rank keeps its block: give every rank the same stream, not split by rank. `set_epoch(epoch)` is
    called where it exists. Samples are known by `id`, else `__key__`, else their running number, which also
    is the occurrence. Such a dataset shares the work among several workers, and leaves out broken samples,
    itself; with another number of workers it may give another stream.

    Args:
        dataset: with `__len__` and `__getitem__`, or with `__iter__`; samples are mappings.
        batch_size: samples of a micro-batch of one rank, >= 1.
        seed: 0 … 2^64 - 1.
        ranks: number of processes, >= 1.
        rank: this process, 0 … ranks - 1.
        shuffle: if False, samples come in the dataset's order.
        num_workers: processes that load; 0 loads in this one.
        pin_memory: whether tensors come in page-locked memory.
        collate: from samples to a batch.

    Raises:
        ValueError: for numbers out of their ranges, what an `Order` refuses, ids that do not fit the dataset,
            and `pin_memory` without an accelerator. The stream raises it for a micro-batch of which no sample
            could be read.
        TypeError: for what is no dataset. The stream raises it for samples that are no mappings.

    >>> loader = Loader([{"x": 0.5}, {"x": 1.5}, {"x": 2.5}], batch_size=2, shuffle=False)
    >>> for micro in loader.stream(epochs=1):
    ...     print(micro.batch["x"], micro.batch["id"], micro.batch["weight"], micro.rows)
    tensor([0.5000, 1.5000]) tensor([0, 1]) tensor([1., 1.]) 2
    tensor([2.5000, 2.5000]) tensor([2, 2]) tensor([1., 0.]) 1
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: SupportsIndex,
        seed: SupportsIndex = 0,
        *,
        ranks: SupportsIndex = 1,
        rank: SupportsIndex = 0,
        shuffle: bool = True,
        num_workers: SupportsIndex = 0,
        pin_memory: bool = False,
        collate: Collate = collate_samples,
    ) -> None:
        self.dataset, self.seed = dataset, ranged("seed", seed, 0, 2**64)
        self.batch_size = ranged("batch_size", batch_size, 1, 2**31)
        self.ranks = ranged("ranks", ranks, 1, 2**31)
        self.rank = ranged("rank", rank, 0, self.ranks)
        self.num_workers = ranged("num_workers", num_workers, 0, 2**15)
        self.pin_memory, self.collate = pin_memory, collate
        if pin_memory and not torch.accelerator.is_available():
            raise ValueError("pin_memory=True, but no accelerator was found to copy to; leave it False.")
        self.order: Order | None = None
        self._ids: Sequence[Id] | None = None
        if not _iterable(dataset):
            self.order = Order(dataset, batch_size, seed, ranks=ranks, rank=rank, shuffle=shuffle)
            self._ids = _ids_of(dataset)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return -(-self.samples // (self.ranks * self.batch_size)) if self.order is None else len(self.order)

    @property
    def samples(self) -> int:
        """Real samples of an epoch, over all ranks."""
        if self.order is not None:
            return self.order.samples
        try:
            return len(self.dataset)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"{type(self.dataset).__name__} can be iterated over but has no length, so an epoch has no "
                f"known number of micro-batches; count in steps instead of epochs, or give it `__len__`."
            ) from error

    def stream(
        self, epoch: SupportsIndex = 0, start: SupportsIndex = 0, epochs: SupportsIndex | None = None
    ) -> Generator[Micro, None, None]:
        """Micro-batches from number `start` of `epoch` on, through the ends of epochs.

        The workers of a dataset with indices live as long as the stream, and end when it is closed, exhausted
        or fails. A dataset that is iterated over has new ones in every epoch, and reads and drops what comes
        before `start`.

        Args:
            epoch: the first, 0 … 2^32 - 1.
            start: number of micro-batches of it that are left out; all of them leads to the next epoch.
            epochs: where to end, exclusive; None never ends.

        Raises:
            ValueError: for numbers out of their ranges, or a `start` after the end of its epoch.
        """
        epoch = ranged("epoch", epoch, 0, 2**32)
        end = 2**32 if epochs is None else ranged("epochs", epochs, 0, 2**32)
        if self.order is None:
            return self._iterate(epoch, ranged("start", start, 0, 2**63), end)
        start = ranged(f"start in an epoch of {len(self)} micro-batches", start, 0, len(self) + 1)
        fetch = _Fetch(self.dataset, self._ids, self.seed, self.collate)
        return self._fetch(fetch, _plans(self.order, epoch, start, end))

    def _fetch(self, fetch: "_Fetch", plans: Iterator[Plan]) -> Generator[Micro, None, None]:
        # Dictionaries cross the process border: an instance of a class that was imported twice (a reload, a
        # notebook) cannot be pickled, and torch's queue then waits for ever instead of raising.
        with closing(self._load(fetch, map(vars, plans), pin_memory=self.pin_memory)) as loaded:
            for facts in loaded:
                yield Micro(**facts)

    def _iterate(self, epoch: int, start: int, end: int) -> Generator[Micro, None, None]:
        for number in range(epoch, end):
            yield from self._read(number, start)
            start = 0

    def _read(self, epoch: int, start: int) -> Iterator[Micro]:
        """One epoch of a dataset that can only be iterated over."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        with closing(self._load(_Numbered(self.dataset, self.seed, epoch), epoch=epoch)) as loaded:
            samples, index = enumerate(loaded), 0
            ahead = next(samples, None)  # only then is it known which micro-batch is the last
            while ahead is not None:
                every = [ahead, *islice(samples, self.ranks * self.batch_size - 1)]
                ahead = next(samples, None)
                if index >= start:
                    yield self._own(every, epoch, index, last=ahead is None)
                index += 1
        if index == 0:
            raise ValueError(
                f"{type(self.dataset).__name__} gave no sample in epoch {epoch}; its `__iter__` has to start "
                f"anew every time, which an iterator or a generator cannot do."
            )
        if index < start:
            raise ValueError(f"start is {start}, but epoch {epoch} has only {index} micro-batches.")

    def _own(self, every: Sequence[tuple[int, object]], epoch: int, index: int, *, last: bool) -> Micro:
        """This rank's part of a global micro-batch."""
        first, rows = block(len(every), self.ranks, self.rank)
        read = [
            (named(sample, number, "__key__"), number % 2**32)
            for number, sample in (every[first : first + rows] or every)[: self.batch_size]
        ]
        numbers = tuple(islice(cycle(number for _, number in read), self.batch_size))
        with generators_kept():
            plan = Plan(numbers, numbers, rows, len(every), epoch, index, last)
            micro = micro_of(read, plan, self.seed, self.collate)
        return micro.pin_memory() if self.pin_memory else micro

    def _load(
        self, dataset: Any, tasks: Iterable[Any] | None = None, *, epoch: int = 0, pin_memory: bool = False
    ) -> Generator[Any, None, None]:
        """What torch's DataLoader makes of a dataset, in order; its workers end with this generator."""
        seed = Rng(self.seed).fold("workers").fold(epoch).bits("seed", (1,))
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=tasks,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(int(seed)),  # else it draws from the global one
        )
        loaded = iter(loader)
        try:
            yield from loaded
        finally:
            # Else workers would live as long as the traceback of an error, which refers to them.
            shutdown = getattr(loaded, "_shutdown_workers", None)  # an iterator without workers has none
            if shutdown is not None:
                shutdown()


@dataclass(frozen=True)
class _Fetch:
    """What torch's DataLoader sees as a dataset: what a plan says gives what a micro-batch holds."""

    dataset: Any
    ids: Sequence[Id] | None
    seed: int
    collate: Collate

    def __getitem__(self, task: dict[str, Any]) -> dict[str, Any]:
        plan = Plan(**task)
        if isinstance(self.dataset, Tensors) and self.collate is collate_samples:
            return vars(micro_at_once(self.dataset.batch(plan.indices), plan, self.seed))
        # Padding repeats entries, and a repeated one would be the same to the last bit.
        entries = list(dict.fromkeys(zip(plan.indices, plan.occurrences, strict=True)))
        ids = [index if self.ids is None else self.ids[index] for index, _ in entries]
        keys = sample_keys(self.seed, ids, epoch=plan.epoch, occurrence=[count for _, count in entries])
        read, broken = list[tuple[Sample, int]](), list[tuple[Id, str]]()
        with generators_kept():
            for (index, occurrence), id, key in zip(entries, ids, keys.tolist(), strict=True):
                try:
                    read.append((self._sample(index, id, key), occurrence))
                except BrokenSample as error:
                    broken.append((error.id, error.reason))
                if read and plan.rows == 0:  # padding alone needs no more
                    break
            if not read:
                listed = "; ".join(f"{id!r}: {reason}" for id, reason in broken)
                raise ValueError(
                    f"no sample of micro-batch {plan.index} of epoch {plan.epoch} could be read, so there is "
                    f"nothing to train on: {listed}. Repair or remove them; with a larger batch_size, "
                    f"single ones are skipped."
                )
            return vars(micro_of(read, plan, self.seed, self.collate, broken if plan.rows else ()))

    def _sample(self, index: int, id: Id, key: int) -> Sample:
        try:
            with seeded(key):
                given = self.dataset[index]
        except BrokenSample:
            raise
        except Exception as error:
            raise RuntimeError(
                f"sample {id!r} (index {index}) could not be loaded: {type(error).__name__}: {error}"
            ) from error
        return named(given, id)


class _Numbered(IterableDataset[Any]):
    """A dataset that can only be iterated over, with randomness of its own for the n-th sample."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        with generators_kept(), seeded(self._key(-1)):
            samples = iter(self.dataset)
        for number in count(first, step):  # the place in the stream, if all workers go on to the end
            try:
                with generators_kept(), seeded(self._key(number)):
                    sample = next(samples)
            except StopIteration:
                return
            except Exception as error:
                raise RuntimeError(
                    f"sample number {number} of epoch {self.epoch} could not be loaded: "
                    f"{type(error).__name__}: {error}"
                ) from error
            yield sample

    def _key(self, number: int) -> int:
        return int(sample_keys(self.seed, [number], epoch=self.epoch))


def _plans(order: Order, epoch: int, start: int, end: int) -> Iterator[Plan]:
    for number in range(epoch, end):
        plans = order.epoch(number)
        yield from (plans[index] for index in range(start, len(plans)))
        start = 0


def _iterable(dataset: object) -> bool:
    if isinstance(dataset, IterableDataset):
        return True
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    if hasattr(dataset, "__iter__"):
        return True
    raise TypeError(
        f"{type(dataset).__name__} is no dataset; accepted is what has `__len__` and `__getitem__`, or "
        f"`__iter__`."
    )


def _ids_of(dataset: Any) -> Sequence[Id] | None:
    ids = getattr(dataset, "ids", None)
    if ids is not None and len(ids) != len(dataset):
        raise ValueError(
            f"dataset.ids has {len(ids)} entries for {len(dataset)} samples; it has to give the id of every "
            f"index."
        )
    return ids


def _same(value: Any) -> Any:
    return value
