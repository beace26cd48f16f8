"""Names in files: rows of the live model under original names, read back by diffusers' own converters."""

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as loras
from diffusers.loaders import single_file_utils as checkpoints
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import nn

from gendiff.lora import inject, plan
from gendiff.lora.naming import (
    Original,
    Rows,
    diffusers_names,
    kohya_names,
    kohya_prefix,
    original_names,
)
from gendiff.lora.naming.families import FAMILIES
from gendiff.lora.targets import targets_of
from tests.attention.models import FLUX, SD3, WAN
from tests.zoo import QUIET, ZOO, build

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in QUIET),
]
FLUX2, QWEN, Z, PIXART, SANA = (
    f"{one}Transformer2DModel" for one in ("Flux2", "QwenImage", "ZImage", "PixArt", "Sana")
)
WIDE = {  # diffusers' converters of Flux know one width only
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
}


def unet(**changes):
    """A UNet with blocks of either kind and an attention of two layers at the inner level."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            **{
                "block_out_channels": (4, 8, 8),
                "norm_num_groups": 2,
                "layers_per_block": 2,
                "cross_attention_dim": 6,
                "attention_head_dim": 2,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                **changes,
            }
        )


def sdxl(**changes):
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
        transformer_layers_per_block=(1, 2, 11),
        use_linear_projection=True,
        **changes,
    )


def meta(name, **changes):
    """One of the zoo without numbers, so that it may be wide."""
    with torch.device("meta"):
        return getattr(diffusers, name)(**{**ZOO[name].config, **changes})


def clip(projection=False, layers=2):
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5():
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


MODELS = {
    "sd": unet,
    "sdxl": sdxl,
    "sd3": lambda: meta(SD3),
    "flux": lambda: meta(FLUX, **WIDE),
    "flux2": lambda: meta(FLUX2),
    "wan": lambda: meta(WAN),
    "qwen": lambda: meta(QWEN),
    "z-image": lambda: build(Z),
    "pixart": lambda: build(PIXART),
    "sana": lambda: meta(SANA, guidance_embeds=False),
    "clip": clip,
    "t5": t5,
}


def numbered(model):
    """By live layer a column with a number for each row, of which no two of a model are the same."""
    found, count = {}, 0
    for target in targets_of(model):
        found[target.name] = torch.arange(count, count + target.shape[0], dtype=torch.float64)[:, None]
        count += target.shape[0]
    return found


def stacked(original, columns):
    """The weight of an original layer."""
    return torch.cat([columns[one.layer][one.start : one.stop] for one in original.rows])


class Given(dict):
    """A checkpoint with something under every name, for what is no layer."""

    def pop(self, key, *default):
        return super().pop(key, *default) if key in self else torch.zeros(6, 1)


def converted(model, convert, prefix="", **settings):
    """What diffusers makes of the weights and biases of a model under their original names."""
    columns, given = numbered(model), Given()
    biased = {t.name for t in targets_of(model) if t.module.bias is not None}
    for name, one in original_names(model).items():
        given[f"{prefix}{name}.weight"] = stacked(one, columns)
        if {rows.layer for rows in one.rows} <= biased:
            given[f"{prefix}{name}.bias"] = stacked(one, columns)[:, 0]
    return convert(given, **settings), columns, biased, given


CONVERTERS = {
    "sd3": (lambda: meta(SD3), "sd3"),
    "sd3 with one attention": (lambda: meta(SD3, dual_attention_layers=(), qk_norm=None), "sd3"),
    "flux": (lambda: meta(FLUX, **WIDE), "flux"),
    "flux without guidance": (
        lambda: meta(FLUX, **WIDE, guidance_embeds=False, num_layers=11, num_single_layers=1),
        "flux",
    ),
    "flux2": (lambda: meta(FLUX2), "flux2"),
    "wan": (lambda: meta(WAN), "wan"),
    "wan of text": (lambda: meta(WAN, image_dim=None, added_kv_proj_dim=None, num_layers=12), "wan"),
    "vace": (lambda: meta("WanVACETransformer3DModel"), "wan"),
    "chronoedit": (lambda: meta("ChronoEditTransformer3DModel"), "wan"),
    "skyreels": (lambda: meta("SkyReelsV2Transformer3DModel", inject_sample_info=False), "wan"),
    "z-image": (lambda: meta(Z), "z_image"),
    "sana": (lambda: meta(SANA, guidance_embeds=False), "sana"),
}


@pytest.mark.parametrize("case", CONVERTERS)
def test_original_names_are_those_that_diffusers_converts(case) -> None:
    """Every row of every weight and bias comes out where it was, and every layer has a counterpart."""
    make, name = CONVERTERS[case]
    kind = "transformer_to_diffusers" if name in ("wan", "sana") else "transformer_checkpoint_to_diffusers"
    got, columns, biased, left = converted(make(), getattr(checkpoints, f"convert_{name}_{kind}"))
    assert columns
    for layer, column in columns.items():
        assert torch.equal(got[f"{layer}.weight"], column), layer
        if layer in biased:
            assert torch.equal(got[f"{layer}.bias"], column[:, 0]), layer
    assert not left


UNETS = {
    "sd": unet,
    "sd2": lambda: unet(use_linear_projection=True, upcast_attention=True),
    "sdxl": sdxl,
    "upscaler": lambda: unet(class_embed_type="projection", projection_class_embeddings_input_dim=6),
    "no middle": lambda: unet(mid_block_type=None),
    "four levels of one layer": lambda: unet(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "one level of five": lambda: unet(
        block_out_channels=(4,),
        layers_per_block=5,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ),
}


@pytest.mark.parametrize("case", UNETS)
def test_unets_are_counted_as_diffusers_counts_them(case) -> None:
    model = UNETS[case]()
    got, columns, biased, _ = converted(
        model,
        checkpoints.convert_ldm_unet_checkpoint,
        prefix=checkpoints.LDM_UNET_KEY,
        config=dict(model.config),
    )
    for layer, column in columns.items():
        assert torch.equal(got[f"{layer}.weight"], column), layer
        if layer in biased:
            assert torch.equal(got[f"{layer}.bias"], column[:, 0]), layer


def test_names_in_the_wild() -> None:
    names = original_names(sdxl())
    assert names["input_blocks.4.1.transformer_blocks.1.attn2.to_k"].rows[0].layer == (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    )
    assert names["output_blocks.2.2.conv"] == Original(
        "output_blocks.2.2.conv", (Rows("up_blocks.0.upsamplers.0.conv", 0, 8),)
    )
    assert "output_blocks.1.1.conv" in original_names(UNETS["four levels of one layer"]())  # no attention
    assert names["label_emb.0.0"].rows[0].layer == "add_embedding.linear_1"
    flux = original_names(build(FLUX))
    assert flux["single_blocks.1.linear1"].rows == (
        *(Rows(f"single_transformer_blocks.1.attn.to_{one}", 0, 32) for one in "qkv"),
        Rows("single_transformer_blocks.1.proj_mlp", 0, 128),
    )
    swapped = (Rows("norm_out.linear", 32, 64), Rows("norm_out.linear", 0, 32))
    assert flux["final_layer.adaLN_modulation.1"].rows == swapped
    sd3 = original_names(build(SD3))
    modulations = [sd3[f"joint_blocks.{i}.context_block.adaLN_modulation.1"].rows for i in range(3)]
    assert [len(rows) for rows in modulations] == [1, 1, 2]  # the last has scale and shift only
    assert original_names(build(QWEN)).keys() == {target.name for target in targets_of(build(QWEN))}


def test_pixart_has_the_names_of_its_release() -> None:
    """By hand: diffusers' converter of PixArt is no part of the package."""
    blocks = {
        f"blocks.{i}.{name}": tuple(Rows(f"transformer_blocks.{i}.{part}", 0, rows) for part in parts)
        for i in range(2)
        for name, rows, *parts in (
            ("attn.qkv", 48, "attn1.to_q", "attn1.to_k", "attn1.to_v"),
            ("attn.proj", 48, "attn1.to_out.0"),
            ("cross_attn.q_linear", 48, "attn2.to_q"),
            ("cross_attn.kv_linear", 48, "attn2.to_k", "attn2.to_v"),
            ("cross_attn.proj", 48, "attn2.to_out.0"),
            ("mlp.fc1", 192, "ff.net.0.proj"),
            ("mlp.fc2", 48, "ff.net.2"),
        )
    }
    ends = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }
    names = {name: one.rows for name, one in original_names(build(PIXART)).items()}
    assert {name: names.pop(name)[0].layer for name in ends} == ends
    assert names == blocks


