"""Gradients of windows against one big batch, on one process and two."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff.random import Rng
from gendiff.training import Trainer
from gendiff.training.windows import POLICIES
from tests.training.toy import Images, trainer

ROOT = Path(__file__).parents[2]


class Recorder(torch.optim.SGD):
    """Keeps the gradient of every update, and moves nothing."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.0)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.seen.append([p.grad.clone() for p in parameters])


def gradients(folder: Path, batch: int, length: int, samples: int, **options: Any) -> list[list[Tensor]]:
    made = trainer(
        folder,
        train_dataset=Images(samples),
        optimizer=Recorder,
        per_device_batch_size=batch,
        gradient_accumulation_steps=length,
        max_grad_norm=None,
        num_epochs=2,
        **options,
    )
    made.train()
    optimizer: Any = made.update.optimizer
    return optimizer.seen


@pytest.mark.parametrize("length", range(1, 8))
def test_a_window_of_micro_batches_has_the_gradient_of_one_big_batch(tmp_path: Path, length: int) -> None:
    """24 samples: windows that divide the epoch and windows that go on into the next one."""
    split = gradients(tmp_path / "split", 2, length, 2 * length * 3)
    whole = gradients(tmp_path / "whole", 2 * length, 1, 2 * length * 3)
    assert len(split) == len(whole) == 6
    for ours, theirs in zip(split, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_short_window_is_divided_by_the_samples_that_it_has(tmp_path: Path, policy: str) -> None:
    """Every window's gradient is the mean of the gradients of its samples, computed one by one."""
    split = gradients(tmp_path / "split", 2, 3, 10, windows=policy)
    single = trainer(tmp_path / "single", train_dataset=Images(10), optimizer=Recorder)
    parameters = [p for group in single.update.optimizer.param_groups for p in group["params"]]
    epochs = [list(single.loader.order.epoch(e)) for e in range(2)]  # pyright: ignore
    ids = [[i for plan in epoch for i in plan.indices[: plan.rows]] for epoch in epochs]
    cuts = {
        "carry": [[(0, i) for i in ids[0][:6]], [(0, i) for i in ids[0][6:]] + [(1, i) for i in ids[1][:2]]],
        "short": [[(0, i) for i in ids[0][:6]], [(0, i) for i in ids[0][6:]]],
        "drop": [[(0, i) for i in ids[0][:6]], [(1, i) for i in ids[1][:6]]],
    }
    for window, gradient in zip(cuts[policy], split, strict=False):
        total = [torch.zeros_like(p) for p in parameters]
        for epoch, i in window:
            sample = single.train_dataset[i]
            batch = {"image": sample["image"][None], "label": torch.tensor([sample["label"]])}
            terms: Any = single.compute_loss(single.model, batch, Rng(0, ids=[i], epoch=epoch))
            for sum_, g in zip(total, torch.autograd.grad(terms.mean(), parameters), strict=True):
                sum_ += g
        for a, b in zip(gradient, total, strict=True):
            torch.testing.assert_close(a, b / len(window), rtol=1e-4, atol=1e-6)


def test_weights_of_samples_and_a_scalar_loss(tmp_path: Path) -> None:
    class Scalar(Trainer):
        def compute_loss(self, model: Any, batch: Any, rng: Any) -> Tensor:
            terms: Any = super().compute_loss(model, batch, rng)
            return terms.mean()

    class Weighted(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {**super().__getitem__(i), "weight": 2.0}

    plain = gradients(tmp_path / "plain", 2, 2, 6)
    for name, factor, options in (
        ("scalar", 1, {"kind": Scalar}),
        ("weighted", 2, {}),
    ):
        dataset = Weighted(6) if name == "weighted" else Images(6)
        made = trainer(
            tmp_path / name,
            train_dataset=dataset,
            optimizer=Recorder,
            per_device_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=None,
            num_epochs=2,
            **options,
        )
        made.train()
        optimizer: Any = made.update.optimizer
        for ours, theirs in zip(optimizer.seen, plain, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, factor * b, rtol=1e-5, atol=1e-7)


# ---- two processes


def run(folder: Path, processes: int, batch: int, length: int) -> dict[str, Any]:
    """What tests/training/run_toy.py prints, run on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, "--module", "tests.training.run_toy", str(folder), str(batch), str(length)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_processes_and_accumulation_change_nothing_but_rounding(tmp_path: Path) -> None:
    """(1 process, accumulation 4), (2, 2), and (2 processes, half the batch, 4)."""
    runs = [run(tmp_path / f"{i}", *split) for i, split in enumerate([(1, 2, 4), (2, 2, 2), (2, 1, 4)])]
    for other in runs[1:]:
        assert other["rates"] == runs[0]["rates"]  # the trace of learning rates, equal to the bit
        assert other["replicas"] == 0.0  # the largest difference of two processes' weights
        assert [row["samples"] for row in other["rows"]] == [row["samples"] for row in runs[0]["rows"]]
        for ours, theirs in zip(other["rows"], runs[0]["rows"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            assert ours["levels"]["count"] == theirs["levels"]["count"]
        torch.testing.assert_close(
            torch.tensor(other["weights"]), torch.tensor(runs[0]["weights"]), rtol=1e-3, atol=1e-4
        )
        assert other["evaluated"] == pytest.approx(runs[0]["evaluated"], rel=1e-3)
    assert len(runs[0]["rates"]) == 6
    assert len(set(runs[0]["rates"])) > 3
