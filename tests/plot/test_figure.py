"""What every picture is: a figure that a notebook shows, and nothing of pyplot's or the settings changed."""

import copy
import importlib.util
import sys
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from gendiff import plot
from gendiff.denoiser import OracleDenoiser
from gendiff.lora import inject, measure
from gendiff.lora import plan as lora_plan
from gendiff.math import GaussianOracle, Rectified, grids
from gendiff.objectives import Uniform
from gendiff.plot.figure import Picture, numbers
from gendiff.plot.text import width, wrap
from gendiff.sampling import Euler

ROWS = [{"step": s, "loss": 1 / s, "levels": {"loss": [1.0] * 22, "count": [30] * 22}} for s in (1, 2, 3)]
DENOISE = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), Rectified())
NET = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
DRAW = {
    "adapter": lambda title: plot.adapter(
        measure(inject(copy.deepcopy(NET), lora_plan(NET, "*", rank=2))), title=title
    ),
    "attention": lambda title: plot.attention(torch.rand(2, 8, 8), words=["a", "b"], title=title),
    "sample_grid": lambda title: plot.sample_grid(torch.rand(2, 3, 8, 8), title=title),
    "loss_by_level": lambda title: plot.loss_by_level(ROWS, title=title),
    "loss": lambda title: plot.loss(ROWS, title=title),
    "schedules": lambda title: plot.schedules(Rectified(), title=title),
    "times": lambda title: plot.times(Uniform(), Rectified(), title=title),
    "solver_paths": lambda title: plot.solver_paths(
        DENOISE, torch.ones(2, 1), grids.uniform(Rectified(), 2), {"Euler": Euler()}, title=title
    ),
    "solver_errors": lambda title: plot.solver_errors(
        {"Euler": Euler()}, DENOISE.oracle, Rectified(), evaluations=(2, 4), title=title
    ),
}


def test_every_public_picture_is_here() -> None:
    functions = {name for name in vars(plot) if callable(getattr(plot, name)) and not name.startswith("_")}
    assert functions == {*DRAW, "Picture"}


@pytest.mark.parametrize("name", DRAW)
def test_it_is_shown_by_a_notebook_and_leaves_matplotlib_as_it_was(name: str) -> None:
    before, pyplot = dict(mpl.rcParams), sys.modules.get("matplotlib.pyplot")
    open_before = pyplot.get_fignums() if pyplot else []
    picture = DRAW[name]("A title")
    data, size = picture._repr_png_()
    with Image.open(BytesIO(data)) as image:
        assert image.size == (2 * size["width"], 2 * size["height"])
        pixels = np.asarray(image.convert("L"))
    assert pixels.min() < 100 < 250 < pixels.max()
    texts = [text.get_text() for text in [*picture.texts, *(t for ax in picture.axes for t in ax.texts)]]
    titles = [*texts, picture.get_suptitle()]
    assert "A title" in titles
    assert dict(mpl.rcParams) == before
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert (pyplot.get_fignums() if pyplot else []) == open_before


def test_ipython_shows_a_returned_picture() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, metadata = formatters.DisplayFormatter().format(DRAW["loss"](None))
    assert data["image/png"][:4] == b"\x89PNG"
    assert metadata["image/png"] == {"width": 750, "height": 400}


def test_names_of_the_users_are_no_formulas_in_a_legend() -> None:
    picture = plot.schedules({"costs $5": Rectified(), "costs $6": Rectified()})
    (legend,) = picture.legends
    assert [text.get_parse_math() for text in legend.get_texts()] == [False, False]


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = Path(plot.__file__).with_name("_matplotlib.py")
    spec = importlib.util.spec_from_file_location("without_matplotlib", file)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'gendiff\[plot\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_numbers_come_from_tensors_of_any_kind() -> None:
    values = torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True)
    assert numbers(values, "x").tolist() == [1.0, 2.5]
    with pytest.raises(TypeError, match="x holds numbers, got list"):
        numbers(["a"], "x")


def test_wrapped_text_fits_and_keeps_its_words() -> None:
    text = "a red fox in the snow\nand an extraordinarilylongwordthatfitsnowhere at all"
    lines = wrap(text, 1.0, 8)
    assert max(width(line, 8) for line in lines) <= 1.0
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert wrap(text, 1.0, 8, most=2)[0] == lines[0]
    assert len(wrap(text, 1.0, 8, most=2)) == 2
    assert wrap(text, 1.0, 8, most=2)[1].endswith(" …")
    assert wrap("", 1.0, 8) == []


def test_a_picture_can_be_saved_and_changed_like_any_figure(tmp_path: Path) -> None:
    picture = DRAW["loss"](None)
    assert isinstance(picture, Picture)
    picture.axes[0].set_ylim(0, 1)
    picture.savefig(tmp_path / "loss.pdf")
    assert (tmp_path / "loss.pdf").read_bytes()[:4] == b"%PDF"
