"""The clip that clips nothing: the gradient that the optimizer gets, by a script's pattern and by `Update`.

`train_text_to_image_lora.py` of diffusers hands an iterator to the optimizer, which uses it up, and then to
`clip_grad_norm_`. Here it is on a tiny UNet, in one step: a few seconds on one core.

Run: python benchmarks/clipping.py [--scale 1e6]
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from torch.optim import AdamW

from gendiff.testing import tiny_pipeline
from gendiff.training import Update
from gendiff.training.names import parameters

MAX_NORM = 1.0
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the script's, as is the configuration below


def adapted() -> Any:
    unet: Any = tiny_pipeline("sd15").components["unet"]
    unet.requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
    return unet


def loss(unet: Any, scale: float) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x_t, noise, text = (torch.randn(shape, generator=draw) for shape in ((4, 4, 8, 8),) * 2 + ((4, 77, 16),))
    out = unet(x_t, torch.tensor([10, 200, 500, 900]), text, return_dict=False)[0]
    return scale * torch.nn.functional.mse_loss(out, noise)


def norms(way: str, scale: float) -> list[float]:
    """Norms of the gradient: as backward leaves it, and as the optimizer gets it."""
    unet, accelerator, seen = adapted(), Accelerator(cpu=True), list[float]()
    trained = parameters({"unet": unet})

    def look(*_: Any) -> None:
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    found = filter(lambda p: p.requires_grad, unet.parameters())  # line 563 of the script
    layers: Any = found if way == "script" else list(found)
    optimizer = AdamW(layers, fused=True)  # 591
    optimizer.register_step_pre_hook(look)
    if way == "gendiff":
        update = Update(trained, optimizer, [[1e-4]], max_norm=MAX_NORM)
        loss(unet, scale).backward()
        look()
        update()
        return seen
    unet, prepared = accelerator.prepare(unet, optimizer)  # 786
    accelerator.backward(loss(unet, scale))  # 928
    look()
    accelerator.clip_grad_norm_(layers, MAX_NORM)  # 931
    prepared.step()  # 932
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1e6, help="factor of the loss")
    scale = parser.parse_args().scale
    ways = {"script": "the script", "list": "with list(filter(...))", "gendiff": "gendiff's Update"}
    print(f"{f'norm, to be clipped at {MAX_NORM:g}':26}{'of backward':>14}{'of the step':>14}")
    for way, name in ways.items():
        print(f"{name:26}" + "".join(f"{norm:14,.1f}" for norm in norms(way, scale)))
