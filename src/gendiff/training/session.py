"""A run from its beginning to its end: what is set up for it, and put back however it ends."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendiff.training import state
from gendiff.training.running import checkpointing, deterministic, generators_kept, mode, wrapped
from gendiff.training.step import Step

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer


@contextmanager
def session(trainer: "Trainer", resume: str | Path | None) -> Iterator[Step]:
    """Go on from a checkpoint or begin, and give the step that the loop is to run."""
    if trainer.torn:
        raise RuntimeError(
            "the run was interrupted inside an update, so that its weights are of two steps; make the "
            "trainer anew: it goes on from its newest checkpoint."
        )
    optimizer: Any = trainer.update.optimizer
    with ExitStack() as stack:
        stack.enter_context(generators_kept(trainer.device))
        stack.enter_context(deterministic(trainer.config.deterministic))
        stack.callback(trainer.records.close)
        state.resume(trainer, resume)
        trainer.stopped = None
        stack.enter_context(mode(trainer.components, training=True))
        stack.enter_context(checkpointing(trainer.components, trainer.config.gradient_checkpointing))
        losses = stack.enter_context(wrapped(trainer.losses, trainer.accelerator))
        stack.callback(optimizer.zero_grad)  # of a window that was interrupted
        if hasattr(optimizer, "train"):  # schedule-free: the weights that it trains, not their average
            optimizer.train()
        trainer.trackers.start(trainer.position.step or None)
        stack.callback(trainer.trackers.finish)
        _show(trainer, stack)
        for callback in trainer.callbacks.values():
            callback.on_train_begin(trainer)
        yield Step(losses, trainer.update, trainer.meters, trainer.accelerator.num_processes)


def _show(trainer: "Trainer", stack: ExitStack) -> None:
    def close(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        trainer.progress.close(f"{kind.__name__}: {error}".rstrip(": ") if kind else trainer.stopped)

    trainer.progress.start(trainer.total, trainer.position.step, f"training in {trainer.output_dir.name}")
    stack.push(close)
