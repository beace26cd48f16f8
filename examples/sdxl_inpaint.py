"""SDXL inpainting in two stages: the base paints down to t = 0.2, the refiner goes on; the rest stays exact.

    python examples/sdxl_inpaint.py                              # tiny networks of random weights: about 20 s
    python examples/sdxl_inpaint.py --base FOLDER --refiner FOLDER  # the base may have 4 or 9 channels

Expected: runs/sdxl_inpaint/00000.png, a photograph whose middle was painted anew; every pixel outside the
mask is the photograph's, and so are its latents before they are decoded.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from local_pipeline import arguments, engine, load
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import interpolate

from gendiff import Guider, Rng, cfg, iterate, sample
from gendiff.data import save_images
from gendiff.interop.diffusers import codec_of, denoiser_of, grid_of
from gendiff.sampling import DPMpp, Known, split


def guided(pipe: Any, prompt: str, **facts: Any) -> Guider:
    """A stage: the pipeline's own network, text encoders, sizes and null prompt."""
    codec = codec_of(pipe)
    cond = codec.cond([prompt], **{name: fact for name, fact in facts.items() if name in codec.facts})
    return Guider(
        denoiser_of(pipe), {"cond": cond, "uncond": codec.null(cond)}, combine=partial(cfg, scale=7.5)
    )


def paint(base: Any, refiner: Any, photo: Tensor, hole: Tensor, prompt: str, steps: int, seed: int) -> Tensor:
    """The photo [1, 3, H, W] with its hole [1, 1, H, W], where that is 1, painted anew."""
    codec, device = codec_of(base), str(base.device)
    photo, hole = photo.to(device), hole.to(device)
    facts = {"image": photo, "mask": hole, "size": tuple(photo.shape[-2:])}
    x0, keep = codec.latents(photo).float(), 1 - codec.mask(hole).ceil().float()
    known, solver, run = Known(x0, keep), DPMpp(order=2), engine(device)
    high, low = split(grid_of(base, steps), at=0.2)
    x = Rng(seed, device=device).normal("start", tuple(x0.shape))
    for step in iterate(known(guided(base, prompt, **facts)), x, high, solver, engine=run):
        handoff = step.handoff
    final = sample(known(guided(refiner, prompt, **facts)), handoff, low, solver, engine=run)
    assert torch.equal(final * keep, x0 * keep), "what is kept is not the photo's"
    return torch.where(hole > 0, codec.decode(final).float(), photo)


def example(size: int) -> tuple[Tensor, Tensor]:
    """A photograph that scikit-learn has, and a round hole in its middle."""
    photo = (
        torch.from_numpy(load_sample_image("china.jpg") / 255).float().permute(2, 0, 1)[None, :, :, 100:527]
    )
    photo = interpolate(photo, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return photo, (y.square() + x.square() < 0.25).float()[None, None]


if __name__ == "__main__":
    args = arguments(
        __doc__, base=None, refiner=None, prompt="a golden pagoda", size=128, steps=40,
        out=Path("runs/sdxl_inpaint"),
    )  # fmt: skip
    base = load(args.base, "sdxl-inpaint", args.device)
    refiner = load(args.refiner, "sdxl-refiner", args.device)
    photo, hole = example(args.size)
    image = paint(base, refiner, photo, hole, args.prompt, args.steps, args.seed)
    print(*save_images(image.cpu(), args.out))
