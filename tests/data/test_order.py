"""The data order: each sample once, over all ranks, in the same windows, from (seed, epoch) alone."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gendiff._philox import hash64, low_high, philox
from gendiff.data.order import Order, Plan, block, occurrences, permutation

few = settings(max_examples=25)
sizes, batch_sizes, several_ranks = st.integers(1, 40), st.integers(1, 5), st.integers(1, 4)


class Grouped:
    def __init__(self, groups: list[int]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)


class Own:
    """Gives the sequences it is told, one an epoch."""

    def __init__(self, size: int, *sequences: Any, groups: list[int] | None = None) -> None:
        self.size, self.sequences, self.groups = size, sequences, groups

    def __len__(self) -> int:
        return self.size

    def order(self, seed: int, epoch: int) -> Any:
        return self.sequences[epoch % len(self.sequences)]


def plans(dataset: Any, batch_size: int, ranks: int = 1, epoch: int = 0, **options: Any) -> list[list[Plan]]:
    """Of every rank, the plans of an epoch."""
    return [
        list(Order(dataset, batch_size, 5, ranks=ranks, rank=rank, **options).epoch(epoch))
        for rank in range(ranks)
    ]


def real(plan: Plan) -> list[tuple[int, int]]:
    return list(zip(plan.indices, plan.occurrences, strict=True))[: plan.rows]


def merged(of_ranks: list[list[Plan]]) -> list[list[tuple[int, int]]]:
    """The real entries of every global micro-batch."""
    return [list(chain.from_iterable(map(real, several))) for several in zip(*of_ranks, strict=True)]


def check(of_ranks: list[list[Plan]], batch_size: int, expected: Counter[int]) -> None:
    """Every entry once over all ranks, as many micro-batches on each, padding that repeats real entries."""
    batches = merged(of_ranks)
    assert Counter(index for batch in batches for index, _ in batch) == expected
    entries = [entry for batch in batches for entry in batch]
    assert len(set(entries)) == len(entries)
    for several, batch in zip(zip(*of_ranks, strict=True), batches, strict=True):
        rows = [plan.rows for plan in several]
        assert max(rows) - min(rows) <= 1
        for plan in several:
            assert len(plan.indices) == len(plan.occurrences) == batch_size
            assert plan.total == len(batch) == sum(rows)
            everything = list(zip(plan.indices, plan.occurrences, strict=True))
            assert set(everything) <= set(real(plan) or batch)
    for own in of_ranks:
        assert [(plan.index, plan.last) for plan in own] == [(n, n == len(own) - 1) for n in range(len(own))]


@few
@given(sizes, batch_sizes, several_ranks, st.integers(0, 3), st.booleans())
def test_every_index_is_there_once(size: int, batch: int, ranks: int, epoch: int, shuffle: bool) -> None:
    of_ranks = plans(range(size), batch, ranks, epoch, shuffle=shuffle)
    check(of_ranks, batch, Counter(range(size)))
    sequence = permutation(5, epoch, size).tolist() if shuffle else list(range(size))
    assert [index for one in merged(of_ranks) for index, _ in one] == sequence
    assert (
        len(of_ranks[0])
        == math.ceil(size / (batch * ranks))
        == len(Order(range(size), batch, 0, ranks=ranks))
    )


@few
@given(st.lists(st.integers(-2, 3), min_size=1, max_size=40), batch_sizes, several_ranks, st.booleans())
def test_a_micro_batch_is_of_one_group(groups: list[int], batch: int, ranks: int, shuffle: bool) -> None:
    of_ranks = plans(Grouped(groups), batch, ranks, shuffle=shuffle)
    check(of_ranks, batch, Counter(range(len(groups))))
    short = Counter[int]()
    for one in merged(of_ranks):
        (group,) = {groups[index] for index, _ in one}
        short[group] += len(one) < batch * ranks
    assert max(short.values()) <= 1
    if not shuffle:
        firsts = [one[0][0] for one in merged(of_ranks)]
        assert firsts == sorted(firsts)


def test_bucket_batches_on_two_processes_lose_nothing() -> None:
    of_ranks = plans(Grouped([0] * 5 + [1] * 2 + [2] * 3), 2, 2)  # accelerate 1.15 drops three of these ten
    assert sorted(index for one in merged(of_ranks) for index, _ in one) == list(range(10))
    assert [len(own) for own in of_ranks] == [4, 4]


def test_groups_follow_each_other_at_random() -> None:
    groups = [0] * 8 + [1] * 8 + [2] * 9
    order = Order(Grouped(groups), 2, 0)
    seen = [[(groups[plan.indices[0]], plan.rows) for plan in order.epoch(epoch)] for epoch in range(30)]
    assert len(set(map(str, seen))) == 30
    assert len({one.index((2, 1)) for one in seen}) > 6  # the short one of group 2 may stand anywhere


@few
@given(sizes, st.lists(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]), min_size=2, max_size=2))
def test_windows_are_the_same_for_every_split_over_ranks(size: int, splits: list[tuple[int, int]]) -> None:
    # a window of 16 samples: (ranks, accumulation) with batches of two
    windows = []
    for ranks, accumulation in splits:
        batches = merged(plans(range(size), 2, ranks))
        parts = [batches[n : n + accumulation] for n in range(0, len(batches), accumulation)]
        windows.append([list(chain.from_iterable(part)) for part in parts])
    assert windows[0] == windows[1]


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4))
def test_micro_batches_are_the_same_for_every_split_of_a_global_one(groups: list[int], ranks: int) -> None:
    assert merged(plans(Grouped(groups), 12, 1)) == merged(plans(Grouped(groups), 12 // ranks, ranks))


@settings(max_examples=12)
@given(sizes, batch_sizes, several_ranks, st.data())
def test_an_order_has_no_memory(size: int, batch: int, ranks: int, data: st.DataObject) -> None:
    dataset = Grouped([index % 3 for index in range(size)])
    order, other = (Order(dataset, batch, 9, ranks=ranks, rank=ranks - 1) for _ in range(2))
    whole = [plan for epoch in range(3) for plan in order.epoch(epoch)]
    start = data.draw(st.integers(0, len(order)))
    resumed = [*other.epoch(1)[start:], *other.epoch(2)]
    assert whole[len(order) + start :] == resumed
    assert [*other.epoch(0), *other.epoch(1)[:start], *resumed] == whole
    assert order.epoch(2)[-1] == whole[-1]


@few
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), batch_sizes, several_ranks)
def test_a_dataset_may_have_an_order_of_its_own(sequence: list[int], batch: int, ranks: int) -> None:
    dataset = Own(6, torch.tensor(sequence))
    of_ranks = plans(dataset, batch, ranks)
    check(of_ranks, batch, Counter(sequence))
    entries = list(chain.from_iterable(merged(of_ranks)))
    assert entries == [(index, sequence[:n].count(index)) for n, index in enumerate(sequence)]
    assert Order(dataset, batch, 0).samples == len(sequence)
    assert [index for one in merged(plans(dataset, 4, shuffle=False)) for index, _ in one] == list(range(6))


@few
@given(st.lists(st.integers(-3, 3), max_size=30))
def test_occurrences_count_what_came_before(values: list[int]) -> None:
    counts = occurrences(torch.tensor(values, dtype=torch.int64)).tolist()
    assert counts == [values[:n].count(value) for n, value in enumerate(values)]


@few
@given(st.integers(0, 50), st.integers(1, 9))
def test_blocks_are_even_and_contiguous(size: int, ranks: int) -> None:
    blocks = [block(size, ranks, rank) for rank in range(ranks)]
    assert [place for first, rows in blocks for place in range(first, first + rows)] == list(range(size))
    assert {rows for _, rows in blocks} <= {size // ranks, -(-size // ranks)}


def test_a_permutation_sorts_philox_words() -> None:
    def word(element: int) -> int:
        stream = low_high(hash64("order/\\3/samples"))
        return philox((element // 4, 0, *stream), low_high(2**63 + 7))[element % 4]

    size = 100
    signed = [(word(n) | word(size + n) << 32) for n in range(size)]
    expected = sorted(range(size), key=lambda n: (signed[n] + 2**63) % 2**64)
    assert permutation(2**63 + 7, 3, size).tolist() == expected
    assert permutation(0, 0, 10).tolist() == [5, 8, 7, 9, 2, 3, 1, 4, 6, 0]  # on every platform, for ever
    assert permutation(0, 0, 10).tolist() != permutation(0, 0, 10, "other").tolist()
    assert permutation(0, 0, 0).tolist() == []


def test_permutations_are_uniform() -> None:
    seen = Counter(tuple(permutation(1, epoch, 4).tolist()) for epoch in range(480))
    assert len(seen) == 24
    assert 0.01 < stats.chisquare(list(seen.values())).pvalue < 0.99
    size, draws = 10, 200
    places = torch.stack([permutation(seed, 0, size) for seed in range(draws)])
    table = torch.stack(
        [places.eq(n).sum(0) for n in range(size)]
    ).double()  # rows and columns sum to `draws`
    statistic = (size - 1) / size * (table - draws / size).square().sum() / (draws / size)
    assert 0.01 < stats.chi2.sf(statistic.item(), (size - 1) ** 2) < 0.99


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Order([], 2, 0), ValueError, "dataset is empty"),
        (lambda: Order((n for n in "ab"), 2, 0), TypeError, "__len__"),
        (lambda: Order("ab", 0, 0), ValueError, "batch_size is 0"),
        (lambda: Order("ab", 1, 0, ranks=2, rank=2), ValueError, r"rank is 2, which is not in 0 … 1"),
        (lambda: Order(Grouped([0, 1]), 1, 0).epoch(-1), ValueError, "epoch is -1"),
        (lambda: Order(Own(3, int64(0), groups=[0, 1]), 1, 0), ValueError, r"shape \[2\] but .* 3 samples"),
        (lambda: Order(Own(3, int64(0, 3)), 1, 0), ValueError, "outside 0 … 2"),
        (lambda: Order(Own(3, int64(-1)), 1, 0), ValueError, "outside 0 … 2"),
        (lambda: Order(Own(3, int64()), 1, 0), ValueError, "none at all"),
        (lambda: Order(Own(3, [0, 1]), 1, 0), TypeError, r"order\(seed, epoch\) gave list"),
        (lambda: Order(Own(3, torch.zeros(2)), 1, 0), TypeError, "float32"),
        (lambda: Order(Own(3, int64(0, 1), int64(0)), 1, 0).epoch(1), ValueError, "1 samples in 1 .* 2 in 2"),
        (
            lambda: Order(Own(2, int64(0, 0), int64(0, 1), groups=[0, 1]), 2, 0).epoch(1),
            ValueError,
            "2 samples in 2 micro-batches, but epoch 0 has 2 in 1",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_an_attribute_that_is_no_order_is_named() -> None:
    dataset = Grouped([0, 0])
    dataset.order = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"dataset\.order is 3.*rename"):
        Order(dataset, 1, 0)
