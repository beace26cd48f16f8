"""Facts beside the caption: sizes and crops, the aesthetic score, the guidance scale a network is told."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5  # what SDXL's pipelines tell the refiner unless asked otherwise

Size = Sequence[int | float] | Tensor
Scalar = float | int | Tensor


def size_facts(size: Size, rows: int, aesthetic: Scalar | None, device: torch.device) -> Tensor:
    """What an SDXL network is told of sizes, [rows, 6], or [rows, 5] where there is an aesthetic score.

    Args:
        size: (height, width) of a picture that was neither scaled nor cropped, or the six of `Folder`: height
            and width of the original, top and left of the crop, height and width of what is seen; a sequence,
            or a tensor [6] or [rows, 6]. Five are passed on where there is an aesthetic score.
        rows: number of samples.
        aesthetic: score, one or [rows]; takes the place of the last two.
        device: of the result.

    >>> size_facts((64, 32), 1, None, torch.device("cpu"))
    tensor([[64., 32.,  0.,  0., 64., 32.]])
    >>> size_facts((64, 32), 1, 6.0, torch.device("cpu"))
    tensor([[64., 32.,  0.,  0.,  6.]])
    """
    columns: list[Any] = list(size.unbind(-1)) if isinstance(size, Tensor) else list(size)
    if len(columns) == 2:
        columns = [*columns, 0, 0, *columns]
    if len(columns) == 5 and aesthetic is not None:
        columns.append(0)  # they were made here
        aesthetic = columns[4]
    if len(columns) != 6:
        given = tuple(size.shape) if isinstance(size, Tensor) else tuple(size)
        raise ValueError(
            f"size is (height, width), or the six of original, crop and target: (height, width, top, left, "
            f"height, width); got {given}."
        )
    if aesthetic is not None:
        columns = [*columns[:4], aesthetic]
    return torch.stack([per_sample(column, rows, device) for column in columns], dim=1)


def per_sample(value: Scalar, rows: int, device: torch.device) -> Tensor:
    """A number, or one value a sample, as float32 [rows]; a number is a fill, which does not synchronise."""
    if not isinstance(value, Tensor):
        return torch.full((rows,), float(value), device=device)
    value = value.to(device, torch.float32)
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, rows)):
        raise ValueError(f"give one number, or one for each of {rows} samples, got {tuple(value.shape)}.")
    return value.expand(rows)
