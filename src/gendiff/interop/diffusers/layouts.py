"""Layouts: how a family's network is given x_t, and how its answer becomes a grid again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], tuple[Any, Callable[[Any], Tensor]]]


def as_is(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The grid itself, [B, C, *]."""
    return x, lambda out: out


def patches(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One token for every 2 by 2 places, [B, h·w/4, 4·C], the channel changing slowest within a token.

    >>> tokens, back = patches(torch.arange(16.0).reshape(1, 1, 4, 4))
    >>> tokens[0, 0], back(tokens).flatten().equal(torch.arange(16.0))
    (tensor([0., 1., 4., 5.]), True)
    """
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(
            f"x_t is {h} by {w} places, which do not fall into patches of 2 by 2; give even sides "
            f"(`codec.shape` says which)."
        )
    tokens = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)

    def back(out: Tensor) -> Tensor:
        out = out.reshape(b, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, -1, h, w)

    return tokens, back


def places(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One token a place, [B, h·w, C].

    >>> tokens, back = places(torch.zeros(1, 3, 2, 4))
    >>> tokens.shape, back(tokens).shape
    (torch.Size([1, 8, 3]), torch.Size([1, 3, 2, 4]))
    """
    b, _, h, w = x.shape
    return x.flatten(2).transpose(1, 2), lambda out: out.transpose(1, 2).reshape(b, -1, h, w)


def frames_listed(x: Tensor) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """A list of single clips of one frame, [C, 1, h, w].

    >>> clips, back = frames_listed(torch.zeros(2, 3, 4, 4))
    >>> len(clips), clips[0].shape, back(clips).shape
    (2, torch.Size([3, 1, 4, 4]), torch.Size([2, 3, 4, 4]))
    """
    return list(x.unsqueeze(2).unbind(0)), lambda out: torch.stack(out).squeeze(2)
