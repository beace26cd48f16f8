"""A tiny pipeline of every model family: real classes, its own scheduler, random weights, no download.

Widths and numbers of blocks are small. What decides how code has to talk to a family is as in the released
models: the kinds of blocks and their order, the VAE's factor of 8 and its latent statistics, the tokenizers'
lengths and padding, the time ids, the scheduler's configuration.

The builders are given the library as an untyped argument, since it accepts more than its annotations say.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gendiff._checks import unknown
from gendiff.testing import text

if TYPE_CHECKING:  # importing gendiff.testing must not import diffusers, which takes seconds
    import diffusers

LATENT = 8  # default height and width of the latents: images of 64 by 64 pixels
CLIP_L, CLIP_G, T5 = 16, 24, 40  # widths of the text encoders; CLIP_L + CLIP_G <= T5, as 768 + 1280 <= 4096

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


def tiny_pipeline(name: str, *, seed: int = 0) -> "diffusers.DiffusionPipeline":  # pyright: ignore[reportPrivateImportUsage]
    """A pipeline of a real diffusers class that runs from a prompt, offline, in a fraction of a second.

    The weights are random but a function of the seed alone; torch's generators are left as they were.

    Args:
        name: one of `TINY_PIPELINES`.
        seed: seed of the weights, an integer.

    Returns:
        The pipeline, on the CPU and in torch's default dtype, in evaluation mode, its progress bar off.
        Images are 64 by 64 pixels by default (16 by 16 of "ddpm"); for Flux and Wan, whose pipelines have a
        default of their own, pass `height` and `width`, multiples of 16.

    Raises:
        ValueError: there is no pipeline of that name.

    >>> pipe = tiny_pipeline("sd15")
    >>> pipe("a red fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size
    (64, 64)
    """
    if name not in TINY_PIPELINES:
        raise ValueError(unknown("tiny pipeline", name, TINY_PIPELINES))
    import diffusers

    # the CPU's generator only: torch.manual_seed would re-seed those of all GPUs, which are not restored here
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        pipe = _BUILDERS[name](diffusers)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd15(
    diffusers: Any, kind: str = "StableDiffusionPipeline", scheduler: str = "PNDMScheduler", channels: int = 4
) -> Any:
    tokenizer = text.clip_tokenizer()
    return getattr(diffusers, kind)(
        vae=_vae(diffusers, scaling_factor=0.18215),
        text_encoder=text.clip_encoder(tokenizer, width=CLIP_L),
        tokenizer=tokenizer,
        unet=_unet(diffusers, "CCCD", in_channels=channels, cross_attention_dim=CLIP_L, attention_head_dim=2),
        scheduler=getattr(diffusers, scheduler).from_config(dict(SD_SCHEDULER)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(
    diffusers: Any, kind: str = "StableDiffusionXLPipeline", channels: int = 4, refiner: bool = False
) -> Any:
    """The base has two text encoders and six time ids, the refiner the second encoder and five time ids."""
    first, second = text.clip_tokenizer(), text.clip_tokenizer(pad="!")
    encoder = None if refiner else text.clip_encoder(first, width=CLIP_L)
    scheduler = dict(SD_SCHEDULER) | {"timestep_spacing": "leading", "interpolation_type": "linear"}
    facts = {"requires_aesthetics_score": refiner} if kind != "StableDiffusionXLPipeline" else {}
    return getattr(diffusers, kind)(
        vae=_vae(diffusers, scaling_factor=0.13025),
        text_encoder=encoder,
        text_encoder_2=text.clip_encoder(second, width=CLIP_G, projected=True, act="gelu"),
        tokenizer=None if refiner else first,
        tokenizer_2=second,
        unet=_unet(
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


def _sd3(diffusers: Any) -> Any:
    first, second, third = text.clip_tokenizer(), text.clip_tokenizer(pad="!"), text.t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(diffusers, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
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


def _flux(diffusers: Any) -> Any:
    """FLUX.1-dev: the network is given the guidance scale; the shift follows from the size of the image."""
    first, second = text.clip_tokenizer(), text.t5_tokenizer()
    return diffusers.FluxPipeline(
        vae=_vae(diffusers, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
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


def _wan(diffusers: Any) -> Any:
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


def _ddpm(diffusers: Any) -> Any:
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


def _vae(diffusers: Any, latent_channels: int = 4, **latents: float) -> Any:
    """Four levels, hence a factor of 8; the sixteen-channel ones have no convolution round the latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=8 * LATENT,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
        **latents,
    )


def _unet(diffusers: Any, levels: str, **settings: Any) -> Any:
    """`levels` has a letter a resolution, from the finest: C with cross-attention, D without."""
    down = {"C": "CrossAttnDownBlock2D", "D": "DownBlock2D"}
    up = {"C": "CrossAttnUpBlock2D", "D": "UpBlock2D"}
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(8, 16, 32, 32)[: len(levels)],
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=tuple(down[level] for level in levels),
        up_block_types=tuple(up[level] for level in reversed(levels)),
        **settings,
    )


_XL_INPAINT = "StableDiffusionXLInpaintPipeline"
_BUILDERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "sd15": _sd15,
        "sd15-inpaint": lambda lib: _sd15(lib, "StableDiffusionInpaintPipeline", "DDIMScheduler", channels=9),
        "sdxl": _sdxl,
        "sdxl-inpaint": lambda lib: _sdxl(lib, _XL_INPAINT, channels=9),
        "sdxl-inpaint-4": lambda lib: _sdxl(lib, _XL_INPAINT),
        "sdxl-refiner": lambda lib: _sdxl(lib, "StableDiffusionXLImg2ImgPipeline", refiner=True),
        "sd3": _sd3,
        "flux": _flux,
        "wan": _wan,
        "ddpm": _ddpm,
    }
)
TINY_PIPELINES: tuple[str, ...] = tuple(_BUILDERS)
