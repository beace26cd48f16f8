"""A loss of one's own: a subclass of the Trainer in ten lines, on the digits.

    python examples/custom_loss.py    # two CPU cores: about 20 s

Expected: a bar, then the mean error on ink and on paper, of which the first has fallen further.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from digits_data import Digits
from digits_unet import UNet

from gendiff import Denoiser, LossTerms, Objective, Rng, TrainConfig, Trainer
from gendiff.codec import PixelCodec
from gendiff.math import CosineBeta
from gendiff.training import WarmupCosine, read_log


class InkMatters(Trainer):
    """An error on ink counts five times as much as one on paper."""

    objective: Objective

    def compute_loss(self, model: Denoiser, batch: Mapping[str, Any], rng: Rng) -> LossTerms:
        x0, cond = self.inputs(batch, rng)
        draw = self.objective.draw(model.schedule, x0, rng=rng)
        denoised = model(draw.x_t, draw.t, cond)
        terms = self.objective.score(denoised, draw, where=1 + 2 * (x0 + 1))  # paper is -1, ink is 1
        error, ink = (denoised.x0 - x0).square().detach(), (x0 + 1) / 2
        parts = {"ink": ink, "paper": 1 - ink}
        told = {name: (w * error).flatten(1).sum(1) / w.flatten(1).sum(1) for name, w in parts.items()}
        return LossTerms(terms.loss, t=terms.t, log_snr=terms.log_snr, metrics=told)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = TrainConfig(
        output_dir="runs/custom_loss",
        max_steps=150,
        per_device_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler=WarmupCosine(10),
        save_steps=None,
    )
    trainer = InkMatters(
        Denoiser(UNet(classes=10), CosineBeta(), "v"),
        Digits.load().train,
        codec=PixelCodec(channels=1, classes=10, drop=0.1),
        config=config,
        accelerator=Accelerator(cpu=True),
    )
    trainer.train()
    first, *_, last = (row["metrics"] for row in read_log(config.output_dir))
    for name in first:
        print(f"mean squared error on {name}: {first[name]:.3f} at first, {last[name]:.3f} at last")
