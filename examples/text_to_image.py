"""Stable Diffusion, text to image, of parts: schedule, grid, solver and guidance are chosen one by one.

    python examples/text_to_image.py                 # a tiny network of random weights: about 10 s
    python examples/text_to_image.py --model FOLDER  # a local folder of Stable Diffusion 1, 2 or XL

Expected: runs/text_to_image/00000.png and 00001.png; of the tiny network, coloured noise.
"""

from functools import partial
from pathlib import Path
from typing import Any

from local_pipeline import arguments, engine, load
from torch import Tensor
from tqdm import tqdm

from gendiff import Guider, Rng, cfg, iterate
from gendiff.data import save_images
from gendiff.interop.diffusers import codec_of, denoiser_of, grid_of
from gendiff.sampling import DPMpp


def draw(
    pipe: Any, prompts: list[str], negative: str, size: int, steps: int, scale: float, seed: int
) -> Tensor:
    """Pictures [B, 3, size, size] in [0, 1]."""
    codec, denoiser = codec_of(pipe), denoiser_of(pipe)
    cond = codec.cond(prompts, **({"size": (size, size)} if "size" in codec.accepts else {}))
    uncond = codec.cond([negative] * len(prompts), **({"size": (size, size)} if "size" in cond else {}))
    guider = Guider(denoiser, {"cond": cond, "uncond": uncond}, combine=partial(cfg, scale=scale))
    device = str(pipe.device)
    x = Rng(seed, ids=range(len(prompts)), device=device).normal(
        "start", (len(prompts), *codec.shape(size, size))
    )
    grid = grid_of(pipe, steps)
    for step in tqdm(iterate(guider, x, grid, DPMpp(order=2), engine=engine(device)), total=grid.steps):
        x = step.x
    return codec.decode(x)


if __name__ == "__main__":
    args = arguments(
        __doc__, model=None, prompt="a red fox in the snow", negative="blurry", size=64, steps=50, scale=7.5,
        out=Path("runs/text_to_image"),
    )  # fmt: skip
    pipe = load(args.model, "sd15", args.device)
    images = draw(pipe, [args.prompt] * 2, args.negative, args.size, args.steps, args.scale, args.seed)
    print(*save_images(images.float().cpu(), args.out), sep="\n")