def test_sana_sprint_has_an_embedder_of_the_guidance() -> None:
    names = {name: one.rows[0].layer for name, one in original_names(build(SANA)).items()}
    assert names["cfg_embedder.mlp.2"] == "time_embed.guidance_embedder.linear_2"
    assert names["t_embedder.mlp.0"] == "time_embed.timestep_embedder.linear_1"


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("names", [original_names, kohya_names])
def test_every_row_of_a_model_stands_in_one_place(case, names) -> None:
    model = MODELS[case]()
    found = names(model)
    if names is kohya_names:
        assert not any("." in stem for stem in found)
        assert all(one.name.replace(".", "_") == stem for stem, one in found.items())
    else:
        assert all(one.name == name for name, one in found.items())
    columns = numbered(model)
    rows = torch.cat([stacked(one, columns) for one in found.values()]).sort(0).values
    assert torch.equal(rows, torch.cat(list(columns.values())))


def test_names_are_the_same_for_a_compiled_model_and_while_the_layers_carry_adapters() -> None:
    model = build(FLUX)
    before = original_names(model), kohya_names(model), diffusers_names(model)
    for one in (model, unet()):
        compiled = torch.compile(one, backend="eager")
        for names in (original_names, kohya_names, diffusers_names):
            assert names(compiled) == names(one)
    with inject(model, plan(model, "flux/attention+ff", rank=2)):
        assert (original_names(model), kohya_names(model), diffusers_names(model)) == before


