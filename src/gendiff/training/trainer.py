"""The trainer: one loop, on public parts that work without it."""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gendiff.codec import Codec
from gendiff.condition import Condition
from gendiff.data.loader import Loader, Micro
from gendiff.denoiser import Denoiser
from gendiff.objectives import LossTerms, Objective
from gendiff.random import Rng
from gendiff.training import state
from gendiff.training.callbacks import Callback
from gendiff.training.config import Precision, TrainConfig
from gendiff.training.evaluation import evaluate
from gendiff.training.loss import LossModule, moved, trimmed
from gendiff.training.meters import Meters
from gendiff.training.optimizer import Factory, evaluated
from gendiff.training.position import Position
from gendiff.training.posthoc import save_snapshot
from gendiff.training.progress import progress_for
from gendiff.training.records import LOG, TIMING, Records
from gendiff.training.reporting import losses, timing
from gendiff.training.saving import save_pretrained
from gendiff.training.session import session
from gendiff.training.setup import (
    accelerated,
    agreed_accumulation,
    agreed_precision,
    autocast_of,
    components_of,
    loader_of,
    named_callbacks,
    total_of,
    trained,
    update_of,
)
from gendiff.training.step import Step, reseed
from gendiff.training.summary import summary
from gendiff.training.trackers import Trackers
from gendiff.training.views import Models, Twin, Weights, chosen, using
from gendiff.training.windows import Window, windows

PATIENCE = 100  # windows in a row without a finite gradient, after which a run is no longer one


