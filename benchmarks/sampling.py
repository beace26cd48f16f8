"""Sampling at full size with random weights: the stock pipeline, our eager loop and captured steps, side by side.

Run on a CUDA device: python benchmarks/sampling.py [--models sd15 sdxl] [--steps 50]

Batch 1, classifier-free guidance, bfloat16. Times are the wall clock of whole runs, the second of each kind,
over the number of steps; the text encoders and the VAE are left out. The run ends with exit code 1 if captured
steps differ from eager ones or are not as much faster as promised.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from gendiff import Denoiser, Guider, cfg, sample
from gendiff.condition import Condition
from gendiff.math import ScaledLinearBeta, grids
from gendiff.sampling import DDIM, Euler, Graphs

PROMISED = {"sd15": 4.0, "sdxl": 2.0}
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def sd15() -> Any:
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        vae=vae(), unet=unet, scheduler=scheduler, requires_safety_checker=False, **nothing
    )


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **nothing
    )


def vae() -> Any:
    """A small one with the factor of 8; it is not run."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )


MODELS: dict[str, Callable[[], Any]] = {"sd15": sd15, "sdxl": sdxl}


def timed(run: Callable[[], Tensor], steps: int, repeats: int = 3) -> tuple[float, Tensor]:
    """Milliseconds a step of the median run after a first one, and the result."""
    run()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds) / steps, result  # pyright: ignore[reportPossiblyUnboundVariable]


class Net(torch.nn.Module):
    """The pipeline's network, called as the pipeline calls it."""

    accepts = frozenset({"text", "text_pooled", "size"})

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        added = {"text_embeds": cond["text_pooled"], "time_ids": cond["size"]} if "size" in cond else None
        return self.unet(
            x, timestep, encoder_hidden_states=cond["text"], added_cond_kwargs=added, return_dict=False
        )[0]


def bench(name: str, steps: int) -> bool:
    torch.manual_seed(0)
    pipe = MODELS[name]().to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    wide, size = pipe.unet.config.cross_attention_dim, pipe.unet.config.sample_size
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    text, null, x = draw(1, 77, wide), draw(1, 77, wide), draw(1, 4, size, size)
    call: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": null}
    conds: dict[str, dict[str, Tensor]] = {"cond": {"text": text}, "uncond": {"text": null}}
    if name == "sdxl":
        pooled = draw(2, 1280)
        call |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
        ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device="cuda", dtype=torch.bfloat16)
        for i, cond in enumerate(conds.values()):
            cond |= {"text_pooled": pooled[i : i + 1], "size": ids}
    schedule = ScaledLinearBeta()
    denoiser = Denoiser(Net(pipe.unet).eval(), schedule, "epsilon")
    guider = Guider(denoiser, conds, partial(cfg, scale=7.5))
    grid = grids.leading(schedule, steps, offset=1, end=schedule.t_min)
    solver = DDIM() if name == "sd15" else Euler()

    def stock() -> Tensor:
        return pipe(
            **call, latents=x, num_inference_steps=steps, guidance_scale=7.5, output_type="latent"
        ).images

    graphs = Graphs()
    start = x.float()
    theirs, _ = timed(stock, steps)
    eager, latents = timed(lambda: sample(guider, start, grid, solver), steps)
    began = time.perf_counter()
    sample(guider, start, grid, solver, engine=graphs)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    graph, captured = timed(lambda: sample(guider, start, grid, solver, engine=graphs), steps)
    same, ratio = torch.equal(latents, captured), theirs / graph
    print(
        f"{name:6} {steps} steps  stock {theirs:7.2f} ms/step  eager {eager:7.2f}  captured {graph:7.2f}  "
        f"x{ratio:.2f} (promised {PROMISED[name]})  first captured run {first:.2f} s  "
        f"same latents: {same}  largest difference {float((latents - captured).abs().max()):.1e}",
        flush=True,
    )
    return same and ratio >= PROMISED[name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    held = [bench(name, args.steps) for name in args.models]
    raise SystemExit(0 if all(held) else 1)
