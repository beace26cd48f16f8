"""A run small enough for many: a network with dropout, data with augmentation, their trainer."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gendiff.codec import PixelCodec
from gendiff.data import sample_rng
from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta
from gendiff.training import EMA, ParamGroup, TrainConfig, Trainer, WarmupCosine


class Net(nn.Module):
    """Two convolutions that see the class, with dropout between them."""

    accepts = frozenset({"label"})

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inward, self.outward = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
            self.label, self.drop = nn.Embedding(11, 4), nn.Dropout(dropout)

    def forward(self, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen = self.label(cond["label"])[:, :, None, None] + (timestep / 1000)[:, None, None, None]
        return self.outward(self.drop(torch.tanh(self.inward(x) + seen)))


class Images:
    """Random images; with `augment`, changed by every kind of randomness that a dataset may draw from."""

    def __init__(self, size: int = 12, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.rand(size, 1, 6, 6, generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = self.pixels[i]
        if self.augment:
            image = image * (0.7 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.05 * torch.rand(()))
            image = image + 0.05 * sample_rng().uniform("light", (1, 1, 1))
        return {"image": image, "label": i % 10}


def config(folder: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "output_dir": folder,
        "per_device_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler": WarmupCosine(2),
        "param_groups": [ParamGroup("**.bias", learning_rate=2e-2, weight_decay=0.0)],
        "ema": EMA(0.8),
        "logging_steps": 4,
        "save_steps": None,
        "progress": "none",
    }
    if "num_epochs" not in settings:
        given["max_steps"] = 8
    return TrainConfig(**(given | settings))


def trainer(folder: Path, *, kind: type[Trainer] = Trainer, dropout: float = 0.0, **options: Any) -> Trainer:
    """A trainer; what is no setting of the config is an argument of the trainer."""
    parts = {"train_dataset", "eval_dataset", "callbacks", "optimizer", "objective", "accelerator"}
    arguments = {name: value for name, value in options.items() if name in parts}
    arguments.setdefault("train_dataset", Images())
    settings = {name: value for name, value in options.items() if name not in parts}
    model = Denoiser(Net(dropout), CosineBeta(), "v")
    codec = PixelCodec(1, 10, drop=0.2)
    return kind(model, codec=codec, config=config(folder, **settings), **arguments)
