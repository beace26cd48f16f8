"""Files of adapters: read by diffusers and peft as by us, and whatever others wrote, read exactly."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gendiff.lora import inject, load, plan, read, save
from gendiff.testing import tiny_pipeline
from tests.attention.models import FLUX, SD3, UNET, WAN, build, said
from tests.lora.adapters import adapter, drawn, error, weights, worst
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def unet():
    return build(UNET).requires_grad_(False)


@pytest.fixture(scope="module")
def flux():
    return build(FLUX).requires_grad_(False)


def encoder(kind=transformers.CLIPTextModel):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(transformers.CLIPTextConfig(vocab_size=20, projection_dim=16, **sizes)).requires_grad_(False)


def keys_of(path):
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata() or {}


# ---- others read what we write


DOUBLE = "flux/attention+ff"
FAMILIES = {  # of a pipeline: what is adapted, and whether diffusers reads kohya's names of it at this width
    "sd15": ({"unet": "sd/attention+ff+conv", "text_encoder": "clip/attention+ff"}, True),
    "sdxl": (
        {"unet": "sdxl/attention+ff", "text_encoder": "clip/attention", "text_encoder_2": "clip/attention"},
        True,
    ),
    "sd3": ({"transformer": "sd3/attention+ff", "text_encoder": "clip/attention"}, False),
    "flux": ({"transformer": DOUBLE, "text_encoder": "clip/attention"}, False),
    "wan": ({"transformer": "wan/attention+ff"}, True),
}


@pytest.mark.parametrize(
    "name", ["sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "sd15")]
)
def test_pipelines_of_diffusers_read_our_files(name, tmp_path) -> None:
    """Of mixed ranks, with a strength other than the rank, with its text encoders, the change is the same."""
    targets, kohya = FAMILIES[name]
    pipe = tiny_pipeline(name)
    made = {}
    for component, preset in targets.items():
        model = getattr(pipe, component)
        rules = {"**.to_k" if "encoder" not in component else "**.k_proj": {"rank": 3}}
        made[component] = adapter(model, preset, rank=2, lora_alpha=5, rules=rules)
    for form in ("diffusers", "kohya") if kohya else ("diffusers",):
        path = save(made, tmp_path / f"{form}.safetensors", form, model=pipe)
        fresh = tiny_pipeline(name)
        fresh.load_lora_weights(path, adapter_name="read")
        for component, mine in made.items():
            named = getattr(fresh, component).named_modules()
            theirs = {layer: one for layer, one in named if "read" in getattr(one, "lora_A", ())}
            assert theirs.keys() == mine.tensors.keys(), (form, component)
            for layer, one in theirs.items():
                assert error(one.get_delta_weight("read"), mine.delta(layer)) <= 1e-6, (form, layer)
        ours = read(path, pipe)
        assert all(
            worst(mine, ours[component], getattr(pipe, component)) <= 1e-6 for component, mine in made.items()
        )


@pytest.mark.parametrize("settings", [{"rslora": True}, {"algorithm": "dora"}, {"algorithm": "lokr"}])
def test_models_of_diffusers_read_our_header(settings, flux, tmp_path) -> None:
    mine = adapter(flux, "flux/attention", rank=2, lora_alpha=6, **settings)
    path = save(mine, tmp_path / "a.safetensors", model=flux)
    theirs = build(FLUX)
    # without use_safetensors a model, other than a pipeline, does not look into the header
    theirs.load_lora_adapter(path, prefix="transformer", adapter_name="read", use_safetensors=True)
    with load(path, flux).handles["transformer"]:
        torch.testing.assert_close(said(theirs, FLUX), said(flux, FLUX), rtol=1e-5, atol=1e-5)


def test_diffusers_converts_stacked_layers_of_flux(tmp_path) -> None:
    """Its converter knows one width, of which the model has no numbers here: the factors are compared."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    sizes = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, in_channels=8, **sizes)
    mine = adapter(model, "flux/attention", rank=2, lora_alpha=6, rules={"**.to_k": {"lora_alpha": 3}})
    path = save(mine, tmp_path / "a.safetensors", "kohya", model=model)
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(path))
    for name, parts in mine.tensors.items():
        a, b = (theirs.pop(f"transformer.{name}.{part}.weight") for part in ("lora_A", "lora_B"))
        probe = torch.eye(a.shape[1])[:, :7]
        assert (
            error(b @ (a @ probe), mine.plan[name].scale * parts["lora_B"] @ (parts["lora_A"] @ probe))
            <= 1e-6
        )
    assert not any(bool(tensor.any()) for key, tensor in theirs.items() if "lora_B" in key), "what is left"


