"""Zip: partners by id, alike draws. Mix: shares in every stretch, permutations, groups."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gendiff.data.combine import Mix, Zip
from gendiff.data.context import BrokenSample, sampled_with
from gendiff.data.folder import Folder
from gendiff.data.loader import Loader
from gendiff.random import Rng


class Made:
    """Samples of known ids, groups and values."""

    def __init__(self, ids: Any, groups: Any = None, broken: Any = (), **values: Any) -> None:
        self.ids, self.values, self.bad = list(ids), values, broken
        if groups is not None:
            self.groups = groups

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise BrokenSample(self.ids[index], "damaged")
        return {"id": self.ids[index], **self.values, "index": index}


def write(folder: Path, names: list[str], seed: int, height: int = 20, width: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        rng = np.random.default_rng(seed + n)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_partners_are_found_by_id_and_see_the_same_part(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "c.png"]
    photos = write(tmp_path / "photos", names, 0)
    edges = tmp_path / "edges"
    edges.mkdir()
    for name in names:  # the negative of its partner, in a file of another name and order
        image = Image.open(photos / name)
        Image.eval(image, lambda v: 255 - v).save(edges / name.replace("png", "webp"), lossless=True)
    settings: dict[str, Any] = {"size": 20, "crop": "random", "flip": True}
    pairs = Zip(
        Folder(photos, caption="x", weight=2.0, **settings), control=Folder(edges, only="image", **settings)
    )
    assert pairs.ids == ["a.png", "b.png", "c.png"]
    seen = set[tuple[int, ...]]()
    for seed in range(12):
        with sampled_with(partial(Rng, seed)):
            sample = pickle.loads(pickle.dumps(pairs))[seed % 3]
        assert sorted(sample) == ["caption", "control", "id", "image", "size", "weight"]
        assert torch.allclose(sample["control"], 1 - sample["image"], atol=1e-6)
        seen.add(tuple(sample["size"].tolist()))
    assert len(seen) > 3
    assert pairs.groups == pairs.base.groups


def test_partners_are_not_found_by_position() -> None:
    pairs = Zip(Made(["z.jpg", "x/y.a.jpg"], one=1), other=Made(["x/y.a.png", "z.png"]))
    assert [pairs[i]["other"] for i in range(2)] == [1, 0]
    assert Zip(Made([5, 7]), other=Made([7, 5]))[0]["other"] == 1


def test_without_a_base_the_samples_stay_apart() -> None:
    image = torch.zeros(3, 4, 4)
    pairs = Zip(
        win=Made(["a.png", "b.png"], groups=[3, 4], image=image, weight=0.5),
        lose=Made(["b.jpg", "a.jpg"], image=image, weight=0.5),
    )
    sample = pairs[1]
    assert sorted(sample) == ["id", "lose", "weight", "win"]
    assert (sample["id"], sample["weight"]) == ("b.png", 0.5)
    assert {name: (sample[name]["id"], sample[name]["index"]) for name in ("win", "lose")} == {
        "win": ("b.png", 1),
        "lose": ("b.jpg", 0),
    }
    assert "weight" not in sample["win"]
    assert pairs.groups == [3, 4]
    [micro] = Loader(Zip(win=Made("ab", image=image), lose=Made("ab", image=image)), batch_size=2).stream(
        epochs=1
    )
    assert micro.batch["win"]["image"].shape == (2, 3, 4, 4)


def test_a_broken_partner_breaks_the_sample() -> None:
    with pytest.raises(BrokenSample, match=r"a\.png: its 'control', a\.jpg: damaged"):
        Zip(Made(["a.png"]), control=Made(["a.jpg"], broken=[0]))[0]
    with pytest.raises(BrokenSample, match=r"^1/b: damaged"):
        Mix([(Made("a"), 0.5), (Made("b", broken=[0]), 0.5)])[1]


def test_a_zipped_mix_keeps_its_order() -> None:
    mix = Mix([(Made("ab"), 0.5), (Made("c"), 0.5)])
    pairs = Zip(mix, control=Made(["0/b", "1/c", "0/a"]))
    assert torch.equal(pairs.order(1, 2), mix.order(1, 2))
    assert not hasattr(Zip(Made("a"), control=Made("a")), "order")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Zip(), TypeError, "nothing to zip"),
        (lambda: Zip(win=Made("a")), TypeError, "nothing to zip"),
        (lambda: Zip(Made("abc"), c=Made("b")), ValueError, "2 samples have no partner in 'c': 'a', 'c'"),
        (
            lambda: Zip(Made("b"), c=Made("abc")),
            ValueError,
            "2 samples have no partner in the first.*'a', 'c'",
        ),
        (lambda: Zip(Made(["a.b", "a.c"]), c=Made("a")), ValueError, r"'a\.b' and 'a\.c' of the first"),
        (lambda: Zip(Made("a"), c=Made("a", one=1))[0], TypeError, "'c' has .*one value"),
        (lambda: Zip(Made("a"), index=Made("a"))[0], ValueError, "has 'index' already"),
        (
            lambda: Zip(win=Made("a", weight=1.0), lose=Made("a", weight=2.0))[0],
            ValueError,
            "weights .*1.0.*2.0",
        ),
        (
            lambda: Zip(
                win=Made("a", image=torch.zeros(3, 4, 4)), lose=Made("a", image=torch.zeros(3, 4, 5))
            )[0],
            ValueError,
            r"different shapes.*\(4, 4\).*\(4, 5\)",
        ),
        (lambda: Mix([]), ValueError, "sum to 0"),
        (lambda: Mix([(Made("a"), 0.5), (Made("b"), 0.25)]), ValueError, r"0\.75; give \[0\.6667, 0\.3333\]"),
        (lambda: Mix([(Made("a"), 1.5), (Made("b"), -0.5)]), ValueError, "above 0"),
        (lambda: Mix([(Made("a"), 0.5), (Made(""), 0.5)]), ValueError, "dataset 1 is empty"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_zipped_images_of_different_shapes_are_an_error(tmp_path: Path) -> None:
    photos, edges = (write(tmp_path / name, ["a.png"], 0) for name in ("photos", "edges"))
    pairs = Zip(Folder(photos, size=16), control=Folder(edges, size=8, only="image"))
    with pytest.raises(ValueError, match=r"'a\.png' have different shapes"):
        pairs[0]


mixes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(mixes, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_every_stretch_has_the_shares(given_parts: list[tuple[int, int]], seed: int, epoch: int) -> None:
    total = sum(share for _, share in given_parts)
    shares = [share / total for _, share in given_parts]
    sizes = [size for size, _ in given_parts]
    mix = Mix([(Made(range(size)), share) for size, share in zip(sizes, shares, strict=True)])
    order = mix.order(seed, epoch)
    part = np.searchsorted(np.cumsum(sizes), order.numpy(), side="right")
    lasts = False
    for k, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        off = np.concatenate([[0], np.cumsum(part == k)]) - share * np.arange(len(order) + 1)
        assert abs(off).max() <= 0.5 + share * (len(sizes) - 2) / 2 + 1e-9
        if len(sizes) == 2:
            assert off.max() - off.min() <= 1 + 1e-9  # the largest difference over any stretch
        own = (order[torch.from_numpy(part == k)] - sum(sizes[:k])).tolist()
        for start in range(0, len(own), size):  # whole permutations, and a part of the last
            assert len(set(own[start : start + size])) == len(own[start : start + size])
        assert len(own) >= size
        lasts |= len(own) == size
    assert lasts


def test_epochs_seeds_parts_and_repetitions_have_orders_of_their_own() -> None:
    mix = Mix([(Made(range(30)), 0.25), (Made(range(30)), 0.25), (Made(range(120)), 0.5)])
    one = Mix([(Made(range(30)), 0.25), (Made(range(90)), 0.75)])
    assert torch.equal(mix.order(0, 0), mix.order(0, 0))
    a, b = mix.order(0, 0), mix.order(0, 0) - 30
    first, second = a[a < 30].tolist(), b[(b >= 0) & (b < 30)].tolist()
    rows = [first[:30], first[30:60], second[:30], mix.order(0, 1)[mix.order(0, 1) < 30].tolist()[:30]]
    rows.append(mix.order(1, 0)[mix.order(1, 0) < 30].tolist()[:30])
    assert all(sorted(row) == list(range(30)) for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows)
    assert len(one.order(0, 0)) == 120


def test_prior_preservation_has_half_of_every_batch_each() -> None:
    dogs, prior = Made(range(5), x=0.0), Made(range(40), x=1.0)
    loader = Loader(Mix([(dogs, 0.5), (prior, 0.5)]), batch_size=2)
    micros = list(loader.stream(epochs=1))
    assert len(micros) == 40
    assert all(sorted(micro.batch["x"].tolist()) == [0.0, 1.0] for micro in micros)
    assert len({id for micro in micros for id in micro.batch["id"]}) == 45


def test_ids_and_samples_are_those_of_the_parts() -> None:
    mix = Mix([(Made(["a", "b"], groups=[4, 9]), 0.5), (Made(["a"]), 0.5)])
    assert mix.ids == ["0/a", "0/b", "1/a"]
    assert mix.groups == [4, 9, 0]
    assert [(mix[i]["id"], mix[i]["index"]) for i in (0, 1, 2, -1)] == [
        *(("0/a", 0), ("0/b", 1), ("1/a", 0), ("1/a", 0))
    ]
    with pytest.raises(IndexError):
        mix[3]


def test_differently_bucketed_folders_make_batches_of_one_shape(tmp_path: Path) -> None:
    first = write(tmp_path / "one", [f"{n}.png" for n in range(5)], 0)
    write(first, ["tall0.png", "tall1.png"], 9, 30, 20)
    second = write(tmp_path / "two", [f"{n}.png" for n in range(9)], 20, 30, 20)
    write(second, ["wide.png"], 40, 16, 32)
    mix = Mix([(Folder(first, area=24 * 24, buckets=8), 0.3), (Folder(second, area=24 * 24, buckets=4), 0.7)])
    loader = Loader(mix, batch_size=3)
    for epoch in range(4):  # the loader refuses epochs that differ in their groups
        shapes = [micro.batch["image"].shape[2:] for micro in loader.stream(epoch, epochs=epoch + 1)]
        assert len(set(shapes)) > 1


def test_a_mix_of_mixes_keeps_the_inner_shares() -> None:
    inner = Mix([(Made(range(4)), 0.25), (Made(range(12)), 0.75)])
    outer = Mix([(inner, 0.5), (Made(range(40)), 0.5)])
    order = outer.order(0, 0)
    assert len(order) == 80
    own = order[order < 16]
    assert (own[:16] < 4).sum() == (own[16:32] < 4).sum() == 4
    assert own[:16].tolist() != own[16:32].tolist()
