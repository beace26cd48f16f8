"""Tiny settings of image transformers that read latents of a height and a width."""

from types import MappingProxyType
from typing import Any

import torch
from diffusers.models import embeddings

from tests.zoo.core import Tiny, ids, mask, noise

_T, _STEP = torch.tensor([0.1, 0.7]), torch.tensor([10, 700])
_LAYERS = {"num_layers": 2, "num_attention_heads": 2}
_HEADS = _LAYERS | {"attention_head_dim": 16}
_SIZES = {
    "original_size": torch.tensor([[64.0, 96.0]] * 2),
    "target_size": torch.tensor([[64.0, 96.0]] * 2),
    "crop_coords": torch.zeros(2, 2),
}


def _latents(text: int, channels: int = 4, timestep: torch.Tensor = _T) -> dict[str, Any]:
    """Latents of 8 by 12, a text of 5 tokens and times."""
    return {
        "hidden_states": noise(2, channels, 8, 12),
        "timestep": timestep,
        "encoder_hidden_states": noise(2, 5, text),
    }


IMAGES = MappingProxyType(
    {
        "DiTTransformer2DModel": Tiny(
            _HEADS | {"sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
            lambda: {
                "hidden_states": noise(2, 4, 8, 8),  # it takes squares only
                "timestep": _STEP,
                "class_labels": torch.tensor([1, 7]),
            },
        ),
        "PixArtTransformer2DModel": Tiny(
            _HEADS
            | {
                "num_attention_heads": 3,  # the sizes and the ratio share the width of the time
                "sample_size": 8,
                "cross_attention_dim": 48,
                "caption_channels": 12,
                "use_additional_conditions": True,
                "norm_num_groups": 4,
            },
            lambda: {
                **_latents(12, timestep=_STEP),
                "encoder_attention_mask": mask(5, 5, 4),
                "added_cond_kwargs": {
                    "resolution": _SIZES["target_size"],
                    "aspect_ratio": torch.full((2, 1), 1.5),
                },
            },
        ),
        "Transformer2DModel": Tiny(
            _HEADS | {"in_channels": 16, "cross_attention_dim": 12, "norm_num_groups": 4},
            lambda: {"hidden_states": noise(2, 16, 4, 6), "encoder_hidden_states": noise(2, 5, 12)},
        ),
        "DreamLiteTransformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 16,
                "cross_attention_dim": 12,
                "norm_num_groups": 4,
                "qk_norm": "rms_norm",  # but no fewer heads of keys, which only the UNet's processor knows
            },
            lambda: {"hidden_states": noise(2, 16, 4, 6), "encoder_hidden_states": noise(2, 5, 12)},
        ),
        "SD3Transformer2DModel": Tiny(
            _HEADS
            | {
                "num_layers": 3,
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "joint_attention_dim": 12,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 10,
                "pos_embed_max_size": 8,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
            },
            lambda: {**_latents(12, timestep=_STEP), "pooled_projections": noise(2, 10)},
        ),
        "AuraFlowTransformer2DModel": Tiny(
            {
                "sample_size": 8,
                "num_mmdit_layers": 2,
                "num_single_dit_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "joint_attention_dim": 12,
                "caption_projection_dim": 32,
                "pos_embed_max_size": 64,
            },
            lambda: _latents(12),
        ),
        "CogView3PlusTransformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 12,
                "time_embed_dim": 16,
                "condition_dim": 4,
                "pos_embed_max_size": 8,
                "sample_size": 8,
            },
            lambda: {**_latents(12, timestep=_STEP), **_SIZES},
        ),
        "CogView4Transformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 12,
                "time_embed_dim": 16,
                "condition_dim": 4,
                "sample_size": 8,
                "rope_axes_dim": (16, 16),
            },
            lambda: {**_latents(12, timestep=_STEP), **_SIZES},
        ),
        "GlmImageTransformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 12,
                "time_embed_dim": 16,
                "condition_dim": 4,
                "prior_vq_quantizer_codebook_size": 20,
            },
            lambda: {
                **_latents(12, timestep=_STEP),
                "prior_token_id": ids(20, 2, 24),
                "prior_token_drop": torch.zeros(2, 24, dtype=torch.bool),
                "target_size": _SIZES["target_size"],
                "crop_coords": _SIZES["crop_coords"],
            },
        ),
        "HunyuanDiT2DModel": Tiny(
            _HEADS
            | {
                "num_layers": 4,  # the last reads a skip
                "in_channels": 4,
                "patch_size": 2,
                "sample_size": 8,
                "hidden_size": 32,
                "cross_attention_dim": 12,
                "cross_attention_dim_t5": 16,
                "pooled_projection_dim": 10,
                "text_len": 5,
                "text_len_t5": 6,
            },
            lambda: {
                **_latents(12, timestep=_STEP.float()),
                "text_embedding_mask": mask(5, 5, 4),
                "encoder_hidden_states_t5": noise(2, 6, 16),
                "text_embedding_mask_t5": mask(6, 6, 3),
                "image_meta_size": torch.tensor([[64.0, 96, 64, 96, 0, 0]] * 2),
                "style": torch.zeros(2, dtype=torch.long),
                "image_rotary_emb": embeddings.get_2d_rotary_pos_embed(
                    16, ((0, 0), (4, 6)), (4, 6), output_type="pt"
                ),
            },
        ),
    }
)