@pytest.mark.parametrize("algorithm", ["lora", "dora", "loha", "lokr", "oft"])
def test_peft_reads_our_folder(algorithm, tmp_path) -> None:
    settings = {"rank": 4} if algorithm == "oft" else {"rank": 2, "lora_alpha": 6}
    if algorithm != "oft":
        settings["rules"] = {"**.to_k": {"rank": 1, "lora_alpha": 5}}
    model = build(FLUX).requires_grad_(False)
    mine = adapter(model, "flux/attention", algorithm=algorithm, **settings)
    folder = save(mine, tmp_path / "folder", "peft", model=model)
    assert set(load_peft_weights(folder, device="cpu")) == keys_of(folder / "adapter_model.safetensors")[0]
    theirs = PeftModel.from_pretrained(build(FLUX), folder)
    with inject(model, mine):
        torch.testing.assert_close(
            said(theirs.get_base_model(), FLUX), said(model, FLUX), rtol=1e-5, atol=1e-5
        )


def test_what_the_trainer_saved_is_read(unet, tmp_path) -> None:
    """And what a model of diffusers saves itself, with the settings of its peft."""
    handle = inject(build(UNET), plan(unet, "sd/attention", rank=2, lora_alpha=6, rslora=True))
    with torch.no_grad():
        for number, parameter in enumerate(handle.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    handle.model.save_lora_adapter(tmp_path, adapter_name="default")
    found = read(tmp_path, unet)
    assert found.format == "diffusers"
    assert worst(handle.adapter(), found["unet"], unet) == 0
    assert set(found.alpha_source["unet"].values()) == {"metadata"}


# ---- an independent reading of kohya's format


def by_hand(path, place):
    """What the layers of a file add, from the description of the format alone: up, down, alpha over rank."""
    held, found = load_file(path), {}
    for stem in dict.fromkeys(key.split(".")[0] for key in held):
        own = {key.split(".", 1)[1]: held[key].double() for key in held if key.split(".")[0] == stem}
        alpha = float(own["alpha"])
        if "lora_up.weight" in own:
            up, down = own["lora_up.weight"], own["lora_down.weight"]
            change = alpha / down.shape[0] * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        else:
            one, two = (own[f"hada_w{i}_a"] @ own[f"hada_w{i}_b"] for i in (1, 2))
            change = alpha / own["hada_w1_b"].shape[0] * one * two
        if "dora_scale" in own:
            base = place(stem)[1].double().flatten(1)
            tuned = base + change
            change = own["dora_scale"].reshape(-1, 1) * tuned / tuned.norm(dim=1, keepdim=True) - base
        found[stem] = change
    return found


def stack_of(family):
    """By a stem of kohya's, the live layers that it stacks, written by hand from the releases."""
    if family == FLUX:
        found = {}
        for i in range(2):
            live, stem = f"transformer_blocks.{i}.attn", f"lora_unet_double_blocks_{i}"
            found[f"{stem}_img_attn_qkv"] = [f"{live}.to_{x}" for x in "qkv"]
            found[f"{stem}_txt_attn_qkv"] = [f"{live}.add_{x}_proj" for x in "qkv"]
            found[f"{stem}_img_attn_proj"] = [f"{live}.to_out.0"]
            found[f"{stem}_txt_attn_proj"] = [f"{live}.to_add_out"]
            single = f"single_transformer_blocks.{i}"
            found[f"lora_unet_single_blocks_{i}_linear1"] = [
                *(f"{single}.attn.to_{x}" for x in "qkv"),
                f"{single}.proj_mlp",
            ]
        return found
    if family == SD3:
        found = {}
        for i in range(3):
            live, stem = f"transformer_blocks.{i}.attn", f"lora_unet_joint_blocks_{i}"
            found[f"{stem}_x_block_attn_qkv"] = [f"{live}.to_{x}" for x in "qkv"]
            found[f"{stem}_context_block_attn_qkv"] = [f"{live}.add_{x}_proj" for x in "qkv"]
            found[f"{stem}_x_block_attn_proj"] = [f"{live}.to_out.0"]
            if i < 2:
                found[f"{stem}_context_block_attn_proj"] = [f"{live}.to_add_out"]
        return found
    if family == UNET:
        return {
            f"lora_unet_{BLOCK.replace('.', '_')}_attn{n}_to_{x}": [f"{BLOCK}.attn{n}.to_{x}"]
            for n in (1, 2)
            for x in "qkv"
        }
    return {
        f"lora_unet_blocks_{i}_{'self' if n == 1 else 'cross'}_attn_{x}": [f"blocks.{i}.attn{n}.to_{x}"]
        for i in range(2)
        for n in (1, 2)
        for x in "qkv"
    }


@pytest.mark.parametrize("algorithm", ["lora", "dora", "loha"])
@pytest.mark.parametrize("family", [UNET, SD3, FLUX, WAN])
def test_kohyas_naming_read_by_hand_adds_the_same_to_the_stacked_weights(family, algorithm, tmp_path) -> None:
    model, stacks = build(family), stack_of(family)
    layers = [layer for stack in stacks.values() for layer in stack]
    rules = {"**.to_v": {"rank": 1, "lora_alpha": 5}, "**.to_k": None}
    mine = adapter(model, layers, rank=2, lora_alpha=6, algorithm=algorithm, rules=rules)
    path = save(mine, tmp_path / "a.safetensors", "kohya", model=model)
    held = weights(model)

    def place(stem):
        return stacks[stem], torch.cat([held[layer] for layer in stacks[stem]])

    found = by_hand(path, place)
    assert set(found) == {
        stem for stem, stack in stacks.items() if any(layer in mine.tensors for layer in stack)
    }
    for stem, change in found.items():
        expected = [
            mine.delta(layer, held[layer]) if layer in mine.tensors else torch.zeros_like(held[layer])
            for layer in place(stem)[0]
        ]
        assert error(change, torch.cat(expected)) <= 1e-6, stem


# ---- we read what others write


def factors(weight, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out, inward, *kernel = weight.shape
    down = torch.randn(rank, inward, *kernel, generator=generator)
    return down, torch.randn(out, rank, *(1 for _ in kernel), generator=generator)


U, Q = BLOCK.replace(".", "_"), f"{BLOCK}.attn1.to_q"
T = "single_transformer_blocks.1.attn.to_q"
SPELLINGS = [  # of a UNet: how keys end, and what stands before
    (UNET, f"unet.{BLOCK}.attn1.processor.to_q_lora", "{}.down.weight", Q, "diffusers"),
    (
        UNET,
        f"unet.{BLOCK}.attn1.processor.to_out_lora",
        "{}.down.weight",
        f"{BLOCK}.attn1.to_out.0",
        "diffusers",
    ),
    (UNET, f"unet.{Q}.lora", "{}.down.weight", Q, "diffusers"),
    (UNET, f"unet.{Q}.lora_linear_layer", "{}.down.weight", Q, "diffusers"),
    (UNET, f"unet.{Q}", "{}.lora_down.weight", Q, "diffusers"),
    (UNET, f"{Q}", "{}.lora_A.weight", Q, "diffusers"),
    (UNET, f"unet._orig_mod.{Q}", "{}.lora_A.weight", Q, "diffusers"),
    (UNET, f"base_model.model.{Q}", "{}.lora_A.default.weight", Q, "peft"),
    (UNET, f"unet.base_model.model.{Q}", "{}.lora_A.weight", Q, "peft"),
    (UNET, f"lora_unet_{U}_attn1_to_q", "{}.lora_down.weight", Q, "kohya"),
    (UNET, f"lora_unet__orig_mod_{U}_attn1_to_q", "{}.lora_down.weight", Q, "kohya"),
    (UNET, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "{}.lora_down.weight", Q, "kohya"),
    (UNET, f"lycoris_{U}_attn1_to_q", "{}.lora_down.weight", Q, "kohya"),
    (
        UNET,
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "{}.lora_A.weight",
        Q,
        "original",
    ),
    (UNET, "lora_unet_input_blocks_0_0", "{}.lora_down.weight", "conv_in", "kohya"),
    (FLUX, f"transformer.{T}", "{}.lora_A.weight", T, "diffusers"),
    (FLUX, f"diffusion_model.{T}", "{}.lora_down.weight", T, "original"),
    (FLUX, f"lora_transformer_{T.replace('.', '_')}", "{}.lora_down.weight", T, "kohya"),
    (FLUX, f"lycoris_{T.replace('.', '_')}", "{}.lora_down.weight", T, "kohya"),
    (
        FLUX,
        "double_blocks.0.img_attn.proj",
        "{}.lora_A.weight",
        "transformer_blocks.0.attn.to_out.0",
        "original",
    ),
    (
        FLUX,
        "model.diffusion_model.double_blocks.0.txt_mlp.2",
        "{}.lora_A.weight",
        "transformer_blocks.0.ff_context.net.2",
        "original",
    ),
]
OTHER = {"lora_A": "lora_B", "lora_down": "lora_up", "down": "up"}


@pytest.mark.parametrize(("family", "stem", "ending", "layer", "form"), SPELLINGS)
def test_names_of_others(family, stem, ending, layer, form, unet, flux, tmp_path) -> None:
    model = unet if family == UNET else flux
    down, up = factors(weights(model)[layer])
    first = ending.format(stem)
    before, _, last = first.rpartition("lora_A" if "lora_A" in ending else "down")
    word = first[len(before) : len(first) - len(last)]
    tensors = {first: down, before + OTHER[word] + last: up, f"{stem}.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", model)
    (component,) = found.adapters
    assert found.format == form
    assert [(row.name, row.lora_alpha) for row in found[component].plan.rows] == [(layer, 4.0)]
    assert torch.equal(found[component].tensors[layer]["lora_A"], down)
    assert torch.equal(found[component].tensors[layer]["lora_B"], up)
    assert found.alpha_source == {component: {layer: "tensor"}}


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{}.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.1.self_attn.q_proj.lora_{}.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_{}.weight",
    ],
)
def test_names_of_text_encoders(stem, unet, tmp_path) -> None:
    model = encoder()
    (layer,) = [name for name in weights(model) if name.endswith("layers.1.self_attn.q_proj")]
    down, up = factors(weights(model)[layer])
    save_file({stem.format("down"): down, stem.format("up"): up}, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", {"unet": unet, "text_encoder": model}, missing_alpha=3)
    assert list(found.adapters) == ["text_encoder"]
    (row,) = found["text_encoder"].plan.rows
    assert (row.name, row.scale) == (layer, 1.5)
    torch.testing.assert_close(found["text_encoder"].delta(layer), 1.5 * up @ down)


def test_tucker_decompositions_are_multiplied_out(unet, tmp_path) -> None:
    """A layer that is a small convolution between two of one tap, as three convolutions compute it."""
    layer = "down_blocks.0.resnets.0.conv1"
    weight = weights(unet)[layer]
    out, inward, *kernel = weight.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    stem = f"lora_unet_{layer.replace('.', '_')}"
    down, mid, up = normal(3, inward, 1, 1), normal(2, 3, *kernel), normal(out, 2, 1, 1)
    w1_a, w1_b, t1, w2_a, w2_b, t2 = (
        normal(*s) for s in ((2, out), (2, inward), (2, 2, *kernel), (2, out), (2, inward), (2, 2, *kernel))
    )
    image = normal(1, inward, 6, 6)
    conv = nn.functional.conv2d
    expected = {"lora": 3 * conv(conv(conv(image, down), mid, padding=1), up)}
    one, two = (  # a tap at a time
        torch.stack([a.T @ core.flatten(2)[:, :, tap] @ b for tap in range(9)], -1)
        for a, b, core in ((w1_a, w1_b, t1), (w2_a, w2_b, t2))
    )
    expected["loha"] = conv(image, (3 * one * two).view(weight.shape), padding=1)
    files = {
        "lora": {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up},
        "loha": {
            "hada_w1_a": w1_a,
            "hada_w1_b": w1_b,
            "hada_t1": t1,
            "hada_w2_a": w2_a,
            "hada_w2_b": w2_b,
            "hada_t2": t2,
        },
    }
    first = normal(2, 2)
    low, high = (out // 2, inward // 2)
    a, b, core = normal(1, low), normal(1, high), normal(1, 1, *kernel)
    files["lokr"] = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    second = torch.stack([a.T @ core.flatten(2)[:, :, tap] @ b for tap in range(9)], -1).view(low, high, 3, 3)
    expected["lokr"] = conv(
        image, 6 * torch.einsum("ab,cdkl->acbdkl", first, second).reshape(weight.shape), padding=1
    )
    for algorithm, parts in files.items():
        path = tmp_path / f"{algorithm}.safetensors"
        save_file(
            {**{f"{stem}.{part}": t for part, t in parts.items()}, f"{stem}.alpha": torch.tensor(6.0)}, path
        )
        change = read(path, unet)["unet"].delta(layer)
        torch.testing.assert_close(conv(image, change, padding=1), expected[algorithm], rtol=1e-4, atol=1e-3)


def test_lokr_of_lycoris(unet, tmp_path) -> None:
    """Whole factors have a scale of 1, whatever alpha says; a factor that no setting gives is refused."""
    layer = Q
    out, inward = weights(unet)[layer].shape
    stem = f"lora_unet_{U}_attn1_to_q"
    for one, two, scale, rank in (((4, 4), (4, 4), 1, 3), ((2, 2), (8, 8), 1, 4), ((4, 4), None, 3, 1)):
        first = torch.randn(one)
        if two:
            second, tensors = torch.randn(two), {}
            tensors["lokr_w2"] = second
        else:
            a, b = torch.randn(out // 4, 1), torch.randn(1, inward // 4)
            second, tensors = a @ b, {"lokr_w2_a": a, "lokr_w2_b": b}
        tensors |= {"lokr_w1": first, "alpha": torch.tensor(3.0)}
        save_file({f"{stem}.{part}": one for part, one in tensors.items()}, tmp_path / "a.safetensors")
        found = read(tmp_path / "a.safetensors", unet)["unet"]
        assert found.plan[layer].rank == rank  # alpha, where that makes peft's factors whole
        change = found.delta(layer)
        torch.testing.assert_close(change, scale * torch.kron(first, second))
        with load(tmp_path / "a.safetensors", unet).handles["unet"] as handle:
            torch.testing.assert_close(handle.delta(layer), change)


# ---- stacked layers


def test_a_stacked_layer_is_cut_exactly(flux, tmp_path) -> None:
    """Its parts have the same A, the rows of B that are theirs, its rank and its alpha, to the bit."""
    width = weights(flux)["transformer_blocks.0.attn.to_q"].shape[0]
    down, up = torch.randn(4, width), torch.randn(3 * width, 4)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", flux)["transformer"]
    for i, layer in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{layer}"
        assert torch.equal(found.tensors[name]["lora_A"], down)
        assert torch.equal(found.tensors[name]["lora_B"], up[i * width : (i + 1) * width])
        assert (found.plan[name].rank, found.plan[name].lora_alpha) == (4, 2.0)
    save(found, tmp_path / "b.safetensors", "kohya", model=flux)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors), "and stacked again it is the same"


def test_parts_that_are_joined_have_their_ranks_again(flux, tmp_path) -> None:
    """Block by block, with zeros for a part without an adapter; what others use is left out of a part."""
    rules = {"**.to_k": None, "**.to_v": {"rank": 3, "lora_alpha": 9}}
    mine = adapter(flux, "transformer_blocks.0.attn.to_[qkv]", rank=2, lora_alpha=6, rules=rules)
    path = save(mine, tmp_path / "a.safetensors", "original", model=flux)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    held = load_file(path)
    up, width = held[f"{stem}.lora_B.weight"], weights(flux)["transformer_blocks.0.attn.to_q"].shape[0]
    assert float(held[f"{stem}.alpha"]) == 3 * 5
    assert not up[width : 2 * width].any()
    assert not up[:width, 2:].any()
    back = read(path, flux)["transformer"]
    assert back.plan.rows == mine.plan.rows
    assert all(
        torch.equal(back.tensors[n][p], t) for n, parts in mine.tensors.items() for p, t in parts.items()
    )


def test_shift_and_scale_stand_in_the_other_order_in_the_original(flux, tmp_path) -> None:
    mine = adapter(flux, "norm_out.linear", rank=2, lora_alpha=6)
    held = load_file(save(mine, tmp_path / "a.safetensors", "kohya", model=flux))
    up = held["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    own = mine.tensors["norm_out.linear"]["lora_B"]
    assert torch.equal(torch.cat(up.chunk(2)[::-1]), own)
    lokr = adapter(flux, "norm_out.linear", rank=2, algorithm="lokr")
    keys, _ = keys_of(save(lokr, tmp_path / "b.safetensors", "kohya", model=flux))
    assert all(key.startswith("lycoris_norm_out_linear.") for key in keys)


def test_kronecker_products_of_stacked_layers_are_not_cut(flux, tmp_path) -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{stem}.lokr_w1": torch.ones(3, 1), f"{stem}.lokr_w2": torch.ones(32, 32)}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"is of lokr on transformer_blocks.0.attn.to_q, .* which cannot be cut"
    ):
        read(tmp_path / "a.safetensors", flux)


def test_dora_of_a_part_that_adds_nothing(flux, tmp_path) -> None:
    """Its lengths are those of the weight; where they are others, a part without a product has them still."""
    mine = adapter(flux, "transformer_blocks.0.attn.to_q", rank=2, lora_alpha=6, algorithm="dora")
    path = save(mine, tmp_path / "a.safetensors", "kohya", model=flux)
    assert [row.name for row in read(path, flux)["transformer"].plan.rows] == [
        "transformer_blocks.0.attn.to_q"
    ]
    key = "lora_unet_double_blocks_0_img_attn_qkv.dora_scale"
    save_file({k: 2 * one if k == key else one for k, one in load_file(path).items()}, path)
    found = read(path, flux)["transformer"]
    for name in ("to_k", "to_v"):
        weight = weights(flux)[f"transformer_blocks.0.attn.{name}"]
        torch.testing.assert_close(found.delta(f"transformer_blocks.0.attn.{name}", weight), weight)
        assert found.plan[f"transformer_blocks.0.attn.{name}"].rank == 1


def test_an_adapter_of_two_scales_has_one_configuration(unet, tmp_path) -> None:
    """By alphas of its own; of two algorithms it has none."""
    one, two = (
        adapter(unet, f"{BLOCK}.attn1.{x}", rank=2, lora_alpha=6, rslora=x == "to_k")
        for x in ("to_q", "to_k")
    )
    rows, tensors = (*one.plan.rows, *two.plan.rows), {**one.tensors, **two.tensors}
    both = replace(one, plan=replace(one.plan, rows=rows), tensors=tensors)
    for form in ("diffusers", "peft"):
        path = save(both, tmp_path / (form if form == "peft" else "a.safetensors"), form, model=unet)
        assert worst(both, read(path, unet)["unet"], unet) <= 1e-6
    two = adapter(unet, f"{BLOCK}.attn1.to_k", rank=2, algorithm="loha")
    rows, tensors = (*one.plan.rows, *two.plan.rows), {**one.tensors, **two.tensors}
    both = replace(one, plan=replace(one.plan, rows=rows), tensors=tensors)
    with pytest.raises(
        ValueError, match=r"is of loha and lora .*a configuration of peft is of one: save it in"
    ):
        save(both, path, "peft", model=unet)
    path = save(both, tmp_path / "b.safetensors", "kohya", model=unet)
    with pytest.raises(ValueError, match="an adapter of peft is of one algorithm"):
        read(path, unet)


# ---- strengths, as other tools get them wrong


def test_alpha_that_is_not_saved_is_not_guessed(unet, tmp_path) -> None:
    """Trained at a scale of 3, a file of tensors alone is loaded by diffusers at 1."""
    mine = adapter(unet, f"{BLOCK}.attn1.to_[qk]", rank=2, lora_alpha=6)
    path = save(mine, tmp_path / "a.safetensors", model=unet)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(path), bare)
    theirs = build(UNET)
    theirs.load_lora_adapter(bare, prefix="unet", adapter_name="read")
    assert theirs.get_submodule(Q).scaling["read"] == 1.0
    assert read(path, unet)["unet"].plan[Q].scale == 3
    with pytest.raises(
        ValueError,
        match=r"bare.safetensors: the file says no alpha for 2 of 2 layers, 'unet.*pass missing_alpha='rank'",
    ):
        read(bare, unet)
    assert read(bare, unet, missing_alpha="rank")["unet"].plan[Q].scale == 1
    found = read(bare, unet, missing_alpha=6)
    assert found["unet"].plan[Q].scale == 3
    assert set(found.alpha_source["unet"].values()) == {"assumed"}


def test_some_alphas_are_not_those_of_the_others(unet, tmp_path) -> None:
    """Two of rank and alpha 2, one of rank 8 without: diffusers takes its alpha for 2, a quarter of it."""
    tensors = {}
    for seed, (part, rank) in enumerate((("q", 2), ("k", 2), ("v", 8))):
        down, up = factors(weights(unet)[Q if part == "q" else f"{BLOCK}.attn1.to_{part}"], rank, seed)
        stem = f"lora_unet_{U}_attn1_to_{part}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if part != "v":
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    pipe = tiny_pipeline("sd15")
    pipe.unet = build(UNET)
    pipe.load_lora_weights(path, adapter_name="read")
    layer = f"{BLOCK}.attn1.to_v"
    assert pipe.unet.get_submodule(layer).scaling["read"] == 2 / 8
    with pytest.raises(
        ValueError, match=r"no alpha for 1 of 3 layers, 'lora_unet_.*attn1_to_v.lora_down.weight'"
    ):
        read(path, unet)
    found = read(path, unet, missing_alpha="rank")
    assert [row.scale for row in found["unet"].plan.rows] == [1, 1, 1]
    assert found.alpha_source["unet"] == {Q: "tensor", f"{BLOCK}.attn1.to_k": "tensor", layer: "assumed"}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_each_alpha_is_that_of_its_layer(unet, tmp_path) -> None:
    """Of a UNet under kohya's names diffusers takes the commonest alpha for all: a scale of 2, not 5."""
    rules = {f"{BLOCK}.attn1.to_v": {"lora_alpha": 10}}
    mine = adapter(unet, f"{BLOCK}.attn1.to_[qkv]", rank=2, lora_alpha=4, rules=rules)
    path = save(mine, tmp_path / "a.safetensors", "kohya", model=unet)
    pipe = tiny_pipeline("sd15")
    pipe.unet = build(UNET)
    pipe.load_lora_weights(path, adapter_name="read")
    found = read(path, unet)["unet"].plan
    theirs = [pipe.unet.get_submodule(row.name).scaling["read"] for row in found.rows]
    assert theirs == [2, 2, 2]
    assert [row.scale for row in found.rows] == [2, 2, 5]


def test_mixed_ranks_without_alphas_are_one_scale_each(unet, tmp_path) -> None:
    tensors = {}
    for rank, part in ((2, "q"), (8, "k"), (2, "v")):
        down, up = factors(weights(unet)[f"{BLOCK}.attn1.to_{part}"], rank)
        tensors |= {
            f"unet.{BLOCK}.attn1.to_{part}.lora_A.weight": down,
            f"unet.{BLOCK}.attn1.to_{part}.lora_B.weight": up,
        }
    save_file(tensors, tmp_path / "a.safetensors")
    rows = read(tmp_path / "a.safetensors", unet, missing_alpha="rank")["unet"].plan.rows
    assert [(row.rank, row.scale) for row in rows] == [(2, 1), (8, 1), (2, 1)]


def test_names_of_compiled_models_are_those_of_the_models(tmp_path) -> None:
    """torch.compile names its module _orig_mod, which other tools saved and no other loader found."""
    ways = (
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.compile_repeated_blocks(backend="eager") or model,
    )
    sets = []
    for number, compiled in enumerate(ways):
        model = build(FLUX)
        handle = inject(compiled(model), plan(model, "flux/attention", rank=2, lora_alpha=6))
        sets.append([])
        for form in ("diffusers", "kohya", "original", "peft"):
            path = save(handle, tmp_path / f"{form}{number}{'' if form == 'peft' else '.safetensors'}", form)
            keys, words = keys_of(path / "adapter_model.safetensors" if form == "peft" else path)
            assert not any("_orig_mod" in text for text in (*keys, *words.values()))
            sets[-1].append(keys)
        assert set(read(path, compiled(build(FLUX))).adapters) == {"transformer"}
    assert all(one == other for one, other in pairwise(sets))


# ---- several networks, words and tables


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_text_encoders_in_one_file(form, unet, tmp_path) -> None:
    models = {
        "unet": unet,
        "text_encoder": encoder(),
        "text_encoder_2": encoder(transformers.CLIPTextModelWithProjection),
    }
    made = {
        name: adapter(
            model, "mid_block.**.to_q" if name == "unet" else "clip/attention", rank=2, lora_alpha=6
        )
        for name, model in models.items()
    }
    path = tmp_path / (form if form == "peft" else "a.safetensors")
    save(made, path, form, model=models)
    report = load(path, models)
    for name, handle in report.handles.items():
        assert worst(made[name], handle.adapter(), models[name]) <= 1e-6
        assert len(report.matched[name]) == len(made[name])
        handle.remove()
    with pytest.raises(
        ValueError, match=r"16 .*for no layer of unet, text_encoder: .*text_encoder_2|lora_te2"
    ):
        read(path, {name: models[name] for name in ("unet", "text_encoder")})
    found = read(path, {"unet": unet}, ignore=["text_encoder*.** | lora_te*.**"])
    assert list(found.adapters) == ["unet"]
    assert len(found.unmatched) == 2 * 8 * (3 if form == "kohya" else 2)


def test_a_pipeline_gives_its_networks(tmp_path) -> None:
    pipe = tiny_pipeline("sd15")
    made = {
        "unet": adapter(pipe.unet, "sd/attention", rank=2),
        "text_encoder": adapter(pipe.text_encoder, "clip/attention", rank=2),
    }
    path = save(made, tmp_path / "a.safetensors", "kohya", model=pipe)
    assert any(key.startswith("lora_te_text_model") for key in keys_of(path)[0]), (
        "a lone encoder has no number"
    )
    report = load(path, pipe, "style")
    assert set(report.handles) == {"unet", "text_encoder"}
    save_file({"vae.encoder.conv_in.lora_A.weight": torch.ones(2, 3, 3, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"keys are for no layer of (unet, text_encoder|text_encoder, unet): '"
    ):
        read(tmp_path / "b.safetensors", pipe)
    assert pipe.get_active_adapters() == ["style"]


def test_words_are_kept(unet, tmp_path) -> None:
    words = {"ss_tag_frequency": '{"cat": 3}', "author": "me"}
    mine = drawn(plan(unet, "mid_block.**.to_q", rank=2), metadata=words)
    path = save(mine, tmp_path / "a.safetensors", model=unet, metadata={"author": "you"})
    found = read(path, unet)["unet"]
    assert found.metadata == {**words, "author": "you"}
    with load(path, unet).handles["unet"] as handle:
        assert handle.adapter().metadata == found.metadata
    for form in ("kohya", "original"):
        written = keys_of(save(found, tmp_path / f"{form}.safetensors", form, model=unet))[1]
        assert written == {**found.metadata, "format": "pt"}
    with pytest.raises(ValueError, match="came with different words for 'author': say which by metadata="):
        save(
            {"unet": found, "transformer": mine},
            tmp_path / "b.safetensors",
            model={"unet": unet, "transformer": unet},
        )


def test_the_report_prints_as_a_table(unet, tmp_path) -> None:
    rules = {"mid_block.**": {"rank": 3, "lora_alpha": 12}}
    mine = adapter(unet, "**.attn1.to_q", rank=2, lora_alpha=4, rules=rules)
    report = load(save(mine, tmp_path / "a.safetensors", "kohya", model=unet), unet)
    assert repr(report) == (
        "component  layers    algorithm  rank          lora_alpha     alpha from\n"
        "unet       8 of 123  lora       2 (6), 3 (2)  4 (6), 12 (2)  tensor\n"
        "in the names of kohya"
    )
    assert "<td>8 of 123</td>" in report._repr_html_()
    report.handles["unet"].remove()


def test_settings_in_the_header_are_those_of_peft(unet, tmp_path) -> None:
    """By the name of the network, and each pattern a whole name."""
    rules = {Q: {"rank": 3, "lora_alpha": 1}}
    mine = adapter(unet, f"{BLOCK}.attn1.to_[qkv]", rank=2, lora_alpha=6, rules=rules)
    words = keys_of(save(mine, tmp_path / "a.safetensors", model=unet))[1]
    fields = json.loads(words["lora_adapter_metadata"])
    pattern = "^" + Q.replace(".", r"\.")
    targets = fields.pop("unet.target_modules")
    assert targets.count("|") == 2
    assert fields == {
        "unet.r": 2,
        "unet.lora_alpha": 6.0,
        "unet.rank_pattern": {pattern: 3},
        "unet.alpha_pattern": {pattern: 1.0},
        "unet.use_rslora": False,
        "unet.use_dora": False,
    }


# ---- written whole or not at all


def test_a_file_is_replaced_when_the_new_one_is_complete(unet, tmp_path, monkeypatch) -> None:
    import gendiff.lora.files.saving as saving

    mine = adapter(unet, "mid_block.**.to_q", rank=2)
    files = {form: tmp_path / name for form, name in (("kohya", "a.safetensors"), ("peft", "folder"))}
    for form, path in files.items():
        save(mine, path, form, model=unet)

    def content():
        return {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}

    before, whole = content(), saving._write

    def half(tensors, path, words):
        whole(tensors, path, words)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("no space left on device")

    other = drawn(mine.plan, seed=1)
    monkeypatch.setattr(saving, "_write", half)
    for form, path in files.items():
        with pytest.raises(OSError, match="no space"):
            save(other, path, form, model=unet)
        assert content() == before
    monkeypatch.undo()
    for form, path in files.items():
        save(other, path, form, model=unet)
        assert torch.equal(
            read(path, unet)["unet"].tensors[mine.plan.rows[0].name]["lora_A"],
            other.tensors[mine.plan.rows[0].name]["lora_A"],
        )
    assert content().keys() == before.keys(), "nothing is left beside them"


def test_a_precision_of_the_file(unet, tmp_path) -> None:
    mine = adapter(unet, "mid_block.**.to_q", rank=2, lora_alpha=5)
    path = save(mine, tmp_path / "a.safetensors", "kohya", model=unet, dtype=torch.bfloat16)
    assert {(key.endswith("alpha"), one.dtype) for key, one in load_file(path).items()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    large = drawn(mine.plan, size=1e6)
    with pytest.raises(ValueError, match=r"not finite in torch.float16: save in a wider dtype"):
        save(large, path, model=unet, dtype=torch.float16)
    assert read(path, unet)["unet"].plan.rows == mine.plan.rows
