"""The loader: the same micro-batches with any workers and after any interruption, nothing global changed."""

import multiprocessing
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from gendiff._philox import sample_keys
from gendiff.data.context import BrokenSample, sample_rng
from gendiff.data.loader import Loader, Micro
from gendiff.data.order import Order, permutation
from gendiff.random import Rng


class Noisy(Dataset[dict[str, Any]]):
    """Samples that draw from every source; some may be broken or raise."""

    def __init__(self, size: int = 10, broken: Iterable[int] = (), fails: Iterable[int] = ()) -> None:
        self.ids = [f"s{index}" for index in range(size)]
        self.broken, self.fails = set(broken), set(fails)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        worker = get_worker_info()
        self.worker = -1 if worker is None else worker.id
        if index in self.fails:
            raise KeyError("caption")
        if index in self.broken:
            raise BrokenSample(self.ids[index], "truncated")
        return {"value": index, "name": f"n{index}", "drawn": drawn()}


class Stream:
    """Can only be iterated over; workers share the samples in turn."""

    def __init__(self, size: int = 10, named: str | None = None) -> None:
        self.size, self.named, self.epoch = size, named, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, self.size, step):
            yield {"value": index, "from": self.epoch, "drawn": drawn()} | (
                {self.named: f"k{index}"} if self.named else {}
            )


class TorchStream(Stream, IterableDataset[dict[str, Any]]):
    def __len__(self) -> int:
        return self.size


