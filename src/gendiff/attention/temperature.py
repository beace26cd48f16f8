"""A temperature of attention, and how a middleware's numbers come to the device."""

from typing import Any, final

import torch
from torch import Tensor

from gendiff.attention.context import Context
from gendiff.attention.middleware import Middleware
from gendiff.attention.site import Site


@final
class Temperature(Middleware):
    r"""Attention sharper or flatter: :math:`\text{softmax}(q k^\top \cdot \text{scale} / \text{value})\,v`.

    A value of 1 is off, exactly; towards 0 each query sees its best key alone, towards infinity it sees the
    mean of all values. It acts on every query of a layer, those of text included. It is a buffer, so that a
    compiled or captured step reads its present value.

    Jin et al.'s adaptation to another image size is `value = (log(trained) / log(tokens)) ** 0.5` with the
    numbers of tokens at the size of training and at the present one.

    Args:
        value: what the scores are divided by, above 0.

    Raises:
        ValueError: for a value that is not above 0.

    References:
        Jin et al. 2023, *Training-free diffusion model adaptation for variable-sized text-to-image
        synthesis*, arXiv 2306.08645.

    >>> warm = Temperature(1.0)
    >>> warm.set(2.0)
    >>> warm.value
    tensor(2.)
    """

    def __init__(self, value: float | int) -> None:
        self.value = torch.tensor(1.0)
        self.set(value)

    def set(self, value: float | int | Tensor) -> None:
        """Write another value into the buffer; a tensor is not read by the host, and so not checked."""
        write(self.value, value, "a temperature")

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divide the queries."""
        return q / moved(self, "value", q.device), k, v


def write(buffer: Tensor, value: float | int | Tensor, what: str) -> None:
    """Write a number above 0 into a buffer in place.

    Raises:
        ValueError: for a number that is not above 0.
    """
    if isinstance(value, Tensor):
        buffer.copy_(value)
    elif value > 0:
        buffer.fill_(value)
    else:
        raise ValueError(f"{what} is above 0, got {value}.")


def moved(owner: Any, name: str, device: torch.device) -> Tensor:
    """A buffer of a middleware on the device of the layer; it moves at the first call there."""
    value = getattr(owner, name)
    if value.device != device:
        value = value.to(device)
        setattr(owner, name, value)
    return value
