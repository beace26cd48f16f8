"""An adapter added into the weights of a model for good, and the bits of before back."""

from collections.abc import Callable, Mapping
from typing import final
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from gendiff._checks import working_dtype
from gendiff.attention.table import unwrapped
from gendiff.lora.adapter import Adapter
from gendiff.lora.weights import weight_of, weights_of

# What was added into a model and not undone, in its order. Neither is kept alive by it: what nobody can undo
# any more is not in the way of what was merged before.
_MERGES: "WeakKeyDictionary[nn.Module, list[ref[Merged]]]" = WeakKeyDictionary()


@final
class Merged:
    """An adapter in the weights of a model; see `merge`. As a context manager it is undone at the end.

    Attributes:
        model: the network.
        layers: the names of the layers whose weights were changed.
        undone: whether the weights are those of before.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.layers, self.undone = model, tuple(weights), False
        self._weights = dict(weights)
        self._saved: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of the copies that `undo` puts back."""
        return sum(saved.numel() * saved.element_size() for saved in self._saved.values())

    def undo(self) -> None:
        """Put the weights back as they were, to the bit, whatever happened to them since.

        Raises:
            RuntimeError: where something was merged after this and has not been undone: that comes first.
        """
        if self.undone:
            return
        held = [one for one in (weak() for weak in _MERGES[self.model]) if one and not one.undone]
        if held[-1] is not self:
            raise RuntimeError(
                "another adapter was merged after this one, and lies on its weights: undo that one first."
            )
        self.put_back()
        _MERGES[self.model] = [ref(one) for one in held[:-1]]

    def put_back(self) -> None:
        """Write the saved weights; a weight that two layers share was saved twice."""
        with torch.no_grad():
            for name, saved in reversed(self._saved.items()):
                self._weights[name].copy_(saved)
        self.undone, self._saved = True, {}

    def __enter__(self) -> "Merged":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Merged({len(self.layers)} layers of {type(self.model).__name__}{', undone' * self.undone})"


def add(model: nn.Module, weights: Mapping[str, Tensor], change: Callable[[str], Tensor]) -> Merged:
    """Add a change to each of some weights of a model, in float32 at least, rounded once.

    Args:
        model: the network.
        weights: what is written to, by name of the layer.
        change: what is added to that of a layer.

    Raises:
        ValueError: for a sum that is beyond the numbers of the weight's dtype; nothing has changed then.
    """
    merged = Merged(model, weights)
    try:
        for name, weight in weights.items():
            with torch.no_grad():
                added = change(name)
                wide = working_dtype(weight, added)
                total = (weight.to(wide) + added.to(weight.device, wide)).to(weight.dtype)
                if not bool(total.isfinite().all()):
                    raise ValueError(
                        f"with the adapter the weight of {name} is beyond what {weight.dtype} can hold: "
                        f"merge into a model in float32 or bfloat16, or at a lower weight."
                    )
                merged._saved[name] = weight.detach().to("cpu", copy=True)
                weight.copy_(total)
    except BaseException:
        merged.put_back()
        raise
    _MERGES.setdefault(model, []).append(ref(merged))
    return merged


def merge(model: nn.Module, adapter: Adapter, weight: float | int = 1.0) -> Merged:
    r"""Add an adapter into the weights of a model, :math:`W + w\,\Delta W`, so that the model needs none.

    The sum is made in float32 at least and rounded once to the model's dtype. The weights of before stay on
    the CPU, and `undo` puts back their bits; subtracting what was added would leave what rounding took. Drop
    what is returned to keep the merged weights and free the copies; `handle.merged()` does the same within a
    block for an adapter that is on a model.

    Args:
        model: the network. Adapters that it carries stay as they are, and act beside what is added.
        adapter: see `Adapter`; `handle.adapter()` is that of a handle, which `handle.remove()` takes off.
        weight: what the change is multiplied by.

    Returns:
        What can be undone, by `undo()` or as a context manager.

    Raises:
        ValueError: for an adapter of another model, and for sums beyond the numbers of the weights' dtype;
            the model is unchanged then.

    >>> from gendiff.lora import inject, plan
    >>> net = nn.Sequential(nn.Linear(4, 6))
    >>> before = net[0].weight.clone()
    >>> with inject(net, plan(net, "*", rank=2)) as handle:
    ...     for parameter in handle.parameters():
    ...         _ = nn.init.ones_(parameter)
    ...     adapter = handle.adapter()
    >>> with merge(net, adapter, 0.5):
    ...     torch.equal(net[0].weight, before + 1)
    True
    >>> torch.equal(net[0].weight, before)
    True
    """
    root = unwrapped(model)
    every = weights_of(root)
    targets: dict[str, Tensor] = {}
    for row in adapter.plan.rows:
        found = weight_of(row, every)
        assert found is not None  # a model without layers is refused by the name of the first
        targets[row.name] = found
    return add(root, targets, lambda name: weight * adapter.delta(name, targets[name]))
