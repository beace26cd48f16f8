"""The tiny pipelines run from a prompt, offline, and are what the family's models are in all but size."""

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gendiff.testing
from gendiff.testing import TINY_PIPELINES, language, text, tiny_pipeline

# diffusers hands a tensor to np.array in the set_timesteps of Euler and UniPC; torch's __array__ lacks `copy`
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

PROMPT, OTHER = "a red fox", "two dogs on the beach at night"
CLASSES = {
    "sd15": ("StableDiffusionPipeline", "PNDMScheduler"),
    "sd15-inpaint": ("StableDiffusionInpaintPipeline", "DDIMScheduler"),
    "pix2pix": ("StableDiffusionInstructPix2PixPipeline", "EulerAncestralDiscreteScheduler"),
    "sd2": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sdxl-inpaint": ("StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler"),
    "sdxl-inpaint-4": ("StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler"),
    "sd3": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "wan": ("WanPipeline", "UniPCMultistepScheduler"),
    "pixart": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler"),
    "flux2": ("Flux2Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "qwen": ("QwenImagePipeline", "FlowMatchEulerDiscreteScheduler"),
    "z-image": ("ZImagePipeline", "FlowMatchEulerDiscreteScheduler"),
    "lumina2": ("Lumina2Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "sana": ("SanaPipeline", "DPMSolverMultistepScheduler"),
    "ddpm": ("DDPMPipeline", "DDPMScheduler"),
}
SD = [name for name in CLASSES if (name.startswith("sd") and name != "sd3") or name == "pix2pix"]
PROMPTED = [name for name in CLASSES if name != "ddpm"]
CHANNELS = {"sd15-inpaint": 9, "sdxl-inpaint": 9, "pix2pix": 8}
SCALES = {"sd3": (1.5305, 0.0609), "sana": (0.41407, None)}
SCALES |= dict.fromkeys(("flux", "z-image", "lumina2"), (0.3611, 0.1159))
SCALES |= dict.fromkeys(("sd15", "sd15-inpaint", "pix2pix", "sd2"), (0.18215, None))


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: tiny_pipeline(name) for name in TINY_PIPELINES}


@pytest.fixture(scope="module")
def clip() -> Any:
    return text.clip_tokenizer()


@pytest.fixture(scope="module")
def t5() -> Any:
    return text.t5_tokenizer()


def picture() -> Image.Image:
    return Image.fromarray((np.arange(64 * 64 * 3) % 251).reshape(64, 64, 3).astype("uint8"))


def hole() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    return mask


def run(name: str, pipe: Any, prompt: str = PROMPT, **extra: Any) -> np.ndarray:
    """Pixels in [0, 1] of two steps, with the inputs that the pipeline of this name needs."""
    inputs: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(1),
    }
    if name != "ddpm":
        inputs |= {"prompt": prompt}
    if name == "wan":
        inputs |= {"height": 16, "width": 32, "num_frames": 5}
    elif name == "sdxl-refiner":
        inputs |= {"image": picture(), "strength": 1.0}
    elif name == "pix2pix":
        inputs |= {"image": picture()}
    elif "inpaint" in name:
        inputs |= {"image": picture(), "mask_image": hole(), "height": 64, "width": 64}
    elif name in ("flux", "flux2", "qwen", "z-image"):
        inputs |= {"height": 64, "width": 32}
    elif name in ("sana", "pixart"):
        inputs |= {"height": 64, "width": 64, "use_resolution_binning": False}
    if name == "qwen":
        inputs |= {"negative_prompt": ""}  # without one it says that it will not guide
    result = pipe(**inputs | extra)
    return result.frames if name == "wan" else result.images


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def calls(module: torch.nn.Module, pipe_run: Any) -> list[tuple[tuple, dict]]:
    """What `module` is called with during `pipe_run()`."""
    seen: list[tuple[tuple, dict]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    pipe_run()
    hook.remove()
    return seen


# ------------------------------------------------------------------------------------------------ they run


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_runs_end_to_end_and_depends_on_prompt_and_generator_alone(pipes, name):
    shapes = {"wan": (1, 5, 16, 32, 3), "ddpm": (1, 16, 16, 3)}
    shapes |= dict.fromkeys(("flux", "flux2", "qwen", "z-image"), (1, 64, 32, 3))
    first = run(name, pipes[name])
    assert first.shape == shapes.get(name, (1, 64, 64, 3))
    assert np.isfinite(first).all()
    assert first.std() > 0.05
    assert np.mean((first > 0) & (first < 1)) > 0.4
    np.testing.assert_array_equal(first, run(name, pipes[name]))
    assert np.abs(first - run(name, pipes[name], generator=torch.Generator().manual_seed(2))).max() > 0.05
    if name != "ddpm":  # well above a grey level, so that it shows in PIL images too
        assert np.abs(first - run(name, pipes[name], OTHER)).max() > 2 / 255


def test_the_default_is_a_pil_image_of_64_pixels(pipes):
    for name in ("sd15", "sd2", "sdxl", "sd3", "lumina2"):
        assert pipes[name](PROMPT, num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "qwen", "sana"])
