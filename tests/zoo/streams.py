"""Tiny settings of image transformers that read a sequence of patches: Flux and its kin."""

from types import MappingProxyType

import torch

from tests.zoo.core import Tiny, grid, mask, noise

_T = torch.tensor([0.1, 0.7])
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_BOTH = _HEADS | {"num_layers": 2, "num_single_layers": 2}
_ROPE = {"axes_dims_rope": (4, 6, 6)}
_TEXT, _IMAGE = 3, 2  # kinds of tokens of Ideogram


def _sequences(channels: int, text: int, axes: int = 3) -> dict[str, torch.Tensor]:
    """Patches of an image of 4 by 6, a text of 5 tokens, and the coordinates of both."""
    return {
        "hidden_states": noise(2, 24, channels),
        "encoder_hidden_states": noise(2, 5, text),
        "timestep": _T,
        "img_ids": grid(4, 6, width=axes),
        "txt_ids": torch.zeros(5, axes),
    }


STREAMS = MappingProxyType(
    {
        "FluxTransformer2DModel": Tiny(
            _BOTH
            | _ROPE
            | {
                "in_channels": 8,
                "joint_attention_dim": 12,
                "pooled_projection_dim": 10,
                "guidance_embeds": True,
            },
            lambda: {
                **_sequences(8, 12),
                "pooled_projections": noise(2, 10),
                "guidance": torch.tensor([3.5, 2.0]),
            },
        ),
        "Flux2Transformer2DModel": Tiny(
            _BOTH
            | {
                "in_channels": 8,
                "joint_attention_dim": 12,
                "timestep_guidance_channels": 16,
                "axes_dims_rope": (4, 4, 4, 4),
            },
            lambda: {**_sequences(8, 12, axes=4), "guidance": torch.tensor([3.5, 2.0])},
        ),
        "Flux3Transformer2DModel": Tiny(
            _BOTH
            | {
                "in_channels": 8,
                "cond_in_channels": 8,
                "joint_attention_dim": 12,
                "timestep_channels": 16,
                "axes_dims_rope": (4, 4, 4, 4),
            },
            lambda: {
                **_sequences(8, 12, axes=4),
                "image_cond_hidden_states": noise(2, 8, 8),
                "image_cond_ids": torch.cat([torch.ones(8, 1), grid(2, 4, width=3)], dim=1),
            },
        ),
        "ChromaTransformer2DModel": Tiny(
            _BOTH
            | _ROPE
            | {
                "in_channels": 8,
                "joint_attention_dim": 12,
                "approximator_num_channels": 8,
                "approximator_hidden_dim": 16,
                "approximator_layers": 1,
            },
            lambda: _sequences(8, 12),
        ),
        "BriaTransformer2DModel": Tiny(
            _BOTH | _ROPE | {"in_channels": 8, "joint_attention_dim": 12},
            lambda: _sequences(8, 12),
        ),
        "BriaFiboTransformer2DModel": Tiny(
            _BOTH | _ROPE | {"in_channels": 8, "joint_attention_dim": 12, "text_encoder_dim": 10},
            lambda: {
                **_sequences(8, 12),
                "text_encoder_layers": [noise(2, 5, 10, seed=layer) for layer in range(4)],
            },
        ),
        "BriaFibo2Transformer2DModel": Tiny(
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "cap_feat_dim": 12,
                "injection_layer_ids": (1,),
                "perceiver_num_layers": 1,
                "min_num_gist_tokens": 4,
                "max_num_gist_tokens": 8,
                "gist_step": 4,
                "gist_min_text_len": 4,
                "gist_max_text_len": 16,
                "axes_dims": (4, 6, 6),
                "axes_lens": (64, 16, 16),
            },
            lambda: {
                "hidden_states": noise(2, 4, 8, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 2, 5, 12),
            },
        ),
        "LongCatImageTransformer2DModel": Tiny(
            _BOTH | _ROPE | {"in_channels": 8, "joint_attention_dim": 12, "pooled_projection_dim": 12},
            lambda: _sequences(8, 12),
        ),
        "OvisImageTransformer2DModel": Tiny(
            _BOTH | _ROPE | {"in_channels": 8, "out_channels": 8, "joint_attention_dim": 12},
            lambda: _sequences(8, 12),
        ),
        "Krea2Transformer2DModel": Tiny(
            _HEADS
            | _ROPE
            | {
                "in_channels": 8,
                "num_layers": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 40,
                "timestep_embed_dim": 16,
                "text_hidden_dim": 16,
                "num_text_layers": 3,
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 2,
                "text_intermediate_size": 24,
                "num_layerwise_text_blocks": 1,
                "num_refiner_text_blocks": 1,
            },
            lambda: {
                "hidden_states": noise(2, 24, 8),
                "encoder_hidden_states": noise(2, 5, 3, 16),
                "timestep": _T,
                "position_ids": torch.cat([torch.zeros(5, 3), grid(4, 6, width=3)]),
                "encoder_attention_mask": mask(5, 5, 4).bool(),
            },
        ),
        "Ideogram4Transformer2DModel": Tiny(
            _HEADS
            | {
                "in_channels": 8,
                "num_layers": 2,
                "intermediate_size": 40,
                "adaln_dim": 12,
                "llm_features_dim": 12,
                "mrope_section": (4, 2, 2),
            },
            lambda: {
                "hidden_states": noise(2, 29, 8),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 29, 12),
                "position_ids": torch.cat([torch.zeros(5, 3), grid(4, 6, width=3)]).expand(2, -1, -1),
                "segment_ids": torch.zeros(2, 29, dtype=torch.long),
                "indicator": torch.tensor([_TEXT] * 5 + [_IMAGE] * 24).expand(2, -1),
            },
        ),
        "QwenImageTransformer2DModel": Tiny(
            _HEADS
            | _ROPE
            | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12},
            lambda: {
                "hidden_states": noise(2, 24, 16),
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_hidden_states_mask": mask(5, 5, 4),
                "timestep": _T,
                "img_shapes": [[(1, 4, 6)]] * 2,
            },
        ),
        "QwenImage21Transformer2DModel": Tiny(
            _HEADS | _ROPE | {"in_channels": 8, "out_channels": 8, "num_layers": 2, "context_in_dim": 12},
            lambda: {
                "hidden_states": noise(2, 8 + 24, 8),  # an image to start from, of 2 by 4, and the noisy one
                "encoder_hidden_states": noise(2, 7, 12),
                "timestep": _T,
                "img_shapes": [[(1, 2, 4), (1, 4, 6)]] * 2,
                # a slot stands for 2 by 2 patches
                "img_mask": torch.tensor([0, 0, 1, 1, 0, 0, 0] + [1] * 6).bool().expand(2, -1),
            },
        ),
        "NucleusMoEImageTransformer2DModel": Tiny(
            _HEADS
            | _ROPE
            | {
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 5,  # all but the fourth are dense
                "num_key_value_heads": 1,
                "joint_attention_dim": 12,
                "num_experts": 4,
                "moe_intermediate_dim": 16,
                "capacity_factors": 2.0,
            },
            lambda: {
                "hidden_states": noise(2, 24, 16),
                "img_shapes": [(1, 4, 6)] * 2,
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_hidden_states_mask": mask(5, 5, 4).bool(),
                "timestep": _T,
            },
        ),
    }
)