# ---- kohya's names, by the loaders of diffusers


def files(model, prefix, down="lora_down", up="lora_up", names=kohya_names, alpha=True):
    """An adapter of rank 1 whose B numbers the rows, as such a file has it."""
    columns, state = numbered(model), {}
    for stem, one in names(model).items():
        state[f"{prefix}{stem}.{down}.weight"] = torch.ones(1, 1)
        state[f"{prefix}{stem}.{up}.weight"] = stacked(one, columns)
        if alpha:
            state[f"{prefix}{stem}.alpha"] = torch.tensor(1.0)
    return state, columns


def lost(state, columns):
    """The live layers to which not all their rows came."""
    return {
        layer
        for layer, column in columns.items()
        if not torch.equal(state.get(f"{layer}.lora_B.weight", column[:0]), column)
    }


def strip(state):
    return {key.removeprefix("transformer."): one for key, one in state.items()}


@pytest.mark.parametrize("make", [unet, sdxl, lambda: sdxl(layers_per_block=1)])
def test_diffusers_reads_kohya_names_of_unets(make) -> None:
    model = make()
    state, columns = files(model, "lora_unet_")
    if model.config.addition_embed_type:
        state = loras._maybe_map_sgm_blocks_to_diffusers(state, model.config)
    got, alphas = loras._convert_non_diffusers_lora_to_diffusers(state)
    got = convert_unet_state_dict_to_peft({key.removeprefix("unet."): one for key, one in got.items()})
    assert len(alphas) == len(columns)
    assert not lost(got, columns)


def test_diffusers_reads_kohya_names_of_flux() -> None:
    state, columns = files(meta(FLUX, **WIDE), "lora_unet_")
    assert not lost(strip(loras._convert_kohya_flux_lora_to_diffusers(state)), columns)


def test_diffusers_reads_names_of_flux2() -> None:
    """But for the last modulation, whose halves diffusers swaps in checkpoints and not in adapters."""
    model = meta(FLUX2)
    state, columns = files(model, "diffusion_model.", "lora_A", "lora_B", original_names, alpha=False)
    wrong = lost(strip(loras._convert_non_diffusers_flux2_lora_to_diffusers(state)), columns)
    assert wrong == {"norm_out.linear"}
    blocks = {key: one for key, one in files(model, "lora_unet_")[0].items() if "_blocks_" in key}
    wrong = lost(strip(loras._convert_kohya_flux2_lora_to_diffusers(blocks)), columns)
    assert wrong == {name for name in columns if "_blocks." not in name}


def test_diffusers_reads_names_of_wan() -> None:
    model = meta(WAN)
    state, columns = files(model, "diffusion_model.", "lora_A", "lora_B", original_names, alpha=False)
    known = {key: one for key, one in state.items() if "patch_embedding" not in key}  # all but this
    wrong = lost(strip(loras._convert_non_diffusers_wan_lora_to_diffusers(known)), columns)
    assert wrong == {"patch_embedding"}
    state, _ = files(model, "lora_unet_")
    blocks = {key: one for key, one in state.items() if "_blocks_" in key}
    wrong = lost(strip(loras._convert_musubi_wan_lora_to_diffusers(blocks)), columns)
    assert wrong == {name for name in columns if not name.startswith("blocks.")}


def test_diffusers_reads_names_of_qwen_image_and_z_image() -> None:
    state, columns = files(meta(QWEN), "lora_unet_")
    assert not lost(strip(loras._convert_non_diffusers_qwen_lora_to_diffusers(state)), columns)
    state, columns = files(meta(Z), "lora_unet_")
    wrong = lost(strip(loras._convert_non_diffusers_z_image_lora_to_diffusers(state)), columns)
    assert wrong == {name for name in columns if name.startswith("all_")}  # renamed in checkpoints only


