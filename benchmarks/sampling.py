"""Sampling at full size with random weights: the stock pipeline, our eager loop and captured steps.

Run on a CUDA device: python benchmarks/sampling.py [--models sd15 sdxl] [--steps 50]

Batch 1, classifier-free guidance, bfloat16; without text encoders and VAE. Times are the wall clock of
whole runs over the number of steps, the least of five that alternate with those of the other kinds, after a
first one. The stock pipeline and our eager loop wait for the host: their times are as much the processor's as
the card's. The run ends with exit code 1 if captured steps differ from eager ones, or take more than 2 %
longer than the graphs alone.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from full_size import full_pipeline
from torch import Tensor

from gendiff import Guider, cfg, sample
from gendiff.interop.diffusers import GendiffScheduler, codec_of, denoiser_of, grid_of
from gendiff.sampling import DDIM, Euler, Graphs

SCHEDULERS = {"sd15": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}


def timed(runs: dict[str, Callable[[], Tensor]], steps: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds a step of the fastest run of each kind, which take turns."""
    best = {name: float("inf") for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], 1000 * (time.perf_counter() - began) / steps)
    return best


def replays_alone(graphs: Graphs, x: Tensor) -> float:
    """Milliseconds of a captured step without the loop round it."""
    (program,) = graphs.programs.values()
    (graph,) = program.graphs.values()

    def one() -> Tensor:
        program.table.index.zero_()
        graph.replay()
        return x

    return timed({"one": one}, 1, repeats=50)["one"]


def bench(name: str, steps: int, channels_last: bool) -> bool:
    import diffusers

    pipe = full_pipeline(name)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)
    codec, denoiser = codec_of(pipe), denoiser_of(pipe)
    cond, uncond = codec.cond(["a red fox"]), codec.cond(["blurry"])
    guider = Guider(denoiser, {"cond": cond, "uncond": uncond}, combine=partial(cfg, scale=7.5))
    side = 8 * pipe.unet.config.sample_size
    x = torch.randn(
        1, *codec.shape(side, side), device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    call: dict[str, Any] = {"prompt_embeds": cond["text"], "negative_prompt_embeds": uncond["text"]}
    if name == "sdxl":
        call |= {
            "pooled_prompt_embeds": cond["text_pooled"],
            "negative_pooled_prompt_embeds": uncond["text_pooled"],
        }
    call |= {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "latent"}

    def stock(scheduler: Any) -> Tensor:
        pipe.scheduler = scheduler
        return pipe(**call, latents=x.bfloat16()).images

    grid, solver, graphs = grid_of(pipe, steps), DDIM() if name == "sd15" else Euler(), Graphs()
    theirs, ours = pipe.scheduler, GendiffScheduler.from_config(pipe.scheduler)
    runs: dict[str, Callable[[], Tensor]] = {
        "stock": partial(stock, theirs),
        "stock with our scheduler": partial(stock, ours),
        "eager": lambda: sample(guider, x, grid, solver),
        "captured": lambda: sample(guider, x, grid, solver, engine=graphs),
    }
    same = torch.equal(runs["eager"](), runs["captured"]())
    took = timed(runs, steps)
    took["replays alone"] = replays_alone(graphs, x)
    listed = ", ".join(f"{kind} {ms:.2f}" for kind, ms in took.items())
    ratio = took["stock"] / took["captured"]
    what = f"{name}{', channels last' if channels_last else ''}, {steps} steps, ms a step"
    print(f"{what}: {listed}; stock/captured {ratio:.2f}; same latents: {same}", flush=True)
    return same and took["captured"] <= 1.02 * took["replays alone"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SCHEDULERS), choices=list(SCHEDULERS))
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    held = [bench(name, args.steps, last) for name in args.models for last in (False, True)]
    raise SystemExit(0 if all(held) else 1)
