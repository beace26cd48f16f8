"""The denoising loop on latents by hand: a solver is asked where, a network says what, the solver is told.

    python examples/latent_loop.py                 # a tiny network of random weights: a few seconds
    python examples/latent_loop.py --model FOLDER  # a local folder of Stable Diffusion

Expected: runs/latent_loop/00000.png, and the same picture as `sample` gives, bit for bit.
"""

from functools import partial
from pathlib import Path

import torch
from local_pipeline import arguments, load

from gendiff import Guider, Rng, cfg, sample
from gendiff.data import save_images
from gendiff.interop.diffusers import codec_of, denoiser_of, grid_of
from gendiff.sampling import DDIM

if __name__ == "__main__":
    args = arguments(__doc__, model=None, size=64, steps=50, out=Path("runs/latent_loop"))
    pipe = load(args.model, "sd15", args.device)
    codec, denoiser, solver = codec_of(pipe), denoiser_of(pipe), DDIM()
    cond = codec.cond(["a red fox in the snow"])
    guided = Guider(denoiser, {"cond": cond, "uncond": codec.null(cond)}, combine=partial(cfg, scale=7.5))
    x = Rng(args.seed, device=args.device).normal("start", (1, *codec.shape(args.size, args.size)))

    with torch.no_grad():
        state = solver.init(x, grid_of(pipe, args.steps))
        while (query := solver.ask(state)) is not None:
            denoised = guided(query.x, query.t)
            state = solver.tell(state, denoised)
            if state.i % 10 == 0:
                print(f"step {state.i}: t = {float(query.t):.3f}, predicted x0 ± {denoised.x0.std():.3f}")

    assert torch.equal(state.x, sample(guided, x, grid_of(pipe, args.steps), solver))
    print(*save_images(codec.decode(state.x).float().cpu(), args.out))
