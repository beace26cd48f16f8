"""A small U-Net for 8×8 images, told the noise level and the class: 0.4 million parameters.

A backbone of `gendiff.Denoiser` is any callable `(x_t, timestep, cond) -> out` that says which conditions it
`accepts`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gendiff import Condition

GROUPS, FREQUENCIES = 8, 32


class Block(nn.Module):
    """Two convolutions beside a shortcut, scaled and shifted by the embedding of noise level and class."""

    def __init__(self, channels: int, width: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, channels), nn.Conv2d(channels, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.shortcut = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts as its shortcut

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class UNet(nn.Module):
    """A block at 8×8, four blocks at 4×4, and a block at 8×8 that also sees what the first one saw.

    Args:
        classes: number of classes; one more embedding is for "no class", which `PixelCodec.null` gives.
        widths: channels at 8×8 and at 4×4, multiples of 8.
        embedding: size of the embedding of noise level and class.
    """

    accepts = frozenset({"label"})
    frequencies: Tensor

    def __init__(self, classes: int, widths: tuple[int, int] = (24, 64), embedding: int = 96) -> None:
        super().__init__()
        fine, coarse = widths
        self.register_buffer("frequencies", torch.logspace(0, 3, FREQUENCIES))
        self.level = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(classes + 1, embedding)
        self.first = nn.Conv2d(1, fine, 3, padding=1)
        self.enter = Block(fine, fine, embedding)
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.middle = nn.ModuleList(Block(coarse, coarse, embedding) for _ in range(4))
        self.up = nn.ConvTranspose2d(coarse, fine, 2, stride=2)
        self.leave = Block(2 * fine, fine, embedding)
        self.last = nn.Sequential(nn.GroupNorm(GROUPS, fine), nn.SiLU(), nn.Conv2d(fine, 1, 3, padding=1))

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        angle = timestep[:, None] / 1000 * self.frequencies
        embedding = silu(self.level(torch.cat([angle.sin(), angle.cos()], dim=1)) + self.label(cond["label"]))
        skip = self.enter(self.first(x_t), embedding)
        h = self.down(skip)
        for block in self.middle:
            h = block(h, embedding)
        return self.last(self.leave(torch.cat([self.up(h), skip], dim=1), embedding))
