"""Forward passes whose layers will be computed again, in a backward pass that is still to come."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Variable


@final
class Passes:
    """Counts forward passes of a model under gradient checkpointing that had no backward pass yet.

    Attributes:
        waiting: how many there are.
    """

    def __init__(self) -> None:
        self.waiting = 0

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        first = _first_tensor(output)
        if first is None or not first.requires_grad or not _checkpointing(model):
            return
        self.waiting += 1

        def begun(grad: Tensor) -> None:
            Variable._execution_engine.queue_callback(done)

        def done() -> None:
            self.waiting -= 1

        first.register_hook(begun)

    def refuse_waiting(self) -> None:
        """Raise a RuntimeError where a backward pass is still to come, and forget it."""
        waiting, self.waiting = self.waiting, 0
        if waiting:
            raise RuntimeError(
                f"{waiting} forward pass(es) with gradient checkpointing had no backward pass when the stack "
                f"was taken off; it would compute the layers again without their middlewares, and give wrong "
                f"gradients. Call backward inside the stack; without one, run it under torch.no_grad()."
            )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    )
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
