"""Callbacks: five events of a run, and the three callbacks that most runs want."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from gendiff.training.views import Weights

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


class Callback:
    """Something that a run calls at five events; the ones below do nothing.

    Callbacks are called in the order given, on every process. `every` says at which steps `on_step_end` is
    called: at its multiples, and never for None. The host looks at the device at those steps, so that a
    small number costs speed. A checkpoint of the same step is written after they have run.

    A callback that keeps something between steps returns it from `state_dict`: tensors and what JSON
    knows.
    """

    every: int | None = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Before the first update, after a checkpoint was loaded."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """After each update whose number is a multiple of `every`."""

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """After a row was logged, also one that another callback logged."""

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """After a checkpoint was written and verified."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last update and its checkpoint; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""


@final
class Validation(Callback):
    """Log the loss on a dataset, with the same noise and times every time.

    Args:
        dataset: whose samples the loss is taken of; None is the trainer's `eval_dataset`.
        every: updates between two of them, >= 1.
        weights: "ema" or "live"; None is the average where there is one.
        name: under which it is logged.
    """

    def __init__(
        self, dataset: Any = None, *, every: int, weights: Weights | None = None, name: str = "eval"
    ) -> None:
        check_every(every)
        self.dataset, self.every, self.name = dataset, every, name
        self.weights: Weights | None = weights

    def on_step_end(self, trainer: "Trainer") -> None:
        trainer.log({self.name: trainer.evaluate(self.dataset, weights=self.weights)})


@final
class EarlyStop(Callback):
    """End a run when a logged number has not become better for a while.

    Args:
        metric: its name in a row of the log, with "/" between levels: "loss", "eval/loss".
        patience: rows that have it, without an improvement, after which the run ends, >= 1.
        min_delta: how much better counts as better, >= 0.
        maximize: whether larger is better.

    >>> stop = EarlyStop("eval/loss", patience=2)
    >>> [stop.due(value) for value in (1.0, 0.5, 0.6, 0.7)]
    [False, False, False, True]
    """

    def __init__(
        self, metric: str = "eval/loss", *, patience: int, min_delta: float = 0.0, maximize: bool = False
    ) -> None:
        if patience < 1 or not min_delta >= 0:
            raise ValueError(
                f"patience is at least 1 row and min_delta is not negative, got {patience} and {min_delta}."
            )
        self.metric, self.patience, self.min_delta, self.maximize = metric, patience, min_delta, maximize
        self.best: float | None = None
        self.waited = 0

    def due(self, value: float) -> bool:
        """Whether the run should end, given the next value; one that is not finite is no improvement."""
        gain = -math.inf if not math.isfinite(value) else value if self.maximize else -value
        if self.best is None or gain > self.best + self.min_delta:
            self.best, self.waited = gain, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        value: Any = row
        for key in self.metric.split("/"):
            if not isinstance(value, Mapping) or key not in value:
                return
            value = value[key]
        if self.due(float(value)):
            trainer.stop(f"{self.metric} has not improved for {self.patience} rows")

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.best is None:
            raise ValueError(
                f"EarlyStop waited for {self.metric!r}, which no row of the log had; its rows have "
                f"{', '.join(map(repr, trainer.logged)) or 'nothing'}."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def check_every(every: int) -> None:
    """Raise a ValueError unless it is a number of updates."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"every is a whole number of updates, at least 1, got {every!r}.")
