"""Builders of the families with a transformer that reads CLIP or T5: SD3, Flux, Wan, PixArt."""

from typing import Any

from torch import nn

from gendiff.testing import text
from gendiff.testing.pipelines.parts import CLIP_G, CLIP_L, LATENT, T5, vae


def sd3(diffusers: Any) -> Any:
    """Stable Diffusion 3: two CLIP encoders and T5, sixteen latent channels."""
    first, second, third = text.clip_tokenizer(), text.clip_tokenizer(pad="!"), text.t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(diffusers, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text.clip_encoder(first, width=CLIP_L, projected=True),
        tokenizer=first,
        text_encoder_2=text.clip_encoder(second, width=CLIP_G, projected=True, act="gelu"),
        tokenizer_2=second,
        text_encoder_3=text.t5_encoder(third, width=T5),
        tokenizer_3=third,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=LATENT,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5,
            caption_projection_dim=16,
            pooled_projection_dim=CLIP_L + CLIP_G,
            pos_embed_max_size=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(diffusers: Any) -> Any:
    """FLUX.1-dev: the network is given the guidance scale; the shift follows from the size of the image."""
    first, second = text.clip_tokenizer(), text.t5_tokenizer()
    return diffusers.FluxPipeline(
        vae=vae(diffusers, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text.clip_encoder(first, width=CLIP_L),
        tokenizer=first,
        text_encoder_2=text.t5_encoder(second, width=T5),
        tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5,
            pooled_projection_dim=CLIP_L,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def wan(diffusers: Any) -> Any:
    """Wan 2.1, text to video, with the statistics of the real latents (they are the defaults of its VAE)."""
    tokenizer = text.t5_tokenizer()
    encoder = text.t5_encoder(tokenizer, width=T5, multilingual=True)
    # a prompt is a few tokens among 512 of padding: at a gain of 1 it moves pixels by less than a grey level
    nn.init.constant_(encoder.encoder.final_layer_norm.weight, 16.0)
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=T5,
            freq_dim=16,
            ffn_dim=48,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def pixart(diffusers: Any) -> Any:
    """PixArt-Sigma: a network that also learned a variance, which its pipeline throws away."""
    tokenizer = text.t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        vae=vae(diffusers, scaling_factor=0.13025),
        text_encoder=text.t5_encoder(tokenizer, width=T5),
        tokenizer=tokenizer,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=LATENT,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=T5,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
    )
