"""What an adapter costs on a GPU: LoRA and DoRA of one layer and of a network, ours beside peft's own.

Run on a CUDA device: python -m benchmarks.lora [--rounds 5] [--no-network]; with --tiny anywhere, to see
that it runs.

The layer is linear, 3072 x 3072 in bfloat16, and gets 4096 tokens; the network is SDXL's UNet at 128 x 128
with random weights, batch 1, with adapters of rank 16 in its attention. Adapters are in float32. A figure is
the least time of a forward and backward pass, to the input too, over the rounds, in which cases of a layer
take turns, and the most memory that a pass needs above what was held before it. LoRA is peft's layer in both
cases; ours has its scale as a tensor. Last, how many of an adapter's numbers a step of AdamW at 1e-6 moves.

The exit status is 1 where our DoRA needs more time or memory than peft's, or a step moves less than 99 % of
an adapter in float32; with --tiny times say nothing.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.attention import milliseconds
from benchmarks.full_size import sdxl_unet
from gendiff.lora import inject, plan

lib: Any = diffusers
ATTENTION = r".*\.attn[12]\.(to_[qkv]|to_out\.0)"  # what peft is told where we say "sdxl/attention"
KINDS = ("LoRA peft", "LoRA ours", "DoRA peft", "DoRA ours")
SLACK = 1.02  # of a time, which is never the same twice


@contextmanager
def adapted(model: nn.Module, kind: str, targets: str, pattern: str, rank: int) -> Iterator[None]:
    """The model with an adapter of a kind within a block; peft's own stays, so that it goes on a copy."""
    dora = kind.startswith("DoRA")
    if kind.endswith("ours"):
        with inject(model, plan(model, targets, rank=rank, algorithm="dora" if dora else "lora")) as handle:
            for parameter in handle.parameters():
                nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
            yield
        return
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=pattern, use_dora=dora), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            nn.init.normal_(parameter, std=0.02) if "magnitude" not in name else None
    yield


def layer(size: int, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, size)).to(device, dtype).requires_grad_(False)


def network(tiny: bool, device: str, dtype: torch.dtype) -> tuple[Any, int]:
    """SDXL's UNet, or a small one, with the side of its latents."""
    torch.manual_seed(0)
    with torch.device(device):
        made = (
            lib.UNet2DConditionModel(
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=32,
                attention_head_dim=8,
                norm_num_groups=8,
            )
            if tiny
            else sdxl_unet()
        )
    return made.to(dtype).requires_grad_(False), 16 if tiny else 128


def pass_of(model: nn.Module, tokens: int, size: int) -> Callable[[], None]:
    """A forward and backward pass of a layer."""
    first = next(model.parameters())
    x = torch.randn(1, tokens, size, device=first.device, dtype=first.dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(gradient)

    return run


def step_of(unet: Any, side: int) -> Callable[[], None]:
    """A micro step of training of a network: prediction, loss and gradients."""
    first = next(unet.parameters())

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=first.device, dtype=first.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(1, 4, side, side).requires_grad_(True),
        "timestep": torch.tensor(500, device=first.device),
        "encoder_hidden_states": noise(1, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, 1280), "time_ids": noise(1, 6)}
    target = noise(1, 4, side, side).float()

    def run() -> None:
        unet.zero_grad(set_to_none=True)
        inputs["sample"].grad = None
        nn.functional.mse_loss(unet(**inputs).sample.float(), target).backward()

    return run


def peak(run: Callable[[], None]) -> float:
    """The MiB that a pass needs above what was held before; nan where torch counts none."""
    if not torch.cuda.is_available():
        return float("nan")
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compared(cases: dict[str, Callable[[], None]], rounds: int, count: int) -> dict[str, tuple[float, float]]:
    """The least milliseconds of each case over rounds in which they take turns, and the MiB it needs."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):  # the first round warms up
        for name, run in cases.items():
            run()
            found[name].append(milliseconds(run, count))
    return {name: (min(found[name][1:]), peak(run)) for name, run in cases.items()}


def report(what: str, figures: dict[str, tuple[float, float]]) -> bool:
    """Print a table, and say whether our DoRA costs no more than peft's."""
    print(f"{what:44}{'ms':>10}{'to frozen':>11}{'MiB':>10}")
    least = figures["frozen"][0]
    for name, (time, memory) in figures.items():
        print(f"  {name:42}{time:10.3f}{time / least:11.3f}{memory:10.1f}", flush=True)
    (own, own_memory), (theirs, their_memory) = (figures[f"DoRA {whose}"] for whose in ("ours", "peft"))
    held = own <= SLACK * theirs and not own_memory > their_memory  # nan is not more
    print(f"  our DoRA {'costs no more than' if held else 'COSTS MORE THAN'} peft's")
    return held


def one_layer(rank: int, size: int, tokens: int, rounds: int, count: int, device: str, dtype: Any) -> bool:
    """Each case on a layer of its own."""
    models = {name: layer(size, device, dtype) for name in ("frozen", *KINDS)}
    with ExitStack() as kept:
        for kind in KINDS:
            kept.enter_context(adapted(models[kind], kind, "0", "0", rank))
        cases = {name: pass_of(model, tokens, size) for name, model in models.items()}
        return report(f"linear {size} x {size}, {tokens} tokens, rank {rank}", compared(cases, rounds, count))


def whole(tiny: bool, rank: int, rounds: int, count: int, device: str, dtype: Any) -> bool:
    """One network after the other, since few cards hold several with what their passes keep."""
    figures: dict[str, tuple[float, float]] = {}
    for kind in ("frozen", "LoRA ours", "DoRA ours", "DoRA peft"):
        unet, side = network(tiny, device, dtype)
        run = step_of(unet, side)
        frozen = kind == "frozen"
        with nullcontext() if frozen else adapted(unet, kind, "sdxl/attention", ATTENTION, rank):
            figures |= compared({kind: run}, rounds, count)
        del unet, run
        gc.collect()
        torch.cuda.empty_cache()
    return report(f"{'small UNet' if tiny else 'SDXL UNet'}, {side} x {side}, rank {rank}", figures)


def moved(size: int, device: str) -> bool:
    """How many of an adapter's numbers a small step moves, in float32 and in bfloat16."""
    shares: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = layer(size, device, torch.bfloat16)
        handle = inject(model, plan(model, "0", rank=16), dtype=dtype)
        for parameter in handle.parameters():
            nn.init.normal_(parameter, std=0.02)
        before = [one.detach().clone() for one in handle.parameters()]
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-6, weight_decay=0.0)
        pass_of(model, 256, size)()
        optimizer.step()
        changed = [(one != was).float().mean() for one, was in zip(handle.parameters(), before, strict=True)]
        shares[dtype] = float(torch.stack(changed).mean())
    print("one step of AdamW at 1e-6 on a bfloat16 layer moves, of an adapter in")
    for dtype, share in shares.items():
        print(f"  {str(dtype).removeprefix('torch.'):42}{100 * share:9.2f}%", flush=True)
    return shares[torch.float32] >= 0.99


def main(rounds: int, tiny: bool, networks: bool) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size, tokens, count = (64, 32, 2) if tiny else (3072, 4096, 20)
    held = True
    for rank in (16, 64):
        held &= one_layer(rank, size, tokens, rounds, count, device, dtype)
    if networks:
        held &= whole(tiny, 16, rounds, 1 if tiny else 3, device, dtype)
    held &= moved(size, device)
    return int(not held and not tiny)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-network", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.rounds, arguments.tiny, not arguments.no_network))
