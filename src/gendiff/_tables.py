"""Tables as text for a terminal and as HTML for a notebook."""

import html
from collections.abc import Iterable, Sequence

Row = Sequence[str]


def as_text(head: Row, rows: Iterable[Row]) -> str:
    """Columns as wide as their widest cell, two spaces apart.

    >>> print(as_text(("name", "n"), [("a", "10")]))
    name  n
    a     10
    """
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def as_html(head: Row, rows: Iterable[Row], notes: Iterable[str] = ()) -> str:
    """The same as a table of a page, with paragraphs below.

    >>> as_html(("a",), [("<",)], ["b"])
    '<table><tr><th>a</th></tr><tr><td>&lt;</td></tr></table><p>b</p>'
    """

    def line(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th')}{body}</table>" + "".join(
        f"<p>{html.escape(note)}</p>" for note in notes
    )
