"""What an adapter changes, drawn: a cell a layer with its number, in the place of the layer."""

import math
import random

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from gendiff.lora import Measures, inject, measure, plan
from gendiff.lora.measures import Measured
from gendiff.plot import adapter
from tests.attention.models import FLUX, UNET, build
from tests.lora.test_algebra import made
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture(scope="module")
def measures() -> Measures:
    model = build(UNET)
    return measure(made(model, 0, "sd/attention+ff+conv", rank=2), model)


def cells(picture) -> np.ma.MaskedArray:
    return picture.axes[0].images[0].get_array()


def names(axes, which) -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


@pytest.mark.parametrize("quantity", ["ratio", "norm", "effective_rank", "highest"])
def test_every_layer_is_a_cell_with_its_number(measures, quantity) -> None:
    picture = adapter(measures, quantity)
    shown = cells(picture)
    assert shown.count() == len(measures)
    expected = sorted(getattr(row, quantity) for row in measures.rows)
    np.testing.assert_allclose(np.sort(shown.compressed()), expected)
    rows = names(picture.axes[0], "y")
    line = shown[rows.index("attn2.to_k")].compressed()
    of_kind = [row for row in measures.rows if row.name.endswith("attn2.to_k")]
    of_kind.sort(key=lambda row: ["down", "mid_", "up_b"].index(row.name[:4]))
    np.testing.assert_allclose(line, [getattr(row, quantity) for row in of_kind])
    bars = [bar for container in picture.axes[2].containers for bar in container if hasattr(bar, "get_width")]
    part = Measures(tuple(of_kind)).total
    assert bars[rows.index("attn2.to_k")].get_width() == pytest.approx(getattr(part, quantity))


def test_columns_are_in_the_order_of_the_model_and_named(measures) -> None:
    picture = adapter(measures, title="A UNet")
    assert picture.get_suptitle() == "A UNet"
    blocks = names(picture.axes[0], "x")
    assert blocks == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [text.get_text() for text in picture.legends[0].get_texts()] == [p.name for p in measures.groups]
    heights = [bar.get_height() for bar in picture.axes[1].patches]
    assert len(heights) == cells(picture).shape[1]
    first = tuple(row for row in measures.rows if row.name.startswith("down_blocks.0.attentions.0.proj"))
    assert heights[0] == pytest.approx(Measures(first).total.ratio)


def test_blocks_of_a_transformer_are_named_together() -> None:
    model = build(FLUX)
    picture = adapter(measure(made(model, 0, "**", rank=1), model))
    count = [len(blocks) for blocks in (model.transformer_blocks, model.single_transformer_blocks)]
    shown = names(picture.axes[0], "x")
    expected = [f"transformer_blocks 0…{count[0] - 1}", f"single_transformer_blocks 0…{count[1] - 1}"]
    assert [name.removesuffix(" 0…0") for name in shown] == [name.removesuffix(" 0…0") for name in expected]
    assert "x_embedder" in names(picture.axes[0], "y")


def test_hundreds_of_layers_are_apart() -> None:
    """Of a model of SDXL's size cells are some pixels wide, and no two names lie on each other."""
    rng = random.Random(0)
    rows, blocks = [], ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"]
    for block, count in zip(blocks, (2, 2, 20, 10, 30), strict=True):
        for i in range(count):
            place = f"{block}.attentions.{i // 10}.transformer_blocks.{i % 10}"
            for kind in ("self", "cross"):
                for part in ("to_q", "to_k", "to_v", "to_out.0"):
                    name = f"{place}.attn{1 if kind == 'self' else 2}.{part}"
                    size = rng.uniform(0.1, 1)
                    rows.append(Measured(name, f"{kind} attention", block, 1, 16.0, size, 30.0, 8.0, 0.4))
    picture = adapter(Measures(tuple(rows)))
    assert cells(picture).shape == (8, 64)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    heat = picture.axes[0]
    box = heat.get_window_extent()
    assert box.width / 64 > 5
    assert box.height / 8 > 12
    for which in "xy":
        labels = getattr(heat, f"get_{which}ticklabels")()
        boxes = [label.get_window_extent() for label in labels]
        if which == "x":  # slanted, of which boxes say nothing
            assert {label.get_rotation() for label in labels} == {40}
            continue
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert math.isclose(float(cells(picture).max()), max(row.norm / 30 for row in rows))


def test_an_adapter_that_changes_nothing_and_one_without_weights() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    picture = adapter(measure(inject(model, plan(model, "**", rank=2))))
    FigureCanvasAgg(picture).draw()
    assert cells(picture).tolist() == [[0, 0, 0]]
    assert picture.axes[0].images[0].get_clim() == (0, 1)
    assert names(picture.axes[0], "x") == ["blocks 0…2"]
    without = measure(made(model, rank=2))
    assert cells(adapter(without))[0].tolist() == pytest.approx([row.norm for row in without.rows])
    with pytest.raises(ValueError, match=r"ratios need the weights that the adapter changes: measure\("):
        adapter(without, "ratio")
    with pytest.raises(ValueError, match="unknown quantity 'rank'"):
        adapter(without, "rank")
