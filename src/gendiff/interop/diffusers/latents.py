"""How the latents of an autoencoder are brought to about unit variance, and back.

The operations are in the order in which the pipelines have them, so that results agree to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, shaped to broadcast, where the autoencoder has them."""

    mean: Tensor | None
    std: Tensor | None

    def like(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """(mean, std) like z, which may have been moved since; None unless there are both."""
        if self.mean is None or self.std is None:
            return None
        return self.mean.to(z), self.std.to(z)


Map = Callable[[Tensor, Any, Statistics], Tensor]


@final
@dataclass(frozen=True)
class Latents:
    """A normalisation: `normalise(z, vae, statistics) -> x0` and its inverse, `restore(x0, vae, statistics)`.

    Args:
        normalise: from what the autoencoder encodes to.
        restore: to what it decodes from.
        patch: side in latents of the square that becomes one place of x0; 1 where none does.
    """

    normalise: Map
    restore: Map
    patch: int = 1


def _scaled(z: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor")
    if (known := statistics.like(z)) is not None:
        mean, std = known
        return (z - mean) * scale / std
    return z * scale if shift is None else (z - shift) * scale


def _unscaled(x0: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor")
    if (known := statistics.like(x0)) is not None:
        mean, std = known
        return x0 * std / scale + mean
    return x0 / scale if shift is None else x0 / scale + shift


def _standardised(z: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    mean, std = _known(z, vae, statistics)
    return (z - mean) * (1.0 / std)


def _unstandardised(x0: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    mean, std = _known(x0, vae, statistics)
    return x0 / (1.0 / std) + mean


def _known(z: Tensor, vae: Any, statistics: Statistics) -> tuple[Tensor, Tensor]:
    known = statistics.like(z)
    if known is None:
        raise ValueError(
            f"{type(vae).__name__} has no latents_mean and latents_std in its configuration, by which the "
            f"latents of this family are normalised; load the autoencoder that belongs to the pipeline."
        )
    return known


def patched(z: Tensor) -> Tensor:
    """[B, C, h, w] with the squares of 2 by 2 as channels: [B, 4·C, h/2, w/2].

    >>> patched(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten()
    tensor([0., 1., 2., 3.])
    """
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(b, 4 * c, h // 2, w // 2)


def unpatched(x: Tensor) -> Tensor:
    """The inverse of `patched`."""
    b, c, h, w = x.shape
    x = x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(b, c // 4, 2 * h, 2 * w)


def _batch_norm(z: Tensor, vae: Any) -> tuple[Tensor, Tensor]:
    mean, variance = (v.view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
    return mean.to(z.dtype), torch.sqrt(variance + vae.config.batch_norm_eps).to(z.dtype)


def _normed(z: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    z = patched(z)
    mean, std = _batch_norm(z, vae)
    return (z - mean) / std


def _unnormed(x0: Tensor, vae: Any, statistics: Statistics) -> Tensor:
    mean, std = _batch_norm(x0, vae)
    return unpatched(x0 * std + mean)


SCALE_SHIFT = Latents(_scaled, _unscaled)
"""By `scaling_factor`, and `shift_factor` or channel statistics where the configuration has them."""
MEAN_STD = Latents(_standardised, _unstandardised)
"""By the statistics of each channel."""
PATCH_NORM = Latents(_normed, _unnormed, patch=2)
"""Squares of 2 by 2 as channels, normalised by the running statistics of the autoencoder's batch norm."""
