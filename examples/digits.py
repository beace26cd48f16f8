"""Train a class-conditional diffusion model of handwritten digits, sample it with guidance, judge it.

    python examples/digits.py           # two CPU cores: about 2 minutes
    python examples/digits.py --short   # the same code with fewer steps: about 20 s

Expected: a table of accuracy, Fréchet distance and nearness to training images at every guidance scale,
the picture runs/digits/digits.png, and all bounds kept at scale 1.5; where not, the exit code is 1.
`own_loop.py` beside it does the same without the Trainer.
"""

from functools import partial

import torch
from accelerate import Accelerator
from digits_data import Digits
from digits_report import arguments, report
from digits_unet import UNet
from torch import Tensor
from tqdm import tqdm

from gendiff import Denoiser, Guider, Objective, Rng, TrainConfig, Trainer, cfg, iterate
from gendiff.codec import PixelCodec
from gendiff.math import Clip, CosineBeta, grids
from gendiff.objectives import LogitNormal, SoftMinSNR
from gendiff.sampling import Bounded, Heun
from gendiff.training import OneCycle, read_log

OBJECTIVE = Objective(times=LogitNormal(), weighting=SoftMinSNR(4.0))


def generate(denoiser: Denoiser, codec: PixelCodec, labels: Tensor, scale: float, seed: int) -> Tensor:
    """Images of these classes, from the same noise at every guidance scale."""
    cond = codec.cond(labels)
    guider = Guider(denoiser, {"cond": cond, "uncond": codec.null(cond)}, combine=partial(cfg, scale=scale))
    grid = grids.trailing(denoiser.schedule, 8)
    x = Rng(seed, ids=range(len(labels))).normal("start", (len(labels), *codec.shape(8, 8)))
    steps = iterate(Bounded(guider, Clip()), x, grid, Heun())
    for step in tqdm(steps, desc=f"sampling at scale {scale:g}", total=grid.steps):
        x = step.x
    return codec.decode(x)


if __name__ == "__main__":
    args, digits = arguments(__doc__), Digits.load()
    torch.manual_seed(args.seed)  # for the initial weights; all else is drawn from a Rng
    codec = PixelCodec(channels=1, classes=10, drop=0.12)
    denoiser = Denoiser(UNet(codec.classes), CosineBeta(), "v")
    config = TrainConfig(
        output_dir=args.out / "run",
        seed=args.seed,
        num_epochs=8 if args.short else 40,
        per_device_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler=OneCycle(pct_start=0.05),
        logging_steps=10,
        save_steps=None,
    )
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(
        denoiser, digits.train, codec=codec, objective=OBJECTIVE, config=config, accelerator=accelerator
    )
    print(trainer)
    trainer.train()
    labels = digits.labels[: 359 if args.short else None]
    samples = {s: generate(denoiser, codec, labels, s, args.seed) for s in (0.0, 1.0, 1.5, 3.0)}
    report(args, digits, labels, samples, read_log(config.output_dir))
