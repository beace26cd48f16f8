"""Emoji and captions, drawn and encoded once and kept in one file, which can be carried elsewhere."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from emoji_captions import HELD, RECIPE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

TRAIN, REPAINTED, HELD_OUT, LEFT_OUT = range(4)
NEAR = 0.015  # mean absolute difference of pixels below which two images show the same


class Kept(NamedTuple):
    """Images [N, 3, S, S] in [0, 1], captions, kinds [N], and embeddings [T, 384] by caption, "" included.

    A kind is TRAIN, REPAINTED (another emoji's shape in a colour that it has not), HELD_OUT, or LEFT_OUT: to
    the eye the same as one held out, under another caption.
    """

    images: Tensor
    captions: list[str]
    kinds: Tensor
    table: dict[str, Tensor]


def kept(path: Path | None, size: int, pairs: bool) -> Kept:
    """What the file has, which is made where there is none; its default name tells how it is made."""
    recipe = hashlib.sha256(f"{size} {pairs} {NEAR} {RECIPE}".encode()).hexdigest()
    path = path or Path(f"runs/emoji/{size}px-{recipe[:12]}.safetensors")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path, size, pairs, recipe)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        facts = file.metadata() or {}
    if facts.get("recipe") != recipe:
        raise ValueError(f"{path} was made with other settings; delete it, and it is made anew.")
    captions = json.loads(facts["captions"])
    parts = tensors["tokens"].split(tensors["lengths"].tolist())
    table = dict(zip([*captions, ""], parts, strict=True))
    return Kept(tensors["images"] / 255, captions, tensors["kinds"], table)


def make(path: Path, size: int, pairs: bool, recipe: str) -> None:
    """Draw the emoji, encode their captions, and write both."""
    from emoji_encoder import encode
    from emoji_font import pictures, scaled  # these two need packages that the file makes unnecessary

    captions, painted, drawn = zip(*pictures(pairs), strict=True)
    images = torch.stack([torch.tensor(scaled(picture, size)).permute(2, 0, 1) for picture in drawn])
    kinds = torch.tensor([HELD_OUT if c in HELD else int(p) for c, p in zip(captions, painted, strict=True)])
    for held in moves(images[kinds == HELD_OUT] / 255, 1).flatten(0, 1):
        near = (images / 255 - held).abs().flatten(1).mean(1) < NEAR
        kinds[near & (kinds != HELD_OUT)] = LEFT_OUT
    tokens = list(encode([*captions, ""]).values())
    lengths = torch.tensor([len(text) for text in tokens])
    tensors = {"images": images, "kinds": kinds, "tokens": torch.cat(tokens), "lengths": lengths}
    save_file(tensors, path, {"recipe": recipe, "captions": json.dumps(captions)})


def moves(images: Tensor, by: int, white: float = 1.0) -> Tensor:
    """Images [..., H, W] moved by -by … by pixels each way, white coming in: [(2·by + 1)², ..., H, W]."""
    wide, (height, width) = pad(images, [by] * 4, value=white), images.shape[-2:]
    places = [(y, x) for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return torch.stack([wide[..., y : y + height, x : x + width] for y, x in places])
