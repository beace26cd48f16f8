"""Builders of the families that read a language model: FLUX.2, Qwen-Image, Z-Image, Lumina 2, Sana."""

from typing import Any

from torch import nn

from gendiff.testing import language
from gendiff.testing.pipelines.parts import LATENT, LLM, scaled, vae

GAIN = 30  # of what lets attention into the image: a prompt is a few tokens among those of an instruction


def flux2(diffusers: Any) -> Any:
    """FLUX.2-dev: latents in patches of 2 by 2, normalised by the running statistics of a batch norm."""
    tokenizer = language.qwen_tokenizer()  # in place of a processor, of which the chat template is used
    tokenizer.padding_side = "left"
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=8 * LATENT,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scaled(transformer.double_stream_modulation_img, transformer.single_stream_modulation, by=GAIN)
    nn.init.normal_(autoencoder.bn.running_mean, std=0.5)
    nn.init.uniform_(autoencoder.bn.running_var, 0.5, 2.0)
    return diffusers.Flux2Pipeline(
        vae=autoencoder,
        text_encoder=language.mistral3_encoder(tokenizer, width=8),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def qwen(diffusers: Any) -> Any:
    """Qwen-Image: the VAE of a video model, with the statistics of the real latents (its defaults)."""
    tokenizer = language.qwen_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=LLM,
        axes_dims_rope=(4, 6, 6),
    )
    scaled(*(block.img_mod[1] for block in transformer.transformer_blocks), by=GAIN)
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scaled(autoencoder.decoder.conv_out, by=4)
    return diffusers.QwenImagePipeline(
        vae=autoencoder,
        text_encoder=language.qwen_vl_encoder(tokenizer, width=LLM),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )


def z_image(diffusers: Any) -> Any:
    """Z-Image: lists in place of batches, times that run the other way, x0 - eps in place of eps - x0."""
    tokenizer = language.qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=LLM,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # they are made without values
        nn.init.normal_(token)
    return diffusers.ZImagePipeline(
        vae=vae(diffusers, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=language.qwen3_encoder(tokenizer, width=LLM),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2(diffusers: Any) -> Any:
    """Lumina-Image 2.0: a system prompt in front of every prompt but the empty one; times as for Z-Image."""
    tokenizer = language.gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        vae=vae(diffusers, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=language.gemma2_encoder(tokenizer, width=LLM),
        tokenizer=tokenizer,
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=LATENT,
            patch_size=2,
            in_channels=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=LLM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def sana(diffusers: Any) -> Any:
    """Sana: a deterministic autoencoder of factor 32, an instruction in front of every prompt."""
    tokenizer = language.gemma_tokenizer()
    widths = (8, 8, 16, 16, 32, 32)
    blocks = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    return diffusers.SanaPipeline(
        vae=diffusers.AutoencoderDC(
            latent_channels=32,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
            decoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
            scaling_factor=0.41407,
        ),
        text_encoder=language.gemma2_encoder(tokenizer, width=LLM),
        tokenizer=tokenizer,
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=32,
            out_channels=32,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=LLM,
            sample_size=LATENT // 4,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