def drawn() -> dict[str, Any]:
    return {
        "rng": sample_rng().uniform("crop", (2,)),
        "torch": torch.rand(2),
        "numpy": np.random.random(2),
        "random": random.random(),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Micro):
        return same(vars(one), vars(two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    return torch.equal(one, two) and one.dtype == two.dtype if isinstance(one, Tensor) else one == two


def all_same(one: Iterable[Micro], two: Iterable[Micro]) -> bool:
    return all(same(a, b) for a, b in zip(one, two, strict=True))


def ids(micro: Micro) -> list[Any]:
    given = micro.batch["id"]
    return (given.tolist() if isinstance(given, Tensor) else given)[: micro.rows]


class Globals:
    """The global generators now, to be compared with later."""

    def __init__(self) -> None:
        self.torch, self.numpy = torch.get_rng_state(), np.random.get_state(legacy=False)
        self.random = random.Random()
        self.random.setstate(random.getstate())

    def untouched(self) -> bool:
        # beartype, which tests run under, draws from `random` itself: it may be further on, but no more
        ahead = (self.random.getrandbits(32) for _ in range(3000))
        moved = random.getstate() != self.random.getstate()
        reached = not moved or any(random.getstate() == self.random.getstate() for _ in ahead)
        return (
            reached
            and torch.equal(self.torch, torch.get_rng_state())
            and str(self.numpy) == str(np.random.get_state(legacy=False))
        )


@pytest.mark.parametrize("dataset", [Noisy(), Stream(named="id")], ids=lambda d: type(d).__name__)
def test_workers_and_interruptions_change_nothing(dataset: Any) -> None:
    def loader(workers: int) -> Loader:
        return Loader(dataset, 3, seed=7, ranks=2, rank=1, num_workers=workers)

    whole = list(loader(0).stream(epochs=2))
    assert [(micro.epoch, micro.index, micro.last) for micro in whole] == [
        (epoch, index, index == 1) for epoch in range(2) for index in range(2)
    ]
    assert all_same(loader(2).stream(epochs=2), whole)
    for place, micro in enumerate(whole):
        assert all_same(loader(0).stream(micro.epoch, micro.index, 2), whole[place:])
        assert all_same(loader(0).stream(micro.epoch, micro.index + 1, 2), whole[place + 1 :])
        with_workers = loader(2).stream(micro.epoch, micro.index)
        assert all_same(islice(with_workers, 2), [*whole[place:], *loader(0).stream(2, 0, 3)][:2])
        with_workers.close()
    draws = torch.cat(
        [micro.batch["drawn"][name].flatten() for micro in whole for name in ("rng", "torch", "numpy")]
    )
    expected = sum(micro.rows * 6 for micro in whole)
    assert len(draws.unique()) == expected  # every sample, epoch and source has its own numbers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy(6), Stream(6)], ids=lambda d: type(d).__name__)
def test_global_generators_are_left_alone(dataset: Any, workers: int) -> None:
    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        return {"drawn": drawn()}

    before = Globals()
    stream = Loader(dataset, 2, num_workers=workers, collate=collate).stream(epochs=2)
    first = []
    for micro in stream:
        first.append(micro)
        assert before.untouched()
    torch.rand(1), np.random.random(), random.random()
    assert all_same(Loader(dataset, 2, collate=collate).stream(epochs=2), first)


def test_global_generators_are_left_alone_after_an_error() -> None:
    before = Globals()
    for dataset in (Noisy(4, fails=[2]), Noisy(2, broken=[0, 1])):
        with pytest.raises((RuntimeError, ValueError)):
            list(Loader(dataset, 2, shuffle=False).stream(epochs=1))
        assert before.untouched()


def test_randomness_is_that_of_seed_epoch_id_and_occurrence() -> None:
    class Repeated(Noisy):
        def order(self, seed: int, epoch: int) -> Tensor:
            return torch.tensor([4, 1, 4, 4, 1])

    micros = list(Loader(Repeated(), 5, seed=3).stream(epoch=2, epochs=3))
    (micro,) = micros
    assert ids(micro) == ["s4", "s1", "s4", "s4", "s1"]
    keys = sample_keys(3, ids(micro), epoch=2, occurrence=[0, 0, 1, 2, 1])
    assert torch.equal(micro.keys, keys)
    assert torch.equal(Rng.from_keys(keys).fold("data").uniform("crop", (5, 2)), micro.batch["drawn"]["rng"])
    assert torch.equal(Loader(Repeated(), 5, seed=3, num_workers=1).stream(2).__next__().keys, keys)


def test_what_a_sample_is_known_by() -> None:
    own: list[Any] = [{"id": f"own{n}", "x": sample_rng} for n in range(3)]
    loader = Loader([{"id": one["id"]} for one in own], 3, shuffle=False)
    micro = next(loader.stream())
    assert micro.batch["id"] == ["own0", "own1", "own2"]
    assert torch.equal(micro.keys, sample_keys(0, micro.batch["id"]))
    plain = next(Loader([{}, {}, {}], 3, seed=1, shuffle=False).stream(epoch=5))
    assert plain.batch["id"].tolist() == [0, 1, 2]
    assert torch.equal(plain.keys, sample_keys(1, range(3), epoch=5))
    assert torch.equal(plain.batch["weight"], torch.ones(3))


@pytest.mark.parametrize(("ranks", "batch"), [(1, 3), (2, 3), (3, 2), (4, 3)])
def test_ranks_share_an_epoch(ranks: int, batch: int) -> None:
    streams = [Loader(Noisy(), batch, 5, ranks=ranks, rank=rank).stream(1, epochs=2) for rank in range(ranks)]
    seen: list[Any] = []
    for micros in zip(*streams, strict=True):
        assert {micro.total for micro in micros} == {sum(micro.rows for micro in micros)}
        for micro in micros:
            assert len(micro.keys) == len(micro.batch["value"]) == batch
            assert micro.batch["weight"].tolist() == [1.0] * micro.rows + [0.0] * (batch - micro.rows)
            seen += ids(micro)
    assert seen == [f"s{index}" for index in permutation(5, 1, 10).tolist()]


def test_a_rank_without_samples_is_all_padding() -> None:
    for dataset in (Noisy(3, broken=[0]), Stream(3)):
        micro = next(Loader(dataset, 2, ranks=5, rank=4, shuffle=False).stream())
        assert (micro.rows, micro.total, micro.broken) == (0, 3, ())
        assert micro.batch["weight"].tolist() == [0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_become_padding(workers: int) -> None:
    clean = list(Loader(Noisy(8), 4, shuffle=False).stream(epochs=2))
    micros = list(Loader(Noisy(8, broken=[0, 2, 5]), 4, shuffle=False, num_workers=workers).stream(epochs=2))
    assert [(micro.rows, micro.total) for micro in micros] == [(2, 2), (3, 3)] * 2
    assert micros[2].broken == (("s0", "truncated"), ("s2", "truncated"))
    assert micros[3].broken == (("s5", "truncated"),)
    for micro, whole, rows in zip(micros, clean, [[1, 3, 1, 3], [0, 2, 3, 0]] * 2, strict=True):
        assert torch.equal(micro.keys, whole.keys[rows])
        assert torch.equal(micro.batch["drawn"]["torch"], whole.batch["drawn"]["torch"][rows])
        assert micro.batch["id"] == [whole.batch["id"][row] for row in rows]
        assert micro.batch["weight"].tolist() == [1.0] * micro.rows + [0.0] * (4 - micro.rows)
    half = next(Loader(Noisy(8, broken=[0]), 4, ranks=2, rank=1, shuffle=False).stream())
    assert (half.rows, half.total, half.broken) == (4, 8, ())  # rank 0 knows of it, this one does not


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "error", "says"),
    [
        (Noisy(6, broken=[2, 3]), ValueError, "micro-batch 1 of epoch 0 .*'s2': truncated; 's3': truncated"),
        (
            Noisy(6, fails=[3]),
            RuntimeError,
            r"sample 's3' \(index 3\) could not be loaded: KeyError: 'caption'",
        ),
        ([{}, {}, 3, {}], TypeError, "sample 2 is a int; a sample is a mapping"),
        ([{}, {}, {"x": 1}, {"x": "a"}], ValueError, "'x' is int in sample 2 but a string in sample 3"),
    ],
)
def test_what_a_worker_meets_is_named(dataset: Any, error: type[Exception], says: str, workers: int) -> None:
    stream = Loader(dataset, 2, shuffle=False, num_workers=workers).stream()
    next(stream)
    with pytest.raises(error, match=says) as caught:
        next(stream)
    assert caught.value.__traceback__ is not None
    assert multiprocessing.active_children() == []  # although the traceback knows their queues
    with pytest.raises(StopIteration):
        next(stream)


def test_workers_live_as_long_as_the_stream() -> None:
    loader = Loader(Noisy(4), 2, num_workers=2)
    stream = loader.stream()
    next(stream)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    for _ in range(9):
        next(stream)
    assert {child.pid for child in multiprocessing.active_children()} == workers
    stream.close()
    assert multiprocessing.active_children() == []
    assert len(list(loader.stream(epochs=2))) == 4
    assert multiprocessing.active_children() == []
    iterated = Loader(Stream(40), 1, num_workers=2).stream()
    next(iterated)
    assert len(multiprocessing.active_children()) == 2
    iterated.close()
    assert multiprocessing.active_children() == []
    loader.stream()  # nothing starts before the first micro-batch is asked for
    assert multiprocessing.active_children() == []


def test_classes_that_were_imported_twice_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(Loader(Noisy(4), 2).stream(epochs=1))
    for name in ("gendiff.data.order", "gendiff.data.micro"):  # pickle looks for Plan and Micro there
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert all_same(Loader(Noisy(4), 2, num_workers=1).stream(epochs=1), plain)


def test_a_dataset_to_iterate_over() -> None:
    micros = [list(Loader(Stream(11), 2, 4, ranks=3, rank=rank).stream(2, epochs=4)) for rank in range(3)]
    values = [[micro.batch["value"].tolist() for micro in own] for own in micros]
    assert values == [[[0, 1], [6, 7]] * 2, [[2, 3], [8, 9]] * 2, [[4, 5], [10, 10]] * 2]
    assert [(m.rows, m.total, m.last, m.epoch) for m in micros[2]] == [
        (rows, total, last, epoch) for epoch in (2, 3) for rows, total, last in [(2, 6, False), (1, 5, True)]
    ]
    assert [micro.batch["from"].tolist() for micro in micros[0]] == [[2, 2]] * 2 + [[3, 3]] * 2
    last = micros[2][-1]
    assert last.batch["id"].tolist() == [10, 10]
    assert last.batch["weight"].tolist() == [1, 0]
    assert torch.equal(last.keys, sample_keys(4, [10, 10], epoch=3, occurrence=10))
    rng = Rng.from_keys(sample_keys(4, [8, 9], epoch=2)).fold("data")
    assert torch.equal(micros[1][1].batch["drawn"]["rng"], rng.uniform("crop", (2, 2)))


def test_names_in_a_dataset_to_iterate_over() -> None:
    (micro,) = Loader(Stream(3, named="__key__"), 4).stream(epochs=1)
    assert micro.batch["id"] == micro.batch["__key__"] == ["k0", "k1", "k2", "k0"]
    assert torch.equal(micro.keys, sample_keys(0, micro.batch["id"], occurrence=[0, 1, 2, 0]))
    assert ids(next(Loader(Stream(3, named="id"), 4).stream())) == ["k0", "k1", "k2"]


def test_lengths() -> None:
    for dataset in (Noisy(11), TorchStream(11)):
        loader = Loader(dataset, 2, ranks=2)
        assert (len(loader), loader.samples) == (3, 11)
        assert len(list(loader.stream(epochs=2))) == 6
        assert list(loader.stream(epoch=2, epochs=2)) == []
    for ask in (len, lambda loader: loader.samples):
        with pytest.raises(TypeError, match=r"Stream .* no length.*count in steps"):
            ask(Loader(Stream(), 2))


def test_a_collation_of_the_users() -> None:
    samples = [{"x": torch.tensor(float(n)), "weight": n + 0.5} for n in range(3)]
    plain = list(Loader(samples, 2, shuffle=False).stream(epochs=1))
    assert [micro.batch["weight"].tolist() for micro in plain] == [[0.5, 1.5], [2.5, 0.0]]
    torch_like = Loader(samples, 2, shuffle=False, collate=default_collate).stream(epochs=1)
    assert all_same(torch_like, plain)
    sums = Loader(samples, 2, shuffle=False, collate=lambda given: {"sum": sum(one["x"] for one in given)})
    assert [(m.batch["sum"].item(), m.batch["weight"].tolist()) for m in sums.stream(epochs=1)] == [
        (1.0, [0.5, 1.5]),
        (4.0, [2.5, 0.0]),
    ]
    for collate, error in [
        (lambda given: 3, TypeError),
        (lambda given: {"weight": torch.ones(1)}, ValueError),
    ]:
        with pytest.raises(error, match="the collation gave"):
            next(Loader(samples, 2, collate=collate).stream())


def test_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="accelerator"):
        Loader(Noisy(), 2, pin_memory=True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 100)
    micro = next(Loader(Noisy(), 2, shuffle=False).stream())
    pinned = micro.pin_memory()
    assert torch.equal(pinned.keys, micro.keys + 100)
    assert torch.equal(pinned.batch["drawn"]["torch"], micro.batch["drawn"]["torch"] + 100)
    assert pinned.batch["name"] == micro.batch["name"]
    assert (pinned.rows, pinned.total, pinned.last) == (micro.rows, micro.total, micro.last)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy(), Stream()], ids=lambda d: type(d).__name__)
