"""The loss over a dataset, with the same noise every time."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gendiff.data.loader import Loader
from gendiff.random import Rng
from gendiff.training.loss import moved, trimmed, weighted
from gendiff.training.meters import Meters

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


def evaluate(trainer: "Trainer", model: Any, loader: Loader) -> dict[str, Any]:
    """The mean loss of a model over one pass of a loader, its metrics, and the loss by noise level."""
    meters, samples = Meters(trainer.device), 0
    for micro in loader.stream(epochs=1):
        rows = max(1, micro.rows)
        batch: Mapping[str, Any] = moved(trimmed(micro.batch, rows), trainer.device)
        keys = micro.keys[:rows].to(trainer.device, non_blocking=True)
        rng = Rng.from_keys(keys).fold("evaluate")
        _, seen = weighted(trainer.compute_loss(model, batch, rng), batch)
        meters.add(seen, micro.rows)
        samples += micro.total
    reduce = trainer.summed if trainer.accelerator.num_processes > 1 else None
    return meters.read(samples, updates=0, reduce=reduce)
