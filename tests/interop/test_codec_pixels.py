"""Pixels through a codec: the latents and the images of the pipelines' own autoencoders, to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff.interop.diffusers import codec_of
from gendiff.random import GeneratorRng, Rng
from gendiff.testing import TINY_PIPELINES, tiny_pipeline
from tests.interop.calls import PIPES, PROMPTS, Pipes, masks, pixels, run

# pipelines that encode a picture, made of the same components, with a method that draws from a generator
ENCODING = {
    "sd15": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
    "sd3": "StableDiffusion3InpaintPipeline",
    "flux": "FluxImg2ImgPipeline",
    "qwen": "QwenImageImg2ImgPipeline",
    "flux2": "Flux2Pipeline",
}
SIDES = {"wan": (16, 1, 8, 4), "flux2": (128, 4, 2), "sana": (32, 2, 1), "ddpm": (3, 64, 32)}
FOUR = ("sd15", "sd15-inpaint", "pix2pix", "sd2", "pixart")


@pytest.fixture
def pipes() -> Pipes:
    return PIPES


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODING)
def test_a_sample_of_the_latents_is_the_pipelines_own(pipes, name):
    import diffusers

    pipe = pipes[name]
    components = {key: part for key, part in pipe.components.items() if key != "safety_checker"}
    kind = getattr(diffusers, ENCODING[name])
    if name in ("sd15", "sd2"):
        components |= {"safety_checker": None, "requires_safety_checker": False}
    other = pipe if name == "flux2" else kind(**components)
    signed = 2 * pixels() - 1
    theirs = other._encode_vae_image(signed.unsqueeze(2) if name == "qwen" else signed, generator())
    ours, _ = codec_of(pipe).inputs(
        {"image": pixels(), "caption": PROMPTS}, None if name == "flux2" else GeneratorRng(generator())
    )  # flux2 takes the mean
    assert torch.equal(ours, theirs.squeeze(2) if name == "qwen" else theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_latents_are_the_normalised_mean_of_what_the_autoencoder_says(pipes, name):
    codec, vae = codec_of(pipes[name]), getattr(pipes[name], "vae", None)
    ours = codec.latents(pixels())
    assert tuple(ours.shape[1:]) == codec.shape(64, 32)
    expected = SIDES.get(name, (4 if name in FOUR or "sdxl" in name else 16, 8, 4))
    assert codec.shape(64, 32) == expected
    if vae is None:
        torch.testing.assert_close(ours, 2 * pixels() - 1)
        torch.testing.assert_close(codec.decode(ours), pixels())
        return
    signed = 2 * pixels() - 1
    encoded = vae.encode(signed.unsqueeze(2) if name in ("wan", "qwen") else signed)
    mean = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    torch.testing.assert_close(ours, by_hand(name, vae, mean).reshape(ours.shape), rtol=1e-6, atol=1e-6)


def by_hand(name: str, vae: Any, z: Tensor) -> Tensor:
    if name in ("wan", "qwen"):
        mean, std = (
            torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (z - mean) / std
    if name == "flux2":
        z = torch.nn.functional.pixel_unshuffle(z, 2)  # the same order: channel, row and column of the patch
        variance = vae.bn.running_var[:, None, None] + vae.config.batch_norm_eps
        return (z - vae.bn.running_mean[:, None, None]) / variance.sqrt()
    return (z - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def test_channel_statistics_in_the_place_of_a_shift(pipes):
    """As Playground 2.5, an SDXL, has them; the pipeline's own decode says what they mean."""
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(latents_mean=[-1.6, 1.7, 0.1, -1.5], latents_std=[8.4, 5.9, 5.3, 6.6])
    seen = run("sdxl", pipe)
    codec = codec_of(pipe)
    assert torch.equal(codec.decode(seen.latents), seen.images)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{key}"])[:, None, None] for key in ("mean", "std"))
    z = pipe.vae.encode(2 * pixels() - 1).latent_dist.mode()
    torch.testing.assert_close(codec.latents(pixels()), (z - mean) / std * pipe.vae.config.scaling_factor)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # by the pipeline itself