def test_micro_batches_come_in_page_locked_memory(dataset: Any, workers: int) -> None:
    before = torch.cuda.get_rng_state()
    plain = list(Loader(dataset, 3, num_workers=workers).stream(epochs=2))
    pinned = list(Loader(dataset, 3, num_workers=workers, pin_memory=True).stream(epochs=2))
    assert all_same(pinned, plain)
    assert all(m.keys.is_pinned() and m.batch["drawn"]["torch"].is_pinned() for m in pinned)
    assert torch.equal(torch.cuda.get_rng_state(), before)


class Ids(Noisy):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.ids = self.ids[1:]

    def __len__(self) -> int:
        return len(self.ids) + 1


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Loader(Noisy(), 0), ValueError, "batch_size is 0"),
        (lambda: Loader(Stream(), 0), ValueError, "batch_size is 0"),
        (lambda: Loader(Noisy(), 1, num_workers=-1), ValueError, "num_workers is -1"),
        (lambda: Loader(Stream(), 1, ranks=2, rank=2), ValueError, "rank is 2"),
        (lambda: Loader(Noisy(0), 1), ValueError, "empty"),
        (lambda: Loader(3, 1), TypeError, "int is no dataset"),
        (lambda: Loader(Ids(4), 1), ValueError, "3 entries for 4 samples"),
        (
            lambda: Loader(Noisy(), 4).stream(start=4),
            ValueError,
            "3 micro-batches is 4, which is not in 0 … 3",
        ),
        (lambda: Loader(Noisy(), 4).stream(epoch=-1), ValueError, "epoch is -1"),
        (lambda: next(Loader(Stream(), 4).stream(epoch=1, start=4)), ValueError, "start is 4.* only 3"),
        (
            lambda: list(Loader(iter([{"x": 1}]), 4).stream(epochs=2)),
            ValueError,
            "no sample in epoch 1.*anew",
        ),
        (lambda: next(Loader(map(int, "7x"), 4).stream()), RuntimeError, "number 1 of epoch 0 .*ValueError"),
        (lambda: next(Loader(iter([3]), 4).stream()), TypeError, "sample 0 is a int"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_an_order_is_what_it_follows() -> None:
    loader = Loader(Noisy(), 3, seed=2, ranks=2, rank=1)
    plans = list(chain(*(Order(Noisy(), 3, 2, ranks=2, rank=1).epoch(epoch) for epoch in range(2))))
    loaded = [[f"s{index}" for index in plan.indices] for plan in plans]
    assert [micro.batch["id"] for micro in loader.stream(epochs=2)] == loaded
