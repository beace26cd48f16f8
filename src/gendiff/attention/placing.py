"""A layer's processor and those it had before, so that each can be taken off in any order."""

import warnings
from typing import Any, final

from torch import nn

from gendiff.attention.facts import CHAIN
from gendiff.attention.run import layer_of, swap_in, swap_out


@final
class Placed:
    """A processor that was put on a layer, and the order of the layer's parts before."""

    def __init__(self, processor: Any, order: tuple[str, ...]) -> None:
        self.processor, self.order = processor, order


def place(module: nn.Module, processor: Any) -> Placed:
    """Put a processor on a layer, above what is there."""
    chain: list[Placed] = module.__dict__.setdefault(CHAIN, [])
    order = tuple(module._modules)
    if not chain:
        chain.append(Placed(module.processor, order))
    entry = Placed(processor, order)
    chain.append(entry)
    _set(module, processor)
    return entry


def take_off(module: nn.Module, entry: Placed) -> None:
    """Take a processor off again; what was put above it stays."""
    chain: list[Placed] = module.__dict__[CHAIN]
    if chain[-1].processor is not module.processor:
        warnings.warn(
            f"the processor {type(chain[-1].processor).__name__} was replaced by "
            f"{type(module.processor).__name__}, not by a handle, which is left in place.",
            RuntimeWarning,
            stacklevel=4,
        )
        chain.remove(entry)
    else:
        place = chain.index(entry)
        chain.remove(entry)
        if place == len(chain):
            _set(module, chain[-1].processor)
            if set(entry.order) == set(module._modules):
                module._modules.update({name: module._modules.pop(name) for name in entry.order})
        else:
            chain[place].order = entry.order
    if len(chain) == 1:
        del module.__dict__[CHAIN]


def _set(module: nn.Module, processor: Any) -> None:
    """What `set_processor` of diffusers does, without its message; a stack goes on to the new one."""
    layer = layer_of(module)
    if layer is not None:
        swap_out(module, layer)
    module._modules.pop("processor", None)
    module.__dict__.pop("processor", None)
    module.processor = processor
    if layer is not None:
        swap_in(module, layer)