@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_is_run_in_float32_and_is_as_before():
    pipe = tiny_pipeline("sdxl").to(torch.float16)
    before = {key: value.clone() for key, value in pipe.vae.state_dict().items()}
    seen = run("sdxl", pipe)
    codec = codec_of(pipe)
    assert (seen.latents.dtype, seen.images.dtype) == (torch.float16, torch.float32)
    assert torch.equal(codec.decode(seen.latents), seen.images)
    assert codec.latents(pixels()).dtype == torch.float16
    after = pipe.vae.state_dict()
    assert all(
        torch.equal(value, after[key]) and after[key].dtype == torch.float16 for key, value in before.items()
    )
    plain = tiny_pipeline("flux").to(torch.float16)  # of another family, which does not
    assert codec_of(plain).decode(torch.zeros(1, 16, 8, 4)).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@torch.no_grad()
def test_in_bfloat16_it_encodes_in_float32_and_decodes_as_it_is():
    """As SDXL's pipelines have it; pixels are not rounded first, which makes no difference to these."""
    pipe, images = tiny_pipeline("sdxl-inpaint").to(torch.bfloat16), (pixels() * 128).round() / 128
    codec = codec_of(pipe)
    theirs = pipe._encode_vae_image((2 * images - 1).to(torch.bfloat16), generator())
    encoded = codec.pixels.encode(images)
    assert encoded["moments"].dtype == torch.float32
    ours = codec.pixels.x0(encoded, GeneratorRng(generator()))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert codec.decode(ours).dtype == torch.bfloat16


@torch.no_grad()
def test_clips_have_frames_and_one_frame_is_an_image(pipes):
    codec = codec_of(pipes["wan"])
    assert codec.shape(64, 32, frames=5) == (16, 2, 8, 4)
    clip = pixels()[:, :, None].expand(-1, -1, 5, -1, -1)
    assert codec.latents(clip).shape == (2, 16, 2, 8, 4)
    assert codec.decode(torch.zeros(1, 16, 2, 8, 4)).shape == (1, 3, 5, 64, 32)
    assert codec.decode(torch.zeros(1, 16, 1, 8, 4)).shape == (1, 3, 64, 32)
    assert codec.mask(masks()).shape == (2, 1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"clips have 1 \+ 4·n frames, got 4"):
        codec.shape(64, 32, frames=4)
    with pytest.raises(ValueError, match="has no frames"):
        codec_of(pipes["qwen"]).shape(64, 32, frames=5)


def test_a_mask_of_places_is_the_masked_part_of_each(pipes):
    mask = codec_of(pipes["sdxl-inpaint-4"]).mask(masks(1))
    assert mask.shape == (1, 1, 8, 4)
    # columns 8 … 20 of 32, rows 16 … 39 of 64: the place of columns 16 … 23 is masked to 5/8
    torch.testing.assert_close(mask[0, 0, 2], torch.tensor([0.0, 1.0, 0.625, 0.0]))
    torch.testing.assert_close(mask[0, 0, :, 1], torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0]))
    assert codec_of(pipes["flux2"]).mask(masks(1)).shape == (1, 1, 4, 2)


@torch.no_grad()
def test_encoding_is_deterministic_cacheable_and_consumes_what_it_has_a_use_for(pipes):
    codec = codec_of(pipes["sd15-inpaint"])
    batch = {"image": pixels(), "caption": PROMPTS, "mask": masks(), "source": pixels(), "id": ["a", "b"]}
    encoded = codec.encode(batch)
    assert set(encoded) == {"moments", "text", "channels", "source", "id"}  # this network edits nothing
    assert set(batch) == {"image", "caption", "mask", "source", "id"}
    assert all(value is encoded[key] for key, value in codec.encode(encoded).items())
    for key in ("moments", "text", "channels"):
        assert torch.equal(codec.encode(batch)[key], encoded[key])
    x0, cond = codec.inputs(encoded)
    again, same = codec.inputs(batch)
    assert torch.equal(x0, again)
    assert torch.equal(x0, codec.latents(pixels()))
    assert cond == same
    rng = [Rng(0, ids=["a", "b"]), Rng(0, ids=["b"])]
    both, alone = (
        codec.inputs(encoded, rng[0])[0],
        codec.inputs({k: v[1:] for k, v in encoded.items()}, rng[1])[0],
    )
    assert torch.equal(both[1:], alone)  # a sample of its own randomness
    assert not torch.equal(both, x0)
    assert "mask" in codec_of(pipes["sdxl-inpaint-4"]).encode(batch)


