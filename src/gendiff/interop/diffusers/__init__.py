"""Any diffusers pipeline as parts: its network as a denoiser, its encoders as a codec, its scheduler as data.

One frozen row a family says all that differs between model families (`Family`); one generic backbone and one
generic codec read it. The first use of a name loads the module that holds it; diffusers itself is loaded by
whoever made the pipeline.

>>> import torch
>>> from gendiff.interop.diffusers import codec_of, denoiser_of
>>> from gendiff.testing import tiny_pipeline
>>> pipe = tiny_pipeline("sd15")
>>> denoise, codec = denoiser_of(pipe), codec_of(pipe)
>>> cond = codec.cond(["a red fox"])
>>> x_t = torch.randn(1, *codec.shape(64, 64), generator=torch.Generator().manual_seed(0))
>>> codec.decode(denoise(x_t, 0.5, cond).x0).shape
torch.Size([1, 3, 64, 64])
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gendiff.interop.diffusers.backbone import PipelineBackbone as PipelineBackbone
    from gendiff.interop.diffusers.backbone import denoiser_of as denoiser_of
    from gendiff.interop.diffusers.codec import PipelineCodec as PipelineCodec
    from gendiff.interop.diffusers.codec import codec_of as codec_of
    from gendiff.interop.diffusers.family import Clock as Clock
    from gendiff.interop.diffusers.family import Family as Family
    from gendiff.interop.diffusers.family import Images as Images
    from gendiff.interop.diffusers.family import Network as Network
    from gendiff.interop.diffusers.family import Prompt as Prompt
    from gendiff.interop.diffusers.grids import grid_of as grid_of
    from gendiff.interop.diffusers.latents import Latents as Latents
    from gendiff.interop.diffusers.registry import family_of as family_of
    from gendiff.interop.diffusers.registry import register_family as register_family
    from gendiff.interop.diffusers.scheduler import GendiffScheduler as GendiffScheduler
    from gendiff.interop.diffusers.schedules import prediction_of as prediction_of
    from gendiff.interop.diffusers.schedules import schedule_of as schedule_of

_HOME = {  # public name -> the module of this package that holds it
    "Clock": "family",
    "Family": "family",
    "GendiffScheduler": "scheduler",
    "Images": "family",
    "Latents": "latents",
    "Network": "family",
    "PipelineBackbone": "backbone",
    "PipelineCodec": "codec",
    "Prompt": "family",
    "codec_of": "codec",
    "denoiser_of": "backbone",
    "family_of": "registry",
    "grid_of": "grids",
    "prediction_of": "schedules",
    "register_family": "registry",
    "schedule_of": "schedules",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  (the block above tells it)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        from gendiff._checks import unknown

        raise AttributeError(unknown("attribute of gendiff.interop.diffusers", name, __all__))
    return getattr(import_module(f"gendiff.interop.diffusers.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
