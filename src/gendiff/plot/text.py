"""Text that is measured and broken into lines before it is drawn, so that it stays in its place."""

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

SPACING = 1.25  # of lines, in sizes of the font
POINTS = 72  # in an inch


def width(text: str, size: float | int) -> float:
    """Inches that a line of text takes in the user's font at a size in points."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0] / POINTS


def height(lines: int, size: float | int) -> float:
    """Inches that so many lines take."""
    return lines * size * SPACING / POINTS


def wrap(text: str, inches: float | int, size: float | int, most: int | None = None) -> list[str]:
    """Break text into lines no wider than that; what does not fit into `most` lines becomes "…".

    Lines break at spaces, and inside a word that is wider than a line.

    >>> wrap("a red fox in the snow", 0.8, 10)
    ['a red fox in', 'the snow']
    >>> wrap("a red fox in the snow", 0.8, 10, most=1)
    ['a red fox …']
    """
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if width(longer, size) <= inches:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, inches, size)
            lines += full
        lines.append(line)
    if most is not None and len(lines) > most:
        last = lines[most - 1]
        while last and width(f"{last} …", size) > inches:
            last = last[:-1].rstrip()
        lines = [*lines[: most - 1], f"{last} …".strip()]
    return lines


def _pieces(word: str, inches: float | int, size: float | int) -> list[str]:
    """A word in pieces no wider than that, of a letter at least."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and width(pieces[-1] + letter, size) > inches:
            pieces.append("")
        pieces[-1] += letter
    return pieces
