"""What builders share: sizes, the VAE of Stable Diffusion and its successors, the UNet with attention."""

from typing import Any

import torch
from torch import nn

LATENT = 8  # default height and width of the latents: images of 64 by 64 pixels
CLIP_L, CLIP_G, T5 = 16, 24, 40  # widths of the text encoders; CLIP_L + CLIP_G <= T5, as 768 + 1280 <= 4096
LLM = 16  # width of the language models


def vae(diffusers: Any, latent_channels: int = 4, **latents: float) -> Any:
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


def unet(diffusers: Any, levels: str, **settings: Any) -> Any:
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


def scaled(*modules: nn.Module, by: float | int) -> None:
    """Multiply the weights of modules, where the usual ones leave a prompt no visible effect."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.mul_(by)
