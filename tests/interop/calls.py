"""Tiny pipelines run with spies on their schedulers: what a family's own pipeline does, to compare with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gendiff.interop.diffusers.layouts import patches
from gendiff.testing import tiny_pipeline

PROMPTS = ["a red fox", "two dogs on the beach at night"]
SIZE = {"height": 64, "width": 32}
PACKED = ("flux", "flux2", "qwen")


class Pipes(dict[str, Any]):
    """The tiny pipelines, each made when it is first asked for; no test changes them."""

    def __missing__(self, name: str) -> Any:
        self[name] = tiny_pipeline(name)
        return self[name]


PIPES = Pipes()


class Step(NamedTuple):
    """What a scheduler was given in a step: the network's input as a grid, its timestep, and its output."""

    x: Tensor
    timestep: Tensor
    out: Tensor


class Run(NamedTuple):
    steps: list[Step]
    latents: Tensor
    images: Tensor


def pixels(rows: int = 2, seed: int = 0, **size: int) -> Tensor:
    height, width = size.get("height", 64), size.get("width", 32)
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def masks(rows: int = 2) -> Tensor:
    mask = torch.zeros(rows, 1, 64, 32)
    mask[:, :, 16:40, 8:21] = 1.0  # its edge lies inside a place of the latents
    return mask


def inputs(name: str, guided: bool, prompts: list[str]) -> dict[str, Any]:
    """Arguments of the call; 64 by 32 pixels."""
    rows = len(prompts)
    given: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1)}
    if name == "ddpm":
        return given | {"batch_size": rows}
    given |= {"prompt": list(prompts)}
    if name == "pix2pix":
        given |= {"image": pixels(rows), "image_guidance_scale": 1.5 if guided else 1.0}
    elif name == "sdxl-refiner":
        given |= {"image": pixels(rows), "strength": 1.0}
    else:
        given |= SIZE
    if "inpaint" in name:
        given |= {"image": pixels(rows), "mask_image": masks(rows), "strength": 1.0}
    if name == "wan":
        given |= {"num_frames": 5}
    if name in ("sana", "pixart"):
        given |= {"use_resolution_binning": False}
    if name in ("flux", "qwen"):
        given |= {"negative_prompt": [""] * rows, "true_cfg_scale": 3.0} if guided else {}
    elif name != "flux2":
        given |= {"guidance_scale": 3.0 if guided else 0.0 if name == "z-image" else 1.0}
    if name in ("flux", "flux2"):
        given |= {"guidance_scale": 2.5}
    return given


def run(name: str, pipe: Any, prompts: list[str] = PROMPTS, *, guided: bool = False, **extra: Any) -> Run:
    """Run the pipeline, once for images and once for latents."""
    steps: list[Step] = []
    results: list[Tensor] = []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    @functools.wraps(step)  # some pipelines look whether it takes a generator
    def spy(out: Tensor, t: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        steps.append(Step(grid(name, pipe, scaled), torch.as_tensor(t).clone(), grid(name, pipe, out)))
        result = step(out, t, x, *args, **kwargs)
        results.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    scheduler.step = spy
    try:
        images = output(pipe(**inputs(name, guided, prompts) | {"output_type": "pt"} | extra))
    finally:
        del scheduler.step
    if name == "ddpm":
        return Run(steps, results[-1], images)
    latents = output(pipe(**inputs(name, guided, prompts) | {"output_type": "latent"} | extra))
    return Run(steps, grid(name, pipe, latents), images.transpose(1, 2) if name == "wan" else images)


def output(result: Any) -> Tensor:
    found = result.frames if hasattr(result, "frames") else result.images
    return torch.stack(found) if isinstance(found, list) else found


def grid(name: str, pipe: Any, x: Tensor) -> Tensor:
    """Packed latents as a grid, by the pipeline's own methods."""
    if name not in PACKED:
        return x
    if name == "flux2":
        return x.transpose(1, 2).reshape(len(x), -1, 4, 2)
    return pipe._unpack_latents(x, 64, 32, pipe.vae_scale_factor).reshape(len(x), -1, 8, 4)


def _guided(scale: float) -> Callable[..., Tensor]:
    return lambda uncond, cond: uncond + scale * (cond - uncond)


def _qwen(uncond: Tensor, cond: Tensor) -> Tensor:
    (uncond, _), (cond, back) = patches(uncond), patches(cond)
    out = uncond + 3.0 * (cond - uncond)
    return back(out * (cond.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True)))


def _lumina(uncond: Tensor, cond: Tensor) -> Tensor:
    out = uncond + 3.0 * (cond - uncond)
    return out * (cond.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))


COMBINE: dict[str, Callable[..., Tensor]] = {
    "qwen": _qwen,
    "lumina2": _lumina,
    "z-image": lambda uncond, cond: cond + 3.0 * (cond - uncond),
}
SD = ("sd15", "sd15-inpaint", "sd2", "sdxl", "sdxl-inpaint", "sdxl-inpaint-4", "sdxl-refiner")
TOGETHER = (*SD, "sd3", "sana", "pixart")  # whose pipelines evaluate both branches in one batch


def combine(name: str) -> Callable[..., Tensor]:
    """How the pipeline combines the unconditional and the conditional answer."""
    return COMBINE.get(name, _guided(3.0))
