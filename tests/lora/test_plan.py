"""A plan: which layers, of what rank and strength; every target and rule covers something or says why."""

import pytest
import torch
from torch import nn

from gendiff.attention import Depth, match
from gendiff.lora import Class, Width, plan, preset
from gendiff.lora.presets import FAMILIES
from tests.attention.models import FLUX, SD3, UNET, WAN
from tests.zoo import QUIET, build

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
MODELS = {
    "sd": UNET,
    "sdxl": UNET,
    "sd3": SD3,
    "flux": FLUX,
    "flux2": "Flux2Transformer2DModel",
    "wan": WAN,
    "qwen-image": "QwenImageTransformer2DModel",
    "z-image": "ZImageTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "sana": "SanaTransformer2DModel",
}
ENCODERS = ("clip", "t5")


def encoder(family):
    import transformers

    if family == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.CLIPTextModel(config)
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def names(planned):
    return [row.name for row in planned.rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_covers_the_layers_of_its_family(family) -> None:
    model = build(MODELS[family]) if family in MODELS else encoder(family)
    attention = names(plan(model, f"{family}/attention", rank=2))
    every = names(plan(model, "/".join((family, "+".join(FAMILIES[family]))), rank=1))
    assert set(attention) < set(every)
    marks = ("attn", "attention", "SelfAttention")
    assert all(any(mark in name for mark in marks) for name in attention)
    inner = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and ".attn" in name]
    if family in ("sd", "sd3", "flux", "pixart", "qwen-image"):
        assert set(attention) == set(inner)


def test_a_preset_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matches none of .* layers that can carry an adapter"):
        plan(build(UNET), "flux/attention")
    with pytest.raises(ValueError, match=r"unknown family of a preset 'sxdl'; did you mean 'sdxl'"):
        preset("sxdl/attention")
    with pytest.raises(ValueError, match=r"unknown part of flux 'attn'; did you mean"):
        preset("flux/attn")


def test_a_pattern_covers_whole_segments() -> None:
    """Block 1 is neither block 10 nor a block 1 of another list."""
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    model = nn.ModuleDict(
        {"transformer_blocks": blocks, "single_transformer_blocks": nn.ModuleList([nn.Linear(2, 2)] * 2)}
    )
    assert names(plan(model, "transformer_blocks.1", rank=1)) == ["transformer_blocks.1"]


def test_every_alternative_covers_something() -> None:
    model = build(UNET)
    with pytest.raises(ValueError, match=r"the pattern '\*\*.to_qq' matches none of .*"):
        plan(model, "**.to_q | **.to_qq")
    message = (
        r"'\*\*.attn1.to_out' covers '.*', a ModuleList, which carries no adapter; its layers are '.*out.0'"
    )
    with pytest.raises(ValueError, match=message):
        plan(model, ["**.to_q", "**.attn1.to_out"])
    with pytest.raises(ValueError, match=r"a LayerNorm, which carries no adapter\."):
        plan(model, "**.norm1")
    with pytest.raises(
        ValueError, match=r"Class\('Conv3d'\) covers none of .* layers; there are Conv2d, Linear"
    ):
        plan(model, Class("Conv3d"))


def test_rules_by_pattern_class_depth_and_shape() -> None:
    model = build(UNET)
    planned = plan(
        model,
        Class("Linear") | Class("Conv2d"),
        rank=4,
        lora_alpha=8,
        rules={
            Class("Conv2d"): {"rank": 2},
            "mid_block.**": {"rank": 3, "lora_alpha": 6, "learning_rate": 1e-5},
            Depth(0, 0.0) | match("conv_out"): None,
            Width(0, 4): None,
            "**.attn2.to_k": {"learning_rate": 1e-3},
        },
    )
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    for row in planned.rows:
        kernel = layers[row.name].weight[0, 0].numel()
        out, inward = layers[row.name].weight.shape[:2]
        mid = row.name.startswith("mid_block.")
        assert row.rank == (3 if mid else 2 if row.kind == "Conv2d" else 4)
        assert row.scale == (2 if mid else 8 / row.rank)
        assert row.parameters == row.rank * (out + inward * kernel)
        expected = 1e-3 if row.name.endswith("attn2.to_k") else 1e-5 if mid else None
        assert row.learning_rate == expected
    assert set(layers) - set(names(planned)) == {"conv_in", "conv_out"}
    assert planned.parameters == sum(row.parameters for row in planned.rows)


def test_rules_that_cover_nothing_or_say_nothing_known() -> None:
    model = build(UNET)
    with pytest.raises(ValueError, match=r"'mid_blok.\*\*' matches none of 64 planned layers"):
        plan(model, "sd/attention", rules={"mid_blok.**": {"rank": 2}})
    with pytest.raises(ValueError, match=r"the rule for Class\('Conv2d'\) covers none of 64 planned layers"):
        plan(model, "sd/attention", rules={Class("Conv2d"): None})
    with pytest.raises(
        ValueError, match=r"unknown setting of the rule for \*\* 'alpha'; did you mean 'lora_alpha'"
    ):
        plan(model, "sd/attention", rules={"**": {"alpha": 2}})
    with pytest.raises(ValueError, match=r"the rules leave out all 64 layers"):
        plan(model, "sd/attention", rules={"**": None})


@pytest.mark.parametrize("rank", [0, -1, 17, True])
def test_ranks_that_a_weight_has_not(rank) -> None:
    with pytest.raises(
        ValueError, match=r"ranks are whole numbers from 1 to that of the weight, which is 16 at"
    ):
        plan(nn.Sequential(nn.Linear(16, 20)), "*", rank=rank)


def test_strengths() -> None:
    net = nn.Sequential(nn.Linear(16, 20))
    assert plan(net, "*", rank=4).rows[0].scale == 1
    assert plan(net, "*", rank=4, lora_alpha=8).rows[0].scale == 2
    assert plan(net, "*", rank=4, lora_alpha=8, rslora=True).rows[0].scale == 4
    for alpha in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"lora_alpha is a number above 0"):
            plan(net, "*", rank=4, lora_alpha=alpha)


def test_nothing_is_changed_and_layers_that_carry_adapters_count_once() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = build(UNET)
    before = plan(model, "sd/attention", rank=2)
    keys = list(model.state_dict())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    after = plan(model, "sd/attention", rank=2)
    assert [(r.name, r.shape) for r in after.rows] == [(r.name, r.shape) for r in before.rows]
    assert after.layers == before.layers
    assert keys == list(build(UNET).state_dict())


def test_a_table() -> None:
    planned = plan(build(FLUX), "flux/attention", rank=2, lora_alpha=4)
    lines = repr(planned).splitlines()
    assert lines[0].split()[:4] == ["layer", "class", "weight", "algorithm"]
    assert lines[-1] == f"{len(planned)} of {planned.layers} layers, {planned.parameters:,} parameters"
    assert planned._repr_html_().count("<tr>") == len(planned) + 1
    assert planned["transformer_blocks.0.attn.to_q"].scale == 2
    with pytest.raises(KeyError, match=r"did you mean 'transformer_blocks\.0\.attn\.to_q'"):
        planned["transformer_blocks.0.attn.to_qq"]
    assert torch.tensor([row.parameters for row in planned.rows]).sum() == planned.parameters
