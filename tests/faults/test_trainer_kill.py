"""SIGKILL at random instants, half of them inside saving: the run that goes on ends as the one never killed.

With averages, a schedule, dropout, two workers, and augmentation by every kind of generator. The ordinary run
has a few kills; `pytest -m slow` has hundreds.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from gendiff.training import checkpoint

STEPS, SAVES, LAST = 24, 3, "checkpoint-00000024"
PRELOADED = ["gendiff.training", "gendiff.training.trainer", "tests.training.toy"]


def train(folder: str, begun: Event, saving: Event, stretch: float) -> None:
    """The run, in a process of its own; saving takes long enough to be hit."""
    import torch

    from gendiff.training import Callback
    from tests.training.toy import Images, trainer

    torch.set_num_threads(1)
    fsync, write = os.fsync, checkpoint.write

    def slow_fsync(descriptor: int) -> None:
        time.sleep(stretch)
        fsync(descriptor)

    def told_write(*arguments: Any, **options: Any) -> Any:
        saving.set()
        try:
            return write(*arguments, **options)
        finally:
            saving.clear()

    os.fsync, checkpoint.write = slow_fsync, told_write

    class Begun(Callback):
        def on_train_begin(self, trainer: Any) -> None:
            begun.set()

    trainer(
        Path(folder),
        train_dataset=Images(augment=True),
        callbacks=[Begun()],
        dropout=0.2,
        max_steps=STEPS,
        save_steps=SAVES,
        save_total_limit=2,
        logging_steps=2,
        gradient_accumulation_steps=2,
        num_workers=2,
    ).train()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the log and of every file of the last checkpoint: weights, averages, optimizer, position."""
    files = [folder / "log.jsonl", *sorted((folder / LAST).iterdir())]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    """Processes that have imported everything, since this takes longer than the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(
    server: ForkServerContext, folder: Path, kill: str | None, pause: float, stretch: float
) -> int | None:
    """One process of the run, killed some time after it has begun, or inside a save; its exit code."""
    begun, saving = server.Event(), server.Event()
    process = server.Process(target=train, args=(str(folder), begun, saving, stretch))
    process.start()
    if kill is not None:
        (saving if kill == "saving" else begun).wait(timeout=60)
        process.join(pause)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def killed_run(server: ForkServerContext, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a run again and again, and let it end; how often it was hit."""
    draw, hits = random.Random(seed), {"saving": 0, "anywhere": 0}
    for number in range(kills):
        where = ("saving", "anywhere")[number % 2]
        pause = draw.uniform(0, 0.12) if where == "saving" else draw.uniform(0, 0.8)
        code = run(server, folder, where, pause, stretch=0.01)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return hits
        hits[where] += 1
    assert run(server, folder, None, 0, stretch=0) == 0
    return hits


@pytest.fixture(scope="module")
def unkilled(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unkilled") / "run"
    assert run(server, folder, None, 0, stretch=0) == 0
    return hashes(folder)


@pytest.mark.timeout(600)
def test_a_killed_run_ends_bit_equal(
    server: ForkServerContext, unkilled: dict[str, str], tmp_path: Path
) -> None:
    hits = killed_run(server, tmp_path / "run", kills=4, seed=0)
    assert hashes(tmp_path / "run") == unkilled
    assert sum(hits.values()) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_killed_runs_end_bit_equal(
    server: ForkServerContext, unkilled: dict[str, str], tmp_path: Path, seed: int
) -> None:
    hits = killed_run(server, tmp_path / "run", kills=12, seed=seed)
    print(hits)
    assert hashes(tmp_path / "run") == unkilled
