"""Tiny settings of Wan and the video transformers that were made of it."""

from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.zoo.core import Tiny, noise

_STEP = torch.tensor([10, 700])
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_IMAGE = {"image_dim": 10, "added_kv_proj_dim": 24}


def _video(frames: int = 3) -> dict[str, Any]:
    """Latents of 8 by 12, a text of 5 tokens and times."""
    return {
        "hidden_states": noise(2, 4, frames, 8, 12),
        "timestep": _STEP,
        "encoder_hidden_states": noise(2, 5, 12),
    }


WAN = MappingProxyType(
    {
        "WanTransformer3DModel": Tiny(
            _WAN | _IMAGE,
            lambda: {**_video(), "encoder_hidden_states_image": noise(2, 3, 10)},
        ),
        "ChronoEditTransformer3DModel": Tiny(
            _WAN | _IMAGE | {"rope_temporal_skip_len": 4},
            lambda: {**_video(), "encoder_hidden_states_image": noise(2, 3, 10)},
        ),
        "SkyReelsV2Transformer3DModel": Tiny(
            _WAN | _IMAGE | {"inject_sample_info": True},
            lambda: {
                **_video(),
                "encoder_hidden_states_image": noise(2, 3, 10),
                "fps": torch.tensor([0, 1]),
            },
        ),
        "WanVACETransformer3DModel": Tiny(
            _WAN | _IMAGE | {"vace_layers": [0, 1], "vace_in_channels": 6},
            lambda: {
                **_video(),
                "encoder_hidden_states_image": noise(2, 3, 10),
                "control_hidden_states": noise(2, 6, 3, 8, 12),
                "control_hidden_states_scale": torch.ones(2),
            },
        ),
        "AnyFlowTransformer3DModel": Tiny(
            _WAN | {"image_dim": 10},
            lambda: {
                **_video(),
                "hidden_states": noise(2, 3, 4, 8, 12),
                "timestep": _STEP[:, None].expand(-1, 3),
                "r_timestep": torch.tensor([5, 400])[:, None].expand(-1, 3),
                "encoder_hidden_states_image": noise(2, 3, 10),
            },
        ),
        "AnyFlowFARTransformer3DModel": Tiny(
            _WAN | {"image_dim": 10, "chunk_partition": (1, 2), "full_chunk_limit": 2},
            lambda: {
                **_video(),
                "hidden_states": noise(2, 3, 4, 8, 12),
                "timestep": _STEP[:, None].expand(-1, 3),
                "r_timestep": torch.tensor([5, 400])[:, None].expand(-1, 3),
                "encoder_hidden_states_image": noise(2, 3, 10),
                "chunk_partition": [1, 2],
            },
        ),
        "WanAnimateTransformer3DModel": Tiny(
            _WAN
            | _IMAGE
            | {
                "in_channels": 12,  # latents twice and four masks
                "latent_channels": 4,
                "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 4},
                "motion_encoder_size": 16,
                "motion_style_dim": 8,
                "motion_dim": 4,
                "motion_encoder_dim": 8,
                "face_encoder_hidden_dim": 16,
                "face_encoder_num_heads": 2,
                "inject_face_latents_blocks": 1,
            },
            lambda: {
                **_video(),
                "hidden_states": noise(2, 12, 3, 8, 12),
                "encoder_hidden_states_image": noise(2, 3, 10),
                "pose_hidden_states": noise(2, 4, 2, 8, 12),
                "face_pixel_values": noise(2, 3, 5, 16, 16),
            },
        ),
        "WanAnimate2Transformer3DModel": Tiny(
            {
                "text_len": 5,
                "in_dim": 6,
                "dim": 24,
                "ffn_dim": 32,
                "freq_dim": 16,
                "text_dim": 12,
                "out_dim": 4,
                "num_heads": 2,
                "num_layers": 2,
            },
            lambda: {
                "hidden_states": [noise(4, 3, 8, 12), noise(4, 3, 8, 12, seed=1)],
                "timestep": _STEP,
                "encoder_hidden_states": [noise(5, 12), noise(4, 12)],
                "condition_latents": [noise(2, 3, 8, 12), noise(2, 3, 8, 12, seed=1)],
                # the pass over the reference; the other one compiles its mask
                "kv_cache": WanAnimate2KVCache(2),
                "kv_cache_mode": "extract",
                "seq_len": 72,
                "encoder_hidden_states_image": noise(2, 3, 1280),
                "offset_grid_sizes": torch.tensor([[3, 4, 6]] * 2),
            },
        ),
        "HeliosTransformer3DModel": Tiny(
            {key: value for key, value in _WAN.items() if key != "rope_max_seq_len"}
            | {"rope_dim": (4, 4, 4), "is_amplify_history": True},
            lambda: {
                **_video(),
                "indices_hidden_states": torch.arange(9, 12).expand(2, -1),
                "latents_history_short": noise(2, 4, 2, 8, 12),
                "indices_latents_history_short": torch.arange(7, 9).expand(2, -1),
                "latents_history_mid": noise(2, 4, 3, 8, 12, seed=1),
                "indices_latents_history_mid": torch.arange(4, 7).expand(2, -1),
                "latents_history_long": noise(2, 4, 4, 8, 12),
                "indices_latents_history_long": torch.arange(4).expand(2, -1),
            },
        ),
    }
)
