"""Pixels to latents and back, by a pipeline's own autoencoder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from gendiff._checks import positive_batch
from gendiff.interop.diffusers.backbone import config_of
from gendiff.interop.diffusers.family import Family, Images
from gendiff.interop.diffusers.latents import Statistics
from gendiff.random import Randomness

LOG_VAR = (-30.0, 20.0)  # what the log variance of a posterior is clamped to, as in latent diffusion's code


@final
class Pixels(nn.Module):
    """The autoencoder of a pipeline, or none, with the normalisation of its family.

    Args:
        vae: the autoencoder; None where x0 is pixels, or the pipeline came without.
        images: the family's facts.
        channels: of x0.
        factor: pixels a place of x0, to a side.
        temporal: frames a frame of x0.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, vae: nn.Module | None, images: Images, *, channels: int, factor: int, temporal: int = 1
    ) -> None:
        super().__init__()
        self.vae, self.images = vae, images
        self.channels, self.factor, self.temporal = channels, factor, temporal
        device = None if vae is None else next(vae.parameters()).device
        for name in ("mean", "std"):
            values = None if vae is None else self._net.config.get(f"latents_{name}")
            shape = (1, -1, *[1] * (2 if images.frames == "none" else 3))
            buffer = None if values is None else torch.tensor(values, device=device).view(shape)
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def of(cls, pipe: Any, family: Family) -> "Pixels":
        """Those of a pipeline."""
        vae, latents = getattr(pipe, "vae", None), family.images.latents
        if latents is None:
            config = config_of(getattr(pipe, family.network.component))
            return cls(None, family.images, channels=config["in_channels"], factor=1)
        config = {} if vae is None else vae.config
        channels = config.get("latent_channels", config.get("z_dim", 0))
        factor = getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor
        temporal = getattr(pipe, "vae_scale_factor_temporal", 1)
        patch = latents.patch
        return cls(vae, family.images, channels=channels * patch**2, factor=factor * patch, temporal=temporal)

    @property
    def _net(self) -> Any:
        if self.vae is None:
            raise ValueError(
                "the pipeline was loaded without its autoencoder (vae), which makes latents of images and "
                "images of latents; load it, or give the batch 'x0'."
            )
        return self.vae

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """`moments`, mean and log variance of the latents of images in [0, 1]; `x0` where that is certain."""
        return self.encode_signed(self.signed(images))

    def encode_signed(self, pixels: Tensor) -> dict[str, Tensor]:
        """The same for pixels in [-1, 1]."""
        if self.images.latents is None:
            return {"x0": pixels}
        if self.images.frames != "none" and pixels.ndim == 4:
            pixels = pixels.unsqueeze(2)
        with self._precise(encoding=True) as dtype:
            encoded = self._net.encode(pixels.to(dtype))
        if not hasattr(encoded, "latent_dist"):
            return {"x0": self._normalised(encoded.latent)}
        moments = encoded.latent_dist.parameters
        return {"moments": moments.squeeze(2) if self.images.frames == "one" else moments}

    def x0(self, encoded: Mapping[str, Any], rng: Randomness | None = None) -> Tensor:
        """What `encode` gave as x0: a sample, or without an rng the mean."""
        if "x0" in encoded:
            return encoded["x0"]
        return self._normalised(posterior(encoded["moments"], rng))

    def mode(self, pixels: Tensor, *, normalised: bool = True) -> Tensor:
        """The mean of the latents of pixels in [-1, 1]."""
        encoded = self.encode_signed(pixels)
        if normalised or "x0" in encoded:
            return self.x0(encoded)
        return posterior(encoded["moments"])

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]; clips of one frame are images."""
        if self.images.latents is None:
            return (x0 * 0.5 + 0.5).clamp(0, 1)
        one = self.images.frames == "one"
        with self._precise(encoding=False) as dtype:
            z = x0.to(dtype).unsqueeze(2) if one else x0.to(dtype)
            z = self.images.latents.restore(z, self._net, Statistics(self.mean, self.std))
            images = self._net.decode(z, return_dict=False)[0]
        if images.ndim == 5 and (one or images.shape[2] == 1):
            images = images[:, :, 0]
        return (images * 0.5 + 0.5).clamp(0, 1)

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of x0 of an image or a clip, without the batch dimension."""
        if self.images.latents is not None and not self.channels:
            assert self._net is None  # which raises
        step = self.factor * self.images.multiple
        if height < 1 or width < 1 or height % step or width % step:
            raise ValueError(f"images have sides that are multiples of {step}, got {height} by {width}.")
        sides = (height // self.factor, width // self.factor)
        if self.images.frames != "many":
            if frames != 1:
                raise ValueError(f"x0 of this family has no frames, got frames={frames}.")
            return (self.channels, *sides)
        if frames < 1 or (frames - 1) % self.temporal:
            raise ValueError(f"clips have 1 + {self.temporal}·n frames, got {frames}.")
        return (self.channels, 1 + (frames - 1) // self.temporal, *sides)

    def mask(self, masks: Tensor) -> Tensor:
        """Masks of pixels as masks of places of x0: the mean over each place."""
        positive_batch(masks, "mask")
        if masks.ndim != 4 or masks.shape[1] != 1 or not masks.is_floating_point():
            raise ValueError(
                f"masks are floating-point [B, 1, H, W], got {masks.dtype} {tuple(masks.shape)}."
            )
        self.shape(*masks.shape[-2:])
        _in_range(masks, "mask")
        masks = avg_pool2d(masks, self.factor)
        return masks.unsqueeze(2) if self.images.frames == "many" else masks

    def signed(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as pixels in [-1, 1]."""
        positive_batch(images, "image")
        many = self.images.frames == "many"
        if images.ndim not in ((4, 5) if many else (4,)):
            shape = "[B, C, H, W] or [B, C, F, H, W]" if many else "[B, C, H, W]"
            raise ValueError(f"images are {shape}, got {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise TypeError(
                f"images are floating-point in [0, 1], got {images.dtype}; divide 8-bit values by 255."
            )
        height, width = images.shape[-2:]
        self.shape(height, width, images.shape[2] if images.ndim == 5 else 1)
        _in_range(images, "image")
        return 2.0 * images - 1.0

    def _normalised(self, z: Tensor) -> Tensor:
        assert self.images.latents is not None
        many = self.images.frames != "none"
        z = z.to(self._net.dtype)
        z = z.unsqueeze(2) if many and z.ndim == 4 else z
        x0 = self.images.latents.normalise(z, self._net, Statistics(self.mean, self.std))
        return x0.squeeze(2) if self.images.frames == "one" else x0

    @contextmanager
    def _precise(self, *, encoding: bool) -> Iterator[torch.dtype]:
        """The dtype to work in, the autoencoder being raised to float32 meanwhile if its family says so."""
        net, dtype = self._net, self._net.dtype
        raised = self.images.upcast and net.config.get("force_upcast") and dtype != torch.float32
        if not raised or not (encoding or dtype == torch.float16):
            yield dtype
            return
        try:
            nn.Module.to(net, torch.float32)  # 16 bits to 32 and back change no weight
            yield torch.float32
        finally:
            nn.Module.to(net, dtype)


def posterior(moments: Tensor, rng: Randomness | None = None) -> Tensor:
    r"""A sample :math:`\mu + e^{(\log\sigma^2)/2}\,\epsilon` of moments (mu, log variance), or mu."""
    mean, log_var = moments.chunk(2, dim=1)
    if rng is None:
        return mean
    noise = rng.normal("posterior", mean.shape, dtype=mean.dtype, device=mean.device)
    return mean + torch.exp(0.5 * log_var.clamp(*LOG_VAR)) * noise


def _in_range(values: Tensor, name: str) -> None:
    if values.device.type == "cpu" and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"values of {name} lie in [0, 1], got {values.min():g} … {values.max():g}; divide 8-bit values "
            f"by 255."
        )
