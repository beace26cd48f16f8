"""Is what was asked for what was drawn? Judged by real images alone: no trained network takes part."""

from collections.abc import Sequence

import torch
from emoji_cache import moves
from emoji_captions import PAIR
from emoji_data import Emoji
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

SHIFT = 2  # pixels that an image may be off by


def blurred(images: Tensor) -> Tensor:
    """Images averaged over 3×3 pixels, so that an outline that is off by half a pixel costs little."""
    return avg_pool2d(pad(images, [1] * 4, mode="replicate"), 3, stride=1)


def distances(images: Tensor, real: Tensor, white: float = 1.0) -> Tensor:
    """Mean squared differences [B, N] of images and real ones [*, C, S, S], each moved to where it fits."""
    flat = blurred(real).flatten(1)
    found = torch.full((len(images), len(flat)), torch.inf, device=images.device)
    for moved in moves(blurred(images), SHIFT, white):
        found = torch.minimum(found, torch.cdist(moved.flatten(1), flat).square() / flat.shape[1])
    return found


def retrieval(images: Tensor, real: Tensor, which: Tensor) -> dict[int, float]:
    """By k, the share of images [B, 3, S, S] whose own real image `which` [B] is among the k nearest."""
    hits = distances(images, real).topk(5, largest=False).indices == which[:, None]
    return {k: float(hits[:, :k].any(1).float().mean()) for k in (1, 5)}


def silhouettes(images: Tensor) -> Tensor:
    """What is not reached from the border over light pixels, [B, 1, S, S]: a shape, whatever its colour."""
    light = pad((images.amin(1, keepdim=True) > 0.75).float(), [1] * 4, value=1.0)
    outside = torch.zeros_like(light)
    outside[..., 0, :] = 1
    for _ in range(4 * images.shape[-1]):  # by rows and columns, since pixels of an outline touch at corners
        grown = torch.maximum(max_pool2d(outside, (3, 1), 1, (1, 0)), max_pool2d(outside, (1, 3), 1, (0, 1)))
        outside = grown * light
    return 1 - outside[..., 1:-1, 1:-1]


def lines(images: Tensor) -> Tensor:
    """Where an image is about black, [B, 1, S, S]."""
    return (images.amax(1, keepdim=True) < 0.35).float()


def fills(images: Tensor) -> Tensor:
    """The median colour [B, 3] inside the outlines; grey where there is nothing inside."""
    inside = -max_pool2d(-silhouettes(images), 3, 1, 1) > 0
    colours = images.where(inside, torch.full_like(images, torch.nan)).flatten(2)
    return colours.nanmedian(2).values.nan_to_num(0.5)


class Judge:
    """Tells the shape of an image by its silhouette and lines, and its colour by its fill.

    The references are images that were trained on, of every colour and every shape, so that real images of
    held-out pairs are judged as samples are: by other pairs.
    """

    def __init__(self, data: Emoji) -> None:
        found = {row: PAIR.fullmatch(data.kept.captions[row]) for row in data.rows}
        pairs = {row: match.groups() for row, match in found.items() if match}
        self.colours, self.shapes = zip(*pairs.values(), strict=True)
        self.real = data.kept.images[list(pairs)]

    def __call__(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(whether the shape is right [B], whether the colour is) of images of "colour shape" captions."""
        asked = [caption.split() for caption in captions]
        parts = [torch.cat([silhouettes(x), lines(x)], dim=1) for x in (images, self.real.to(images))]
        nearest = distances(*parts, white=0.0).argmin(1).tolist()
        by_colour = torch.cdist(fills(images), fills(self.real.to(images))).argmin(1).tolist()
        right = [self.shapes[i] == shape for i, (_, shape) in zip(nearest, asked, strict=True)]
        same = [self.colours[i] == colour for i, (colour, _) in zip(by_colour, asked, strict=True)]
        return torch.tensor(right), torch.tensor(same)
