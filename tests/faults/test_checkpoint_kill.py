"""A save that is cut off anywhere: what was there before can be read, or what was being written, whole.

Twice: by SIGKILL at random instants, and by a disk that stops at the k-th of the calls that change it, for
every k.
"""

import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from gendiff.training import checkpoint
from gendiff.training.checkpoint import clean, newest, path_of, prune, read, steps, write
from gendiff.training.folder import aside
from tests.training.bits import same

forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the children use no threads
FORK = multiprocessing.get_context("fork")


def state_of(step: int, version: int = 0) -> dict[str, Any]:
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(step + 1000 * version))
    return {"weights": {"net.weight": numbers}, "update": {"moment": numbers * 2}, "position": {"step": step}}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed, unlike a disk without power, loses nothing that it has written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- SIGKILL


def save_for_ever(root: str, keep: int, begun: Connection) -> None:
    """A run that does nothing but save, in a process of its own; it goes on where the last one was killed."""
    os.fsync = lambda handle: time.sleep(0.002)  # there are about ten in a save: most kills fall into one
    folder = Path(root)
    clean(folder)
    found = newest(folder)
    begun.send(None)
    for step in itertools.count(1 if found is None else found[1]["position"]["step"] + 1):
        write(folder, step, state_of(step))
        prune(folder, keep)


def kill_again_and_again(folder: Path, keep: int, kills: int, seed: int) -> Counter[str]:
    draw, seen, last = random.Random(seed), Counter[str](), 0
    folder.mkdir()
    for _ in range(kills):
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_for_ever, args=(str(folder), keep, there))
        process.start()
        assert here.poll(60)
        process.join(draw.uniform(0, 0.1))
        assert process.is_alive()
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        seen["inside a write or removal"] += bool(aside(folder))
        found = newest(folder)  # without a warning: no damaged one has the name of a checkpoint
        if found is None:
            assert last == 0
            continue
        path, state = found
        step = state["position"]["step"]
        assert (path, step >= last) == (path_of(folder, step), True)
        assert same(state, state_of(step))
        assert all(same(read(path_of(folder, one)), state_of(one)) for one in steps(folder))
        seen["saves"] += step - last
        last = step
    clean(folder)
    write(folder, last + 1, state_of(last + 1))
    prune(folder, keep)
    assert steps(folder) == list(range(last + 2 - keep, last + 2))
    return seen


@forks
@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_survives_every_kill(tmp_path: Path, keep: int) -> None:
    seen = kill_again_and_again(tmp_path / "run", keep, kills=20, seed=keep)
    print(keep, dict(seen))
    assert seen["inside a write or removal"] >= 3
    assert seen["saves"] >= 5


@pytest.mark.slow
@forks
@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_survives_hundreds_of_kills(tmp_path: Path, keep: int) -> None:
    print(keep, dict(kill_again_and_again(tmp_path / "run", keep, kills=150, seed=10 + keep)))


# ---- a disk that stops


class Stopped(BaseException):
    """The process has died: no handler of ours may take it for an error."""


class Disk:
    """Counts the calls that change a disk; the k-th and all after it raise, so that nothing changes more."""

    def __init__(self, stop: int) -> None:
        self.stop, self.calls, self.where = stop, 0, ""

    def count(self, where: str) -> None:
        self.calls += 1
        if self.calls >= self.stop:
            self.where = self.where or where
            raise Stopped(where)

    def counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            self.count(name)
            return call(*arguments, **options)

        return counting

    def opened(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return OPEN(file, mode, *arguments, **options)
        self.count("open")
        return HalfWriter(self, OPEN(file, mode, buffering=0))


class HalfWriter:
    """A file that writes in two halves, so that the disk may stop between them."""

    def __init__(self, disk: Disk, raw: Any) -> None:
        self.disk, self.raw = disk, raw
        self.flush, self.fileno = raw.flush, raw.fileno

    def write(self, piece: Any) -> int:
        half = len(piece) // 2
        for part in (piece[:half], piece[half:]):
            self.disk.count("write")
            self.raw.write(part)
        return len(piece)

    def __enter__(self) -> "HalfWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.raw.close()


OPEN = io.open
CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "remove", "fsync")


@contextmanager
def stopping_at(stop: int) -> Iterator[Disk]:
    disk = Disk(stop)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, disk.counted(getattr(os, name), name))
        patch.setattr(io, "open", disk.opened)
        yield disk


def prepare(root: Path, before: list[int]) -> None:
    for step in before:
        write(root, step, state_of(step))


def save_until(root: Path, step: int, keep: int, stop: int) -> Disk:
    with stopping_at(stop) as disk:
        try:
            write(root, step, state_of(step, version=1))
            prune(root, keep)
        except Stopped:
            pass
    return disk


def check_after(root: Path, before: list[int], step: int, ended: bool) -> None:
    """What has to hold for whoever comes next, and when that one has cleaned up and saved."""
    found = newest(root)  # without a warning: nothing damaged has the name of a checkpoint
    assert found is not None
    step_found = found[1]["position"]["step"]
    assert step_found == step if ended else step_found in (max(before), step)
    clean(root)
    assert aside(root) == []
    assert max(steps(root)) == step_found
    for one in steps(root):
        allowed = [state_of(one)] * (one in before) + [state_of(one, version=1)] * (one == step)
        assert any(same(read(path_of(root, one)), state) for state in allowed)


def stop_everywhere(tmp_path: Path, before: list[int], step: int, keep: int) -> Counter[str]:
    where = Counter[str]()
    prepare(tmp_path / "before", before)
    for stop in itertools.count(1):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(stop)))
        disk = save_until(root, step, keep, stop)
        check_after(root, before, step, ended=not disk.where)
        if not disk.where:
            assert len(steps(root)) == keep
            return where
        where[disk.where] += 1
    raise AssertionError


# Steps before, the step that is saved (a new one, or one that is replaced), how many are kept.
@pytest.mark.parametrize(
    ("before", "step", "keep"), [([1], 2, 1), ([1, 2], 3, 2), ([1], 1, 1), ([1, 2], 2, 1)]
)
def test_a_save_that_stops_at_any_call_loses_nothing(
    tmp_path: Path, before: list[int], step: int, keep: int
) -> None:
    where = stop_everywhere(tmp_path, before, step, keep)
    print(before, step, keep, dict(where))
    assert where["open"] == 4  # two sections, the rest, the manifest
    assert where["write"] >= 12
    assert where["fsync"] >= 4 + 5 + 1
    assert where["rename"] >= 1


@contextmanager
def written_in_place(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True, exist_ok=True)
    yield path


def prune_first(root: Path, step: int, state: Any) -> Path:
    for one in steps(root):
        checkpoint.discard(path_of(root, one))
    return checkpoint.write(root, step, state)


@pytest.mark.parametrize("fault", ["written in place", "removed first"])
def test_the_faults_of_others_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "written in place":
        monkeypatch.setattr(checkpoint, "written_aside", written_in_place)
    else:
        monkeypatch.setitem(globals(), "write", prune_first)
    with pytest.raises((AssertionError, RuntimeWarning, checkpoint.CheckpointError)):
        stop_everywhere(tmp_path, [1], 2, 1)
