"""A flow model (Stable Diffusion 3 or Flux), text to image; the shift follows from the size.

    python examples/flow.py                          # a tiny Flux of random weights: about 10 s
    python examples/flow.py --model FOLDER           # a local folder of Flux or Stable Diffusion 3

Expected: runs/flow/00000.png; of the tiny network, coloured noise.
"""

from functools import partial
from pathlib import Path
from typing import Any

from local_pipeline import arguments, engine, load
from torch import Tensor

from gendiff import Guider, Rng, cfg, sample
from gendiff.data import save_images
from gendiff.interop.diffusers import codec_of, denoiser_of, family_of, grid_of
from gendiff.sampling import Euler, Heun


def draw(pipe: Any, prompt: str, size: int, steps: int, scale: float, seed: int) -> Tensor:
    """A picture [1, 3, size, size] in [0, 1]."""
    codec, denoise, device = codec_of(pipe), denoiser_of(pipe), str(pipe.device)
    grid = grid_of(pipe, steps, size=(size, size))
    x = Rng(seed, device=device).normal("start", (1, *codec.shape(size, size)))
    if "guidance" in codec.accepts:  # distilled: the network is told the scale
        cond = codec.cond([prompt], guidance=scale)
        return codec.decode(sample(denoise, x, grid, Euler(), cond=cond, engine=engine(device)))
    cond = codec.cond([prompt])
    guider = Guider(denoise, {"cond": cond, "uncond": codec.null(cond)}, combine=partial(cfg, scale=scale))
    return codec.decode(sample(guider, x, grid, Heun(), engine=engine(device)))


if __name__ == "__main__":
    args = arguments(
        __doc__, model=None, tiny="flux", prompt="a lighthouse at dusk", size=64, steps=28, scale=3.5,
        out=Path("runs/flow"),
    )  # fmt: skip
    pipe = load(args.model, args.tiny, args.device)
    print(f"family {family_of(pipe).name}")
    image = draw(pipe, args.prompt, args.size, args.steps, args.scale, args.seed)
    print(*save_images(image.float().cpu(), args.out))
