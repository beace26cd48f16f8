"""What the emoji are called, which of them are left out, and which pairs of colour and shape are held out."""

import re
import unicodedata

COLOURS = {  # the font's own, as in its circles and squares
    "red": 0xD22F27,
    "orange": 0xE27022,
    "yellow": 0xFCEA2B,
    "green": 0xB1CC33,
    "blue": 0x92D3F5,
    "purple": 0x8967AA,
    "brown": 0x6A462F,
    "black": 0x3F3F3F,
    "white": 0xFFFFFF,
}
SHAPES = ("heart", "circle", "square", "book", "hexagon", "flag", "jar", "diamond", "triangle", "star")
HELD = (  # every colour and every shape of these is in training, in other pairs
    *("green heart", "orange heart", "red circle", "purple circle"),
    *("brown circle", "blue square", "yellow square", "blue book"),
)
SQUARES = dict(zip(COLOURS, "🟥🟧🟨🟩🟦🟪🟫", strict=False))  # what a sequence names its colour by
JOINED = {"hexagon": "⬡\ufe0f\u200d", "flag": "🏳\ufe0f\u200d", "jar": "🫙\u200d"}
REPAINTED = "⭐🔔👕👖👗👚👜👝💼🏷📦🐟🐸👾🛑🔺🔷🍀🌵🌲🍎🐖💡🦋🍐🔑🧦🧤🪣🥾🎒🪑"  # of one main colour each
NAMED = {  # where Unicode's name is not what is seen, or newer than Python 3.11
    **{"❤": "red heart", "♥": "heart suit", "📕": "red book", "⭕": "hollow circle"},
    **{"🩵": "light blue heart", "🩶": "grey heart", "🩷": "pink heart"},
    **{"🛑": "stop sign", "👚": "blouse"},
}
LEFT_OUT = (
    re.compile(  # parts of emoji, writing, long names, and clocks that differ by a hand of three pixels
        "regional indicator|fitzpatrick|ideograph|katakana|combining|hyphen|rounded symbol|clock face"
        "|open circle arrows"
    )
)
OWN = r"\b(circle|square|heart|flag|.*agon|ellipse|rectangle|chess)\b"
CLEANED = {  # "black" and "white" are mostly Unicode's words for filled and hollow
    **{rf"^(white|black|heavy) (?!.*{OWN})": "", r"\b(large|medium|heavy) (?=.*\bcircle)": ""},
    **{r"\blarge (?=.*\bsquare)": "", r"^waving ": "", r"^medium (?=star)": "", r" (symbol|sign)$": ""},
}
RECIPE = ascii([COLOURS, HELD, SQUARES, JOINED, REPAINTED, NAMED, LEFT_OUT.pattern, CLEANED])

PAIR = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def caption(character: str) -> str:
    """What a picture is called, in lower case; empty where there is no name or none is wanted.

    >>> caption("🔴"), caption("☎"), caption("🇦")
    ('red circle', 'telephone', '')
    """
    if character in NAMED:
        return NAMED[character]
    name = unicodedata.name(character, "").lower()
    for pattern, new in CLEANED.items():
        name = re.sub(pattern, new, name)
    return "" if LEFT_OUT.search(name) else name


def bare(name: str) -> str:
    """The shape alone: a name without its colour, size and direction.

    >>> bare("large blue diamond"), bare("up-pointing red triangle")
    ('diamond', 'triangle')
    """
    return re.sub(rf"^(large |up-pointing )?({'|'.join(COLOURS)}) ", "", name)
