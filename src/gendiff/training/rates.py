"""Learning rates of a run: the curves by name, or any scheduler of torch, tabulated before the run begins."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, final

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gendiff._checks import unknown
from gendiff.training.curves import Constant as Constant
from gendiff.training.curves import Linear as Linear
from gendiff.training.curves import OneCycle as OneCycle
from gendiff.training.curves import Polynomial as Polynomial
from gendiff.training.curves import Rates as Rates
from gendiff.training.curves import WarmupCosine as WarmupCosine
from gendiff.training.curves import check_call

Factory: TypeAlias = Callable[[Any], LRScheduler]


@final
@dataclass(frozen=True)
class FromTorch(Rates):
    """Any torch scheduler, tabulated: made for a dummy optimizer and stepped once for every update.

    The dummy is an SGD whose parameter groups have the learning rates of the run. What counts epochs in torch
    counts updates here: give `StepLR` its `step_size` in updates.

    Args:
        factory: `factory(optimizer) -> LRScheduler`.

    Raises:
        ValueError: from a table, for a scheduler that waits for a metric, changes anything but the learning
            rate, or ends before the run.

    >>> halving = FromTorch(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5))
    >>> halving.table(1.0, 5)
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    factory: Factory

    def __post_init__(self) -> None:
        if isinstance(self.factory, LRScheduler) or not callable(self.factory):
            raise TypeError(
                f"FromTorch takes a function of an optimizer that makes the scheduler, got "
                f"{type(self.factory).__name__}; write FromTorch(lambda optimizer: StepLR(optimizer, 100))."
            )

    def rate(self, learning_rate: float | int, step: int, total: int) -> float:
        check_call(learning_rate, step, total)
        return self.table(learning_rate, total)[min(step, total - 1)]

    def tables(self, learning_rates: Sequence[float | int], total: int) -> list[list[float]]:
        for peak in learning_rates:
            check_call(peak, 0, total)
        groups = [{"params": [torch.zeros(1)], "lr": float(peak)} for peak in learning_rates]
        optimizer = torch.optim.SGD(groups, lr=max(learning_rates))  # some factories read the default
        before = _settings(optimizer)
        scheduler = self._made(optimizer)
        rows = []
        for step in range(total):
            rows.append([float(group["lr"]) for group in optimizer.param_groups])
            self._check_row(rows[-1], before, _settings(optimizer), step)
            if step < total - 1:
                optimizer.step()  # there is no gradient: it does nothing, but a scheduler expects it
                try:
                    scheduler.step()
                except ValueError as error:
                    raise ValueError(
                        f"{type(scheduler).__name__} does not go beyond update {step} of {total} ({error}); "
                        f"give it as many steps as the run has updates."
                    ) from error
        return [list(column) for column in zip(*rows, strict=True)]

    def _made(self, optimizer: Any) -> LRScheduler:
        scheduler = self.factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau waits for a metric, so that its rates cannot be known before the run; use "
                "a schedule of the update, such as 'cosine', or the EarlyStop callback."
            )
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"the factory returns a torch LRScheduler, got {type(scheduler).__name__}; this one returned "
                f"none for the optimizer that it was given."
            )
        if scheduler.optimizer is not optimizer:
            raise ValueError(
                "the factory made a scheduler for an optimizer of its own; use the one it is given: "
                "lambda optimizer: StepLR(optimizer, 100)."
            )
        return scheduler

    @staticmethod
    def _check_row(row: list[float], before: list[dict], now: list[dict], step: int) -> None:
        for rate in row:
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"the torch scheduler gives update {step} the learning rate {rate}.")
        changed = sorted(
            {key for old, new in zip(before, now, strict=True) for key in old if old[key] != new[key]}
        )
        if changed:
            raise ValueError(
                f"the torch scheduler changes {', '.join(changed)} beside the learning rate, which a table "
                f"of rates cannot say; turn that off (cycle_momentum=False in OneCycleLR and CyclicLR)."
            )


NAMES: Mapping[str, type[Rates]] = MappingProxyType(
    {
        "constant": Constant,
        "linear": Linear,
        "cosine": WarmupCosine,
        "polynomial": Polynomial,
        "one_cycle": OneCycle,
    }
)


def rates_of(rates: Rates | str | Factory, **settings: Any) -> Rates:
    """Learning rates by name, as they are, or from a factory of a torch scheduler.

    Args:
        rates: `constant`, `linear`, `cosine`, `polynomial` or `one_cycle`; a `Rates`; or a function of an
            optimizer that makes a torch scheduler.
        settings: arguments of the one named.

    Raises:
        ValueError: for an unknown name; the error lists the known ones.
        TypeError: for anything else, and for settings beside something that has its own.

    >>> rates_of("cosine", warmup=100)
    WarmupCosine(warmup=100, total=None, min_lr=0.0)
    """
    if isinstance(rates, str):
        if rates not in NAMES:
            hint = f"Any other schedule of torch or diffusers: {FromTorch.__name__}(factory)."
            raise ValueError(f"{unknown('learning-rate schedule', rates, NAMES)} {hint}")
        return NAMES[rates](**settings)
    if settings:
        raise TypeError(f"{', '.join(settings)}: settings go with a schedule by name, got {rates!r}.")
    if isinstance(rates, Rates):
        return rates
    return FromTorch(rates)


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    own = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return [{key: group[key] for key in own} for group in optimizer.param_groups]
