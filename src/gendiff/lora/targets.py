"""The layers of a model that can carry an adapter, and sets of them."""

from dataclasses import dataclass, field
from typing import final

from torch import nn

from gendiff.attention.selectors import Selector
from gendiff.attention.table import unwrapped
from gendiff.lora.quantised import shape_of

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
@dataclass(frozen=True, eq=False)
class Target:
    """A layer that can carry an adapter.

    Attributes:
        name: dotted name in the model.
        kind: its class.
        shape: of its weight: out, in, and for a convolution the kernel.
        depth: place among all such layers, from 0 for the first to 1 for the last.
        module: the layer, without adapters that it carries already.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: float
    module: nn.Module = field(repr=False)


def targets_of(model: nn.Module) -> list[Target]:
    """The layers of a model that can carry an adapter, in the order of its modules."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in unwrapped(model).named_modules():
        if name.startswith(inside) and inside:
            continue  # the parts of a layer that carries adapters already
        base = getattr(module, "base_layer", module)
        if isinstance(base, KINDS) and getattr(base, "groups", 1) == 1:
            found.append((name, base))
            inside = (*inside, f"{name}.") if base is not module else inside
    last = max(len(found) - 1, 1)
    return [
        Target(name, type(base).__name__, shape_of(base), i / last, base)
        for i, (name, base) in enumerate(found)
    ]


def Class(name: str) -> Selector:
    """The layers of a class, such as `Class("Conv2d")`."""
    return Selector(lambda target: target.kind == name, f"Class({name!r})")


def Width(low: int, high: int | None = None) -> Selector:
    """The layers whose smaller side of the weight, in or out, is low or more, and at most high."""
    top = float("inf") if high is None else high
    text = f"Width({low})" if high is None else f"Width({low}, {high})"
    return Selector(lambda target: low <= min(target.shape[:2]) <= top, text)
