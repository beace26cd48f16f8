"""The style that `lora.py` teaches where no folder is given: emoji as line drawings, without colours."""

from pathlib import Path

import torch
from emoji_data import Emoji
from torch import Tensor

from gendiff.data import save_images


def drawing(images: Tensor) -> Tensor:
    """The brightest of the three colours in all of them: lines stay, fills become paper."""
    return images.amax(-3, keepdim=True).expand_as(images)


def folder(path: Path, count: int, all_emoji: bool) -> Path:
    """A folder of captioned drawings, of so many emoji or coloured shapes; written where there is none."""
    if not path.exists():
        captions, images = Emoji.load(pairs=not all_emoji).real()
        chosen = torch.linspace(0, len(captions) - 1, min(count, len(captions))).long()
        for file, i in zip(save_images(drawing(images[chosen]), path), chosen.tolist(), strict=True):
            Path(file).with_suffix(".txt").write_text(captions[i], encoding="utf-8")
    return path


def colour(images: Tensor) -> float:
    """The distance of the three colours from each other, on average: 0 for a drawing."""
    return float((images.amax(-3) - images.amin(-3)).mean())
