"""The scales of a layer of peft as tensors, which stay where the layer is and are written in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KEEPER = "gendiff_scales"  # the module of a layer that moves its scales


class Scales(dict[str, Any]):
    """The scales of a layer by adapter, in the place of peft's own dictionary.

    What peft and diffusers set, as `set_adapters(..., 0.5)` does, is written into the tensor that is there.
    """

    def __setitem__(self, name: str, value: float | Tensor) -> None:
        held = self.get(name)
        if not isinstance(held, Tensor):
            super().__setitem__(name, value)
        elif value is not held:  # `scaling[name] *= 2` has written in place already
            with torch.no_grad():
                held.copy_(torch.as_tensor(value))

    def move(self, device: torch.device) -> None:
        """All tensors on a device, in their precision; on the meta device they would have no value."""
        for name, value in self.items():
            if isinstance(value, Tensor) and device.type != "meta":
                super().__setitem__(name, value.to(device))


class Keeper(nn.Module):
    """Moves the scales of a layer with the layer, in float32 whatever the layer is made."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Keeper":
        tensors = [value for value in self.scales.values() if isinstance(value, Tensor)]
        if tensors:
            self.scales.move(fn(tensors[0]).device)
        return super()._apply(fn, recurse)


def hold(layer: Any, adapter_name: str, value: float) -> None:
    """Make the scale of an adapter in a layer a tensor."""
    if not isinstance(layer.scaling, Scales):
        layer.scaling = Scales(layer.scaling)
        layer.add_module(KEEPER, Keeper(layer.scaling))
        kind = _reading(type(layer))
        if kind is not None:
            layer.__class__ = kind
    device = layer.get_base_layer().weight.device
    scale = torch.tensor(value, dtype=torch.float32, device="cpu" if device.type == "meta" else device)
    dict.__setitem__(layer.scaling, adapter_name, scale)


def let_go(layer: Any) -> None:
    """Make a layer peft's own again where none of its scales is a tensor."""
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, Scales) and not any(isinstance(value, Tensor) for value in scaling.values()):
        layer.scaling = dict(scaling)
        del layer._modules[KEEPER]
        if hasattr(type(layer), "OF_PEFT"):
            layer.__class__ = type(layer).OF_PEFT


def _reading(kind: type) -> Any:
    """The class of a layer that reads scales that are tensors, where peft's own does not."""
    if kind.__module__ != "peft.tuners.loha.layer":
        return None
    from gendiff.lora import hadamard

    return getattr(hadamard, kind.__name__)
