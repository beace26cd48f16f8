"""What `lora.py` adapts: a local pipeline, else the network that `emoji.py` trained, else a tiny pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from emoji_data import Emoji
from emoji_net import Net
from emoji_text import TextCodec
from local_pipeline import load
from torch import Tensor, nn

from gendiff import Codec, Denoiser, Guider, Objective, Rng, cfg, sample
from gendiff.interop.diffusers import codec_of, denoiser_of, grid_of
from gendiff.math import Rectified, grids
from gendiff.math.grids import Grid
from gendiff.objectives import LogitNormal
from gendiff.sampling import DPMpp, Heun, Solver
from gendiff.training import load_pretrained

EMOJI = Path("runs/emoji")


@final
@dataclass(frozen=True, eq=False)
class Base:
    """A network that is made afresh from its folder, with what it takes to train and to sample it."""

    network: nn.Module
    denoiser: Denoiser
    codec: Codec
    objective: Objective | None
    grid: Grid
    solver: Solver
    size: int
    prompts: tuple[str, ...]
    emoji: bool = False

    @classmethod
    def load(cls, model: Path | None, device: str) -> "Base":
        """From the folder of a pipeline; None is the network of `emoji.py`, or a tiny random one."""
        sizes = [size for size in ("base", "small") if (EMOJI / size).exists()]
        if model is None and sizes:
            return cls.of_emoji(sizes[0], device)
        pipe = load(model, "sd15", device)
        for part in (one for one in pipe.components.values() if isinstance(one, nn.Module)):
            part.requires_grad_(False)
        return cls(
            getattr(pipe, "unet", None) or pipe.transformer,
            denoiser_of(pipe), codec_of(pipe, drop={"text": 0.1}), None,
            grid_of(pipe, 20), DPMpp(order=2), 512 if model else 64, ("a fox", "a house", "a boat", "a tree"),
        )  # fmt: skip

    @classmethod
    def of_emoji(cls, size: str, device: str) -> "Base":
        """The network that `emoji.py` trained."""
        emoji = Emoji.load(pairs=size == "small")
        denoiser = Denoiser(Net(size), Rectified(), "flow")
        load_pretrained({"model": denoiser}, EMOJI / size)
        network: Any = denoiser.requires_grad_(False).backbone
        codec = TextCodec(emoji.kept.table, drop=0.1).to(device)
        return cls(
            network.unet, denoiser.to(device), codec, Objective(times=LogitNormal()),
            grids.uniform(denoiser.schedule, 20), Heun(), 32, tuple(emoji.real()[0]), size == "base",
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, captions: Sequence[str], seed: int, scale: float = 2.5) -> Tensor:
        """A picture of each caption [N, 3, H, W] in [0, 1], on the CPU."""
        sized = "size" in getattr(self.codec, "accepts", ())
        cond = self.codec.cond(captions, **({"size": (self.size, self.size)} if sized else {}))
        branches = {"cond": cond, "uncond": self.codec.null(cond)}
        guider = Guider(self.denoiser.eval(), branches, partial(cfg, scale=scale))
        device = next(self.network.parameters()).device
        noise = Rng(seed, ids=range(len(captions)), device=device)
        x = noise.normal("start", (len(captions), *self.codec.shape(self.size, self.size)))
        return self.codec.decode(sample(guider, x, self.grid, self.solver)).float().cpu()
