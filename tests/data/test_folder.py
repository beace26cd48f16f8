"""Folder: what it finds, what it leaves out and says so, captions from every source, draws."""

import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from gendiff.data.context import BrokenSample, sampled_with
from gendiff.data.folder import Folder
from gendiff.data.framing import Buckets, Framing, group_of
from gendiff.data.images import load
from gendiff.data.loader import Loader
from gendiff.random import Rng


def picture(path: Path, height: int = 24, width: int = 32, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for n, name in enumerate(["b.png", "a/z.jpg", "a/B.webp", "A.PNG", "c.jpeg"]):
        picture(tmp_path / "photos" / name, seed=n)
    return tmp_path / "photos"


def test_samples_are_sorted_by_their_path_and_are_what_load_gives(photos: Path) -> None:
    folder = Folder(photos, size=(16, 20), weight=0.5)
    assert folder.ids == ["A.PNG", "a/B.webp", "a/z.jpg", "b.png", "c.jpeg"] == sorted(folder.ids)
    assert len(folder) == 5
    for index, id in enumerate(folder.ids):
        sample = folder[index]
        image, facts = load(photos / id, Framing(size=(16, 20)))
        assert sorted(sample) == ["id", "image", "size", "weight"]
        assert (sample["id"], sample["weight"]) == (id, 0.5)
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["size"], facts)
    assert folder[-1]["id"] == "c.jpeg"
    assert sorted(Folder(photos, only="image")[0]) == ["id", "image"]


def test_only_headers_are_read_and_groups_follow_from_them(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(photos / "turned.png", 20, 40, exif=exif)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
        folder = Folder(photos, area=32 * 32, buckets=8)
        native = Folder(photos)
    shapes = Buckets(32 * 32, 8).shapes
    wide, tall = shapes[Buckets(32 * 32, 8).index(24, 32)], shapes[Buckets(32 * 32, 8).index(40, 20)]
    assert folder.groups == [group_of(wide)] * 5 + [group_of(tall)]
    for dataset in (folder, native):
        for index, group in enumerate(dataset.groups):
            assert group_of(tuple(dataset[index]["image"].shape[1:])) == group
    assert len(set(native.groups)) == 2
    assert set(Folder(photos, size=8).groups) == {group_of((8, 8))}


def test_what_cannot_be_read_is_left_out_with_its_reason(photos: Path, tmp_path: Path) -> None:
    outside = picture(tmp_path / "outside.png")
    (photos / "out.png").symlink_to(outside)
    (photos / "linked").symlink_to(photos / "a")
    (photos / "dead.png").symlink_to(photos / "nothing.png")
    (photos / "inside.png").symlink_to(photos / "b.png")
    os.mkfifo(photos / "pipe.png")
    picture(photos / ".hidden.png")
    picture(photos / ".cache" / "x.png")
    picture(photos / "old.gif")
    (photos / "text.png").write_text("no picture")
    (photos / "half.png").write_bytes((photos / "b.png").read_bytes()[:20])
    (photos / "notes.md").write_text("kept out silently")
    picture(photos / "large.png", 50, 50)
    folder = Folder(photos, size=8, max_pixels=2000)
    assert folder.ids == ["A.PNG", "a/B.webp", "a/z.jpg", "b.png", "c.jpeg", "inside.png"]
    reasons = {
        "out.png": "leads out",
        "linked": "link to a folder",
        "dead.png": "link to no file",
        "pipe.png": "not a regular file",
        "old.gif": ".gif is not read",
        "text.png": "not a PNG",
        "half.png": "cannot be read",
        "large.png": "max_pixels=2_000",
    }
    assert dict(folder.broken).keys() == reasons.keys()
    for id, reason in folder.broken:
        assert reasons[id] in reason
    assert "6 images, 8 × 8, no captions, 8 left out" in repr(folder)
    for name in reasons:
        only = tmp_path / f"only {name}"
        only.mkdir()
        picture(only / "good.png")
        (photos / name).rename(only / name)
        with pytest.raises(ValueError, match=rf"{name}': it|{name}': \.gif"):
            Folder(only, broken="raise", max_pixels=2000)


def test_a_body_that_is_damaged_shows_when_it_is_decoded(photos: Path) -> None:
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:-60])
    skip, strict = Folder(photos, size=8), Folder(photos, size=8, broken="raise")
    with pytest.raises(BrokenSample, match=r"b\.png: it cannot be read"):
        skip[3]
    with pytest.raises(ValueError, match=r"b\.png': it cannot be read"):
        strict[3]
    [micro] = Loader(skip, batch_size=5).stream(epochs=1)
    assert micro.batch["weight"].sum() == 4
    (photos / "b.png").unlink()
    with pytest.raises(BrokenSample, match="No such file"):
        skip[3]
    picture(photos / "b.png", 32, 24)
    with pytest.raises(BrokenSample, match="not what it was"):
        skip[3]


