"""What a network reads beside x_t, in further channels: a picture to be completed, or to be edited."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gendiff.interop.diffusers.pixels import Pixels

RAW = {"mask": ("image", "mask"), "source": ("source",), None: ()}


@final
class Beside:
    """Makes `channels`, as the pipelines do, but with the mean of the latents where those draw a sample.

    A "mask" network reads the mask, at the place nearest to each, and the latents of the picture with what is
    masked in grey; a "source" network the latents of the picture to be edited, which are not normalised.

    Args:
        pixels: the autoencoder.
        kind: which of the two; None makes nothing.
    """

    def __init__(self, pixels: Pixels, kind: str | None) -> None:
        self.pixels, self.kind = pixels, kind

    @property
    def raw(self) -> tuple[str, ...]:
        """The keys that it is made of."""
        return RAW[self.kind]

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with `channels` in place of `mask` or `source`, where they are in it."""
        encoded = dict(batch)
        if self.kind == "mask" and "mask" in batch:
            if "image" not in batch:
                raise ValueError("there is a 'mask', but no 'image' that it masks; give both.")
            encoded["channels"] = self.masked(batch["image"], encoded.pop("mask"))
        if self.kind == "source" and "source" in batch:
            pixels = self.pixels.signed(encoded.pop("source"))
            encoded["channels"] = self.pixels.mode(pixels, normalised=False)
        return encoded

    def masked(self, images: Tensor, masks: Tensor) -> Tensor:
        """Images [B, 3, H, W] with masks [B, 1, H, W], 1 where is to be painted, as [B, 1 + c, h, w]."""
        small = self.pixels.mask(masks)  # checks them
        if masks.shape[-2:] != images.shape[-2:]:
            raise ValueError(
                f"mask and image are of one size, got {tuple(masks.shape)} and {tuple(images.shape)}."
            )
        hole = (masks >= 0.5).to(masks.dtype)
        latents = self.pixels.mode(self.pixels.signed(images) * (hole < 0.5))
        small = interpolate(hole, size=small.shape[-2:]).to(latents.dtype)
        return torch.cat([small.expand(len(latents), -1, -1, -1), latents], dim=1)

    def null(self, channels: Tensor) -> Tensor:
        """The channels of no picture: zeros for one to be edited, all masked for one to be completed."""
        if self.kind == "source":
            return torch.zeros_like(channels)
        height, width = (side * self.pixels.factor for side in channels.shape[-2:])
        masks = torch.ones(1, 1, height, width, device=channels.device)
        grey = torch.full((1, 3, height, width), 0.5, device=channels.device)
        return self.masked(grey, masks).to(channels.dtype).expand_as(channels)
