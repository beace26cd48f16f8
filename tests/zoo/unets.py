"""Tiny settings of the UNet classes, of images, videos and audio."""

from types import MappingProxyType

import torch

from tests.zoo.core import Tiny, ids, noise

_CROSS = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
}
_T = torch.tensor([10.0, 700.0])


UNETS = MappingProxyType(
    {
        "UNet1DModel": Tiny(
            {
                "sample_size": 32,
                "block_out_channels": (16, 32, 64),  # a head has 32 channels
                "extra_in_channels": 32,
                "layers_per_block": 2,
            },
            lambda: {"sample": noise(2, 2, 32), "timestep": torch.tensor([0.1, 0.8])},
        ),
        "UNet2DModel": Tiny(
            {
                "sample_size": (8, 12),
                "block_out_channels": (16, 32),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                "attention_head_dim": 8,
                "num_class_embeds": 5,
            },
            lambda: {"sample": noise(2, 3, 8, 12), "timestep": _T, "class_labels": torch.tensor([1, 4])},
        ),
        "UNet2DConditionModel": Tiny(
            _CROSS
            | {
                "sample_size": (8, 12),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "attention_head_dim": 2,  # diffusers' name for the number of heads
                "transformer_layers_per_block": 2,
            },
            lambda: {"sample": noise(2, 4, 8, 12), "timestep": _T, "encoder_hidden_states": noise(2, 5, 12)},
        ),
        "UNet3DConditionModel": Tiny(
            _CROSS
            | {
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "attention_head_dim": 2,
            },
            lambda: {
                "sample": noise(2, 4, 3, 8, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 5, 12),
            },
        ),
        "UNetMotionModel": Tiny(
            _CROSS
            | {
                "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
                "num_attention_heads": 2,
                "motion_num_attention_heads": 2,
                "motion_max_seq_length": 4,
            },
            lambda: {
                "sample": noise(2, 4, 3, 8, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 5, 12).repeat_interleave(3, 0),  # a prompt for each frame
            },
        ),
        "UNetSpatioTemporalConditionModel": Tiny(
            {
                "block_out_channels": (32, 32),  # its norms have 32 groups
                "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                "layers_per_block": 1,
                "cross_attention_dim": 12,
                "num_attention_heads": 2,
                "num_frames": 3,
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24,
            },
            lambda: {
                "sample": noise(2, 3, 8, 8, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 5, 12),
                "added_time_ids": noise(2, 3),
            },
        ),
        "I2VGenXLUNet": Tiny(
            _CROSS
            | {
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "attention_head_dim": 2,
            },
            lambda: {
                "sample": noise(2, 4, 3, 8, 12),
                "timestep": _T,
                "fps": torch.tensor([7, 16]),
                "image_latents": noise(2, 4, 3, 8, 12, seed=1),
                "image_embeddings": noise(2, 12),
                "encoder_hidden_states": noise(2, 5, 12),
            },
        ),
        "Kandinsky3UNet": Tiny(
            {
                "time_embedding_dim": 32,
                "groups": 4,
                "attention_head_dim": 8,
                "layers_per_block": 2,
                "block_out_channels": (16, 16, 32, 32),
                "cross_attention_dim": 32,
                "encoder_hid_dim": 12,
            },
            lambda: {
                "sample": noise(2, 4, 16, 24),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_attention_mask": torch.ones(2, 5),
            },
        ),
        "StableCascadeUNet": Tiny(
            {
                "in_channels": 4,
                "out_channels": 4,
                "timestep_ratio_embedding_dim": 8,
                "conditioning_dim": 16,
                "block_out_channels": (16, 32),
                "num_attention_heads": (2, 2),
                "down_num_layers_per_block": (1, 2),
                "up_num_layers_per_block": (2, 1),
                "clip_text_in_channels": 12,
                "clip_text_pooled_in_channels": 10,
                "clip_image_in_channels": 14,
                "clip_seq": 2,
            },
            lambda: {
                "sample": noise(2, 4, 8, 12),
                "timestep_ratio": torch.tensor([0.1, 0.8]),
                "clip_text_pooled": noise(2, 1, 10),
                "clip_text": noise(2, 5, 12),
                "clip_img": noise(2, 1, 14),
            },
        ),
        "DreamLiteUNetModel": Tiny(
            _CROSS
            | {
                "sample_size": (8, 12),
                "block_out_channels": (16, 32, 32),
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            lambda: {"sample": noise(2, 4, 16, 24), "timestep": _T, "encoder_hidden_states": noise(2, 5, 12)},
        ),
        "UVit2DModel": Tiny(
            {
                "hidden_size": 32,
                "cond_embed_dim": 12,
                "micro_cond_encode_dim": 4,
                "micro_cond_embed_dim": 20,
                "encoder_hidden_size": 12,
                "vocab_size": 24,
                "codebook_size": 20,
                "in_channels": 16,
                "block_out_channels": 16,
                "num_res_blocks": 1,
                "downsample": True,
                "upsample": True,
                "block_num_heads": 2,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 40,
                "sample_size": 8,
            },
            lambda: {
                "input_ids": ids(24, 2, 8, 12),
                "encoder_hidden_states": noise(2, 5, 12),
                "pooled_text_emb": noise(2, 12),
                "micro_conds": noise(2, 5),
            },
        ),
    }
)
