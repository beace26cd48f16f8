"""Tiny settings of video transformers, and of image editors that read frames."""

from types import MappingProxyType
from typing import Any

import torch

from tests.zoo.core import Tiny, mask, noise

_T, _STEP = torch.tensor([0.1, 0.7]), torch.tensor([10, 700])
_LAYERS = {"num_layers": 2, "num_attention_heads": 2}
_HEADS = _LAYERS | {"attention_head_dim": 16}
_IO = _HEADS | {"in_channels": 4, "out_channels": 4}


def _video(text: int = 12, channels: int = 4, timestep: torch.Tensor = _STEP) -> dict[str, Any]:
    """Three frames of 8 by 12, a text of 5 tokens and times."""
    return {
        "hidden_states": noise(2, channels, 3, 8, 12),
        "timestep": timestep,
        "encoder_hidden_states": noise(2, 5, text),
    }


def _frames_first(text: int = 12) -> dict[str, Any]:
    return {**_video(text), "hidden_states": noise(2, 3, 4, 8, 12)}


VIDEOS = MappingProxyType(
    {
        "AllegroTransformer3DModel": Tiny(
            _IO
            | {
                "attention_head_dim": 24,  # a third for each axis
                "cross_attention_dim": 48,
                "sample_height": 8,
                "sample_width": 12,
                "sample_frames": 3,
                "caption_channels": 12,
            },
            lambda: {**_video(), "encoder_attention_mask": mask(5, 5, 4)},
        ),
        "CogVideoXTransformer3DModel": Tiny(
            _IO
            | {
                "time_embed_dim": 8,
                "text_embed_dim": 12,
                "sample_width": 12,
                "sample_height": 8,
                "sample_frames": 9,
                "max_text_seq_length": 5,
            },
            lambda: _frames_first(),
        ),
        "ConsisIDTransformer3DModel": Tiny(
            _IO
            | {
                "num_attention_heads": 3,  # faces are given in two thirds of the width
                "time_embed_dim": 8,
                "text_embed_dim": 12,
                "sample_width": 12,
                "sample_height": 8,
                "sample_frames": 9,
                "max_text_seq_length": 5,
                "is_train_face": True,
                "cross_attn_interval": 1,
                "cross_attn_dim_head": 8,
                "cross_attn_num_heads": 2,
                "LFE_id_dim": 10,
                "LFE_vit_dim": 12,
                "LFE_depth": 2,
                "LFE_dim_head": 8,
                "LFE_num_heads": 2,
                "LFE_num_id_token": 2,
                "LFE_num_querie": 3,
                "LFE_output_dim": 32,
                "LFE_ff_mult": 2,
                "LFE_num_scale": 2,
            },
            lambda: {
                **_frames_first(),
                "id_cond": noise(2, 10),
                "id_vit_hidden": [noise(2, 4, 12, seed=scale) for scale in range(2)],
            },
        ),
        "CosmosTransformer3DModel": Tiny(
            _IO
            | {
                "attention_head_dim": 24,
                "text_embed_dim": 12,
                "adaln_lora_dim": 4,
                "max_size": (4, 8, 12),
                "concat_padding_mask": False,  # needs torchvision
                "use_crossattn_projection": True,
                "crossattn_proj_in_channels": 10,
                "encoder_hidden_states_channels": 12,
                "img_context_dim_in": 9,
                "img_context_num_tokens": 3,
                "img_context_dim_out": 48,
            },
            lambda: {
                "hidden_states": noise(2, 4, 3, 8, 12),
                "timestep": _T,
                "encoder_hidden_states": (noise(2, 5, 10), noise(2, 3, 9)),
                "fps": 16,
            },
        ),
        "EasyAnimateTransformer3DModel": Tiny(
            _IO
            | {
                "patch_size": 2,
                "sample_width": 12,
                "sample_height": 8,
                "time_embed_dim": 8,
                "text_embed_dim": 12,
                "mmdit_layers": 1,
            },
            lambda: _video(),
        ),
        "HunyuanVideoTransformer3DModel": Tiny(
            _IO
            | {
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": 12,
                "pooled_projection_dim": 10,
                "rope_axes_dim": (4, 6, 6),
            },
            lambda: {
                **_video(),
                "encoder_attention_mask": mask(5, 5, 4),
                "pooled_projections": noise(2, 10),
                "guidance": torch.tensor([6000.0, 3000.0]),
            },
        ),
        "HunyuanVideo15Transformer3DModel": Tiny(
            _IO
            | {
                "num_refiner_layers": 1,
                "text_embed_dim": 12,
                "text_embed_2_dim": 10,
                "image_embed_dim": 9,
                "rope_axes_dim": (4, 6, 6),
            },
            lambda: {
                **_video(timestep=_STEP.float()),
                "hidden_states": noise(2, 4, 3, 4, 6),
                "encoder_attention_mask": mask(5, 5, 4),
                "encoder_hidden_states_2": noise(2, 3, 10),
                "encoder_attention_mask_2": mask(3, 3, 2),
                "image_embeds": noise(2, 4, 9),
            },
        ),
        "HunyuanVideoFramepackTransformer3DModel": Tiny(
            _IO
            | {
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": 12,
                "pooled_projection_dim": 10,
                "rope_axes_dim": (4, 6, 6),
                "has_image_proj": True,
                "image_proj_dim": 9,
                "has_clean_x_embedder": True,
            },
            lambda: {
                **_video(),
                "encoder_attention_mask": mask(5, 5, 4),
                "pooled_projections": noise(2, 10),
                "image_embeds": noise(2, 3, 9),
                "indices_latents": torch.arange(7, 10),
                "guidance": torch.tensor([6000.0, 3000.0]),
                "latents_clean": noise(2, 4, 2, 8, 12),
                "indices_latents_clean": torch.tensor([0, 6]),
                "latents_history_2x": noise(2, 4, 2, 8, 12, seed=1),
                "indices_latents_history_2x": torch.tensor([4, 5]),
                "latents_history_4x": noise(2, 4, 4, 8, 12),
                "indices_latents_history_4x": torch.arange(4),
            },
        ),
        "JoyImageEditTransformer3DModel": Tiny(
            _LAYERS | {"in_channels": 4, "hidden_size": 32, "text_dim": 12, "rope_dim_list": [4, 6, 6]},
            lambda: _video(),
        ),
        "JoyImageEditPlusTransformer3DModel": Tiny(
            _LAYERS | {"in_channels": 4, "hidden_size": 32, "text_dim": 12, "rope_dim_list": [4, 6, 6]},
            lambda: {
                "hidden_states": noise(2, 24 + 8, 4, 1, 2, 2),  # patches of the image, then of a reference
                "timestep": _STEP,
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_hidden_states_mask": mask(5, 5, 4),
                "shape_list": [[(1, 4, 6), (1, 2, 4)]] * 2,
            },
        ),
        "LatteTransformer3DModel": Tiny(
            _IO
            | {
                "num_layers": 2,
                "cross_attention_dim": 32,
                "sample_size": 8,
                "patch_size": 2,
                "num_embeds_ada_norm": 10,
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "caption_channels": 12,
                "video_length": 3,
                "activation_fn": "gelu-approximate",
            },
            lambda: _video(),
        ),
        "LTXVideoTransformer3DModel": Tiny(
            _IO | {"cross_attention_dim": 32, "caption_channels": 12},
            lambda: {
                "hidden_states": noise(2, 3 * 24, 4),
                "timestep": _STEP,
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_attention_mask": mask(5, 5, 4),
                "num_frames": 3,
                "height": 4,
                "width": 6,
            },
        ),
        "MochiTransformer3DModel": Tiny(
            _IO
            | {
                "num_layers": 3,
                "pooled_projection_dim": 10,
                "text_embed_dim": 16,
                "time_embed_dim": 6,
                "max_sequence_length": 5,
            },
            lambda: {**_video(16), "encoder_attention_mask": mask(5, 5, 4)},
        ),
        "MotifVideoTransformer3DModel": Tiny(
            _IO
            | {
                "num_single_layers": 2,
                "num_decoder_layers": 1,
                "text_embed_dim": 12,
                "image_embed_dim": 9,
                "rope_axes_dim": (4, 6, 6),
                "enable_text_cross_attention_dual": True,
                "enable_text_cross_attention_single": True,
            },
            lambda: {
                **_video(),
                "encoder_attention_mask": mask(5, 5, 4),
                "image_embeds": noise(2, 3, 9),
            },
        ),
        "SanaVideoTransformer3DModel": Tiny(
            _IO
            | {
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 12,
                "sample_size": 8,
                "guidance_embeds": True,
                "rope_max_seq_len": 32,
            },
            lambda: {
                **_video(),
                "guidance": torch.tensor([4.5, 3.0]),
                "encoder_attention_mask": mask(5, 5, 4),
            },
        ),
        "TransformerTemporalModel": Tiny(
            _HEADS | {"in_channels": 16, "norm_num_groups": 4},
            lambda: {"hidden_states": noise(2 * 3, 16, 4, 6), "num_frames": 3},
        ),
        "Kandinsky5Transformer3DModel": Tiny(
            {
                "in_text_dim": 12,
                "in_text_dim2": 10,
                "time_dim": 16,
                "model_dim": 32,
                "ff_dim": 48,
                "num_text_blocks": 1,
                "num_visual_blocks": 2,
                "axes_dims": (4, 6, 6),
            },
            lambda: {
                "hidden_states": noise(2, 3, 8, 12, 4),
                "encoder_hidden_states": noise(2, 5, 12),
                "timestep": _STEP,
                "pooled_projections": noise(2, 10),
                "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(6)],
                "text_rope_pos": torch.arange(5),
            },
        ),
    }
)
