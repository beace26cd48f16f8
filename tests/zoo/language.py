"""Tiny settings of image transformers that read a language model, and latents of a height and a width."""

from types import MappingProxyType
from typing import Any

import torch
from diffusers.models import embeddings

from tests.zoo.core import Tiny, ids, mask, noise

_T, _STEP = torch.tensor([0.1, 0.7]), torch.tensor([10, 700])
_LAYERS = {"num_layers": 2, "num_attention_heads": 2}
_HEADS = _LAYERS | {"attention_head_dim": 16}


def _latents(text: int, channels: int = 4, timestep: torch.Tensor = _T) -> dict[str, Any]:
    """Latents of 8 by 12, a text of 5 tokens and times."""
    return {
        "hidden_states": noise(2, channels, 8, 12),
        "timestep": timestep,
        "encoder_hidden_states": noise(2, 5, text),
    }


def _hidream() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timesteps": _STEP,
        "encoder_hidden_states_t5": noise(2, 5, 12),
        "encoder_hidden_states_llama3": noise(3, 2, 4, 10),
        "pooled_embeds": noise(2, 6),
    }


def _omnigen() -> dict[str, Any]:
    """A text of 5 tokens and a picture of 2 by 2 patches among them; the time is a token too."""
    length = 9 + 1 + 24
    return {
        "hidden_states": noise(2, 4, 8, 12),
        "timestep": _T,
        "input_ids": ids(20, 2, 9),
        "input_img_latents": [noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1)],
        "input_image_sizes": {0: [[2, 6]], 1: [[3, 7]]},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length).expand(2, -1),
    }


LANGUAGE = MappingProxyType(
    {
        "LuminaNextDiT2DModel": Tiny(
            _LAYERS
            | {
                "sample_size": 8,
                "hidden_size": 32,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "cross_attention_dim": 12,
            },
            lambda: {
                **_latents(12),
                "encoder_mask": mask(5, 5, 4),
                "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(16, 16, 16),
                "cross_attention_kwargs": {},
            },
        ),
        "Lumina2Transformer2DModel": Tiny(
            _LAYERS
            | {
                "sample_size": 8,
                "in_channels": 4,
                "hidden_size": 32,
                "num_refiner_layers": 1,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "axes_dim_rope": (4, 6, 6),
                "axes_lens": (32, 16, 16),
                "cap_feat_dim": 12,
            },
            lambda: {**_latents(12), "encoder_attention_mask": mask(5, 5, 4)},
        ),
        "SanaTransformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 12,
                "sample_size": 8,
                "guidance_embeds": True,
                "qk_norm": "rms_norm_across_heads",
            },
            lambda: {
                **_latents(12, timestep=_STEP),
                "hidden_states": noise(2, 4, 4, 6),
                "guidance": torch.tensor([4.5, 3.0]),
                "encoder_attention_mask": mask(5, 5, 4),
            },
        ),
        "ErnieImageTransformer2DModel": Tiny(
            _LAYERS
            | {
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": 2,
                "text_in_dim": 12,
                "rope_axes_dim": (4, 6, 6),
            },
            lambda: {
                "hidden_states": noise(2, 4, 8, 12),
                "timestep": _STEP,
                "text_bth": noise(2, 5, 12),
                "text_lens": torch.tensor([5, 4]),
            },
        ),
        "HiDreamImageTransformer2DModel": Tiny(
            _HEADS
            | {
                "patch_size": 2,
                "in_channels": 4,
                "num_single_layers": 2,
                "caption_channels": (12, 10),
                "text_emb_dim": 6,
                "axes_dims_rope": (8, 4, 4),
                "max_resolution": (12, 12),  # what is no square is padded to that many
                "llama_layers": (0, 1, 2, 0),
            },
            _hidream,
        ),
        "HunyuanImageTransformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 4,
                "out_channels": 4,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "patch_size": (2, 2),
                "guidance_embeds": True,
                "text_embed_dim": 12,
                "text_embed_2_dim": 10,
                "rope_axes_dim": (8, 8),
            },
            lambda: {
                **_latents(12, timestep=_STEP.float()),
                "encoder_attention_mask": mask(5, 5, 4),
                "encoder_hidden_states_2": noise(2, 3, 10),
                "encoder_attention_mask_2": mask(3, 3, 2),
                "guidance": torch.tensor([3500.0, 2000.0]),
            },
        ),
        "PRXTransformer2DModel": Tiny(
            {
                "in_channels": 4,
                "context_in_dim": 12,
                "hidden_size": 32,
                "num_heads": 2,
                "depth": 2,
                "axes_dim": [8, 8],
                "resolution_embeds": True,
            },
            lambda: {**_latents(12), "attention_mask": mask(5, 5, 4).bool()},
        ),
        "OmniGenTransformer2DModel": Tiny(
            _LAYERS
            | {
                "hidden_size": 32,
                "num_key_value_heads": 1,
                "intermediate_size": 40,
                "pad_token_id": 0,
                "vocab_size": 20,
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
                "pos_embed_max_size": 8,
                "time_step_dim": 16,
            },
            _omnigen,
        ),
        "ZImageTransformer2DModel": Tiny(
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 12,
                "axes_dims": [4, 6, 6],
                "axes_lens": [64, 16, 16],
            },
            lambda: {
                "x": [noise(4, 1, 8, 12), noise(4, 1, 12, 8)],
                "t": _T,
                "cap_feats": [noise(5, 12), noise(4, 12)],
            },
        ),
    }
)
