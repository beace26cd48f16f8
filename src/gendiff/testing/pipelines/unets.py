"""Builders of the families with a UNet: Stable Diffusion 1 and 2, SDXL, InstructPix2Pix, DDPM."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gendiff.testing import text
from gendiff.testing.pipelines.parts import CLIP_G, CLIP_L, unet, vae

# the file that Stable Diffusion ships, with the keys that its own scheduler does not read (PNDM: clip_sample)
SD_SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
)


def sd15(
    diffusers: Any, kind: str = "StableDiffusionPipeline", scheduler: str = "PNDMScheduler", channels: int = 4
) -> Any:
    """Stable Diffusion 1.5, and what was made of it by adding input channels."""
    tokenizer = text.clip_tokenizer()
    return getattr(diffusers, kind)(
        vae=vae(diffusers, scaling_factor=0.18215),
        text_encoder=text.clip_encoder(tokenizer, width=CLIP_L),
        tokenizer=tokenizer,
        unet=unet(diffusers, "CCCD", in_channels=channels, cross_attention_dim=CLIP_L, attention_head_dim=2),
        scheduler=getattr(diffusers, scheduler).from_config(dict(SD_SCHEDULER)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2(diffusers: Any) -> Any:
    """Stable Diffusion 2.1: predicts the velocity, reads OpenCLIP, has linear projections."""
    tokenizer = text.clip_tokenizer(pad="!")
    scheduler = dict(SD_SCHEDULER) | {"prediction_type": "v_prediction"}
    return diffusers.StableDiffusionPipeline(
        vae=vae(diffusers, scaling_factor=0.18215),
        text_encoder=text.clip_encoder(tokenizer, width=CLIP_L, act="gelu"),
        tokenizer=tokenizer,
        unet=unet(
            diffusers,
            "CCCD",
            cross_attention_dim=CLIP_L,
            attention_head_dim=(1, 2, 4, 4),
            use_linear_projection=True,
        ),
        scheduler=diffusers.DDIMScheduler.from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(
    diffusers: Any, kind: str = "StableDiffusionXLPipeline", channels: int = 4, refiner: bool = False
) -> Any:
    """The base has two text encoders and six time ids, the refiner the second encoder and five time ids."""
    first, second = text.clip_tokenizer(), text.clip_tokenizer(pad="!")
    encoder = None if refiner else text.clip_encoder(first, width=CLIP_L)
    scheduler = dict(SD_SCHEDULER) | {"timestep_spacing": "leading", "interpolation_type": "linear"}
    facts = {"requires_aesthetics_score": refiner} if kind != "StableDiffusionXLPipeline" else {}
    return getattr(diffusers, kind)(
        vae=vae(diffusers, scaling_factor=0.13025),
        text_encoder=encoder,
        text_encoder_2=text.clip_encoder(second, width=CLIP_G, projected=True, act="gelu"),
        tokenizer=None if refiner else first,
        tokenizer_2=second,
        unet=unet(
            diffusers,
            "DCCD" if refiner else "DCC",
            in_channels=channels,
            cross_attention_dim=CLIP_G if refiner else CLIP_L + CLIP_G,
            attention_head_dim=(1, 2, 4, 4) if refiner else (1, 2, 4),
            transformer_layers_per_block=1 if refiner else (1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + CLIP_G,
        ),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(scheduler),
        force_zeros_for_empty_prompt=not refiner,
        add_watermarker=False,  # otherwise a package that happens to be installed changes the pixels
        **facts,
    )


def ddpm(diffusers: Any) -> Any:
    """The unconditional network of the DDPM paper on the pixels of CIFAR-10."""
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=4,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return diffusers.DDPMPipeline(
        unet, diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    )