def test_round_trips_through_a_local_folder(pipes, name, tmp_path):
    import diffusers

    pipes[name].save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipes[name])
    configs = [dict(pipe.scheduler.config, _use_default_values=None) for pipe in (loaded, pipes[name])]
    assert configs[0] == configs[1]
    for key in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        ours, theirs = (getattr(pipe, key, None) for pipe in (pipes[name], loaded))
        assert type(ours) is type(theirs)
        if ours is not None:
            options = {"padding": "max_length", "max_length": 20, "truncation": True}
            assert ours(OTHER, **options).input_ids == theirs(OTHER, **options).input_ids
            assert ours.model_max_length == theirs.model_max_length
    for key, module in modules(loaded).items():
        ours = modules(pipes[name])[key].state_dict()
        assert all(torch.equal(value, ours[part]) for part, value in module.state_dict().items())
        # tensors mapped from a file are not aligned in memory, which changes the last bit of matrix products
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    np.testing.assert_array_equal(run(name, loaded), run(name, pipes[name]))


# ------------------------------------------------------------------------------------- how they are made


def test_unknown_name_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown tiny pipeline 'sdlx'; did you mean 'sdxl'\? Accepted: 'sd"
    ):
        tiny_pipeline("sdlx")


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_weights_are_a_function_of_the_seed_and_nothing_global_moves(pipes, name):
    torch.manual_seed(123)
    # not Python's `random`: beartype, under which the tests run, draws from it
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(os.environ)
    again, other = tiny_pipeline(name), tiny_pipeline(name, seed=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), dict(os.environ))
    for key, module in modules(pipes[name]).items():
        same, changed = (dict(modules(pipe)[key].state_dict()) for pipe in (again, other))
        assert all(torch.equal(value, same[part]) for part, value in module.state_dict().items())
        assert any(not torch.equal(value, changed[part]) for part, value in module.state_dict().items())
        assert not any(part.training for part in module.modules())
        assert {(value.dtype, value.device.type) for value in module.parameters()} == {(torch.float32, "cpu")}


def test_made_in_under_a_second_without_the_network(pipes, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in TINY_PIPELINES:  # the classes are imported by now
        spent: list[float] = []
        while not spent or (spent[-1] >= 1.0 and len(spent) < 3):  # again, should the machine be busy
            start = time.perf_counter()
            tiny_pipeline(name)
            spent.append(time.perf_counter() - start)
        assert spent[-1] < 1.0, f"{name} took {spent} s"


def test_importing_the_package_loads_none_of_the_heavy_libraries():
    heavy = {"diffusers", "transformers", "tokenizers", "accelerate"}
    code = f"import sys, gendiff.testing; print({heavy} & set(sys.modules))"
    source = Path(gendiff.testing.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert result.stdout.strip() == "set()"


# --------------------------------------------------------------------------- facts of the released models


def test_classes_are_the_families_own(pipes):
    assert tuple(CLASSES) == TINY_PIPELINES
    assert {name: (type(p).__name__, type(p.scheduler).__name__) for name, p in pipes.items()} == CLASSES


@pytest.mark.parametrize("name", SD)
def test_stable_diffusion_has_its_noise_schedule(pipes, name):
    scheduler = pipes[name].scheduler
    # sqrt(alpha_bar_T) as Lin et al. 2024 tabulate it (table 1), and sigma_max as k-diffusion prints it
    assert scheduler.alphas_cumprod[-1].sqrt().item() == pytest.approx(0.068265, abs=1e-5)
    assert ((1 / scheduler.alphas_cumprod[-1] - 1) ** 0.5).item() == pytest.approx(14.6146, abs=1e-3)
    config = scheduler.config
    assert (config.steps_offset, config.set_alpha_to_one, config.clip_sample) == (1, False, False)
    assert config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    spacing, first = ("linspace", 999) if name == "pix2pix" else ("leading", 751)
    assert config.timestep_spacing == spacing
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.max().item() == first


def test_flow_schedules_are_shifted_as_released(pipes):
    sd3 = pipes["sd3"].scheduler
    sigmas = type(sd3).from_config(sd3.config).sigmas  # the table of training, which set_timesteps replaces
    assert (len(sigmas), sigmas[500].item()) == (1000, pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-6))
    # 64 by 32 pixels are 4 by 2 tokens; mu is linear between (256, 0.5) and (4096, 1.15)
    run("flux", pipes["flux"])
    mu = 0.5 + (8 - 256) * (1.15 - 0.5) / (4096 - 256)
    assert pipes["flux"].scheduler.sigmas.tolist() == pytest.approx(
        [1.0, 1 / (1 + math.exp(-mu)), 0.0], abs=1e-6
    )
    config = pipes["wan"].scheduler.config
    assert config.prediction_type == "flow_prediction"
    assert (config.use_flow_sigmas, config.flow_shift) == (True, 3.0)
    assert (config.solver_order, config.solver_type, config.final_sigmas_type) == (2, "bh2", "zero")


def test_ddpm_has_the_schedule_of_the_paper(pipes):
    scheduler = pipes["ddpm"].scheduler
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al. 2020, section 4
    torch.testing.assert_close(scheduler.betas.double(), expected)
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == ("fixed_large", True)


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTED)
def test_vae_compresses_with_the_released_factor_and_statistics(pipes, name):
    vae, clips = pipes[name].vae, name in ("wan", "qwen")
    images = torch.zeros(1, 3, 5, 32, 64) if clips else torch.zeros(1, 3, 32, 64)
    encoded = vae.encode(images)
    latents = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    channels = 4 if name in SD or name == "pixart" else 32 if name in ("sana", "flux2") else 16
    sides = (1, 2) if name == "sana" else (4, 8)
    assert tuple(latents.shape) == (1, channels, *((2,) if clips else ()), *sides)
    assert tuple(vae.decode(latents).sample.shape) == tuple(images.shape)
    if clips:
        assert (vae.config.latents_mean[0], vae.config.latents_std[0]) == (-0.7571, 2.8184)
        return
    assert pipes[name].vae_scale_factor == (32 if name == "sana" else 8)
    if name == "flux2":
        assert tuple(vae.bn.running_var.shape) == (128,)
        return
    assert (vae.config.scaling_factor, vae.config.get("shift_factor")) == SCALES.get(name, (0.13025, None))
    if name != "sana":
        assert (vae.quant_conv is None) == (vae.post_quant_conv is None) == (channels == 16)


