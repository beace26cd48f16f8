"""A checkpoint gives back every bit, names by path what it cannot hold, and is not lost to its successor."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gendiff.training import checkpoint, manifest
from gendiff.training.checkpoint import CheckpointError, clean, newest, path_of, prune, read, steps, write
from tests.training.bits import same


def test_other_programs_find_the_tensors_by_name_and_the_manifest_is_what_is_said(tmp_path: Path) -> None:
    state = {"weights": {"net.0.weight": torch.ones(2), "é": torch.zeros(1)}, "position": {"step": 3}}
    path = write(tmp_path, 3, state)
    assert set(safetensors.torch.load_file(path / "weights.safetensors")) == {"net.0.weight", "_"}
    whole = json.loads((path / "manifest.json").read_text())
    text = json.dumps(whole["content"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == whole["sha256"]
    files = {
        name: {
            "size": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in ("state.json", "weights.safetensors")
    }
    assert whole["content"] == {"format": 1, "step": 3, "files": files}
    assert {file.name for file in path.iterdir()} == {*files, "manifest.json"}
    twin = write(tmp_path / "twin", 3, state)
    assert all((twin / file.name).read_bytes() == file.read_bytes() for file in path.iterdir())


def test_the_state_is_copied_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = torch.ones(3)
    put = checkpoint.put

    def moving(*arguments: Any) -> Any:
        live.add_(1)
        return put(*arguments)

    monkeypatch.setattr(checkpoint, "put", moving)
    assert same(read(write(tmp_path, 1, {"a": live})), {"a": torch.ones(3)})


def test_the_manifest_is_begun_when_all_else_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    opened, fsync = Path.open, os.fsync

    def opening(path: Path, mode: str = "r") -> Any:
        if mode == "xb":
            events.append(path.name)
        return opened(path, mode)

    monkeypatch.setattr(Path, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    write(tmp_path, 1, {"a": torch.ones(1)})
    assert events[:6] == ["state.json", "fsync", "a.safetensors", "fsync", "manifest.json", "fsync"]
    assert events[6:] == ["fsync"] * 5  # the three again, the folder, the folder that it is in


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_what_would_be_too_long_to_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = write(tmp_path, 1, {"a": "x" * 100})
    monkeypatch.setitem(manifest.LARGEST, file, 100)
    with pytest.raises(ValueError, match=f"{file} would have .* keep long lists of numbers in tensors"):
        write(tmp_path, 2, {"a": "x" * 100})
    with pytest.raises(CheckpointError, match=f"{file} has .* bytes, and 100 is the most"):
        read(path)
    assert steps(tmp_path) == [1]


# ---- several of them


def spoil(path: Path) -> None:
    (path / "state.json").write_text("{}")


def test_names_say_the_steps(tmp_path: Path) -> None:
    assert steps(tmp_path / "none") == []
    assert newest(tmp_path / "none") is None
    for step in (20, 3, 123456789):
        write(tmp_path, step, {})
    for name in (
        "checkpoint-12",
        "checkpoint-000000012",
        "checkpoint-0000001x",
        ".checkpoint-00000001.new-01234567",
    ):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [3, 20, 123456789]


def test_the_newest_valid_one_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"step": step})
    spoil(path_of(tmp_path, 4))
    shutil.rmtree(path_of(tmp_path, 3))
    path_of(tmp_path, 3).write_text("a file")
    with pytest.warns(RuntimeWarning) as warned:
        found = newest(tmp_path)
    assert found == (path_of(tmp_path, 2), {"step": 2})
    told = [str(one.message) for one in warned]
    assert told[0].startswith(
        "checkpoint-00000004: state.json has 2 bytes, and had 10 when written. Use another"
    )
    assert told[1].startswith("checkpoint-00000003 is no folder; ")
    assert all(one.endswith("checkpoint-00000002 is used instead.") for one in told)


def test_if_none_can_be_read_all_are_named_and_nothing_begins_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        spoil(write(tmp_path, step, {"step": step}))
    with pytest.raises(CheckpointError, match=r"(?s)none of them.*00000002: state.*00000001: state"):
        newest(tmp_path)


def test_an_earlier_one_of_the_step_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, 1, {"a": torch.ones(1), "b": torch.ones(1)})
    spoil(write(tmp_path, 2, {"a": 1}))
    for step in (1, 2):
        write(tmp_path, step, {"a": torch.zeros(step)})
        assert same(read(path_of(tmp_path, step)), {"a": torch.zeros(step)})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_oldest_beyond_the_number_are_removed(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {})
    prune(tmp_path, keep)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def flip(path: Path) -> None:
    """Damage that names and sizes do not show."""
    text = (path / "state.json").read_bytes()
    (path / "state.json").write_bytes(text.replace(b"0", b"1"))


@pytest.mark.parametrize(
    ("damage", "damaged", "left"),
    [
        (flip, [4], [2, 3, 4]),
        (spoil, [3], [2, 3, 4]),
        (flip, [3, 4], [1, 2, 3, 4]),
        (spoil, [1], [3, 4]),
        (flip, [1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_a_damaged_one_does_not_count_and_the_newest_valid_one_stays(
    tmp_path: Path, damage: Callable[[Path], None], damaged: list[int], left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"a": 0})
    for step in damaged:
        damage(path_of(tmp_path, step))
    if damaged == [1]:
        prune(tmp_path, 2)
    else:
        with pytest.warns(RuntimeWarning, match="does not count among those kept"):
            prune(tmp_path, 2)
    assert steps(tmp_path) == left


@pytest.mark.parametrize("keep", [0, -1, True])
def test_a_number_to_keep_is_at_least_one(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match="at least 1 checkpoint"):
        prune(tmp_path, keep)


def test_leftovers_of_ours_are_removed_and_the_set_aside_is_put_back(tmp_path: Path) -> None:
    write(tmp_path, 5, {"a": 5}).rename(tmp_path / ".checkpoint-00000005.old-01234567")
    write(tmp_path, 4, {"a": 4})
    for name in (
        ".checkpoint-00000004.old-01234567",
        ".checkpoint-00000006.new-01234567",
        ".checkpoint-00000001.gone-01234567",
    ):
        (tmp_path / name / "half").mkdir(parents=True)
    for name in (".result.new-01234567", "notes", ".checkpoint-4.new-01234567"):
        (tmp_path / name).mkdir()
    before = newest(tmp_path)
    assert before == (tmp_path / ".checkpoint-00000005.old-01234567", {"a": 5})
    clean(tmp_path)
    clean(tmp_path / "none")
    kept = ["notes", ".result.new-01234567", ".checkpoint-4.new-01234567"]
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "checkpoint-00000004", "checkpoint-00000005"}
    assert newest(tmp_path) == (path_of(tmp_path, 5), {"a": 5})
