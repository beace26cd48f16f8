"""An adapter by itself: what was planned and the numbers, on no model and in no file's naming."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from gendiff._checks import unknown
from gendiff.lora.algorithms import ALGORITHMS, delta
from gendiff.lora.plan import LoraPlan, Planned


@final
@dataclass(frozen=True, eq=False)
class Adapter:
    r"""An adapter by itself, of no model and no file's naming.

    What a handle gives, a file says, algebra takes and makes, and `inject` puts on a model.

    Attributes:
        plan: the layers, with rank, lora_alpha and algorithm of each.
        tensors: the parts of each layer: lora_A and lora_B, and of the other algorithms theirs.
        metadata: words of a file that go with it.

    Raises:
        ValueError: for layers, parts or shapes that are not those of the plan, and for numbers that are not
            finite.
    """

    plan: LoraPlan
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        planned = [row.name for row in self.plan.rows]
        if set(self.tensors) != set(planned):
            odd = sorted(set(self.tensors) ^ set(planned))
            raise ValueError(f"the plan and the tensors are of other layers: {_few(odd)}.")
        for row in self.plan.rows:
            _check(row, self.tensors[row.name])

    def __len__(self) -> int:
        return len(self.plan)

    def delta(self, layer: str, weight: Tensor | None = None) -> Tensor:
        """What it adds to the weight of a layer, in float32 at least and in its shape.

        Args:
            layer: its name.
            weight: of the layer, of which DoRA and OFT depend.

        Raises:
            KeyError: for a layer that it has not.
            ValueError: where the weight is needed and not given.
        """
        if layer not in self.tensors:
            raise KeyError(unknown("layer of the adapter", layer, self.tensors))
        return delta(self.plan[layer], self.tensors[layer], weight)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """The same on a device, in a precision."""
        moved = {
            name: {part: tensor.to(device=device, dtype=dtype) for part, tensor in parts.items()}
            for name, parts in self.tensors.items()
        }
        return replace(self, tensors=moved)


def _check(row: Planned, parts: Mapping[str, Tensor]) -> None:
    expected = ALGORITHMS[row.algorithm].shapes(row)
    if set(parts) != set(expected):
        raise ValueError(
            f"{row.algorithm} of {row.name} has the parts {_few(expected)}, got {_few(sorted(parts))}."
        )
    for part, shape in expected.items():
        tensor = parts[part]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{part} of {row.name} is of shape {shape} at rank {row.rank} and a weight of {row.shape}, "
                f"got {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{part} of {row.name} holds {tensor.dtype}; weights are floating point.")
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{part} of {row.name} has numbers that are not finite.")


def _few(names: Iterable[str], shown: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more
