"""Networks of one family that differ in what they read: distilled ones, other sizes, dtypes, siblings."""

from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from gendiff import Condition
from gendiff.interop.diffusers import PipelineBackbone, codec_of, denoiser_of, family_of
from gendiff.interop.diffusers.prompts import blended
from gendiff.interop.diffusers.rows import ROWS
from gendiff.testing import TINY_PIPELINES, language, tiny_pipeline
from tests.interop.calls import PROMPTS, pixels, run

# of which the inpainting ones are more of the same, and Lumina 2's network reads the mask of its text itself
ON_ONE_DEVICE = [name for name in TINY_PIPELINES if "inpaint" not in name and name != "lumina2"]


def changed(module: Any, **settings: Any) -> Any:
    """A network of the same configuration but for some settings, with other weights."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return type(module)(**config | settings).eval()


def check(name: str, pipe: Any, cond: Condition, **extra: Any) -> None:
    """The pipeline's scheduler is given what the backbone says."""
    family = family_of(pipe)
    backbone = PipelineBackbone(getattr(pipe, family.network.component), family)
    with torch.no_grad():
        for x, timestep, theirs in run(name, pipe, **extra).steps:
            ours = backbone(x, timestep.float().expand(len(x)), cond)
            assert torch.equal(ours.chunk(2, dim=1)[0] if name == "pixart" else ours, theirs)


def test_a_network_distilled_from_guided_ones_is_told_the_scale():
    pipe = tiny_pipeline("sd15")
    pipe.unet = changed(pipe.unet, time_cond_proj_dim=9)
    codec = codec_of(pipe)
    assert codec.accepts == {"text", "guidance"}
    assert codec.cond(PROMPTS)["guidance"].tolist() == [7.5, 7.5]
    check("sd15", pipe, codec.cond(PROMPTS, guidance=4.0), guidance_scale=4.0)


def test_schnell_is_told_no_scale():
    pipe = tiny_pipeline("flux")
    pipe.transformer = changed(pipe.transformer, guidance_embeds=False)
    codec = codec_of(pipe)
    assert codec.accepts == {"text", "text_pooled"}
    check("flux", pipe, codec.cond(PROMPTS))
    with pytest.raises(TypeError, match="unknown condition 'guidance'"):
        denoiser_of(pipe)(torch.zeros(2, 16, 8, 4), 0.5, codec.cond(PROMPTS).replace(guidance=torch.ones(2)))


def test_klein_reads_another_language_model_and_no_scale():
    pipe = tiny_pipeline("flux2")
    tokenizer = language.qwen_tokenizer()
    width = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=27,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=512,
        **width,
    )
    klein = diffusers.Flux2KleinPipeline(
        scheduler=pipe.scheduler,
        vae=pipe.vae,
        text_encoder=transformers.Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=changed(pipe.transformer, guidance_embeds=False),
        is_distilled=True,
    )
    klein.set_progress_bar_config(disable=True)
    codec = codec_of(klein)
    assert codec.accepts == {"text"}
    check("flux2", klein, codec.cond(PROMPTS))


def test_the_1024_pixel_pixart_alpha_is_told_resolution_and_aspect_ratio():
    sigma = tiny_pipeline("pixart")
    parts = {key: part for key, part in sigma.components.items() if key != "transformer"}
    network = changed(
        sigma.transformer,
        sample_size=128,
        use_additional_conditions=None,
        num_attention_heads=3,
        cross_attention_dim=24,
    )
    pipe = diffusers.PixArtAlphaPipeline(**parts, transformer=network)
    pipe.set_progress_bar_config(disable=True)
    assert network.use_additional_conditions
    check("pixart", pipe, codec_of(pipe).cond(PROMPTS))


def test_sana_with_times_of_another_scale():
    pipe = tiny_pipeline("sana")
    pipe.transformer = changed(pipe.transformer, timestep_scale=0.25)
    check("sana", pipe, codec_of(pipe).cond(PROMPTS))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "qwen", "z-image", "lumina2", "wan"])
