"""Train a class-conditional diffusion model of handwritten digits, sample it with guidance, judge it.

    python examples/digits.py           # two CPU cores: about 2 minutes
    python examples/digits.py --short   # the same code with fewer steps: about 20 s

Expected: a table of accuracy, Fréchet distance and nearness to training images at every guidance scale,
the picture runs/digits/digits.png, and all bounds kept at scale 1.5; where not, the exit code is 1.
"""

from functools import partial

import torch
from accelerate import Accelerator
from digits_data import Digits
from digits_report import arguments, report
from digits_unet import UNet
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from gendiff import Denoiser, Guider, Objective, Rng, cfg, iterate
from gendiff.codec import PixelCodec
from gendiff.math import Clip, CosineBeta, grids
from gendiff.objectives import LogitNormal, SoftMinSNR
from gendiff.sampling import Bounded, Heun


def train(denoiser: Denoiser, codec: PixelCodec, digits: Digits, epochs: int, seed: int) -> Tensor:
    """A plain training loop; returns log-SNR and loss of every sample it saw, [2, N]."""
    objective = Objective(times=LogitNormal(), weighting=SoftMinSNR(4.0))
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(digits, 128, shuffle=True, drop_last=True, generator=order)
    optimizer = torch.optim.AdamW(denoiser.parameters())
    rate = OneCycleLR(optimizer, 2e-3, epochs * len(loader), pct_start=0.05, cycle_momentum=False)
    accelerator, seen = Accelerator(cpu=True), []
    model, optimizer, loader, rate = accelerator.prepare(denoiser, optimizer, loader, rate)
    with tqdm(desc="training", total=epochs * len(loader) * 128, unit=" images") as bar:
        for epoch in range(epochs):
            for batch in loader:
                rng = Rng(seed, ids=batch["id"], epoch=epoch)  # every image has its own randomness
                x0, cond = codec.inputs(batch, rng)
                draw = objective.draw(denoiser.schedule, x0, rng=rng)
                terms = objective.score(model(draw.x_t, draw.t, cond), draw)
                accelerator.backward(terms.mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                seen.append(torch.stack([denoiser.schedule.log_snr(draw.t), terms.loss.detach()]))
                loss, lr = terms.loss.mean().item(), rate.get_last_lr()[0]
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update(len(x0))
    return torch.cat(seen, dim=1)


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
    seen = train(denoiser, codec, digits, epochs=8 if args.short else 40, seed=args.seed)
    labels = digits.labels[: 359 if args.short else None]
    samples = {s: generate(denoiser, codec, labels, s, args.seed) for s in (0.0, 1.0, 1.5, 3.0)}
    report(args, digits, labels, samples, seen)
