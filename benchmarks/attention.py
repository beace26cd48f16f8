"""What a stack on attention costs on a GPU: nothing changed at every layer, maps captured, images as prompts.

Run on a CUDA device: python -m benchmarks.attention [--rounds 5] [--models SDXL] [--no-compile]; with --tiny
anywhere, to see that it runs.

UNets of released sizes with random weights in bfloat16, two rows as with guidance. Stock and stacked take
turns; a figure is the least time of a forward pass over the turns. "compiled" is each block of layers
compiled by itself. The exit status is 1 where one is dearer than promised: 1.01 compiled and 1.03 eager for
middlewares that change nothing at every layer, 1.15 for maps of the 5 layers of 16 x 16 tokens of Stable
Diffusion 1.5. Of SDXL the maps are those of its 50 layers of 32 x 32 tokens, for which nothing is promised.
For the image prompt "stock" is diffusers' own processors.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import diffusers
import torch

from benchmarks.full_size import sdxl_unet
from gendiff.attention import Capture, IPAdapter, Kind, Middleware, match, sites, stack

lib: Any = diffusers
PROMISED = {"eager": 1.03, "compiled": 1.01, "maps": 1.15}
TEXT, IMAGE_TOKENS, EMBED = 77, 4, 1024


class NoOp(Middleware):
    """A hook at every layer that changes nothing."""

    def on_qkv(self, site: Any, context: Any, q: Any, k: Any, v: Any) -> Any:
        return q, k, v


def networks(names: list[str]) -> dict[str, tuple[Any, int]]:
    """Networks with the side of their latents."""
    if names == ["tiny"]:
        small = lib.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        return {"tiny": (small, 16)}
    made = {
        "SD1.5": (lambda: lib.UNet2DConditionModel(cross_attention_dim=768, sample_size=64), 64),
        "SDXL": (sdxl_unet, 128),
    }
    return {name: (make(), side) for name, (make, side) in made.items() if name in names}


def call(unet: Any, side: int, device: str, dtype: torch.dtype, **added: Any) -> Callable[[], Any]:
    """A forward pass with its inputs."""
    draw = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": noise(2, 4, side, side),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": noise(2, TEXT, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": noise(2, 1280), "time_ids": noise(2, 6), **added}
    if added:
        inputs["added_cond_kwargs"] = added
    return lambda: unet(**inputs).sample


def milliseconds(run: Callable[[], Any], count: int) -> float:
    """The least of some passes, each by itself: a host that others use too is slow for seconds at a time."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    least = float("inf")
    for _ in range(count):
        wait()
        began = time.perf_counter()
        run()
        wait()
        least = min(least, time.perf_counter() - began)
    return 1e3 * least


def ratio(
    run: Callable[[], Any],
    changed: Callable[[], AbstractContextManager[Any]],
    rounds: int,
    count: int,
    other: Callable[[], Any] | None = None,
) -> tuple[float, float]:
    """The least milliseconds of a pass, and of the same, or of another, with a change; they take turns."""
    found: list[list[float]] = [[], []]
    turns = ((run, nullcontext), (other or run, changed))
    for _ in range(rounds + 1):  # the first round warms up
        for times, (one, context) in zip(found, turns, strict=True):
            with context():
                one()
                times.append(milliseconds(one, count))
    return min(found[0][1:]), min(found[1][1:])


def added(unet: Any, middleware: Middleware, on: Any = None) -> Callable[[], AbstractContextManager[Any]]:
    """A stack with one middleware."""

    def begin() -> AbstractContextManager[Any]:
        with ExitStack() as kept:
            kept.enter_context(stack(unet)).add(middleware, on=on)
            return kept.pop_all()

    return begin


def quarter(unet: Any, side: int) -> Any:
    """The cross-attention layers whose tokens are a quarter of the side's, squared."""
    blocks = len(unet.config.down_block_types)
    names = f"down_blocks.2.** | up_blocks.{blocks - 3}.**"
    return Kind.CROSS & match(names)


def image_prompt(
    name: str, unet: Any, side: int, device: str, dtype: torch.dtype, rounds: int, count: int
) -> None:
    """The same image prompt by ours and by diffusers' own processors, on two copies, which take turns."""
    embeds = torch.randn(2, 1, 1, EMBED, device=device, dtype=dtype)  # rows, images
    adapter = IPAdapter.new(unet, embeds[:, 0], tokens=IMAGE_TOKENS, scale=1.0)
    adapter.requires_grad_(False).to(device, dtype)
    state: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, rest = key.split(".", 1)
        state[part][rest] = value
    theirs = copy.deepcopy(unet)
    theirs._load_ip_adapter_weights([state])
    theirs.to(device, dtype).requires_grad_(False)
    run = call(unet, side, device, dtype)
    their = call(theirs, side, device, dtype, image_embeds=[embeds[:, 0]])
    with stack(unet) as one:
        one.add(adapter, on=Kind.CROSS)
        difference = float((run() - their()).abs().max())
        own, ours = ratio(their, nullcontext, rounds, count, run)
    report(name, f"image prompt, {difference:.0e} apart", own, ours, None)


def report(name: str, what: str, stock: float, ours: float, promised: float | None) -> bool:
    holds = promised is None or ours <= promised * stock
    limit = "" if promised is None else f"  {'holds' if holds else 'FALLS SHORT'} (at most {promised})"
    print(f"{name:8}{what:28}{stock:10.2f}{ours:10.2f}{ours / stock:8.3f}{limit}", flush=True)
    return holds


def main(rounds: int, names: list[str], compiling: bool) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count, held = (2 if names == ["tiny"] else 20), True
    print(f"{'':8}{'milliseconds a pass':28}{'stock':>10}{'stacked':>10}{'ratio':>8}")
    for name, (unet, side) in networks(names).items():
        unet.to(device, dtype).eval().requires_grad_(False)
        run, every = call(unet, side, device, dtype), len(sites(unet))
        noop, chosen = added(unet, NoOp()), quarter(unet, side)
        times = ratio(run, noop, rounds, count)
        held &= report(name, f"no-op, {every} sites, eager", *times, PROMISED["eager"])
        maps = added(unet, Capture(), chosen)
        what = f"maps of {len(sites(unet).on(chosen))} sites, eager"
        promised = PROMISED["maps"] if side // 4 == 16 else None
        held &= report(name, what, *ratio(run, maps, rounds, count), promised)
        image_prompt(name, unet, side, device, dtype, rounds, count)
        if compiling:
            held &= compiled(name, unet, run, noop, rounds, count)
    return int(not held)


def compiled(name: str, unet: Any, run: Any, noop: Any, rounds: int, count: int) -> bool:
    """Both compiled once, then taking turns."""
    unet.compile_repeated_blocks()
    try:
        torch._dynamo.config.cache_size_limit = 64
        return report(name, "no-op, compiled", *ratio(run, noop, rounds, count), PROMISED["compiled"])
    finally:
        for module in unet.modules():
            module._compiled_call_impl = None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="+", default=["SD1.5", "SDXL"])
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    with torch.no_grad():
        names = ["tiny"] if arguments.tiny else arguments.models
        sys.exit(main(arguments.rounds, names, not arguments.no_compile))