def write(photos: Path, name: str, content: Any) -> None:
    lines = isinstance(content, list)
    text = (
        "\n".join(map(json.dumps, content))
        if lines
        else content
        if isinstance(content, str)
        else json.dumps(content)
    )
    (photos / name).write_text(text, encoding="utf-8")


def test_captions_come_from_every_source(photos: Path) -> None:
    write(photos, "A.txt", "\ufeff a fox – 狐\n")
    write(photos, "b.json", {"text": "a dog", "seed": 3})
    write(photos, "a/z.json", {"caption": "one", "text": "one"})
    write(photos, "a/metadata.jsonl", [{"file_name": "B.webp", "caption": "a boat"}, {"file_name": "z.jpg"}])
    write(
        photos,
        "metadata.jsonl",
        [{"file_name": "c.jpeg", "text": "a\u2028car"}, {"file_name": "a/B.webp", "text": "a boat"}],
    )
    folder = Folder(photos, size=8)
    assert folder.captions == ["a fox – 狐", "a boat", "one", "a dog", "a\u2028car"]
    assert [folder[index]["caption"] for index in range(5)] == folder.captions
    assert "captions from files" in repr(folder)
    assert Folder(photos, size=8, caption="all").captions == ["all"] * 5
    only = Folder(photos, size=8, only="image")
    assert only.captions is None
    assert "caption" not in only[0]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"b.txt": "a dog"}, r"4 of 5 .*'A\.PNG', 'a/B\.webp'.*caption='…'"),
        (
            {"b.txt": "a dog", "b.json": {"caption": "a cat"}},
            r"differ: 'a dog' in b\.txt, 'a cat' in b\.json",
        ),
        ({"b.json": {"caption": "a dog", "text": "a cat"}}, r"b\.json has captions that differ"),
        ({"b.txt": "a", "metadata.jsonl": [{"file_name": "b.png", "text": "b"}]}, "metadata.jsonl line 1"),
        ({"metadata.jsonl": [{"file_name": "b.png", "text": t} for t in "xy"]}, "line 1, .*line 2"),
        ({"metadata.jsonl": [{"file_name": "no.png", "text": "x"}]}, "'no.png', which is not there"),
        ({"metadata.jsonl": [{"file_name": "../b.png", "text": "x"}]}, "not there"),
        ({"metadata.jsonl": [{"text": "x"}]}, "no 'file_name'"),
        ({"b.json": {"caption": 3}}, r"'caption' of b\.json is int"),
        ({"b.json": "[1]"}, r"b\.json is list"),
        ({"b.json": "{"}, r"b\.json is no JSON"),
        ({"b.json": "[" * 200_000}, r"b\.json is no JSON"),
        ({"b.txt": "x" * (2**20 + 1)}, r"b\.txt is longer"),
    ],
    ids=range(13),
)
def test_captions_that_are_missing_or_contradictory_are_named(
    files: dict[str, Any], says: str, photos: Path
) -> None:
    for name, content in files.items():
        write(photos, name, content)
    with pytest.raises(ValueError, match=says):
        Folder(photos, size=8)


def test_a_caption_that_is_not_utf8_is_named(photos: Path) -> None:
    (photos / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        Folder(photos, size=8)


def test_each_visit_draws_one_of_the_templates(photos: Path) -> None:
    templates = ["a photo of a <toy>", "a <toy>", "the <toy>"]
    folder = Folder(photos, size=8, caption=templates)
    assert folder.captions is None
    assert "one of 3 captions" in repr(folder)
    seen = list[str]()
    for seed in range(60):
        with sampled_with(partial(Rng, seed)):
            seen.append(folder[0]["caption"])
            assert folder[0]["caption"] == seen[-1]
    assert set(seen) == set(templates)
    assert max(seen.count(text) for text in templates) < 36


def test_crop_and_flip_are_the_samples_own_and_workers_change_nothing(photos: Path) -> None:
    folder = Folder(photos, size=16, crop="random", flip=True)
    copy = pickle.loads(pickle.dumps(folder))
    for seed in range(4):
        with sampled_with(partial(Rng, seed)):
            assert torch.equal(copy[1]["image"], folder[1]["image"])
            assert torch.equal(
                folder[1]["image"], load(photos / "a/B.webp", Framing(16, crop="random", flip=True))[0]
            )
    facts = set[int]()
    for seed in range(20):
        with sampled_with(partial(Rng, seed)):
            facts.add(int(folder[0]["size"][3]))
    assert len(facts) > 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: Folder(path / "no"), "not a folder"),
        (lambda path: Folder(path / "empty"), "no picture that can be read"),
        (lambda path: Folder(path, broken="ignore"), "unknown broken"),
        (lambda path: Folder(path, only="images"), "did you mean 'image'"),
        (lambda path: Folder(path, only="image", caption="x"), "no effect"),
        (lambda path: Folder(path, caption=[]), "at least one"),
        (lambda path: Folder(path, weight=-1.0), "weight"),
        (lambda path: Folder(path, size=8, area=64), "one of the two"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[Path], Any], says: str, photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match=says):
        make(photos)
