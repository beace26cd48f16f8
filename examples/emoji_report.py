"""What `emoji.py` reports: retrieval of training prompts, held-out pairs, the picture."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from emoji_cache import moves
from emoji_data import Emoji
from emoji_metrics import Judge, retrieval
from emoji_picture import draw
from torch import Tensor

from gendiff import Denoised, Guider, Rng, Trainer, sample
from gendiff.math.grids import Grid
from gendiff.sampling import Heun

Rule = Callable[[Denoised, Denoised], Denoised]
CHUNK, SHOWN = 512, 36


def generate(trainer: Trainer, captions: Sequence[str], grid: Grid, rule: Rule, seed: int) -> Tensor:
    """A sample of each caption from the averaged weights, [N, 3, S, S] in [0, 1]."""
    made = []
    with trainer.using("ema") as denoiser:
        codec, device = trainer.codec, trainer.device
        assert codec is not None
        for first in range(0, len(captions), CHUNK):
            part = captions[first : first + CHUNK]
            cond = codec.cond(part)
            guider = Guider(denoiser, {"cond": cond, "uncond": codec.null(cond)}, rule)
            noise = Rng(seed, ids=range(first, first + len(part)), device=device)
            x = noise.normal("start", (len(part), *codec.shape(32, 32)))
            made.append(codec.decode(sample(guider, x, grid, Heun())).float())
    return torch.cat(made)


def report(trainer: Trainer, emoji: Emoji, grid: Grid, rule: Rule, out: Path, seeds: int) -> None:
    """Print the tables and write the picture."""
    device = trainer.device
    captions, real = emoji.real()
    held, held_real = emoji.held_out()
    gallery = torch.cat([real, held_real]).to(device)
    samples, places = generate(trainer, captions, grid, rule, seed=1), torch.arange(len(captions))
    shifted = moves(real, 1)[0].to(device)  # up and left by one pixel, as in training
    print(f"\ntraining prompts: the caption of a sample among {len(gallery)}, by the nearest real images")
    rows = {"samples": samples, "real, moved": shifted}
    for name, images in rows.items():
        found = retrieval(images, gallery, places.to(device))
        print(f"  {name:<12} top-1 {found[1]:6.1%}   top-5 {found[5]:6.1%}")
    print(f"  {'chance':<12} top-1 {1 / len(gallery):6.1%}   top-5 {5 / len(gallery):6.1%}")

    judge, asked = Judge(emoji), [caption for caption in held for _ in range(seeds)]
    drawn = generate(trainer, asked, grid, rule, seed=2)
    shape, colour = (right.cpu().reshape(len(held), seeds) for right in judge(drawn, asked))
    print(f"\nheld out from training, {seeds} samples each: the right shape, the right colour, both")
    shares = torch.stack([shape, colour, shape & colour]).float().mean(-1)
    for caption, column in zip(
        [*held, "all"], torch.cat([shares, shares.mean(1, keepdim=True)], 1).T, strict=True
    ):
        print(f"  {caption:<15}" + "".join(f"{share:8.0%}" for share in column.tolist()))
    right = [answer.float().mean().item() for answer in judge(held_real.to(device), held)]
    chance = [1 / len(set(names)) for names in (judge.shapes, judge.colours)]
    for name, values in {"real": right, "chance": chance}.items():
        print(f"  {name:<15}" + "".join(f"{share:8.0%}" for share in values))

    chosen = torch.linspace(0, len(captions) - 1, min(SHOWN, len(captions))).long().tolist()
    prompts = {captions[i]: (real[i], samples[i].cpu()) for i in chosen}
    columns = drawn.cpu().reshape(len(held), seeds, *drawn.shape[1:])
    pairs = {c: (held_real[i], columns[i], shape[i], colour[i]) for i, c in enumerate(held)}
    draw(out / "emoji.png", prompts, pairs)
    print(f"\npicture: {out / 'emoji.png'}")
