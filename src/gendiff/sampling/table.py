"""The plan of a linear solver on a device: its coefficients, levels and times, read by a step index there."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from gendiff.math.predictions import Coefficients, Prediction
from gendiff.math.schedules import Level, Moment, Schedule
from gendiff.sampling.stage import ANSWER, Stage

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class TableMoment(Moment):
    """A time that is read from a table, with the coefficients of predictions beside it."""

    table: "Table | None" = None

    def solution(self, prediction: Any) -> Any:
        assert self.table is not None
        return self.table.solution(prediction)


@final
class Table:
    """The stages of a run as rows of tensors.

    Args:
        memory: names of the registers that stages keep.
        capacity: rows, the most evaluations of a run.
        like: a sample, for device and dtype.
    """

    def __init__(self, memory: Sequence[str], capacity: int, like: Float[Tensor, "B *dims"]) -> None:
        self.registers = (*ANSWER, *memory)
        self.written = ("x", *memory)
        device = like.device
        self.index: Int64[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)
        self.facts: Float64[Tensor, "M 4"] = torch.zeros(capacity, 4, dtype=torch.float64, device=device)
        shape = capacity, len(self.written), len(self.registers)
        self.rows: Float[Tensor, "M outputs inputs"] = torch.zeros(shape, dtype=like.dtype, device=device)
        self.queries: Float[Tensor, "M 2"] = torch.zeros(capacity, 2, dtype=like.dtype, device=device)
        self.solutions: dict[Prediction, Float64[Tensor, "M 4"]] = {}
        self._host = Level(torch.empty(0), torch.empty(0))

    def load(self, stages: Sequence[Stage], schedule: Schedule) -> None:
        """Take the rows of a run, and go to its first."""
        points = torch.tensor([stage.at for stage in stages], dtype=torch.float64)
        self._host = Level(points[:, 1], points[:, 2])
        timesteps = schedule.timestep(points[:, 0])[:, None]
        _put(self.facts, torch.cat([points, timesteps], 1))
        _put(self.rows, torch.tensor([self._coefficients(stage) for stage in stages], dtype=torch.float64))
        queries = [[stage.query.get(name, 0.0) for name in ("x", "noise")] for stage in stages]
        _put(self.queries, torch.tensor(queries, dtype=torch.float64))
        for prediction in self.solutions:
            self._solve(prediction)
        self.index.zero_()

    def moment(self, number: float) -> TableMoment:
        """The time of the current row; `number` stands for it where the host has to choose."""
        t, alpha, sigma, timestep = self._current(self.facts).unbind()
        return TableMoment(t, Level(alpha, sigma), timestep, number, self)

    def solution(self, prediction: Prediction) -> Coefficients:
        """The coefficients of a prediction in the current row."""
        if prediction not in self.solutions:
            self.solutions[prediction] = self.facts.new_zeros(self.facts.shape)
            self._solve(prediction)
        return Coefficients(*self._current(self.solutions[prediction]).unbind())

    def query(self, stack: Float[Tensor, "inputs *batch"]) -> Float[Tensor, "*batch"]:
        """Where the network is evaluated, of samples that are noised first."""
        of_x, of_noise = self._current(self.queries).unbind()
        return torch.addcmul(of_x * stack[0], of_noise, stack[3])

    def mix(self, stack: Float[Tensor, "inputs *batch"], x0: Tensor, eps: Tensor) -> None:
        """Write the answer and what the current row makes of it into the registers; go to the next row."""
        mixer(stack.device, len(self.written))(
            stack, x0.contiguous(), eps.contiguous(), self.rows, self.index
        )
        self.index.add_(1)

    def _current(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.index.reshape(1))[0]  # table[index] would read the index

    def _solve(self, prediction: Prediction) -> None:
        _put(self.solutions[prediction], torch.stack(list(prediction.coefficients(self._host)), 1))

    def _coefficients(self, stage: Stage) -> list[list[float]]:
        combinations = (stage.x, *(stage.keep.get(name, {}) for name in self.written[1:]))
        return [[float(c.get(name, 0.0)) for name in self.registers] for c in combinations]


def _put(table: Tensor, values: Tensor) -> None:
    values = values.to(table.dtype)
    if table.device.type == "cuda":
        values = values.pin_memory()
    table[: len(values)].copy_(values, non_blocking=True)


def mix_with_torch(stack: Tensor, x0: Tensor, eps: Tensor, rows: Tensor, index: Tensor) -> None:
    """`mix` in plain torch."""
    stack[1].copy_(x0)
    stack[2].copy_(eps)
    row = rows.index_select(0, index.reshape(1))[0]
    mixed: list[Tensor] = []
    for coefficients in row:
        total = coefficients[0] * stack[0]
        for k in range(1, len(stack)):
            total = torch.addcmul(total, coefficients[k], stack[k])
        mixed.append(total)
    stack[0].copy_(mixed[0])
    for k, value in enumerate(mixed[1:], start=len(ANSWER)):
        stack[k].copy_(value)


@cache
def mixer(device: torch.device, outputs: int) -> Mix:
    """The Triton kernel where it can run, else plain torch, which needs some dozen kernels a step."""
    if device.type != "cuda":
        return mix_with_torch

    def make() -> Mix:
        from gendiff.sampling._mix_triton import MOST, mix

        probe = torch.zeros(4, 1, device=device)
        rows, index = torch.zeros(1, 1, 4, device=device), probe.new_zeros((), dtype=torch.int64)
        mix(probe, probe[1], probe[2], rows, index)
        return mix if outputs <= MOST else mix_with_torch

    return (
        tried(make, f"captured steps on {device} take some dozen kernels in place of one") or mix_with_torch
    )


def tried(make: Callable[[], Made], instead: str) -> Made | None:
    """What `make` makes, or None and a warning that says what is done instead, and why."""
    try:
        return make()
    except Exception as error:
        # Whatever stops a compiler (absent, an old GPU), the numbers are the same without it.
        warnings.warn(
            f"{instead}, because the kernel is not usable here: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