@torch.no_grad()
def test_what_stands_beside_x_t(pipes):
    codec = codec_of(pipes["sdxl-inpaint"])
    channels = codec.cond(PROMPTS, image=pixels(), mask=masks())["channels"]
    assert channels.shape == (2, 5, 8, 4)
    assert torch.equal(channels[:, :1], masks()[:, :, ::8, ::8])
    hidden = (2 * pixels() - 1) * (1 - masks())
    torch.testing.assert_close(channels[:, 1:], codec.latents(hidden / 2 + 0.5))
    null = codec.null(codec.cond(PROMPTS, image=pixels(), mask=masks()), "channels")["channels"]
    assert bool((null[:, 0] == 1).all())
    torch.testing.assert_close(
        null[:, 1:], codec.latents(torch.full((1, 3, 64, 32), 0.5)).expand(2, -1, -1, -1)
    )
    edit = codec_of(pipes["pix2pix"])
    cond = edit.cond(PROMPTS, source=pixels())
    expected = pipes["pix2pix"].vae.encode(2 * pixels() - 1).latent_dist.mode()  # without the scaling factor
    assert torch.equal(cond["channels"], expected)
    assert bool((edit.null(cond, "channels")["channels"] == 0).all())


def test_bad_pixels(pipes):
    codec, inpaint = codec_of(pipes["sd3"]), codec_of(pipes["sd15-inpaint"])
    for images, error, text in (
        (torch.rand(3, 64, 32), ValueError, r"images are \[B, C, H, W\], got \(3, 64, 32\)"),
        (torch.zeros(1, 3, 64, 32, dtype=torch.uint8), TypeError, "divide 8-bit values by 255"),
        (torch.full((1, 3, 64, 32), 255.0), ValueError, r"lie in \[0, 1\], got 255 … 255"),
        (torch.rand(1, 3, 72, 32), ValueError, "multiples of 16, got 72 by 32"),
        (torch.rand(0, 3, 64, 32), ValueError, "at least one sample"),
    ):
        with pytest.raises(error, match=text):
            codec.encode({"image": images})
    with pytest.raises(ValueError, match=r"masks are floating-point \[B, 1, H, W\], got torch.bool"):
        inpaint.encode({"mask": masks().bool(), "image": pixels()})
    with pytest.raises(ValueError, match=r"values of mask lie in \[0, 1\]"):
        inpaint.encode({"mask": -masks(), "image": pixels()})
    with pytest.raises(ValueError, match="no 'image' that it masks"):
        inpaint.encode({"mask": masks()})
    with pytest.raises(ValueError, match="mask and image are of one size"):
        inpaint.encode({"mask": masks()[:, :, :32], "image": pixels()})
    with pytest.raises(ValueError, match=r"'channels' is missing .* give 'image' and 'mask'"):
        inpaint.inputs({"image": pixels(), "caption": PROMPTS})
    with pytest.raises(ValueError, match="a batch needs 'image'"):
        codec.inputs({"caption": PROMPTS})


def test_a_pipeline_without_its_autoencoder_says_so():
    pipe = tiny_pipeline("sd15")
    pipe.vae = None
    codec = codec_of(pipe)
    for use in (lambda: codec.encode({"image": pixels()}), lambda: codec.decode(torch.zeros(1, 4, 8, 4))):
        with pytest.raises(ValueError, match="loaded without its autoencoder"):
            use()
    assert codec.cond(PROMPTS)["text"].shape == (2, 77, 16)
