"""Datasets in memory: a loader makes of them at once what it makes of their samples one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from gendiff.data import Loader, Tensors, collate
from gendiff.data.order import block

COLUMNS = {
    "image": torch.arange(44.0).reshape(11, 1, 2, 2),
    "label": torch.arange(11),
    "flag": torch.arange(11) % 2 == 0,
    "latent": torch.arange(33, dtype=torch.float64).reshape(11, 3).half(),
    "caption": [f"c{n}" for n in range(11)],
    "weight": torch.linspace(0.0, 2.0, 11, dtype=torch.float64),
}
BARE = {name: column for name, column in COLUMNS.items() if name != "weight"}


class OneByOne(Dataset[dict[str, Any]]):
    """The same samples, of which a loader cannot know that they lie in memory."""

    def __init__(self, data: Tensors) -> None:
        self.data, self.ids = data, data.ids

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]


@pytest.mark.parametrize("columns", [COLUMNS, BARE], ids=["weighted", "bare"])
@pytest.mark.parametrize("ids", [None, [f"s{n}" for n in range(11)], [7 * n - 3 for n in range(11)]])
def test_a_batch_is_what_collation_makes_of_its_samples(columns: Any, ids: Any) -> None:
    data = Tensors(columns, ids)
    for indices in ([3], [5, 0, 10, 5]):
        whole, collated = data.batch(indices), collate([data[index] for index in indices])
        assert whole.keys() == collated.keys()
        for name, column in collated.items():
            if isinstance(column, list):
                assert whole[name] == column
            else:
                torch.testing.assert_close(whole[name], column, rtol=0, atol=0)  # its dtype, too


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_makes_of_it_what_it_makes_of_its_samples(ranks: int, workers: int) -> None:
    data = Tensors(COLUMNS, [f"s{n}" for n in range(11)])
    for rank in range(ranks):
        whole, single = (
            Loader(dataset, 2, seed=4, ranks=ranks, rank=rank, num_workers=workers).stream(epochs=2)
            for dataset in (data, OneByOne(data))
        )
        for at_once, one_by_one in zip(whole, single, strict=True):
            rows = max(1, at_once.rows)
            assert (at_once.rows, at_once.total) == (one_by_one.rows, one_by_one.total)
            assert (at_once.epoch, at_once.index, at_once.last) == (
                one_by_one.epoch,
                one_by_one.index,
                one_by_one.last,
            )
            assert torch.equal(at_once.keys[:rows], one_by_one.keys[:rows])
            assert at_once.batch["id"][:rows] == one_by_one.batch["id"][:rows]
            assert at_once.batch["caption"][:rows] == one_by_one.batch["caption"][:rows]
            for name in COLUMNS.keys() - {"caption"}:
                ours, theirs = at_once.batch[name][:rows], one_by_one.batch[name][:rows]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert at_once.batch["weight"][at_once.rows :].count_nonzero() == 0
    if ranks > 1:
        assert block(11 % (ranks * 2), ranks, ranks - 1)[1] < 2  # padding was part of it


def test_it_is_indexed_and_not_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, index: read.append(index))
    batches = [micro.batch["label"] for micro in Loader(Tensors(BARE), 4).stream(epochs=1)]
    assert sorted(torch.cat(batches)[:11].tolist()) == list(range(11))
    assert read == []


def test_a_collation_of_the_users_is_given_samples() -> None:
    given = list[Any]()

    def together(samples: Any) -> Any:
        given.append(samples)
        return collate(samples)

    list(Loader(Tensors(BARE), 4, collate=together).stream(epochs=1))
    assert [sorted(sample) for sample in given[0]] == [sorted({*BARE, "id"})] * 4


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Tensors({}), ValueError, "at least one"),
        (lambda: Tensors({"id": ["a"]}), ValueError, "`ids` apart"),
        (lambda: Tensors({"x": torch.zeros(3), "y": torch.zeros(2)}), ValueError, "'x': 3, 'y': 2"),
        (lambda: Tensors({"x": torch.zeros(2)}, ["a"]), ValueError, "1 ids"),
        (lambda: Tensors({"x": torch.zeros(2)}, ["a", "a"]), ValueError, "1 of them different"),
        (lambda: Tensors({"x": torch.zeros(())}), TypeError, "column 'x'.*N, "),
        (lambda: Tensors({"x": torch.zeros(2, device="meta")}), TypeError, "on meta.*on the CPU"),
        (
            lambda: Tensors({"x": torch.zeros(2), "weight": torch.tensor([1.0, torch.nan])}),
            ValueError,
            "finite",
        ),
        (lambda: Tensors({"x": torch.zeros(2), "weight": ["a", "b"]}), ValueError, "finite"),
        (lambda: Tensors({"x": torch.zeros(2), "weight": torch.zeros(2, 1)}), ValueError, r"\[N\]"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
