"""Tiny settings of what denoises neither images nor videos: sound, embeddings, proteins."""

from types import MappingProxyType

import torch
from diffusers.models import embeddings

from tests.zoo.core import Tiny, ids, mask, noise

_T, _STEP = torch.tensor([0.1, 0.7]), torch.tensor([10, 700])

SOUNDS = MappingProxyType(
    {
        "AceStepTransformer1DModel": Tiny(
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "in_channels": 12,
                "audio_acoustic_hidden_dim": 4,
                "sliding_window": 2,
                "encoder_hidden_size": 10,
            },
            lambda: {
                "hidden_states": noise(2, 12, 4),
                "timestep": _T,
                "timestep_r": torch.tensor([0.05, 0.5]),
                "encoder_hidden_states": noise(2, 5, 10),
                "context_latents": noise(2, 12, 8),
            },
        ),
        "LongCatAudioDiTTransformer": Tiny(
            {
                "dit_dim": 32,
                "dit_depth": 2,
                "dit_heads": 2,
                "dit_text_dim": 12,
                "latent_dim": 4,
                "ff_mult": 2.0,
            },
            lambda: {
                "hidden_states": noise(2, 12, 4),
                "encoder_hidden_states": noise(2, 5, 12),
                "encoder_attention_mask": mask(5, 5, 4).bool(),
                "timestep": _T,
                "attention_mask": mask(12, 12, 10).bool(),
                "latent_cond": noise(2, 12, 4, seed=1),
            },
        ),
        "StableAudioDiTModel": Tiny(
            {
                "sample_size": 12,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "num_key_value_attention_heads": 1,
                "cross_attention_dim": 16,
                "time_proj_dim": 16,
                "global_states_input_dim": 10,
                "cross_attention_input_dim": 12,
            },
            lambda: {
                "hidden_states": noise(2, 4, 12),
                "timestep": _STEP,
                "encoder_hidden_states": noise(2, 5, 12),
                "global_hidden_states": noise(2, 1, 10),
                "rotary_embedding": embeddings.get_1d_rotary_pos_embed(
                    8, 13, use_real=True, repeat_interleave_real=False
                ),
            },
        ),
        "StableAudio3DiTModel": Tiny(
            {
                "io_channels": 4,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "cond_token_dim": 12,
                "global_cond_dim": 10,
                "local_add_cond_dim": 6,
                "timestep_features_dim": 16,
                "ff_mult": 2.0,
                "num_memory_tokens": 3,
            },
            lambda: {
                "hidden_states": noise(2, 4, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 5, 12),
                "global_hidden_states": noise(2, 10),
                "local_add_cond": noise(2, 6, 12),
            },
        ),
        "MiniMaxMusic3Transformer1DModel": Tiny(
            {
                "in_channels": 4,
                "condition_dim": 12,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "ff_inner_dim": 40,
                "rotary_dim": 8,
                "fourier_embedding_dim": 16,
            },
            lambda: {
                "hidden_states": noise(2, 4, 12),
                "timestep": _T,
                "encoder_hidden_states": noise(2, 12, 12),
            },
        ),
        "MiniMaxMusic3RVQDepthDecoder": Tiny(
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "audio_vocab_size": 20,
                "num_codebooks": 3,
                "max_position_embeddings": 8,
            },
            lambda: {"inputs_embeds": noise(2, 6, 32)},
        ),
        "T5FilmDecoder": Tiny(
            {
                "input_dims": 4,
                "targets_length": 12,
                "d_model": 32,
                "num_layers": 2,
                "num_heads": 2,
                "d_kv": 16,
                "d_ff": 48,
            },
            lambda: {
                "decoder_input_tokens": noise(2, 12, 4),
                "decoder_noise_time": _T,
                "encodings_and_masks": [(noise(2, 5, 32), mask(5, 5, 4)), (noise(2, 6, 32), mask(6, 6, 3))],
            },
        ),
        "PriorTransformer": Tiny(
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "embedding_dim": 12,
                "num_embeddings": 5,
            },
            lambda: {
                "hidden_states": noise(2, 12),
                "timestep": _STEP,
                "proj_embedding": noise(2, 12, seed=1),
                "encoder_hidden_states": noise(2, 5, 12),
                "attention_mask": mask(5, 5, 4).bool(),
            },
        ),
        "RFD4ProteinaTransformer": Tiny(
            {
                "nlayers": 3,
                "token_dim": 32,
                "nheads": 2,
                "dim_cond": 16,
                "pair_repr_dim": 16,
                "latent_dim": 4,
                "token_type_emb_dim": 8,
                "cath_emb_dim": 8,
                "t_emb_dim": 8,
                "seq_sep_dim": 5,
                "xt_pair_dist_dim": 6,
                "tri_mult_c": 8,
                "num_token_types": 7,
                "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
                "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
                "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "molecule_idx_pair"),
            },
            lambda: {
                "bb_ca": noise(2, 7, 3),
                "local_latents": noise(2, 7, 4),
                "bb_ca_time": _T,
                "local_latents_time": torch.tensor([0.2, 0.6]),
                "padding_mask": mask(7, 7, 6).bool(),
                "token_type": ids(7, 2, 7),
                "conditioning": {
                    "is_in_context_conditioning": torch.zeros(2, 7, dtype=torch.bool),
                    "supports_local_latent": torch.ones(2, 7, dtype=torch.bool),
                    "molecule_iid": torch.tensor([[0] * 4 + [1] * 3] * 2),
                },
            },
        ),
    }
)
