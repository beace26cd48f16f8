"""Captioned: one sample, whether from a Hugging Face dataset, a webdataset or a list of rows."""

import gc
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from gendiff.data.captioned import Captioned
from gendiff.data.context import BrokenSample, sampled_with
from gendiff.data.framing import Framing, group_of
from gendiff.data.images import load
from gendiff.data.loader import Loader
from gendiff.random import Rng


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed: int, *shape: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, *shape).save(buffer, "PNG")
    return buffer.getvalue()


def seen(seed: int, framing: Framing, *shape: int) -> torch.Tensor:
    return framing(picture(seed, *shape))[0]


class Stream:
    """Rows that can be iterated over again and again."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.epochs = rows, list[int]()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_every_way_to_give_a_picture_gives_the_same_sample(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(0))
    ways = [picture(0), png(0), str(file), file, {"bytes": png(0), "path": None}, {"path": str(file)}]
    dataset = Captioned([{"image": way, "text": "a fox", "rest": 1} for way in ways], size=16, weight=0.5)
    image, facts = load(file, Framing(size=16))
    for index in range(len(ways)):
        sample = dataset[index]
        assert sorted(sample) == ["caption", "id", "image", "size", "weight"]
        assert (sample["id"], sample["caption"], sample["weight"]) == (index, "a fox", 0.5)
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["size"], facts)
    assert dataset.ids == list(range(6))
    assert set(dataset.groups) == {group_of((16, 16))}


def test_a_dataset_of_hugging_face_with_an_image_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    shapes = [(24, 32), (32, 24), (24, 32)]
    table = {
        "picture": [{"bytes": png(n, *shape), "path": None} for n, shape in enumerate(shapes)],
        "title": ["a", "b", "c"],
        "other": [1, 2, 3],
    }
    features = datasets.Features(
        {"picture": datasets.Image(), "title": datasets.Value("string"), "other": datasets.Value("int64")}
    )
    rows = datasets.Dataset.from_dict(table, features=features)
    assert isinstance(rows[0]["picture"], Image.Image)
    framing = Framing(area=24 * 24, buckets=8)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
        dataset = Captioned(rows, image="picture", caption="title", area=24 * 24, buckets=8, keep=["other"])
    assert dataset.groups == [group_of(framing.target(*shape)) for shape in shapes]
    assert rows.column_names == list(table)  # the user's own is untouched
    for n, sample in enumerate(pickle.loads(pickle.dumps(dataset))):
        assert torch.equal(sample["image"], seen(n, framing, *shapes[n]))
        assert (sample["id"], sample["caption"], sample["other"]) == (n, "abc"[n], n + 1)
    micros = list(Loader(dataset, batch_size=2).stream(epochs=1))
    assert sorted(row for micro in micros for row in micro.batch["id"].tolist()[: micro.rows]) == [0, 1, 2]

    stream = Captioned(rows.to_iterable_dataset(), image="picture", caption="title", size=16)
    assert isinstance(stream, IterableDataset)
    stream.set_epoch(3)
    assert stream.rows.epoch == 3
    assert [sample["caption"] for sample in stream] == ["a", "b", "c"]
    for n, sample in enumerate(stream):
        assert torch.equal(sample["image"], seen(n, Framing(size=16), *shapes[n]))
    plain = Captioned(rows.with_transform(lambda batch: {**batch, "title": ["x"] * len(batch["title"])}),
                      image="picture", caption="title", size=16)  # fmt: skip
    assert plain[1]["caption"] == "x"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it to the collector
@pytest.mark.parametrize("decoded", [False, True])
def test_a_webdataset(decoded: bool, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        files = {
            "a.png": png(0), "a.txt": b"a fox", "a.json": b"{}",
            "b.webp": b"no picture", "b.txt": b"broken",
            "c.png": png(2), "c.json": json.dumps({"caption": "a car"}).encode(),
        }  # fmt: skip
        if decoded:
            del files["b.webp"], files["b.txt"]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False)
    stream = Captioned(
        rows.decode("pil") if decoded else rows, image="jpg|png|webp", caption="txt|json", size=16
    )
    assert isinstance(stream, IterableDataset)
    for _ in range(2):
        if decoded:
            samples = list(stream)
        else:
            with pytest.warns(RuntimeWarning, match="left out: b: it is not a PNG"):
                samples = list(stream)
        assert [(sample["id"], sample["caption"]) for sample in samples] == [("a", "a fox"), ("c", "a car")]
        assert torch.equal(samples[1]["image"], seen(2, Framing(size=16)))
        assert [id for id, _ in stream.broken] == ([] if decoded else ["b"])
    del rows, stream
    gc.collect()


def test_a_stream_forwards_epochs_and_draws_per_sample() -> None:
    rows = Stream([{"image": picture(n), "text": "x"} for n in range(3)])
    stream = Captioned(rows, size=16, crop="random", flip=True)
    first, second = (
        [micro.batch["size"] for micro in Loader(stream, batch_size=1).stream(epoch, epochs=epoch + 1)]
        for epoch in range(2)
    )
    assert rows.epochs == [0, 1]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert "id" not in next(iter(stream))


def test_one_of_several_captions_is_drawn() -> None:
    dataset = Captioned([{"image": picture(0), "text": ["one", "two"]}], size=8)
    drawn = set[str]()
    for seed in range(20):
        with sampled_with(partial(Rng, seed)):
            drawn.add(dataset[0]["caption"])
    assert drawn == {"one", "two"}
    assert "caption" not in Captioned([{"image": picture(0)}], caption=None, size=8)[0]


def test_what_cannot_be_read_is_left_out_or_raised() -> None:
    rows = [{"image": png(0), "text": "a"}, {"image": b"no", "text": "b"}, {"image": None, "text": "c"}]
    rows.append({"image": png(3), "text": "d"})
    dataset = Captioned(rows, area=16 * 16, buckets=8)
    assert dataset.ids == [0, 3]
    assert [dataset[i]["caption"] for i in range(2)] == ["a", "d"]
    assert [id for id, _ in dataset.broken] == [1, 2]
    assert "2 left out" in repr(dataset)
    lazy = Captioned(rows, size=16)
    with pytest.raises(BrokenSample, match=r"^1: it is not a PNG"):
        lazy[1]
    with pytest.raises(BrokenSample, match=r"^0: it has 24 × 32 pixels"):
        Captioned(rows, size=16, max_pixels=700)[0]
    for make in (
        lambda: Captioned(rows, size=16, broken="raise")[1],
        lambda: Captioned(rows, area=256, buckets=8, broken="raise"),
    ):
        with pytest.raises(ValueError, match="row 1: it is not a PNG"):
            make()
    with pytest.raises(ValueError, match=r"'\?': it is not a PNG"):
        list(Captioned(Stream(rows), size=16, broken="raise"))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Captioned({"train": []}), TypeError, "of splits give one"),
        (lambda: Captioned(iter([])), TypeError, "read only once"),
        (lambda: Captioned(3), TypeError, "got int"),
        (lambda: Captioned([], size=8), ValueError, "no picture among 0 rows"),
        (
            lambda: Captioned([{"png": png(0)}], size=8)[0],
            ValueError,
            r"no 'image', but \['png'\]; say image=",
        ),
        (lambda: Captioned([{"image": png(0)}], size=8)[0], ValueError, "no 'text'.*say caption="),
        (
            lambda: Captioned([{"image": png(0), "text": None}], size=8)[0],
            ValueError,
            "NoneType, not a caption",
        ),
        (lambda: Captioned([{"image": png(0), "text": b"\xe9"}], size=8)[0], ValueError, "UTF-8"),
        (
            lambda: Captioned([{"image": png(0), "json": "{"}], caption="json", size=8)[0],
            ValueError,
            "no JSON",
        ),
        (lambda: Captioned([(1, 2)], size=8)[0], TypeError, "row is a dictionary"),
        (lambda: Captioned([], keep=["size"]), ValueError, "every sample has"),
        (lambda: Captioned([], broken="x"), ValueError, "unknown broken"),
    ],
    ids=range(12),
)
def test_what_is_wrong_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
