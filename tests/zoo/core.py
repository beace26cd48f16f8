"""What an entry of the zoo is, and the deterministic tensors that inputs are made of."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tiny:
    """A tiny setting of one model class; the first of its inputs is what the model denoises."""

    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, a function of the shape and the seed."""
    return torch.randn(*shape, generator=_generator(shape, seed))


def ids(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Integers below `high`, a function of the shape and the seed."""
    return torch.randint(high, shape, generator=_generator(shape, seed))


def grid(*sizes: int, width: int | None = None) -> torch.Tensor:
    """Coordinates of the cells of a grid, last axis fastest, with zeros in front of them up to `width`."""
    cells = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes)).float()
    missing = (width or len(sizes)) - len(sizes)
    return torch.cat([torch.zeros(len(cells), missing), cells], dim=1)


def mask(length: int, *lengths: int) -> torch.Tensor:
    """A row per given length: ones, then zeros from that length on."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def _generator(shape: tuple[int, ...], seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr((shape, seed)).encode()))
