"""The notebook's block: what it says, what it draws and how often, and that it survives in a saved file."""

import base64
import io
import math
import re
import sys
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("IPython")

from gendiff.training import drawing
from gendiff.training.drawing import Curve, chart, smooth, ticks
from gendiff.training.notebook import Notebook


class Shown:
    """Stands for IPython: what each display shows now, and how often it was sent."""

    def __init__(self) -> None:
        self.html, self.plain, self.sent = list[str](), list[str](), list[int]()

    def __call__(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        at = len(self.html)
        for kept in (self.html, self.plain, self.sent):
            kept.append(None)  # type: ignore[attr-defined]
        self.sent[at] = 0

        def update(bundle: dict[str, str], *, raw: bool) -> None:
            self.html[at], self.plain[at] = bundle["text/html"], bundle["text/plain"]
            self.sent[at] += 1

        update(bundle, raw=raw)
        return SimpleNamespace(update=update)


class Text(HTMLParser):
    """The text of well-formed HTML, and its tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts, self.tags, self.open = list[str](), list[tuple[str, dict[str, Any]]](), list[str]()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    shown = Shown()
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=1))
    monkeypatch.setattr("IPython.display.display", shown)
    return shown


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "learning_rate": [1e-4], "epoch": 0.5, **more}


def test_the_block_tells_the_run(shown: Shown) -> None:
    clock = Clock()
    made = Notebook(clock)
    made.start(1000, 100, "cats & <dogs>")
    for _ in range(11):
        clock.now += 2
        made.advance(10)
    made.show(row(210, metrics={"<fid>": 12.5}, images_per_second=1234.4, memory_gb=3.41, skipped=0))
    made.say("<script>alert(1)</script>")
    read = Text(shown.html[0])
    for text in ("cats & <dogs>", "210/1,000 · 21 % · 2 min 38 s left", "<fid>", "12.50", "1,234", "3.4 GB"):
        assert any(text in told for told in read.texts), text
    assert "<script>alert(1)</script>" in read.texts
    assert dict(read.tags)["progress"]["value"] == "210"
    assert not {"script", "style", "link", "iframe"} & {tag for tag, _ in read.tags}
    colours = set(re.findall(r'(?:fill|stroke|color|background)[=:] ?"?([^";]+)', shown.html[0]))
    assert colours <= {"currentColor", "none", "transparent", "inherit", drawing.ACCENT}
    assert shown.plain[0].startswith("cats & <dogs> (running)  210/1,000   21 %  epoch 0.50  loss 0.0047")


def test_it_is_sent_about_once_a_second_but_a_row_at_once(shown: Shown) -> None:
    clock = Clock()
    made = Notebook(clock)
    made.start(10_000, 0, "run")
    for _ in range(5000):
        clock.now += 0.001
        made.advance()
    assert 5 <= shown.sent[0] <= 6
    made.show(row(5000))
    assert "0.0002" in shown.html[0] or "2.000e-04" in shown.html[0]


def test_a_new_start_is_a_new_block_and_the_old_one_is_closed(shown: Shown) -> None:
    made = Notebook()
    made.start(10, 0, "first")
    made.start(10, 0, "second")
    assert len(shown.html) == 2
    assert "interrupted" in shown.html[0]
    assert "running" in shown.html[1]
    made.advance(10)
    made.close()
    assert "finished" in shown.html[1]
    sent = list(shown.sent)
    made.close("again")
    made.advance()
    made.show(row(1))
    assert shown.sent == sent
    made.start(10, 0, "third")
    made.close("ValueError: x < y")
    assert "ValueError: x &lt; y" in shown.html[2]


@pytest.mark.parametrize(("width", "kept"), [(1600, (800, 400)), (400, (400, 200))])
def test_a_picture_is_embedded_and_made_narrower(
    shown: Shown, tmp_path: Path, width: int, kept: tuple[int, int]
) -> None:
    colours = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(colours).resize((width, width // 2), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    made = Notebook()
    made.start(10, 0, "run")
    made.picture(tmp_path / "a.png", 'step "5" <')
    made.picture(tmp_path / "a.png", 'step "6" <')
    assert shown.sent == [1, 2]  # the numbers are not sent again, and the second picture replaces the first
    [source] = [attributes["src"] for tag, attributes in Text(shown.html[1]).tags if tag == "img"]
    assert 'step "6" <' in Text(shown.html[1]).texts
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
    image = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    assert (image.shape[1], image.shape[0]) == kept
    assert (image[:, :10] == colours[0, 0]).all()
    assert (image[:, -10:] == colours[0, 1]).all()


@given(st.lists(st.floats(-1e3, 1e3), max_size=400), st.sampled_from([4, 10, 300]))
def test_a_curve_keeps_means_over_equally_many_values(values: list[float], limit: int) -> None:
    curve = Curve(limit)
    for step, value in enumerate(values):
        curve.add(step, value)
        curve.add(step, math.nan)
    points = curve.points()
    assert len(points) <= limit
    each = 1
    while len(values) >= limit * each:
        each *= 2
    groups = [values[i : i + each] for i in range(0, len(values), each)]
    assert [y for _, y in points] == pytest.approx([float(np.mean(group)) for group in groups], abs=1e-9)
    assert [x for x, _ in points] == [min(len(values), (i + 1) * each) - 1 for i in range(len(groups))]


def test_the_running_mean_is_its_formula() -> None:
    y = np.random.default_rng(0).normal(size=100)
    got = [m for _, m in smooth([(i, float(v)) for i, v in enumerate(y)], share=0.07)]
    weights = np.exp(-1 / 7) ** np.abs(np.subtract.outer(np.arange(100), np.arange(100)))
    np.testing.assert_allclose(got, weights @ y / weights.sum(1), rtol=1e-12)


def read_chart(svg: str) -> tuple[list[tuple[float, str]], list[tuple[float, str]], list[list[float]]]:
    """Heights and names of the y ticks, places and names of the x ticks, and the points of the last line."""
    name = "{http://www.w3.org/2000/svg}"
    tree = xml.fromstring(svg)
    texts = [(one.attrib, one.text or "") for one in tree.findall(f"{name}text")]
    high = [(float(a["y"]) - 4, text) for a, text in texts if a["text-anchor"] == "end"]
    wide = [(float(a["x"]), text) for a, text in texts if a["text-anchor"] == "middle" and text != "step"]
    inner = tree.find(f"{name}svg")
    assert inner is not None
    line = inner.findall(f"{name}polyline")[-1].attrib["points"]
    at = float(inner.attrib["x"]), float(inner.attrib["y"])
    return high, wide, [[float(p) + a for p, a in zip(q.split(","), at, strict=True)] for q in line.split()]


@pytest.mark.parametrize("values", [[1.0, 0.1, 0.01], [0.5, 0.75, 1.0], [-1.0, 0.0, 2.0], [7.0, 7.0, 7.0]])
def test_a_chart_places_its_points_by_its_ticks(values: list[float]) -> None:
    points = [(100 * (i + 1), value) for i, value in enumerate(values)]
    high, wide, line = read_chart(chart("loss", points, (520, 234), smoothed=True, zero=False))
    assert len(high) >= 2
    log = min(values) > 0 and max(values) / min(values) > 20
    scale = np.log if log else np.asarray
    ys = [float(text.replace(",", "")) for _, text in high]
    heights = np.interp(scale(values), scale(ys), [h for h, _ in high]) if len(set(values)) > 1 else None
    if heights is not None:  # between the ticks, a point lies where a ruler says
        inside = [min(ys) <= value <= max(ys) for value in values]
        np.testing.assert_allclose(np.array(line)[inside, 1], heights[inside], atol=0.2)
        assert sum(inside) >= 1
    assert [float(text) for _, text in wide][-1] == 300
    np.testing.assert_allclose([x for x, _ in line], [56, 56 + 452 / 2, 508], atol=0.1)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8), st.booleans())
def test_ticks_are_few_round_and_inside(low: float, size: float, most: int, whole: bool) -> None:
    if whole:
        low, size = round(low), math.ceil(size)
    found = ticks(low, low + size, most, whole=whole)
    assert 1 <= len(found) <= most + 1
    slack = 1e-6 * size + 4 * math.ulp(abs(low) + size)  # what such numbers are rounded to
    assert all(low - slack <= x <= low + size + slack for x in found)
    assert not whole or all(x == int(x) for x in found)
    step = np.diff(found)
    if len(found) > 2 and size > 1e-5 * abs(low):
        np.testing.assert_allclose(step, step[0], rtol=1e-3)
        digit = step[0] / 10 ** math.floor(math.log10(step[0]) + 1e-3)
        assert min(abs(digit - d) for d in (1, 2, 5)) < 1e-2


def test_charts_of_one_point_or_none_are_left_out() -> None:
    assert chart("loss", [(1, 1.0)], (520, 234), smoothed=True, zero=False) == ""


def test_without_ipython_or_a_kernel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    with pytest.raises(ValueError, match="kernel"):
        Notebook()
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ImportError, match="pip install"):
        Notebook()


@pytest.mark.slow
def test_a_saved_notebook_holds_the_last_state(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    lines = [
        "from gendiff.training.progress import progress_for",
        "p = progress_for('auto')",
        "p.start(10, 0, 'run')",
        "p.advance(10)",
        "p.show({'step': 10, 'loss': 0.5})",
        "p.close()",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    nbclient.NotebookClient(book, timeout=120).execute()
    [output] = book.cells[0].outputs
    assert "finished" in output["data"]["text/html"]
    assert "10/10" in output["data"]["text/plain"]
