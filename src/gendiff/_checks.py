"""Error texts and shape helpers that every floor shares: what was given, what is accepted, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from jaxtyping import Shaped
from torch import Tensor


def unknown(what: str, given: object, accepted: Iterable[object]) -> str:
    """The text of the error for a name that is not among the accepted ones, nearest name first.

    >>> unknown("prediction", "epsylon", ["x0", "epsilon", "v"])
    "unknown prediction 'epsylon'; did you mean 'epsilon'? Accepted: 'x0', 'epsilon', 'v'."
    """
    names = [str(name) for name in accepted]
    near = get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {given!r}{hint} Accepted: {', '.join(map(repr, names)) or 'none'}."


def same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names both shapes unless all tensors agree in shape."""
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but {first} has shape {tuple(reference.shape)}; "
                f"they must be equal."
            )


def positive_batch(x: Tensor, name: str) -> None:
    """Raise a ValueError for a tensor without a batch dimension or with no sample in it."""
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: it needs a batch dimension of at least one sample; "
            f"check that the dataset is not empty."
        )


def finite_on_host(x: Tensor, name: str) -> None:
    """Raise a ValueError if a CPU tensor holds NaN or infinity; CUDA is not read, which would synchronise."""
    if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"{name} holds {bad} value(s) out of {x.numel()} that are NaN or infinite; clean the batch first."
        )


def expand_right(coefficient: Shaped[Tensor, "..."], like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Append dimensions of size one to a scalar or per-sample coefficient until it broadcasts over `like`.

    >>> expand_right(torch.ones(3), torch.ones(3, 1, 8, 8)).shape
    torch.Size([3, 1, 1, 1])
    """
    if coefficient.ndim not in (0, 1) or (coefficient.ndim == 1 and len(coefficient) not in (1, len(like))):
        raise ValueError(
            f"a coefficient of shape {tuple(coefficient.shape)} does not fit samples of shape "
            f"{tuple(like.shape)}: give a scalar or one value per sample."
        )
    if coefficient.ndim == 0 and coefficient.device != like.device and coefficient.device.type == "cpu":
        return torch.full((1,) * like.ndim, coefficient.item(), dtype=coefficient.dtype, device=like.device)
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that results are computed in: the widest of the tensors, and at least float32.

    >>> working_dtype(torch.ones(1, dtype=torch.bfloat16))
    torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; one that has it costs no call of torch, which a step on a GPU would notice."""
    return x if x.dtype == dtype else x.to(dtype)