@pytest.mark.parametrize("projection", [False, True])
def test_diffusers_reads_kohya_names_of_clip(projection) -> None:
    model = clip(projection)
    state, columns = files(model, "lora_te1_")
    got, _ = loras._convert_non_diffusers_lora_to_diffusers(state)
    level = "text_encoder." if projection else "text_encoder.text_model."  # as its loader does
    got = convert_state_dict_to_diffusers({key.removeprefix(level): one for key, one in got.items()})
    assert not lost(convert_state_dict_to_peft(got), columns)


def test_encoders_have_the_names_of_files_whatever_level_the_library_dropped() -> None:
    stems = {
        f"text_model_encoder_layers_{i}_{part}"
        for i in range(2)
        for part in (*(f"self_attn_{one}_proj" for one in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
    }
    assert kohya_names(clip()).keys() == stems
    assert kohya_names(clip(projection=True)).keys() == {*stems, "text_projection"}
    assert "encoder_block_1_layer_0_SelfAttention_q" in kohya_names(t5())
    assert "encoder_block_0_layer_1_DenseReluDense_wi_0" in kohya_names(t5())


# ---- prefixes


def prefixes(**components):
    return [kohya_prefix(name, model, components) for name, model in components.items()]


def test_prefixes_of_pipelines() -> None:
    small, big, text = clip(layers=1), clip(projection=True, layers=1), t5()
    assert prefixes(text_encoder=small, unet=unet()) == ["lora_te", "lora_unet"]
    assert prefixes(text_encoder=small) == ["lora_te"]
    assert prefixes(text_encoder=small, unet=sdxl()) == ["lora_te1", "lora_unet"]
    wrapped = nn.DataParallel(sdxl())
    assert prefixes(text_encoder=small, unet=wrapped) == ["lora_te1", "lora_unet"]
    assert prefixes(text_encoder=small, text_encoder_2=big) == ["lora_te1", "lora_te2"]
    three = prefixes(text_encoder=big, text_encoder_2=big, text_encoder_3=text, transformer=build(SD3))
    assert three == ["lora_te1", "lora_te2", "lora_te3", "lora_unet"]
    assert prefixes(text_encoder=small, text_encoder_2=text) == ["lora_te1", "lora_te3"]
    assert prefixes(text_encoder=small, transformer=build(FLUX)) == ["lora_te1", "lora_unet"]
    assert prefixes(text_encoder=text) == ["lora_te1"]
    assert prefixes(text_encoder=text, transformer=build(PIXART)) == ["lora_te1", "lora_unet"]


def test_parts_without_a_prefix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown part .* 'transformer_2'.* a file of its own"):
        prefixes(transformer_2=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"text_encoder is a UNet2DConditionModel, which is no text encoder"):
        prefixes(text_encoder=unet())


# ---- what is refused


def test_unknown_families_are_refused_by_name() -> None:
    for names in (original_names, kohya_names):
        with pytest.raises(ValueError, match=r"unknown model .* 'Sequential'.*'FluxTransformer2DModel'"):
            names(nn.Sequential(nn.Linear(2, 2)))

    class FluxTransformer(diffusers.FluxTransformer2DModel):
        """A model derived from a known one."""

    with torch.device("meta"):
        derived = FluxTransformer(**ZOO[FLUX].config)
    assert original_names(derived) == original_names(meta(FLUX))
    assert all(hasattr(diffusers, name) or hasattr(transformers, name) for name in FAMILIES)


def test_unets_of_other_blocks_have_no_original_names() -> None:
    odd = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(ValueError, match=r"this UNet has AttnDownBlock2D, AttnUpBlock2D"):
        original_names(odd)
    assert len(kohya_names(odd)) == len(targets_of(odd))


def test_layers_without_a_counterpart_are_left_out() -> None:
    """Such as those of image prompts, and halves of what is stacked."""
    model = build(FLUX)
    model.transformer_blocks[1].attn.to_k_ip = nn.Linear(2, 2)
    model.transformer_blocks[0].attn.to_v = nn.Identity()
    live = {rows.layer for one in original_names(model).values() for rows in one.rows}
    assert {target.name for target in targets_of(model)} - live == {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_k_ip",
    }


def test_names_that_meet_with_underscores_are_refused() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(1, 1), "a": nn.ModuleDict({"b": nn.Linear(1, 1)})})
    with pytest.raises(ValueError, match=r"'a_b' and 'a.b' have the same name with underscores, 'a_b'"):
        diffusers_names(model)
