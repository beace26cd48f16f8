"""What a trainer says of itself: what trains, how, for how long."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from gendiff.training.names import unwrapped
from gendiff.training.setup import samples_of

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


def summary(trainer: "Trainer") -> str:
    """A table of a dozen lines."""
    config, loader, update = trainer.config, trainer.loader, trainer.update
    processes = trainer.accelerator.num_processes
    batch = config.per_device_batch_size * trainer.accumulation * processes
    ema = "none" if config.ema is None else repr(config.ema)
    lines = [
        f"{type(trainer).__name__} in {config.output_dir}",
        *_components(trainer.components),
        *(_row("raised", f"{trainer.raised} trained tensors, to float32") if trainer.raised else []),
        *_groups(trainer),
        *_row("rates", f"{config.lr_scheduler!r}, over {trainer.total:,} steps"),
        *_row(
            "step",
            f"{batch:,} samples = {config.per_device_batch_size} × {trainer.accumulation} accumulated × "
            f"{processes} processes, windows {config.windows!r}",
        ),
        *_row("data", _data(samples_of(loader), trainer.total * batch)),
        *_row("precision", f"{trainer.precision} on {trainer.device}, fp32 trained weights"),
        *_row(
            "clipping", "none" if config.max_grad_norm is None else f"global norm {config.max_grad_norm:g}"
        ),
        *_row("averages", ema),
        *_row("update", f"{type(update.optimizer).__name__}, decided on the {update.gate}"),
    ]
    return "\n".join(lines)


def _row(name: str, text: str) -> list[str]:
    return [f"  {name:<10} {text}"]


def _components(components: Mapping[str, nn.Module]) -> list[str]:
    lines = []
    for name, module in components.items():
        every = list(module.parameters())
        trains = sum(p.numel() for p in every if p.requires_grad)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in every if not p.requires_grad})
        frozen = sum(p.numel() for p in every) - trains
        rest = f", {frozen:,} frozen in {' and '.join(dtypes)}" if frozen else ""
        what = f"{trains:,} parameters train{rest}" if every else "no parameters"
        lines += _row(name, f"{type(unwrapped(module)).__name__}: {what}")
    return lines


def _groups(trainer: "Trainer") -> list[str]:
    lines = []
    update = trainer.update
    for number, group in enumerate(update.optimizer.param_groups):
        peak = float(update.rates[number].max())
        decay = f", weight decay {group['weight_decay']:g}" if "weight_decay" in group else ""
        lines += _row(
            f"group {number}", f"{len(group['params'])} tensors, learning rate up to {peak:g}{decay}"
        )
    return lines


def _data(samples: int | None, seen: int) -> str:
    if samples is None:
        return "a stream of samples"
    return f"{samples:,} samples an epoch, {seen / samples:,.1f} epochs"
