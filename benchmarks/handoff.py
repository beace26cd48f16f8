"""SDXL inpainting handed from a base to a second stage: what is left of the noise where the picture is known.

The networks of tiny pipelines are given an exact answer (the noise in x_t, of a known picture), so that all
noise that is left at the end is the pipeline's doing and not the network's. A few seconds on one core.

Run: python benchmarks/handoff.py
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from gendiff import Denoiser, Rng, iterate, sample
from gendiff.interop.diffusers import codec_of, grid_of, schedule_of
from gendiff.math.schedules import Schedule
from gendiff.sampling import Euler, Known, split
from gendiff.testing import tiny_pipeline

STEPS, CUT, SIZE = 40, 0.8, 64


def exact(schedule: Schedule, x0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
    """The noise in x_t of this picture: what a network of one picture would say."""
    alpha, sigma = schedule.level((timestep.double().reshape(-1)[:1] + 1) / 1000)
    return ((x_t - alpha * x0) / sigma).to(x_t.dtype)


def with_exact_network(name: str, x0: Tensor) -> Any:
    """A tiny pipeline whose network knows the picture."""
    pipe: Any = tiny_pipeline(name)
    schedule = schedule_of(pipe.scheduler)

    def forward(self: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (exact(schedule, x0, x[:, :4], torch.as_tensor(timestep)),)

    pipe.unet.forward = MethodType(forward, pipe.unet)
    return pipe


def picture() -> tuple[Tensor, Tensor]:
    """A picture [1, 3, H, W] in [0, 1] and a mask whose right half is to be painted."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    return Rng(0).uniform("picture", (1, 3, SIZE, SIZE)), mask


def theirs(base: str, image: Tensor, mask: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The latents that the stock pipelines hand over, and those that they end with."""
    call: dict[str, Any] = {
        "prompt": "a fox", "mask_image": mask, "num_inference_steps": STEPS, "guidance_scale": 1.0,
        "height": SIZE, "width": SIZE, "output_type": "latent",
    }  # fmt: skip
    first, second = with_exact_network(base, x0), with_exact_network("sdxl-inpaint-4", x0)
    generator = torch.Generator().manual_seed(0)
    handed = first(**call, image=image, strength=1.0, denoising_end=CUT, generator=generator).images
    return handed, second(**call, image=handed, denoising_start=CUT, generator=generator).images


def ours(image: Tensor, mask: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The same two stages: x_t at the cut, and the end."""
    pipe: Any = tiny_pipeline("sdxl-inpaint")
    schedule = schedule_of(pipe.scheduler)
    denoiser = Denoiser(lambda x, timestep, cond: exact(schedule, x0, x, timestep), schedule, "epsilon")
    known = Known(x0, keep=1 - codec_of(pipe).mask(mask))(denoiser)
    high, low = split(grid_of(pipe, STEPS), at=(1000 - round(CUT * 1000) + 1) / 1000)
    *_, last = iterate(known, Rng(1).normal("x", tuple(x0.shape)), high, Euler())
    return last.x, sample(known, last.handoff, low, Euler())


def figures() -> dict[str, tuple[float, float]]:
    """Standard deviation, where the picture is known, of what is handed over and of the end, less x0."""
    image, mask = picture()
    pipe: Any = tiny_pipeline("sdxl-inpaint")
    x0 = codec_of(pipe).latents(image).float()
    left = slice(None), slice(None), slice(None), slice(x0.shape[-1] // 2)

    def noise(handed: Tensor, end: Tensor, alpha: float = 1.0) -> tuple[float, float]:
        return float((handed / alpha - x0)[left].std()), float((end - x0)[left].std())

    found = {
        f"diffusers, {name}": noise(*theirs(name, image, mask, x0))
        for name in ("sdxl-inpaint", "sdxl-inpaint-4")
    }
    handed, end = ours(image, mask, x0)
    t = split(grid_of(pipe, STEPS), at=(1000 - round(CUT * 1000) + 1) / 1000)[0].times[-1]
    found["gendiff"] = noise(handed, end, float(schedule_of(pipe.scheduler).alpha(t)))
    return found


if __name__ == "__main__":
    print("noise where the picture is known, in units of x0")
    for name, (handed, end) in figures().items():
        print(f"{name:28} at the cut {handed:.3f}   at the end {end:.3g}")
