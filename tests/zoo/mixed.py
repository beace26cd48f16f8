"""Tiny settings of transformers of several streams: video with sound, with a camera, with a language."""

from types import MappingProxyType
from typing import Any

import torch

from tests.zoo.core import Tiny, grid, ids, mask, noise

_T, _STEP = torch.tensor([0.1, 0.7]), torch.tensor([10, 700])
_LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 12,
    "gated_attn": True,
    "audio_gated_attn": True,
}


def _camera(frames: int) -> torch.Tensor:
    """Poses of a camera that moves, and its focal lengths and centre."""
    poses = torch.eye(4).repeat(2, frames, 1, 1)
    poses[..., :3, 3] = 0.1 * noise(2, frames, 3)
    return torch.cat([poses.flatten(2), torch.tensor([8.0, 8.0, 6.0, 4.0]).expand(2, frames, -1)], dim=-1)


def _minimax() -> dict[str, Any]:
    """A text of 5 tokens, then three frames of 4 by 6 patches, then 4 tokens of sound."""
    video, length = 3 * 24, 5 + 3 * 24 + 4
    places = torch.cat([torch.zeros(5, 3), grid(3, 4, 6), grid(4, width=3)])
    return {
        "hidden_states": noise(2, video, 16),
        "audio_hidden_states": noise(2, 4, 6),
        "encoder_hidden_states": noise(2, 5, 12),
        "timestep": _T,
        "timestep_indices": torch.tensor([0] * (5 + video) + [1] * 4),
        "token_tags": torch.tensor([1] * 5 + [0] * video + [2] * 4),
        "position_ids": places,
        "video_indices": torch.arange(5, 5 + video),
        "audio_indices": torch.arange(5 + video, length),
        "text_indices": torch.arange(5),
    }


def _cosmos3() -> dict[str, Any]:
    """A text of 5 tokens, then three frames of 4 by 6 patches of which the first is given."""
    length, noisy = 5 + 3 * 24, torch.arange(1, 3)
    places = torch.cat([torch.arange(5.0)[:, None].expand(-1, 3), 5 + grid(3, 4, 6)]).T
    return {
        "vision_tokens": [noise(1, 4, 3, 8, 12)],
        "input_ids": ids(20, 5),
        "text_indexes": torch.arange(5),
        "position_ids": places,
        "und_len": 5,
        "sequence_length": length,
        "vision_token_shapes": [(3, 4, 6)],
        "vision_sequence_indexes": torch.arange(5, length),
        "vision_mse_loss_indexes": torch.arange(5 + 24, length),
        "vision_timesteps": torch.full((48,), 300.0),
        "vision_noisy_frame_indexes": [noisy],
    }


MIXED = MappingProxyType(
    {
        "LTX2VideoTransformer3DModel": Tiny(
            _LTX,
            lambda: {
                "hidden_states": noise(2, 3 * 24, 4),
                "audio_hidden_states": noise(2, 5, 4),
                "encoder_hidden_states": noise(2, 5, 12),
                "audio_encoder_hidden_states": noise(2, 5, 12, seed=1),
                "timestep": _STEP,
                "audio_timestep": _STEP,
                "encoder_attention_mask": mask(5, 5, 4),
                "audio_encoder_attention_mask": mask(5, 5, 4),
                "num_frames": 3,
                "height": 4,
                "width": 6,
                "audio_num_frames": 5,
            },
        ),
        "SanaWMLTX2RefinerTransformer3DModel": Tiny(
            _LTX,
            lambda: {
                "hidden_states": noise(2, 3 * 24, 4),
                "encoder_hidden_states": noise(2, 5, 12),
                "timestep": _STEP[:, None].expand(-1, 3 * 24),
                "video_rotary_emb": (noise(1, 72, 32), noise(1, 72, 32)),
                "encoder_attention_mask": mask(5, 5, 4),
            },
        ),
        "SanaWMTransformer3DModel": Tiny(
            {
                "in_channels": 4,
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "softmax_every_n": 2,
                "linear_head_dim": 16,
                "chunk_plucker_channels": 6,
                "chunk_plucker_post_attn_blocks": 2,
                "caption_channels": 12,
            },
            lambda: {
                "hidden_states": noise(2, 4, 3, 4, 6),
                "timestep": _STEP[:, None, None].expand(-1, 1, 3),
                "encoder_hidden_states": noise(2, 1, 5, 12),
                "encoder_attention_mask": mask(5, 5, 4),
                "camera_conditions": _camera(3),
                "chunk_plucker": noise(2, 6, 3, 4, 6),
            },
        ),
        "MiniMaxH3Transformer3DModel": Tiny(
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "hidden_size": 24,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "ffn_dim": 40,
                "in_channels": 4,
                "audio_in_channels": 6,
                "text_dim": 12,
                "freq_dim": 16,
                "time_embed_hidden_dim": 16,
                "time_embed_dim": 8,
                "rope_freq_dim": 2,
            },
            _minimax,
        ),
        "Kandinsky6Transformer3DModel": Tiny(
            {
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "in_text_dim": 12,
                "in_text_dim2": 10,
                "time_dim": 16,
                "model_dim": 32,
                "ff_dim": 48,
                "num_text_blocks": 1,
                "num_visual_blocks": 2,
                "axes_dims": (4, 6, 6),
                "in_audio_dim": 5,
                "out_audio_dim": 5,
                "ca_rope": True,
                "cross_gates": True,
            },
            lambda: {
                "hidden_states": noise(2, 3, 8, 12, 9),
                "encoder_hidden_states": noise(2, 5, 12),
                "pooled_projections": noise(2, 10),
                "timestep": _STEP,
                "audio_hidden_states": noise(2, 7, 5),
                "encoder_attention_mask": mask(5, 5, 4).bool(),
            },
        ),
        "Kandinsky6SRTransformer3DModel": Tiny(
            {
                "in_visual_dim": 2,
                "out_visual_dim": 4,
                "time_dim": 16,
                "model_dim": 32,
                "ff_dim": 48,
                "num_visual_blocks": 2,
                "axes_dims": (4, 6, 6),
                "nabla_window": (1, 1, 1),
            },
            lambda: {"hidden_states": noise(2, 2, 8, 16, 5), "timestep": _STEP},  # blocks of 8 by 8
        ),
        "Cosmos3OmniTransformer": Tiny(
            {
                "head_dim": 16,
                "hidden_size": 32,
                "intermediate_size": 48,
                "latent_channel": 4,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "patch_latent_dim": 16,
                "vocab_size": 20,
                "rope_axes_dim": (4, 2, 2),
            },
            _cosmos3,
        ),
    }
)
