"""What an adapter changes: norms, ratios and effective ranks, by layer, kind and block."""

import math

import pytest
import torch
from torch import nn

from gendiff.lora import Measures, inject, measure, plan
from gendiff.lora.diagnostics import effective_rank
from gendiff.lora.measures import SHOWN
from tests.attention.models import FLUX, SD3, UNET, WAN, build
from tests.lora.test_algebra import KINDS, deltas, made
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def entropy_rank(matrix) -> float:
    """Roy & Vetterli's definition, by a sum in a loop over the values of the whole matrix."""
    singular = torch.linalg.svdvals(matrix.double()).tolist()
    shares = [value / sum(singular) for value in singular]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 1e-15))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_layer_are_those_of_the_whole_matrix(kind) -> None:
    model = nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24) if kind == "oft" else nn.Conv2d(4, 6, 3))
    adapter = made(model, **KINDS[kind])
    found = measure(adapter, model)
    for row, (name, matrix) in zip(found.rows, deltas(adapter, model).items(), strict=True):
        assert row.name == name
        assert row.norm == pytest.approx(float(matrix.norm()), rel=1e-5)
        weight = model.get_submodule(name).weight.detach()
        assert row.ratio == pytest.approx(float(matrix.norm() / weight.norm()), rel=1e-5)
        assert row.effective_rank == pytest.approx(entropy_rank(matrix), rel=1e-3)
        singular = torch.linalg.svdvals(matrix)
        assert row.highest == pytest.approx(float(singular[0] / singular.norm()) ** 2, rel=1e-5)


def test_effective_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    two = effective_rank(torch.tensor([3.0, 1.0]))
    assert two == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert effective_rank(torch.tensor([3e9, 1e9])) == pytest.approx(two)


def test_an_adapter_that_changes_nothing() -> None:
    model = build(UNET)
    found = measure(inject(model, plan(model, "sd/attention", rank=2)))
    assert (found.total.norm, found.total.ratio, found.total.effective_rank) == (0, 0, 0)
    assert found.total.highest == 0


@pytest.mark.parametrize(
    ("name", "targets", "groups"),
    [
        (
            UNET,
            "sd/attention+ff+conv",
            ["self attention", "cross attention", "feed-forward", "conv", "other"],
        ),
        (SD3, "sd3/attention+ff", ["self attention", "joint attention", "feed-forward"]),
        (FLUX, "flux/attention+ff", ["joint attention", "single attention", "feed-forward", "other"]),
        (WAN, "wan/attention+ff", ["self attention", "cross attention", "feed-forward"]),
    ],
)
def test_groups_and_blocks_are_all_layers_once(name, targets, groups) -> None:
    model = build(name)
    found = measure(made(model, 0, targets, rank=2), model)
    assert [part.name for part in found.groups] == groups
    for parts in (found.groups, found.blocks):
        assert sum(part.layers for part in parts) == len(found) == found.total.layers
        assert math.hypot(*(part.norm for part in parts)) == pytest.approx(found.total.norm)
        assert math.hypot(*(part.weight_norm for part in parts)) == pytest.approx(found.total.weight_norm)
    members = [row for row in found.rows if row.group == groups[0]]
    assert found.groups[0].norm == pytest.approx(math.sqrt(sum(row.norm**2 for row in members)))
    mean = sum(row.effective_rank for row in members) / len(members)
    assert found.groups[0].effective_rank == pytest.approx(mean)


def test_blocks_of_a_unet_are_in_the_order_in_which_they_run() -> None:
    model = build(UNET)
    found = measure(made(model, 0, "**", rank=1), model)
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [part.name for part in found.blocks if "block" in part.name] == names
    assert found.blocks[-1].name == "conv_out"


def test_without_a_model_names_tell_what_they_can() -> None:
    model = build(UNET)
    found = measure(made(model, 0, "sd/attention+ff", rank=1))
    assert [part.name for part in found.groups] == ["self attention", "cross attention", "feed-forward"]
    assert found.total.ratio is None
    assert {row._cells()[4] for row in found.rows} == {"-"}
    for part in ("attn1", "attn2"):  # the second one of SD3 is not of the text
        only = measure(made(model, 0, f"**.{part}.to_k", rank=1))
        assert [group.name for group in only.groups] == ["attention"]
    transformer = measure(made(build(FLUX), 0, "flux/attention", rank=1))
    assert [part.name for part in transformer.groups] == ["attention"]
    with pytest.raises(ValueError, match=r"depends on the weight of the layer: pass model="):
        measure(made(model, 0, "sd/attention", rank=1, algorithm="dora"))
    with pytest.raises(ValueError, match=r"the adapter is for another model: unknown layer"):
        measure(made(model, 0, "sd/attention", rank=1), build(FLUX))


def test_text_encoders() -> None:
    from tests.lora.test_plan import encoder

    for family, block in (("clip", "layers.1"), ("t5", "encoder.block.1")):
        model = encoder(family)
        found = measure(made(model, 0, f"{family}/attention+ff", rank=1), model)
        assert [part.name for part in found.groups] == ["attention", "feed-forward"]
        assert found.blocks[-1].name.endswith(block)


def test_tables() -> None:
    model = build(UNET)
    found = measure(made(model, 0, "sd/attention", rank=2), model)
    groups, blocks, layers = repr(found).split("\n\n")
    assert groups.splitlines()[0].split()[:3] == ["group", "layers", "rank"]
    assert len(blocks.splitlines()) == 1 + len(found.blocks)
    head, *rows, last = layers.splitlines()
    assert head.startswith(f"the {SHOWN} layers of {len(found)} that change most")
    ratios = [found[row.split()[0]].ratio for row in rows]
    assert ratios == sorted((row.ratio for row in found.rows), reverse=True)[:SHOWN]
    assert last.split()[:2] == ["all", str(len(found))]
    few = Measures(found.rows[:5])
    assert [row.split()[0] for row in repr(few).splitlines()[-6:]] == [*(r.name for r in few.rows), "all"]
    assert found._repr_html_().count("<table>") == 3
    with pytest.raises(KeyError, match="did you mean"):
        found["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qq"]
