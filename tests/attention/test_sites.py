"""Sites: every attention layer of every model, its facts, and the sets that selectors make of them."""

import pytest
import torch
from torch import nn

from gendiff.attention import Depth, Kind, Middleware, Stage, match, sites, stack
from tests.attention.models import FLUX, SD3, UNET, WAN, build, run
from tests.zoo import QUIET, ZOO

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

BLOCKS = (
    "AnyFlowFARTransformer3DModel",
    "Kandinsky6SRTransformer3DModel",
)  # whose masks only one kernel reads
LAST = (
    "SD3",
    "HunyuanVideo",
    "HunyuanImage",
    "Mochi",
    "ZImage",
    "MotifVideo",
    "JoyImage",
    "Ernie",
    "HiDream",
)


def names(model, on):
    return [site.name for site in sites(model).on(on)]


def test_a_unet() -> None:
    found = sites(build(UNET))
    assert [site.stage for site in found] == sorted((s.stage for s in found), key=["down", "mid", "up"].index)
    assert {site.kind for site in found if site.name.endswith("attn1")} == {"self"}
    assert {site.kind for site in found if site.name.endswith("attn2")} == {"cross"}
    assert [found[0].depth, found[-1].depth] == [0.0, 1.0]
    assert {(site.kind, site.text) for site in found} == {("self", "none"), ("cross", "all")}
    for site in found:
        assert site.heads * site.head_dim == site.module.to_q.out_features
        assert site.kernels == ("scaled_dot_product_attention",)


def test_transformers() -> None:
    flux, sd3, wan = (sites(build(name)) for name in (FLUX, SD3, WAN))
    assert {(s.kind, s.stage, s.text, s.outputs) for s in flux} == {
        ("joint", "double", "first", 2),
        ("single", "single", "first", 1),
    }
    assert {(s.kind, s.text, s.outputs) for s in sd3} == {("joint", "last", 2), ("self", "none", 1)}
    assert {(s.kind, s.text) for s in wan} == {("self", "none"), ("cross", "all")}


@pytest.mark.parametrize("name", ZOO)
def test_declared_facts_are_those_of_the_call(name) -> None:
    """Number of outputs, heads, width of a head, and which tokens of joint layers are the text."""
    model, wrong = build(name), []

    class Look(Middleware):
        def on_output(self, site, context, out):
            count = len(out) if isinstance(out, tuple) else 1
            if count != site.outputs:
                wrong.append(f"{site.name} returns {count}, declared {site.outputs}")
            return out

    class Inside(Middleware):
        def on_qkv(self, site, context, q, k, v):
            if tuple(q.shape[1::2]) != (site.heads, site.head_dim):
                wrong.append(f"{site.name} has {q.shape[1]} heads of {q.shape[3]}, declared {site}")
            return q, k, v

    found = sites(model)
    if not len(found):
        pytest.skip("a model without attention layers")
    reached = [site for site in found if site.kernels]
    with stack(model) as one, torch.no_grad():
        one.add(Look())
        if reached and name not in BLOCKS:
            one.add(Inside(), on=reached)
        run(model, name)
    assert wrong == []
    order = {site.text for site in found if site.kind in ("joint", "single")}
    if order:
        assert order == {"last" if name.startswith(LAST) or name.startswith("Nucleus") else "first"}


def test_what_computes_attention_itself_is_named() -> None:
    others = sites(build("ConsisIDTransformer3DModel")).others
    assert any("PerceiverAttention computes its attention itself" in why for why in others.values())
    linear = [site for site in sites(build("SanaTransformer2DModel")) if not site.kernels]
    assert {site.processor for site in linear} == {"SanaLinearAttnProcessor2_0"}


def test_a_table_in_the_terminal_and_in_a_notebook() -> None:
    found = sites(build(FLUX))
    lines = repr(found).splitlines()
    assert lines[0].split() == [
        *("name", "kind", "heads", "head_dim", "stage", "depth", "text", "outputs", "grid", "processor"),
    ]
    assert lines[1].split()[:3] == ["transformer_blocks.0.attn", "joint", "2"]
    assert len(lines) == 1 + len(found)
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found)
    assert "<td>transformer_blocks.0.attn</td>" in page
    assert repr(sites(nn.Linear(1, 1))).split()[0] == "name"


def test_compiled_and_wrapped_models_have_the_sites_of_what_is_inside() -> None:
    model = build(FLUX)
    assert [site.module for site in sites(torch.compile(model, backend="eager"))] == [
        site.module for site in sites(model)
    ]


# ---- selectors


def test_set_algebra() -> None:
    model = build(UNET)
    every, cross = names(model, None), names(model, Kind.CROSS)
    assert names(model, ~Kind.CROSS) == names(model, Kind.SELF) == [n for n in every if n not in cross]
    assert names(model, Kind.CROSS & Stage.UP) == [n for n in cross if n.startswith("up_blocks")]
    assert names(model, Stage.MID | Stage.UP) == [n for n in every if not n.startswith("down")]
    assert names(model, Kind.CROSS & ~(Stage.DOWN | Stage.UP)) == [n for n in cross if n.startswith("mid")]
    assert names(model, "mid_block.**" | Kind.CROSS) == [
        n for n in every if n in cross or n.startswith("mid")
    ]
    assert names(model, "**.attn2") == cross
    assert names(model, Kind("cross")) == cross
    assert names(model, Depth(0, 0.0)) == every[:1]
    assert names(model, Depth(0.5, 1)) == every[len(every) // 2 :]
    assert names(model, sites(model)[2:4]) == every[2:4]


def test_selectors_are_written_as_they_are_read() -> None:
    text = repr(Kind.CROSS & ~(Stage.MID | match("up_blocks.1.**")) | Depth(0.25, 0.5))
    assert text == "Kind.CROSS & ~(Stage.MID | match('up_blocks.1.**')) | Depth(0.25, 0.5)"


def test_nothing_matched_is_an_error_with_the_nearest() -> None:
    model = build(UNET)
    with pytest.raises(
        ValueError, match=r"nothing matches Kind.JOINT among 16 sites: of kinds cross, self, in"
    ):
        names(model, Kind.JOINT)
    with pytest.raises(ValueError, match=r"'mid_blok.\*\*'.*Nearest names: 'mid_block'"):
        names(model, "mid_blok.**")
    with pytest.raises(ValueError, match=r"unknown kind 'corss'; did you mean 'cross'"):
        Kind("corss")
    with pytest.raises(ValueError, match=r"unknown stage 'middle'"):
        Stage("middle")
    with pytest.raises(ValueError, match=r"depths lie in \[0, 1\].*got 0.5 to 0.2"):
        Depth(0.5, 0.2)
    with pytest.raises(ValueError, match=r"the model has no attention layer that takes a processor"):
        names(nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match=r"the model has no sites \['single_transformer"):
        names(model, sites(build(FLUX)))
