"""Runs that go on: bit-equal from every step, and refused where they could not be."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gendiff.training import Callback, CheckpointError, EarlyStop, Trainer, Validation
from gendiff.training.checkpoint import path_of, read
from tests.training.toy import Images, trainer

RUN: dict[str, Any] = {
    "dropout": 0.3,
    "save_steps": 1,
    "logging_steps": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
}


def run(folder: Path, **options: Any) -> Trainer:
    return trainer(folder, **({"train_dataset": Images(11, augment=True)} | RUN | options))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder).train()
    return folder


def cut_at(whole: Path, folder: Path, step: int) -> Path:
    """The run as it was when it had been killed after a step, with a longer log than its checkpoint knows."""
    shutil.copytree(whole, folder)
    for later in range(step + 1, RUN["max_steps"] + 1):
        shutil.rmtree(path_of(folder, later))
    return folder


@pytest.mark.parametrize("step", range(1, 8))
def test_from_every_step_the_end_is_the_same(whole: Path, tmp_path: Path, step: int) -> None:
    """Steps within an epoch, at its end, within a log interval; also with another number of workers."""
    folder = cut_at(whole, tmp_path / "run", step)
    run(folder, num_workers=step % 3).train()
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    ours, theirs = (read(path_of(place, 7)) for place in (folder, whole))
    assert same(ours, theirs)


def test_a_resume_that_forgets_something_is_seen(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with dropout seeded by the clock, the end is another."""
    from gendiff.training import trainer as module

    monkeypatch.setattr(module, "reseed", lambda device, *where: torch.seed())
    folder = cut_at(whole, tmp_path / "run", 3)
    run(folder).train()
    assert not same(read(path_of(folder, 7))["weights"], read(path_of(whole, 7))["weights"])


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(whole: Path, tmp_path: Path) -> None:
    folder = cut_at(whole, tmp_path / "run", 5)
    file = path_of(folder, 5) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))
    with pytest.warns(RuntimeWarning, match="checkpoint-00000005.*weights.safetensors"):
        run(folder).train()
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert same(read(path_of(folder, 7))["weights"], read(path_of(whole, 7))["weights"])


def test_from_a_path_or_anew(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder).train(resume_from_checkpoint=path_of(whole, 4))
    assert same(read(path_of(folder, 7))["weights"], read(path_of(whole, 7))["weights"])
    with pytest.raises(ValueError, match="checkpoints newer than checkpoint-00000005, which are of another"):
        run(folder).train(resume_from_checkpoint=path_of(folder, 5))
    with pytest.raises(ValueError, match="run has checkpoints, of step 7 for one"):
        run(folder).train(resume_from_checkpoint=None)
    with pytest.raises(CheckpointError, match="checkpoint-00000009"):
        run(folder).train(resume_from_checkpoint=path_of(whole, 9))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"per_device_batch_size": 2}, "per_device_batch_size was 3 and is 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2 and is 1"),
        ({"windows": "short"}, "windows was 'carry' and is 'short'"),
        ({"train_dataset": Images(10, augment=True)}, "samples in an epoch was 11 and is 10"),
        ({"ema": None}, "ema was 'EMA"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no' and is 'bf16'"),
    ],
)
def test_settings_that_would_change_the_run_are_refused(
    whole: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = cut_at(whole, tmp_path / "run", 3)
    made = run(folder, **change)
    before = [p.detach().clone() for p in made.parameters.values()]
    with pytest.raises(ValueError, match=says):
        made.train()
    assert all(map(torch.equal, before, made.parameters.values()))


def test_settings_that_do_not_may_change(whole: Path, tmp_path: Path) -> None:
    folder = cut_at(whole, tmp_path / "run", 3)
    made = run(folder, save_total_limit=1, logging_steps=1, save_steps=2)
    made.train()
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-00000007"]
    assert same(read(path_of(folder, 7))["weights"], read(path_of(whole, 7))["weights"])


def test_what_callbacks_remember_goes_on(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [Validation(Images(3), every=2), EarlyStop("eval/loss", patience=3, min_delta=50.0)]

    whole = run(tmp_path / "whole", max_steps=30, callbacks=callbacks())
    whole.train()
    assert whole.step == 8
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    for step in (6, 7, 8):
        shutil.rmtree(path_of(folder, step))
    rest = run(folder, max_steps=30, callbacks=callbacks())
    rest.train()
    assert rest.step == 8
    assert (folder / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    without = run(folder, max_steps=30)
    with pytest.raises(ValueError, match="unknown callback with a state in the checkpoint 'EarlyStop-1'"):
        without.train()


def test_a_log_that_has_lost_lines_is_named(whole: Path, tmp_path: Path) -> None:
    folder = cut_at(whole, tmp_path / "run", 5)
    (folder / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"log\.jsonl has 0 bytes and had \d+"):
        run(folder).train()
