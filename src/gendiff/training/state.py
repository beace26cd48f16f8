"""What a checkpoint holds of a run, and how a run goes on from one."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.training import checkpoint
from gendiff.training.names import canonical
from gendiff.training.position import Position
from gendiff.training.setup import samples_of

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


def save(trainer: "Trainer") -> Path:
    """Write a checkpoint, and drop the oldest ones beyond the limit once it is verified."""
    accelerator, step = trainer.accelerator, trainer.position.step
    if accelerator.num_processes > 1:
        trainer.meters.gather(trainer.summed, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        checkpoint.write(trainer.output_dir, step, state_of(trainer))
        checkpoint.prune(trainer.output_dir, trainer.config.save_total_limit)
    accelerator.wait_for_everyone()
    return checkpoint.path_of(trainer.output_dir, step)


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything that the rest of the run depends on."""
    return {
        "run": agreements(trainer),
        "position": {**asdict(trainer.position), "logged": list(trainer.position.logged)},
        "records": trainer.records.position(),
        "weights": {name: p.detach() for name, p in trainer.parameters.items()},
        "buffers": buffers(trainer.components),
        "update": trainer.update.state_dict(),
        "meters": trainer.meters.state_dict(),
        "callbacks": {n: kept for n, one in trainer.callbacks.items() if (kept := one.state_dict())},
    }


def resume(trainer: "Trainer", which: str | Path | None) -> None:
    """Go on from a checkpoint, or from where this trainer is, or begin.

    Args:
        trainer: the trainer.
        which: "auto", a path, or None.
    """
    root = trainer.output_dir
    if (trainer.position != Position() or trainer.partial) and which == "auto":
        _go_on(trainer)
        return
    if which is None and checkpoint.steps(root):
        raise ValueError(
            f"{root.name} has checkpoints, of step {checkpoint.steps(root)[-1]} for one, which beginning "
            f"anew would replace; give another output_dir, or resume_from_checkpoint='auto'."
        )
    if trainer.accelerator.is_main_process:
        checkpoint.clean(root)
    trainer.accelerator.wait_for_everyone()
    if which == "auto":
        found = checkpoint.newest(root)
    else:
        found = None if which is None else (Path(which), checkpoint.read(Path(which)))
    if found is None:
        trainer.records.open()
        return
    path, state = found
    here = path.resolve().parent == root.resolve()
    if here and which != "auto" and checkpoint.steps(root)[-1] > state["position"]["step"]:
        raise ValueError(
            f"{root.name} has checkpoints newer than {path.name}, which are of another future than a run "
            f"from there; move them away, or give another output_dir."
        )
    restore(trainer, state)
    trainer.records.open(state["records"] if here else None)  # the log of another folder stays with it
    trainer.progress.say(f"going on from {path.name}")


def _go_on(trainer: "Trainer") -> None:
    """From where this very trainer was interrupted, at the end of a window."""
    trainer.position = trainer.position.read(int(trainer.update.applied))
    if trainer.partial:  # the meters have seen a part of a window that is run again: the next row begins here
        trainer.meters.clear()
        at = trainer.position.step, trainer.position.samples
        trainer.position, trainer.partial = replace(trainer.position, logged=at), False
    trainer.records.open(trainer.records.left)


def restore(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Bring a trainer to a state, after settings, names and shapes have been compared."""
    _agree(agreements(trainer), state["run"])
    for name in state["callbacks"]:
        if name not in trainer.callbacks:
            raise ValueError(unknown("callback with a state in the checkpoint", name, trainer.callbacks))
    pairs = _matched("trained parameter", trainer.parameters, state["weights"])
    pairs += _matched("buffer", buffers(trainer.components), state["buffers"])
    trainer.update.load_state_dict(state["update"])
    with torch.no_grad():
        for live, saved in pairs:
            live.copy_(saved)
    several, main = trainer.accelerator.num_processes > 1, trainer.accelerator.is_main_process
    trainer.meters.load_state_dict(state["meters"])
    if several and not main:
        trainer.meters.clear()  # the sums of all are with the main process
    for name, kept in state["callbacks"].items():
        trainer.callbacks[name].load_state_dict(kept)
    position = dict(state["position"])
    trainer.position = Position(**{**position, "logged": tuple(position["logged"])})
    trainer.saved_at = trainer.position.step


def agreements(trainer: "Trainer") -> dict[str, Any]:
    """What has to be the same for a run to go on as it would have."""
    config = trainer.config
    return {
        "seed": config.seed,
        "per_device_batch_size": config.per_device_batch_size,
        "gradient_accumulation_steps": trainer.accumulation,
        "processes": trainer.accelerator.num_processes,
        "windows": config.windows,
        "mixed_precision": trainer.precision,
        "samples in an epoch": samples_of(trainer.loader),
        "ema": repr(config.ema),
    }


def buffers(components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Buffers that a state has, such as running means, by canonical name, of what trains."""
    found: dict[str, Tensor] = {}
    for component, module in components.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            kept = module.state_dict(keep_vars=True)
            found |= {
                f"{component}.{canonical(module, name)}": buffer
                for name, buffer in module.named_buffers()
                if name in kept
            }
    return found


def _agree(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        told = "; ".join(f"{n} was {theirs.get(n)!r} and is {ours[n]!r}" for n in differing)
        raise ValueError(
            f"the checkpoint is of a run with other settings: {told}. Set them as they were, or give another "
            f"output_dir to begin anew."
        )


def _matched(
    what: str, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    for name in saved:
        if name not in live:
            raise ValueError(unknown(f"{what} in the checkpoint", name, live))
    for name, tensor in live.items():
        if name not in saved:
            raise ValueError(f"the {what} {name!r} is not in the checkpoint; train what that run trained.")
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise ValueError(
                f"the {what} {name!r} has {tuple(tensor.shape)} of {tensor.dtype}, and the checkpoint has "
                f"{tuple(saved[name].shape)} of {saved[name].dtype}."
            )
    return [(tensor, saved[name]) for name, tensor in live.items()]
