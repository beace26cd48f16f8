"""A tiny pipeline of every model family: real classes, its own scheduler, random weights, no download.

Widths and numbers of blocks are small. What decides how code has to talk to a family is as in the released
models: the kinds of blocks and their order, the VAE's factor of 8 and its latent statistics, the tokenizers'
lengths and padding, the time ids, the scheduler's configuration.

The builders are given the library as an untyped argument, since it accepts more than its annotations say.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gendiff._checks import unknown
from gendiff.testing.pipelines import dits, llm_dits, unets

if TYPE_CHECKING:  # importing gendiff.testing must not import diffusers, which takes seconds
    import diffusers


def tiny_pipeline(name: str, *, seed: int = 0) -> "diffusers.DiffusionPipeline":  # pyright: ignore[reportPrivateImportUsage]
    """A pipeline of a real diffusers class that runs from a prompt, offline, in a fraction of a second.

    The weights are random but a function of the seed alone; torch's generators are left as they were.

    Args:
        name: one of `TINY_PIPELINES`.
        seed: seed of the weights, an integer.

    Returns:
        The pipeline, on the CPU and in torch's default dtype, in evaluation mode, its progress bar off.
        Images are 64 by 64 pixels by default (16 by 16 of "ddpm"). The pipelines of Flux, Flux 2, Qwen-Image,
        Z-Image, Wan and Sana have a default of their own: pass `height` and `width`, multiples of 16, or
        of 32 for Sana. Sana and PixArt also need `use_resolution_binning=False`.

    Raises:
        ValueError: there is no pipeline of that name.

    >>> pipe = tiny_pipeline("sd15")
    >>> pipe("a red fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size
    (64, 64)
    """
    if name not in TINY_PIPELINES:
        raise ValueError(unknown("tiny pipeline", name, TINY_PIPELINES))
    import diffusers

    # the CPU's generator only: torch.manual_seed would re-seed those of all GPUs, which are not restored here
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        pipe = _BUILDERS[name](diffusers)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _builder(build: Callable[..., Any], *args: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda diffusers: build(diffusers, *args, **settings)


_XL_INPAINT = "StableDiffusionXLInpaintPipeline"
_BUILDERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "sd15": unets.sd15,
        "sd15-inpaint": _builder(unets.sd15, "StableDiffusionInpaintPipeline", "DDIMScheduler", channels=9),
        "pix2pix": _builder(
            unets.sd15,
            "StableDiffusionInstructPix2PixPipeline",
            "EulerAncestralDiscreteScheduler",
            channels=8,
        ),
        "sd2": unets.sd2,
        "sdxl": unets.sdxl,
        "sdxl-inpaint": _builder(unets.sdxl, _XL_INPAINT, channels=9),
        "sdxl-inpaint-4": _builder(unets.sdxl, _XL_INPAINT),
        "sdxl-refiner": _builder(unets.sdxl, "StableDiffusionXLImg2ImgPipeline", refiner=True),
        "sd3": dits.sd3,
        "flux": dits.flux,
        "wan": dits.wan,
        "pixart": dits.pixart,
        "flux2": llm_dits.flux2,
        "qwen": llm_dits.qwen,
        "z-image": llm_dits.z_image,
        "lumina2": llm_dits.lumina2,
        "sana": llm_dits.sana,
        "ddpm": unets.ddpm,
    }
)
TINY_PIPELINES: tuple[str, ...] = tuple(_BUILDERS)
