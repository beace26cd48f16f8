"""A plan: which layers, of what rank and strength; every target and rule covers something or says why."""

import re

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

from gendiff.attention import Depth, match
from gendiff.lora import Class, Width, inject, plan, preset
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


# ---- configurations of peft

CONFIGS = {
    "ends of names": (
        UNET,
        lambda: LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_k", "attn1.to_v"],
            rank_pattern={"to_k": 2, r"mid_block.*\.to_q": 3},
            alpha_pattern={"attn1.to_q": 12},
            use_rslora=True,
            init_lora_weights="gaussian",
        ),
    ),
    "a pattern": (UNET, lambda: LoraConfig(target_modules=r"mid_block.*\.(to_[qv]|conv1)", r=2)),
    "all but some": (
        UNET,
        lambda: LoraConfig(
            target_modules="all-linear", exclude_modules=["to_q", "proj_out"], r=2, use_dora=True
        ),
    ),
    "some blocks": (
        FLUX,
        lambda: LoraConfig(
            target_modules=["to_q"], layers_to_transform=[1], layers_pattern=["transformer_blocks"], r=2
        ),
    ),
    "loha": (
        UNET,
        lambda: LoHaConfig(r=3, alpha=2, target_modules=["to_q", "conv1"], alpha_pattern={"to_q": 5}),
    ),
    "lokr": (
        UNET,
        lambda: LoKrConfig(
            r=1,
            alpha=2,
            target_modules=["to_q", "conv1"],
            rank_pattern={"conv1": 9},
            decompose_both=True,
            decompose_factor=4,
            init_weights="lycoris",
        ),
    ),
    "oft": (
        FLUX,
        lambda: OFTConfig(oft_block_size=4, target_modules=["to_q", "ff.net.2"], use_cayley_neumann=False),
    ),
    "oft by blocks": (
        FLUX,
        lambda: OFTConfig(
            r=2, oft_block_size=0, target_modules=["to_q", "ff.net.2"], use_cayley_neumann=False
        ),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_of_peft_means_what_peft_puts_on(case) -> None:
    name, config = CONFIGS[case]
    theirs, ours = build(name), build(name)
    keys = list(ours.state_dict())
    planned = plan(ours, config())
    assert list(ours.state_dict()) == keys
    inject_adapter_in_model(config(), theirs)
    layers = {key: one for key, one in theirs.named_modules() if hasattr(one, "adapter_layer_names")}
    assert names(planned) == list(layers)
    for row in planned.rows:
        layer = layers[row.name]
        assert row.rank == (layer.oft_block_size if row.algorithm == "oft" else layer.r)["default"]
        if row.algorithm != "oft":
            assert row.scale == layer.scaling["default"]
    inject(ours, planned)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    begins = config()
    assert planned.init == getattr(begins, "init_lora_weights", getattr(begins, "init_weights", None))


def test_a_configuration_says_how_adapters_begin() -> None:
    net = nn.Sequential(nn.Linear(64, 6))
    gaussian = plan(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian"))
    with inject(net, gaussian) as handle:
        assert float(next(handle.parameters()).detach().std()) == pytest.approx(1 / 4, rel=0.1)
    with inject(net, gaussian, init=True) as handle:
        assert float(next(handle.parameters()).detach().abs().max()) <= 1 / 8
    with inject(net, plan(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))) as handle:
        assert handle.principal is not None
        assert handle.principal.init == "pissa"


def test_rules_beside_a_configuration() -> None:
    model = build(UNET)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"])
    rules = {"mid_block.**": None, "up_blocks.**": {"learning_rate": 1e-5, "rank": 2}}
    for row in plan(model, config, rules=rules).rows:
        up = row.name.startswith("up_blocks.")
        assert not row.name.startswith("mid_block.")
        assert (row.rank, row.lora_alpha, row.learning_rate) == ((2, 6, 1e-5) if up else (4, 6, None))
    for given in ({"rank": 4}, {"lora_alpha": 2}, {"rslora": True}, {"algorithm": "loha"}, {"options": {}}):
        with pytest.raises(
            ValueError, match=rf"the configuration says {next(iter(given))} itself: change it"
        ):
            plan(model, config, **given)


@pytest.mark.parametrize("targets", ["all-linear", r".*attn1\.to_q.*"])
def test_a_model_that_carries_adapters_is_read_alike(targets) -> None:
    model, config = build(UNET), LoraConfig(r=2, target_modules=targets)
    before = plan(model, config)
    inject(model, plan(model, "sd/attention", rank=2), "there")
    assert plan(model, config) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"modules_to_save": ["conv_in"]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"target_parameters": ["weight"]},
        {"layer_replication": [(0, 1)]},
        {"use_qalora": True},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
    ],
)
def test_what_an_adapter_has_not_is_refused_by_name(changes) -> None:
    ((name, value),) = changes.items()
    config = LoraConfig(target_modules=["to_q"], **changes)
    with pytest.raises(
        ValueError, match=rf"sets {name}={re.escape(repr(value))}, which adapters here have not"
    ):
        plan(build(UNET), config)


def test_configurations_that_are_for_nothing_or_of_another_kind() -> None:
    model = build(UNET)
    wrong = {
        r"unknown kind of a configuration 'ADALORA'.* Accepted: 'LORA'": AdaLoraConfig(
            target_modules=["to_q"], total_step=9
        ),
        r"says no target_modules: name the layers": LoraConfig(),
        r"target_modules 'to_qq' of the configuration is for none of .* Nearest: 'to_q'": LoraConfig(
            target_modules=["to_q", "to_qq"]
        ),
        r"target_modules 'x.\*' of the configuration is for none of": LoraConfig(target_modules="x.*"),
        r"target_modules covers '.*to_out', a ModuleList, which carries no adapter; its": LoraConfig(
            target_modules=["to_out"]
        ),
        r"rank_pattern 'to_k' of the configuration is for none of": LoraConfig(
            target_modules=["to_q"], rank_pattern={"to_k": 2}
        ),
        r"alpha_pattern 'to_k' of the configuration is for none of": LoHaConfig(
            target_modules=["to_q"], alpha_pattern={"to_k": 2}
        ),
        r"sets rank_dropout=0.1, which adapters": LoHaConfig(target_modules=["to_q"], rank_dropout=0.1),
        r"sets use_effective_conv2d=True, which": LoKrConfig(
            target_modules=["to_q"], use_effective_conv2d=True
        ),
        r"sets use_cayley_neumann=True, a series": OFTConfig(target_modules=["to_q"]),
        r"sets coft=True, which": OFTConfig(target_modules=["to_q"], coft=True, use_cayley_neumann=False),
        r"inputs, which r=3 blocks do not divide evenly": OFTConfig(
            target_modules=["to_q"], r=3, oft_block_size=0, use_cayley_neumann=False
        ),
        r"unknown initialisation of lora 'orthogonal'": LoraConfig(
            target_modules=["to_q"], init_lora_weights="orthogonal"
        ),
        r"unknown initialisation of loha False": LoHaConfig(target_modules=["to_q"], init_weights=False),
        r"ranks are whole numbers from 1 to that of the weight": LoraConfig(target_modules=["to_q"], r=999),
    }
    for text, config in wrong.items():
        with pytest.raises(ValueError, match=text):
            plan(model, config)