def test_in_bfloat16_too(name):
    pipe = tiny_pipeline(name)
    pipe.to(torch.bfloat16)
    codec = codec_of(pipe)
    facts = {"size": (64, 32)} if name == "sdxl" else {"guidance": 2.5} if name == "flux" else {}
    cond = codec.cond(PROMPTS, **facts)
    family = family_of(pipe)
    backbone = PipelineBackbone(getattr(pipe, family.network.component), family)
    with torch.no_grad():
        seen = run(name, pipe)
        for x, timestep, theirs in seen.steps:
            ours = backbone(x.to(torch.bfloat16), timestep.float().expand(len(x)), cond)
            assert torch.equal(ours.to(theirs.dtype), theirs)
        assert torch.equal(codec.decode(seen.latents).float(), seen.images.float())


def test_wan_2_2_has_two_networks_of_which_one_has_to_be_chosen():
    pipe = tiny_pipeline("wan")
    pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match=r"changes from one network to another .* transformer=pipe"):
        denoiser_of(pipe)
    assert denoiser_of(pipe, transformer=pipe.transformer).backbone.module is pipe.transformer
    pipe = tiny_pipeline("wan")
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="a timestep for every token"):
        denoiser_of(pipe, transformer=pipe.transformer)


def test_times_are_rounded_where_the_pipelines_round_them():
    t, clocks = torch.linspace(0, 1000, 4001), {row.name: row.network.clock for row in ROWS}
    assert torch.equal(clocks["z-image"](t), (1000 - t) / 1000)
    assert torch.equal(clocks["lumina2"](t), 1 - t / 1000)
    assert not torch.equal(clocks["z-image"](t), clocks["lumina2"](t))  # so it matters
    for name in ("flux", "flux2", "qwen"):
        half = torch.zeros(1, dtype=torch.bfloat16)
        assert torch.equal(clocks[name](t), t / 1000)
        assert torch.equal(clocks[name](t, half), t.to(torch.bfloat16) / 1000)
    assert torch.equal(clocks["sd3"](t, half), t)


@torch.no_grad()
@pytest.mark.parametrize("name", ON_ONE_DEVICE)
def test_what_is_made_at_the_call_is_where_x_t_is(name):
    """On the meta device, where an operation with a tensor on the CPU is an error, as it is on a GPU."""
    pipe = tiny_pipeline(name)
    codec = codec_of(pipe)
    facts = {"source": pixels()} if name == "pix2pix" else {}
    cond = codec.cond() if name == "ddpm" else codec.cond(PROMPTS[:1] * 2, **facts)
    null = codec.null(cond) if codec.groups else cond
    family = family_of(pipe)
    backbone = PipelineBackbone(getattr(pipe, family.network.component), family)
    for module in (backbone, codec):
        nn.Module.to(module, "meta")
    x = torch.zeros(2, *codec.shape(64, 32), device="meta")
    for one in (cond, null):
        out = backbone(x, torch.zeros(2, device="meta"), one.to("meta"))
        assert out.device.type == "meta"
    assert codec.decode(x).device.type == "meta"
    encoded = {**null.to("meta"), **codec.encode({"image": pixels().to("meta")})}
    assert codec.inputs(encoded)[0].shape == x.shape
    if codec.groups:
        assert blended(cond.to("meta"), null.to("meta"), torch.ones(2, device="meta").bool()).rows == 2


@pytest.mark.parametrize("family", ROWS, ids=lambda row: row.name)
def test_the_pipelines_of_a_row_exist_and_encode_prompts_alike(family):
    kinds = [getattr(diffusers, name) for name in family.pipelines]
    if family.prompt is None:
        return
    known = [set(signature(getattr(kind, family.prompt.method)).parameters) for kind in kinds]
    for kind, names in zip(kinds, known, strict=True):
        odd = {"mask_feature", "kwargs"}  # of one PixArt, deprecated
        assert names - odd == known[0] - odd, kind
        assert kind.__init__.__annotations__.keys() >= {"vae", family.network.component, "scheduler"}