@pytest.mark.parametrize("name", SD)
def test_input_channels_of_the_unet(pipes, name):
    unet, channels = pipes[name].unet, CHANNELS.get(name, 4)
    assert (unet.conv_in.in_channels, unet.conv_out.out_channels) == (channels, 4)
    (sample, *_), _ = calls(unet, lambda: run(name, pipes[name]))[0]
    assert tuple(sample.shape) == (3 if name == "pix2pix" else 2, channels, 8, 8)


def test_the_attention_layers_of_the_unets_are_where_the_released_ones_are(pipes):
    def blocks(name: str) -> list[str]:
        names = dict(pipes[name].unet.named_modules())
        return [key.removesuffix(".attn2") for key in names if key.endswith(".attn2")]

    first = [f"down_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in range(3) for j in range(2)]
    last = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in (1, 2, 3) for j in range(3)]
    assert sorted(blocks("sd15")) == sorted([*first, "mid_block.attentions.0.transformer_blocks.0", *last])
    for name, up in (("sdxl", (0, 1)), ("sdxl-refiner", (1, 2))):
        stages = {key.split(".attentions")[0] for key in blocks(name)}
        assert stages == {"down_blocks.1", "down_blocks.2", "mid_block", *(f"up_blocks.{i}" for i in up)}