class Trainer:
    """Trains what requires grad, in a loop that cannot lose work.

    Override `compute_loss` for a loss of one's own, `inputs` for another way from a batch to (x0, cond);
    everything else is a part that is given or a callback.

    Args:
        model: a `Denoiser`, another module, or modules by name. What requires grad trains, here and in the
            codec; the rest is moved to the device and neither changed nor saved.
        train_dataset: samples by index, or an iterable dataset; see `gendiff.data`.
        eval_dataset: what `evaluate` and `Validation` take by default.
        codec: what makes (x0, cond) of a batch.
        objective: the loss of a denoiser; `Objective()` by default.
        optimizer: a function of parameter groups; fused AdamW by default.
        config: the settings.
        callbacks: called in this order.
        accelerator: one of your own, whose settings are honoured.

    Raises:
        ValueError: nothing requires grad; the accelerator and the config disagree; a pattern of a group
            matches nothing; a dataset without length with `num_epochs`.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        train_dataset: Any,
        *,
        config: TrainConfig,
        eval_dataset: Any = None,
        codec: Codec | None = None,
        objective: Objective | None = None,
        optimizer: Factory | None = None,
        callbacks: Sequence[Callback] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model, self.train_dataset, self.eval_dataset = model, train_dataset, eval_dataset
        self.codec, self.config, self.output_dir = codec, config, Path(config.output_dir)
        self.objective = Objective() if objective is None and isinstance(model, Denoiser) else objective
        self.components = components_of(model, codec)
        self.parameters, self.raised = trained(self.components)
        self.accelerator = accelerated(accelerator)
        self.precision: Precision = agreed_precision(config, self.accelerator)
        self.accumulation = agreed_accumulation(config, self.accelerator)
        self.device: torch.device = self.accelerator.device
        for module in self.components.values():
            module.to(self.device)
        self.loader = self._loader(train_dataset)
        self.total = total_of(self.loader, config, self.accumulation)
        self.update = update_of(self.parameters, config, self.precision, self.total, optimizer)
        self.meters = Meters(self.device)
        self.callbacks = named_callbacks(callbacks)
        self.position, self.logged = Position(), dict[str, None]()
        self.losses = LossModule(self.components, self._compute_loss, self.autocast)
        self.stopped: str | None = None
        self.torn, self.partial = False, False  # whether it was interrupted in an update, in a window
        self._barren = 0
        self._seconds, self.saved_at = 0.0, -1
        self._twin: Twin | None = None
        main = self.accelerator.is_main_process
        self.records = Records(self.output_dir, main)
        self.progress = progress_for(config.progress if main else "none")
        self.trackers = Trackers(
            config.log_with,
            project="gendiff",
            config=config.table(),
            folder=self.output_dir,
            accelerator=self.accelerator,
        )

    # ---- what a subclass overrides

    def compute_loss(self, model: Models, batch: Mapping[str, Any], rng: Rng) -> LossTerms | Tensor:
        """The loss of a batch: one a sample [B], `LossTerms`, or a scalar that cannot be split over samples.

        Args:
            model: what the trainer was given, or its averaged twin in an evaluation.
            batch: on the device, as the dataset and its collation made it.
            rng: the samples' own randomness; `rng.normal("noise", x0.shape)`.
        """
        if self.objective is None:
            raise TypeError(
                f"the model is {type(model).__name__}, which is no Denoiser, and there is no objective: wrap "
                f"the network in Denoiser(network, schedule, prediction), or override compute_loss."
            )
        x0, cond = self.inputs(batch, rng)
        return self.objective(model, x0, cond, rng=rng)

    def inputs(self, batch: Mapping[str, Any], rng: Rng | None) -> tuple[Tensor, Condition]:
        """(x0, cond) of a batch; by default what the codec makes of it."""
        if self.codec is None:
            raise TypeError(
                f"a batch with {sorted(batch)} has to become (x0, cond): give the trainer a codec, or "
                f"override inputs or compute_loss."
            )
        return self.codec.inputs(batch, rng)

    # ---- the run

    def train(self, resume_from_checkpoint: Literal["auto"] | str | Path | None = "auto") -> None:
        """Run to the end.

        Args:
            resume_from_checkpoint: "auto" goes on from the newest valid checkpoint of `output_dir` if there
                is one; a path from that one; None begins anew, and refuses a folder that has checkpoints.

        Raises:
            FloatingPointError: a gradient was not finite, where the config says "raise".
            CheckpointError: no checkpoint of the folder can be read, or not the one given.
        """
        with session(self, resume_from_checkpoint) as step, closing(self._micros()) as micros:
            stream = windows(micros, self.accumulation, self.config.windows)
            while self.position.step < self.total and self.stopped is None:
                stop, ran = self._next_stop(), 0
                began = time.perf_counter()
                for window in islice(stream, stop - self.position.step):
                    self._run(step, window)
                    ran += 1
                self._look()
                self._seconds += time.perf_counter() - began
                if not ran:
                    break  # epochs are over, and some of their updates were not applied
                if self.position.step == stop:
                    self._at_stop()
            self._finish()

    def stop(self, reason: str) -> None:
        """End the run at the next look of the host, with a checkpoint."""
        self.stopped = reason

    def _run(self, step: Step, window: Window) -> None:
        last, self.partial = len(window.micros) - 1, True
        for number, micro in enumerate(window.micros):
            batch = moved(trimmed(micro.batch, max(1, micro.rows)), self.device)
            keys = micro.keys[: max(1, micro.rows)].to(self.device, non_blocking=True)
            rank = self.accelerator.process_index
            reseed(self.device, self.config.seed, micro.epoch, micro.index, rank)
            with self._unsynchronised(step.losses, number < last):
                step.micro(batch, keys, window.samples, micro.rows)
        self.torn = True
        step.close()
        self.position, self.torn, self.partial = self.position.after(window), False, False
        self.progress.advance()

    def _look(self) -> None:
        """Read from the device how many updates were applied: the one synchronisation between two stops."""
        before = self.position
        self.position = before.read(int(self.update.applied))
        new = self.position.skipped - before.skipped
        self._barren = self._barren + new if self.position.step == before.step else 0
        if self._barren >= PATIENCE:
            raise FloatingPointError(
                f"none of the last {self._barren} updates had a finite gradient, and none was applied; look "
                f"at the data, the learning rate and the precision."
            )
        if self.config.nonfinite == "raise" and self.update.scaler is None and new > 0:
            raise FloatingPointError(
                f"the gradient of {new} of the updates up to window {self.position.windows} was not finite; "
                f"none of them was applied. Look at the data and the learning rate, or go on without such "
                f"updates with nonfinite='skip'."
            )

    def _next_stop(self) -> int:
        """The next step at which the host has something to do."""
        step, config = self.position.step, self.config
        periods = [config.logging_steps, config.save_steps, self._snapshot_steps]
        periods += [callback.every for callback in self.callbacks.values()]
        return min([self.total, *((step // period + 1) * period for period in periods if period)])

    def _at_stop(self) -> None:
        step = self.position.step
        if step % self.config.logging_steps == 0:
            self._log()
        for callback in self.callbacks.values():
            if callback.every and step % callback.every == 0:
                callback.on_step_end(self)
        if self._snapshot_steps and step % self._snapshot_steps == 0 and self.accelerator.is_main_process:
            save_snapshot(self.output_dir / "averages", self.ema.averages, step)
        if self.config.save_steps and step % self.config.save_steps == 0:
            self.save()

    def _finish(self) -> None:
        if self.position.logged[1] < self.position.samples:
            self._log()
        if self.config.save_steps and self.saved_at != self.position.step:
            self.save()
        for callback in self.callbacks.values():
            callback.on_train_end(self)

    # ---- what the host writes

    def log(self, row: Mapping[str, Any], shown: Mapping[str, Any] | None = None) -> None:
        """Write a row at this step, to `log.jsonl`, the trackers, the progress and the callbacks.

        Args:
            row: numbers, in dictionaries and lists, that are the same in every run of these settings.
            shown: further ones that only the progress display is given, such as times.
        """
        self.records.write(LOG, {"step": self.position.step, **row})
        self.trackers.log(row, self.position.step)
        self.progress.show({"step": self.position.step, **row, **(shown or {})})
        self.logged.update(dict.fromkeys(row))
        for callback in self.callbacks.values():
            callback.on_log(self, row)

    def _log(self) -> None:
        row, times = losses(self), timing(self, self._seconds)
        self.position = replace(self.position, logged=(self.position.step, self.position.samples))
        self.records.write(TIMING, {"step": self.position.step, **times})
        self.log(row, times)
        self._seconds = 0.0

    def save(self) -> Path:
        """Write a checkpoint of this step, verify it, and drop the oldest beyond `save_total_limit`."""
        path = state.save(self)
        self.saved_at = self.position.step
        for callback in self.callbacks.values():
            callback.on_save(self, path)
        return path

    def save_pretrained(
        self,
        path: str | Path,
        *,
        weights: Weights | None = None,
        pipeline: Any = None,
        dtype: torch.dtype | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save what was trained as diffusers, transformers and peft load it; see `saving.save_pretrained`.

        Args:
            path: a folder that is new, empty, or an earlier result.
            weights: "ema" or "live"; None is the average where there is one.
            pipeline: a diffusers pipeline that the models belong to, to save whole.
            dtype: of the saved weights; None keeps theirs.
            card: further facts for the model card.
        """
        which = chosen(weights, self.update.averages)
        averaged = self.ema.averages.weights() if which == "ema" else None
        settings = self.config.table()
        facts = {"steps": self.step, "seed": self.config.seed, "weights": which, "settings": settings}
        with evaluated(self.update.optimizer, self.parameters) if averaged is None else nullcontext():
            if self.accelerator.is_main_process:
                facts |= card or {}
                save_pretrained(
                    self.components, path, weights=averaged, pipeline=pipeline, card=facts, dtype=dtype
                )
        self.accelerator.wait_for_everyone()
        return Path(path)

    # ---- looking

    @property
    def step(self) -> int:
        """Updates applied, read from the device."""
        return int(self.update.applied)

    @property
    def ema(self) -> Twin:
        """The averaged weights: `ema.model` is called like the model."""
        if self.update.averages is None:
            raise ValueError("there are no averages; ask for them with TrainConfig(ema=EMA(0.999)).")
        if self._twin is None:
            self._twin = Twin.of(self.model, self.components, self.update.averages)
        return self._twin

    def using(self, weights: Weights | None = None) -> AbstractContextManager[Models]:
        """The model with these weights, to be called without disturbing the run.

        Inside, `trainer.codec` belongs to it, modules are in evaluation mode, there are no gradients, and
        torch's generators come back as they were.
        """
        return using(self, weights)

    def evaluate(self, dataset: Any = None, *, weights: Weights | None = None) -> dict[str, Any]:
        """The mean loss over a dataset, its metrics, and the loss by noise level.

        The noise and times of a sample are the same in every call, so that two calls can be compared.

        Args:
            dataset: None is `eval_dataset`.
            weights: "ema" or "live"; None is the average where there is one.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("there is no dataset to evaluate on: give one here, or as eval_dataset.")
        with self.using(weights) as model:
            return evaluate(self, model, self._loader(dataset, shuffle=False))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run, as a context."""
        return autocast_of(self.precision, self.accelerator)

    def __repr__(self) -> str:
        return summary(self)

    # ---- parts

    def _compute_loss(self, batch: Mapping[str, Any], rng: Rng) -> LossTerms | Tensor:
        return self.compute_loss(self.model, batch, rng)

    def _loader(self, dataset: Any, shuffle: bool = True) -> Loader:
        return loader_of(dataset, self.config, self.accelerator, shuffle)

    @property
    def _snapshot_steps(self) -> int | None:
        return None if self.config.ema is None else self.config.ema.snapshot_steps

    def _micros(self) -> Generator[Micro]:
        at = self.position
        return self.loader.stream(at.epoch, at.micro, self.config.num_epochs)  # pyright: ignore[reportReturnType]

    def _unsynchronised(self, module: nn.Module, on: bool) -> AbstractContextManager[Any]:
        several = self.accelerator.num_processes > 1
        return self.accelerator.no_sync(module) if on and several else nullcontext()

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return self.accelerator.reduce(value.clone(), "sum")  # pyright: ignore[reportReturnType]
