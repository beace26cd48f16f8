"""Rules that combine what a network says under several conditions: pure functions of tensors or of pairs."""

from collections.abc import Callable
from typing import overload

from jaxtyping import Float
from torch import Tensor

from gendiff._checks import expand_right, same_shape
from gendiff.denoiser import Denoised

Scale = float | int | Float[Tensor, "..."]


@overload
def cfg(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor: ...
@overload
def cfg(cond: Denoised, uncond: Denoised, scale: Scale) -> Denoised: ...
def cfg(cond: Tensor | Denoised, uncond: Tensor | Denoised, scale: Scale) -> Tensor | Denoised:
    r"""Classifier-free guidance: :math:`\text{uncond} + \text{scale}\,(\text{cond} - \text{uncond})`.

    It is affine, so that the pairs it makes of pairs still stand for the same x_t, whatever the
    parameterisation. A scale of 1 is off, 0 is the unconditional prediction. Ho & Salimans's weight w is
    scale - 1.

    Args:
        cond: prediction under the condition, [B, *], or the pair.
        uncond: prediction without it.
        scale: guidance scale, a number or one per sample, [B].

    References:
        Ho & Salimans 2022, *Classifier-free diffusion guidance*, eq. 6.

    >>> import torch
    >>> cfg(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 7.5)
    tensor([[8.5000]])
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return cond  # exactly, which 1·(c - u) + u is not
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return _cfg(cond, uncond, scale)
    if isinstance(cond, Denoised) and isinstance(uncond, Denoised):
        return elementwise(lambda c, u: _cfg(c, u, scale), cond, uncond)
    raise TypeError(
        f"cfg combines two tensors or two Denoised, got {type(cond).__name__} and {type(uncond).__name__}."
    )


def _cfg(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor:
    same_shape(cond=cond, uncond=uncond)
    if isinstance(scale, Tensor):
        scale = expand_right(scale.to(cond.dtype), cond)
    return uncond + scale * (cond - uncond)


def elementwise(rule: Callable[..., Tensor], *parts: Denoised) -> Denoised:
    """Apply an affine rule to x0, eps and, where all networks predict the same thing, to their outputs.

    What is not combined (variance channels) is the first part's.

    >>> import torch
    >>> one = Denoised(torch.ones(1, 1), torch.zeros(1, 1))
    >>> elementwise(lambda a, b: (a + b) / 2, one, one.replace(x0=torch.zeros(1, 1))).x0
    tensor([[0.5000]])
    """
    first = parts[0]
    outs = [part.out for part in parts]
    alike = all(part.prediction == first.prediction for part in parts) and all(
        out is not None for out in outs
    )
    return first.replace(
        x0=rule(*(part.x0 for part in parts)),
        eps=rule(*(part.eps for part in parts)),
        out=rule(*outs) if alike else None,
    )
