r"""DoRA at the cost of LoRA: the lengths of the rows without the change of the weight.

Of a row :math:`i` of :math:`W + s BA`, with the scale s, the square of the length is

.. math::
    \|W_i\|^2 + 2 s\, (W A^T)_i \cdot B_i + s^2\, B_i (A A^T) B_i^T,

which needs products with the rank of A only. Liu et al. 2024, *DoRA*, arXiv 2402.09353, equation 5.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gendiff.lora.quantised import plain_weight

AT_ONCE = 2**22  # numbers of a weight in half precision that are widened at a time: 16 MiB of float32


def install(layer: Any, adapter_name: str) -> None:
    """Have a layer of peft add DoRA as here, and begin at the lengths of its rows: it changes nothing then.

    What is put in the place of peft's goes with the adapter. The lengths are taken at each call and kept
    nowhere, so that they are those of the weight as it is, wherever it was moved and whatever was added.

    Args:
        layer: peft's, with its scale and its A and B.
        adapter_name: an adapter of it, with `use_dora`.
    """
    layer.lora_variant[adapter_name].forward = forward
    magnitude = layer.lora_magnitude_vector[adapter_name].weight
    magnitude.data = lengths(layer, adapter_name).to(magnitude.dtype).view(magnitude.shape)


def refuse_empty_rows(name: str, layer: Any) -> None:
    """Raise a ValueError where a row of the weight of a layer is zero, and has no direction.

    Args:
        name: of the layer.
        layer: without adapters.
    """
    weight = plain_weight(layer)
    if weight.is_meta:
        return
    empty = int((weight.detach().flatten(1) == 0).all(1).sum())
    if empty:
        raise ValueError(
            f"{empty} of {len(weight)} rows of the weight of {name} are zero, and dora divides by the length "
            f"of each: leave that layer out, or take lora."
        )


def lengths(layer: Any, adapter_name: str) -> Tensor:
    """The length of each row of the weight with the adapter, in float32 at least."""
    a, b = (getattr(layer, part)[adapter_name].weight for part in ("lora_A", "lora_B"))
    return row_lengths(plain_weight(layer.get_base_layer()), a, b, layer.scaling[adapter_name])


def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """The lengths of the rows of W + scale B A, of which nothing is differentiated.

    Args:
        weight: W, of a linear layer or a convolution, with a row for each output.
        a: as lora_A, with a row for each of its rank.
        b: as lora_B, with a row for each output.
        scale: of BA.

    Returns:
        [outputs] in float32 at least.

    >>> w, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    >>> torch.allclose(row_lengths(w, a, b, 0.5), (w + 0.5 * b @ a).norm(dim=1))
    True
    """
    least = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = torch.promote_types(a.dtype, least)
    device = "cpu" if weight.is_meta else weight.device.type  # of autocast, which knows no meta device
    narrowed = torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if narrowed else nullcontext():
        a, b, weight = a.to(wide).flatten(1), b.to(wide).flatten(1), weight.flatten(1)
        length, product = _measured(weight, a, wide)
        square, scaled = length.square(), scale * b
        # 2 s (W A^T) + s^2 B (A A^T), each row times that of B
        added = (torch.addmm(product, scaled, a @ a.T, beta=2) * scaled).sum(1)
        # what is less than the rounding of the sum may come out below 0
        return torch.maximum(square + added, square * torch.finfo(wide).eps).sqrt()


def _measured(weight: Tensor, a: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lengths of the rows of W, and W A^T, in a precision, to which some rows at a time are brought."""
    if weight.dtype == wide:
        return torch.linalg.vector_norm(weight, dim=1), weight @ a.T
    parts = (_measured(some.to(wide), a, wide) for some in weight.split(max(1, AT_ONCE // weight.shape[1])))
    lengths, products = zip(*parts, strict=True)
    return torch.cat(lengths), torch.cat(products)


def forward(layer: Any, *, active_adapter: str, x: Tensor, result: Tensor, **rest: Any) -> Tensor:
    r"""What peft's layer calls to add DoRA to what the layer has said so far.

    :math:`\Delta y = s B(Ax) + (m / n - 1) (Wx + s B(Ax))`, with the magnitude m, and with the lengths n as
    constants (section 4.3 of the paper).

    Args:
        layer: of peft.
        active_adapter: the adapter to be added.
        x: input, in the precision of the adapter.
        result: output of the layer, with that of the adapters before this one.
        rest: what peft's other variants take.
    """
    base = layer.get_base_layer()
    shape = (-1, *(1 for _ in base.weight.shape[2:]))  # beside the channels of an output
    lora_a, lora_b = (getattr(layer, part)[active_adapter] for part in ("lora_A", "lora_B"))
    change = lora_b(lora_a(x) * layer.scaling[active_adapter])
    plain = result
    if next(name for name in layer.active_adapters if name in layer.lora_A) != active_adapter:
        plain = base(x.to(_precision(base) or x.dtype))
    if base.bias is not None:
        plain = plain - base.bias.to(x.dtype).view(shape)
    magnitude = layer.lora_magnitude_vector[active_adapter].weight.view(-1)
    # in the precision of the magnitude, which is all that is known of it: at first the ratio is 1 exactly
    ratio = magnitude / lengths(layer, active_adapter).to(magnitude.dtype)
    return result + torch.addcmul(change, (ratio - 1).view(shape), plain + change)


def _precision(base: Any) -> torch.dtype | None:
    """What a layer takes, which peft has widened: a layer in few bits tells it by its bias, if it has one."""
    held = (one for one in (base.weight, base.bias) if one is not None)
    return next((one.dtype for one in held if one.is_floating_point()), None)
