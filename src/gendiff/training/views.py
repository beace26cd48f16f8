"""Which weights a run is looked at with: the live ones, or their averages in a twin of the models."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import nn

from gendiff._checks import unknown
from gendiff.codec import Codec
from gendiff.training.ema import Averages
from gendiff.training.optimizer import evaluated
from gendiff.training.running import generators_kept, mode
from gendiff.training.twin import twin

if TYPE_CHECKING:
    from gendiff.training.trainer import Trainer

Models = Any  # what the user gave: a module, or modules by name
Weights = Literal["ema", "live"]


@final
@dataclass(frozen=True, eq=False)
class Twin:
    """The averaged weights in callable modules, which share everything frozen with the live ones.

    Attributes:
        model: like the trainer's model: one module, or modules by name.
        codec: like the trainer's codec.
        averages: the averages themselves.
    """

    model: Models
    codec: Codec | None
    averages: Averages

    @classmethod
    def of(cls, model: Models, components: Mapping[str, nn.Module], averages: Averages) -> "Twin":
        """The twin of a trainer's model and its components."""
        made: Any = twin(components, averages.weights())
        models = made["model"] if isinstance(model, nn.Module) else {name: made[name] for name in model}
        return cls(models, made.get("codec"), averages)


def chosen(weights: Weights | None, averages: Averages | None) -> Weights:
    """Which weights a name means; None is the average where there is one.

    >>> chosen(None, None)
    'live'
    """
    if weights is None:
        return "live" if averages is None else "ema"
    if weights not in ("ema", "live"):
        raise ValueError(unknown("weights", weights, ("ema", "live")))
    return weights


@contextmanager
def using(trainer: "Trainer", weights: Weights | None) -> Iterator[Models]:
    """The model of a trainer with some weights; afterwards the trainer is as it was."""
    live, codec = chosen(weights, trainer.update.averages) == "live", trainer.codec
    with ExitStack() as stack:
        stack.enter_context(generators_kept(trainer.device))
        stack.enter_context(torch.no_grad())
        if live:
            stack.enter_context(evaluated(trainer.update.optimizer, trainer.parameters))
            stack.enter_context(mode(trainer.components, training=False))
        stack.enter_context(trainer.autocast())
        trainer.codec = codec if live else trainer.ema.codec
        try:
            yield trainer.model if live else trainer.ema.model
        finally:
            trainer.codec = codec
