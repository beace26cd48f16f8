"""The network: diffusers' U-Net with cross-attention to the words, as a backbone of `gendiff.Denoiser`."""

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from gendiff import Condition

SIZES = {  # channels at full, half and quarter resolution; blocks at each; heads of attention
    "small": ((16, 32, 32), 1, 2),  # 0.6 million parameters
    "base": ((128, 256, 256), 2, 4),  # 41 million
}


class Net(nn.Module):
    """Attention to the image and to the words at half and quarter resolution; padded words are masked.

    Args:
        size: "base", or "small" for a CPU.
        pixels: height and width of an image, a multiple of 4.
    """

    accepts = frozenset({"text", "text_mask"})

    def __init__(self, size: str = "base", pixels: int = 32) -> None:
        super().__init__()
        channels, layers, heads = SIZES[size]
        self.unet = UNet2DConditionModel(
            sample_size=pixels,
            in_channels=3,
            out_channels=3,
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=heads,  # diffusers' name for their number
            cross_attention_dim=384,
            norm_num_groups=16,
        )

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return self.unet(
            x_t,
            timestep,
            encoder_hidden_states=cond["text"].to(x_t.dtype),
            encoder_attention_mask=cond["text_mask"],
        ).sample
