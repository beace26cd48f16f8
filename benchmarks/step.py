"""Microseconds and synchronisations of a scheduler step on a GPU: theirs, ours dropped in, ours captured.

Run on a CUDA device: python benchmarks/step.py [--steps 200]

A latent of 1x4x64x64 and a ready network output, so that nothing but the step is timed. "dropped in" is
`GendiffScheduler.step`; "captured" is one step of the same solver in a CUDA graph of ten, over ten. The run
ends with exit code 1 where ours waits for the device, or a step takes longer than promised.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from gendiff.interop.diffusers import GendiffScheduler

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
}
EAGER, CAPTURED = 40.0, 6.0  # microseconds, at most
INSIDE = 10  # steps in a graph


def steps_of(scheduler: Any, steps: int) -> Callable[[], None]:
    """A run of all steps, from a clean start."""
    draw = torch.Generator("cuda").manual_seed(0)
    x, out = (torch.randn(1, 4, 64, 64, device="cuda", generator=draw) for _ in range(2))

    def run() -> None:
        sample: Tensor = x
        for t in scheduler.timesteps:
            sample = scheduler.step(out, t, sample, return_dict=False)[0]

    def begin() -> None:
        scheduler.set_timesteps(steps, device="cuda")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        run()

    return begin


def microseconds(run: Callable[[], None], steps: int, repeats: int = 5) -> float:
    """Of one step: the least of several runs, less what set_timesteps takes, in wall clock."""
    run()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / steps


def synchronisations(scheduler: Any, steps: int) -> int:
    """How often a step waits for the device, over a run."""
    scheduler.set_timesteps(steps, device="cuda")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    draw = torch.Generator("cuda").manual_seed(0)
    sample, out = (torch.randn(1, 4, 64, 64, device="cuda", generator=draw) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in scheduler.timesteps:
                sample = scheduler.step(out, t, sample, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in caught)


def captured(scheduler: Any, steps: int) -> float:
    """Microseconds of a step in a graph of several, in the middle of a run; noise is drawn in the graph."""
    sample, out = (torch.randn(1, 4, 64, 64, device="cuda") for _ in range(2))
    scheduler.set_timesteps(steps, device="cuda")
    scheduler.set_begin_index(0)

    def some() -> None:
        x = sample
        for t in scheduler.timesteps[:INSIDE]:
            x = scheduler.step(out, t, x, return_dict=False)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        some()
    torch.cuda.synchronize()
    scheduler.set_timesteps(steps, device="cuda")
    scheduler.set_begin_index(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        some()
    return microseconds(lambda: [graph.replay() for _ in range(20)] and None, 20 * INSIDE)  # pyright: ignore[reportArgumentType]


def main(steps: int) -> bool:
    held = True
    print("microseconds a step, and how often a run waits for the device")
    print(f"{'':30}{'diffusers':>12}{'waits':>7}{'dropped in':>12}{'waits':>7}{'captured':>10}")
    for name, settings in NAMES.items():
        theirs = getattr(diffusers, name)(**BETAS, **settings)
        ours = GendiffScheduler.from_config(theirs.config)
        slow, fast = (microseconds(steps_of(scheduler, steps), steps) for scheduler in (theirs, ours))
        waits = synchronisations(theirs, steps), synchronisations(ours, steps)
        inside = captured(ours, steps)
        print(f"{name:30}{slow:12.0f}{waits[0]:7}{fast:12.1f}{waits[1]:7}{inside:10.2f}", flush=True)
        held &= waits[1] == 0 and fast <= EAGER and inside <= CAPTURED
    return held


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    raise SystemExit(0 if main(parser.parse_args().steps) else 1)