@pytest.mark.parametrize(
    ("name", "negative", "positive"),
    [
        ("sdxl", [64, 64, 0, 0, 64, 64], [64, 64, 0, 0, 64, 64]),
        ("sdxl-inpaint", [64, 64, 0, 0, 64, 64], [64, 64, 0, 0, 64, 64]),
        ("sdxl-inpaint-4", [64, 64, 0, 0, 64, 64], [64, 64, 0, 0, 64, 64]),
        ("sdxl-refiner", [64, 64, 0, 0, 2.5], [64, 64, 0, 0, 6.0]),
    ],
)
def test_sdxl_is_told_sizes_crops_and_the_aesthetic_score(pipes, name, negative, positive):
    added = calls(pipes[name].unet, lambda: run(name, pipes[name]))[0][1]["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [negative, positive]
    # an empty prompt is all zeros for the base, and is encoded for the refiner
    assert bool((added["text_embeds"][0] == 0).all()) == (name != "sdxl-refiner")


def test_refiner_and_flux_have_what_sets_them_apart(pipes):
    refiner, flux = pipes["sdxl-refiner"], pipes["flux"]
    assert refiner.text_encoder is None
    assert refiner.tokenizer is None
    assert refiner.config.requires_aesthetics_score
    assert not pipes["sdxl-inpaint"].config.requires_aesthetics_score
    seen = calls(flux.transformer, lambda: run("flux", flux, guidance_scale=2.5))
    assert len(seen) == 2
    assert seen[0][1]["guidance"].tolist() == [2.5]
    assert seen[0][1]["hidden_states"].shape == (1, 8, 64)
    assert seen[0][1]["encoder_hidden_states"].shape[1] == 512


def test_a_language_model_reads_the_prompt_within_an_instruction(pipes):
    seen = calls(pipes["flux2"].transformer, lambda: run("flux2", pipes["flux2"]))
    assert seen[0][1]["encoder_hidden_states"].shape == (1, 512, 24)  # three layers side by side
    seen = calls(pipes["lumina2"].transformer, lambda: run("lumina2", pipes["lumina2"]))
    prompted, empty = (int(seen[i][1]["encoder_attention_mask"].sum()) for i in (0, 1))
    assert seen[0][1]["encoder_hidden_states"].shape[1] == 256
    assert empty == 1 < prompted  # which has a system prompt in front
    given = calls(pipes["sana"].transformer, lambda: run("sana", pipes["sana"]))[0][1]
    empty, prompted = given["encoder_attention_mask"].sum(1).tolist()
    assert given["encoder_hidden_states"].shape[1] == 300
    assert empty == 1 < prompted


def test_pixart_has_learned_its_variance(pipes):
    config = pipes["pixart"].transformer.config
    assert (config.in_channels, config.out_channels) == (4, 8)


# ------------------------------------------------------------------------------------------------- text

letters = st.text(alphabet="abcXYZ019 .,:'()-éüÖ", min_size=1).map(lambda s: " ".join(s.split())).filter(bool)


@settings(max_examples=60, deadline=None)
@given(prompt=letters)
def test_t5_ids_decode_to_the_text(t5, prompt):
    ids = t5(prompt).input_ids
    assert ids[-1] == 1
    assert t5.decode(ids, skip_special_tokens=True) == prompt


@settings(max_examples=60, deadline=None)
@given(prompt=letters.map(lambda s: s + " 雪 🦊"))
def test_clip_ids_decode_to_the_lower_cased_text(clip, prompt):
    ids = clip(prompt).input_ids
    decoded = clip.decode(ids, skip_special_tokens=True)
    # words and punctuation are tokens of their own, so spaces are not kept: neither does the real tokenizer
    assert decoded.replace(" ", "") == prompt.lower().replace(" ", "")


def test_clip_vocabulary_is_laid_out_as_the_real_one(clip):
    ids = clip.convert_tokens_to_ids
    # ids of OpenAI's vocabulary, whose first 512 do not depend on what it was trained on
    assert [ids(t) for t in ("!", "a", "~", "a</w>", ",</w>", ".</w>")] == [0, 64, 93, 320, 267, 269]
    last = len(clip) - 1
    assert (clip.bos_token_id, clip.eos_token_id) == (last - 1, last)
    assert len(clip("a red fox in the snow").input_ids) == 6 + 2  # common words are one token


def test_clip_pads_and_truncates_to_77_tokens(clip):
    filled = clip(PROMPT, padding="max_length").input_ids
    assert len(filled) == 77
    assert set(filled[4:]) == {clip.eos_token_id}
    second = text.clip_tokenizer(pad="!")(PROMPT, padding="max_length").input_ids
    assert second[:5] == filled[:5]
    assert set(second[5:]) == {0}
    long = clip("fox " * 100, truncation=True).input_ids
    assert len(long) == 77
    assert long[-1] == clip.eos_token_id
    with pytest.raises(ValueError, match="unknown padding token"):
        text.clip_tokenizer(pad="?")


def test_t5_special_ids_and_unknown_characters(t5):
    ids = t5.convert_tokens_to_ids
    assert [ids(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert (ids("<extra_id_0>"), ids("<extra_id_99>")) == (len(t5) - 1, len(t5) - 100)
    assert 2 in t5("雪").input_ids
    assert 2 not in t5("snow").input_ids
    assert t5("red", padding="max_length").input_ids == [ids("▁red"), 1] + [0] * 510


def test_learning_a_vocabulary_gives_the_same_one_every_time():
    for make in (text.clip_tokenizer, text.t5_tokenizer, language.qwen_tokenizer, language.gemma_tokenizer):
        assert make().backend_tokenizer.to_str() == make().backend_tokenizer.to_str()


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_encoder_pools_at_the_first_end_of_text(pad):
    tokenizer = text.clip_tokenizer(pad=pad)
    encoder = text.clip_encoder(tokenizer, width=16).eval()
    batch = tokenizer([PROMPT, OTHER], padding="max_length", return_tensors="pt").input_ids
    out = encoder(batch)
    ends = [len(tokenizer(prompt).input_ids) - 1 for prompt in (PROMPT, OTHER)]
    assert ends[0] != ends[1]
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[torch.arange(2), ends])
