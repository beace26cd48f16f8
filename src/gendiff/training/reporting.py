"""The row of losses that a run logs, and how long it took."""

from typing import TYPE_CHECKING, Any

import torch

from gendiff.training.setup import samples_of

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


def losses(trainer: "Trainer") -> dict[str, Any]:
    """What the meters have seen since the last row, with where the run is; the meters begin anew."""
    position, update = trainer.position, trainer.update
    step, samples = position.logged
    reduce = trainer.summed if trainer.accelerator.num_processes > 1 else None
    return {
        "epoch": _epoch(trainer),
        "samples": position.samples,
        "skipped": position.skipped,
        "learning_rate": update.rates_of(max(0, position.step - 1)),
        **({} if update.scaler is None else {"loss_scale": float(update.scaler.scale)}),
        **trainer.meters.read(position.samples - samples, position.step - step, reduce),
    }


def timing(trainer: "Trainer", seconds: float) -> dict[str, float]:
    """Speed and memory since the last row."""
    passed = trainer.position.samples - trainer.position.logged[1]
    row = {"seconds": seconds, "images_per_second": passed / max(seconds, 1e-9)}
    if trainer.device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
    return row


def _epoch(trainer: "Trainer") -> float:
    position = trainer.position
    if samples_of(trainer.loader) is None:
        return float(position.epoch)
    return round(position.epoch + position.micro / len(trainer.loader), 6)
