"""The digits of `digits.py` in a training loop of one's own: every part works without the Trainer.

    python examples/own_loop.py           # two CPU cores: about 2 minutes
    python examples/own_loop.py --short   # fewer steps: about 20 s

Expected: the table, the picture (runs/digits/digits.png) and the bounds of `digits.py`.
"""

from typing import Any

import torch
from accelerate import Accelerator
from digits import OBJECTIVE, generate
from digits_data import Digits
from digits_report import arguments, report
from digits_unet import UNet
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from gendiff import Denoiser, Rng
from gendiff.codec import PixelCodec
from gendiff.math import CosineBeta
from gendiff.training import Meters


def train(
    denoiser: Denoiser, codec: PixelCodec, digits: Digits, epochs: int, seed: int
) -> list[dict[str, Any]]:
    """A plain loop; returns the losses of every epoch by noise level."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(digits.train, 128, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    rate = OneCycleLR(optimizer, 2e-3, epochs * len(loader), pct_start=0.05, cycle_momentum=False)
    accelerator, meters, rows = Accelerator(cpu=True), Meters("cpu"), []
    model, optimizer, loader, rate = accelerator.prepare(denoiser, optimizer, loader, rate)
    with tqdm(desc="training", total=epochs * len(digits.train), unit=" images") as bar:
        for epoch in range(epochs):
            for batch in loader:
                rng = Rng(seed, ids=batch["id"], epoch=epoch)  # every image has its own randomness
                x0, cond = codec.inputs(batch, rng)
                draw = OBJECTIVE.draw(denoiser.schedule, x0, rng=rng)
                terms = OBJECTIVE.score(model(draw.x_t, draw.t, cond), draw)
                accelerator.backward(terms.mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                seen = {"loss": terms.loss, "weight": terms.weight, "log_snr": terms.log_snr}
                meters.add(seen, rows=len(x0))
                bar.update(len(x0))
            rows.append({"step": (epoch + 1) * len(loader), **meters.read(len(digits.train), updates=0)})
            bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}", lr=f"{rate.get_last_lr()[0]:.1e}")
    return rows


if __name__ == "__main__":
    args, digits = arguments(__doc__), Digits.load()
    torch.manual_seed(args.seed)  # for the initial weights; all else is drawn from a Rng
    codec = PixelCodec(channels=1, classes=10, drop=0.12)
    denoiser = Denoiser(UNet(codec.classes), CosineBeta(), "v")
    rows = train(denoiser, codec, digits, epochs=8 if args.short else 40, seed=args.seed)
    labels = digits.labels[: 359 if args.short else None]
    samples = {s: generate(denoiser, codec, labels, s, args.seed) for s in (0.0, 1.0, 1.5, 3.0)}
    report(args, digits, labels, samples, rows)
