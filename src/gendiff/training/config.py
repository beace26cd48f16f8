"""The settings of a training run, one frozen object that is its own record."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

from gendiff._checks import unknown
from gendiff._groups import ParamGroup
from gendiff.training.ema import EMA
from gendiff.training.rates import Rates, rates_of

Precision = Literal["no", "bf16", "fp16"]
Windows = Literal["carry", "short", "drop"]
NonFinite = Literal["raise", "skip"]
Engine = Literal["eager"]
Progress = Literal["auto", "bar", "lines", "notebook", "none"]

_CHOICES = {
    "mixed_precision": Precision,
    "windows": Windows,
    "nonfinite": NonFinite,
    "engine": Engine,
    "progress": Progress,
}
_COUNTS = (
    "per_device_batch_size",
    "max_steps",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)


@final
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a `Trainer`. A step is an applied update, whatever the accumulation and the processes.

    Args:
        output_dir: folder of checkpoints, `log.jsonl` and samples.
        seed: of the data order and of every sample's randomness, 0 … 2^64 - 1.
        max_steps: number of updates; or else
        num_epochs: number of passes over the dataset.
        per_device_batch_size: samples of a micro-step on one process, >= 1.
        gradient_accumulation_steps: micro-steps of an update, >= 1; None is the accelerator's.
        mixed_precision: autocast in "bf16" or "fp16", or "no"; None is the accelerator's.
        learning_rate: of every parameter that no group gives one, > 0.
        lr_scheduler: `WarmupCosine(...)`, another of its kind, a name, or a function that makes a torch
            scheduler from an optimizer.
        param_groups: exceptions by pattern; where several match, later ones win, field by field.
        weight_decay: of AdamW, >= 0.
        betas: of AdamW.
        eps: of AdamW.
        max_grad_norm: global norm to clip the gradient at; None for no clipping.
        ema: averages of the weights; None for none.
        gradient_checkpointing: recompute activations in backward, in every diffusers or transformers module.
        save_steps: updates between checkpoints, and one at the end; None for no checkpoints.
        save_total_limit: checkpoints to keep; None for all.
        logging_steps: updates between log lines; in between the host reads nothing from the device.
        log_with: trackers: names known to accelerate, or its `GeneralTracker` objects.
        num_workers: processes that load samples.
        windows: what the end of an epoch does to a window: "carry" lets it go on into the next epoch,
            "short" closes it early (the gradient is divided by the samples that it has), "drop" leaves it
            out.
        nonfinite: a gradient that is not finite is never applied; "raise" then stops at the next log line,
            "skip" goes on. Under fp16 a skipped update is ordinary and never raises.
        engine: how a step is run; "eager" is the one engine so far.
        deterministic: torch's deterministic algorithms, inside `train` only.
        progress: "auto" is a bar in a terminal, HTML in a notebook, plain lines elsewhere.

    Raises:
        ValueError: a value out of its range, or an unknown choice.

    >>> TrainConfig(output_dir="run", max_steps=10, windows="carri")
    Traceback (most recent call last):
    ...
    ValueError: unknown windows 'carri'; did you mean 'carry'? Accepted: 'carry', 'short', 'drop'.
    """

    output_dir: str | Path
    seed: int = 0
    max_steps: int | None = None
    num_epochs: int | None = None
    per_device_batch_size: int = 1
    gradient_accumulation_steps: int | None = None
    mixed_precision: Precision | str | None = None
    learning_rate: float = 1e-4
    lr_scheduler: Rates | str | Callable[..., Any] = "constant"
    param_groups: Sequence[ParamGroup] = ()
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    ema: EMA | None = None
    gradient_checkpointing: bool = False
    save_steps: int | None = 500
    save_total_limit: int | None = None
    logging_steps: int = 10
    log_with: Sequence[Any] = ()
    num_workers: int = 0
    windows: Windows | str = "carry"
    nonfinite: NonFinite | str = "raise"
    engine: Engine | str = "eager"
    deterministic: bool = False
    progress: Progress | str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices) and not (name == "mixed_precision" and value is None):
                raise ValueError(unknown(name, value, get_args(choices)))
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"a run is max_steps updates or num_epochs passes: give one of the two, got "
                f"max_steps={self.max_steps}, num_epochs={self.num_epochs}."
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
        if self.num_epochs is not None and not self.num_epochs >= 1:
            raise ValueError(f"num_epochs is at least 1, got {self.num_epochs}.")
        if not 0 <= self.seed < 2**64 or self.num_workers < 0:
            raise ValueError(
                f"seed lies in 0 … 2^64 - 1 and num_workers is not negative, got seed={self.seed}, "
                f"num_workers={self.num_workers}."
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate is a positive number, got {self.learning_rate}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is a positive number, or None for no clipping, got {self.max_grad_norm}."
            )
        if isinstance(self.log_with, str):
            object.__setattr__(self, "log_with", (self.log_with,))
        object.__setattr__(self, "lr_scheduler", rates_of(self.lr_scheduler))
        object.__setattr__(self, "param_groups", tuple(self.param_groups))
        object.__setattr__(self, "log_with", tuple(self.log_with))

    def table(self) -> dict[str, Any]:
        """Every setting by name, in the order of the class."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
