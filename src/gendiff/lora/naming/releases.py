"""What the layers of each release are called in it, and in diffusers: data, checked by diffusers' converters.

Left is the original name, right are the layers of diffusers that it stacks; `{i}` is the number of a block.
"""

from gendiff.lora.naming.rows import Templates, layers

_QKV = "to_q to_k to_v"
_ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"


def _of(module: str, parts: str) -> str:
    return " ".join(f"{module}.{part}" for part in parts.split())


def _perceptron(module: str, first: str, second: str) -> dict[str, str]:
    """The two layers of an embedder of diffusers."""
    return {first: f"{module}.linear_1", second: f"{module}.linear_2"}


SD3: Templates = {
    **layers(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            **_perceptron("time_text_embed.timestep_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"),
            **_perceptron("time_text_embed.text_embedder", "y_embedder.mlp.0", "y_embedder.mlp.2"),
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    ),
    **layers(
        {
            "x_block.attn.qkv": _of("attn", _QKV),
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": _of("attn2", _QKV),
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": _ADDED,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
        "joint_blocks.{i}",
        "transformer_blocks.{i}",
    ),
}

_DOUBLE = {  # attention of a block of Flux and Flux 2
    "img_attn.qkv": _of("attn", _QKV),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": "attn.to_add_out",
}
_ENDS = {  # of Flux and Flux 2
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

FLUX: Templates = {
    **layers(
        {
            **_ENDS,
            **_perceptron("time_text_embed.timestep_embedder", "time_in.in_layer", "time_in.out_layer"),
            **_perceptron("time_text_embed.text_embedder", "vector_in.in_layer", "vector_in.out_layer"),
            **_perceptron(
                "time_text_embed.guidance_embedder", "guidance_in.in_layer", "guidance_in.out_layer"
            ),
        }
    ),
    **layers(
        {
            **_DOUBLE,
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
        },
        "double_blocks.{i}",
        "transformer_blocks.{i}",
    ),
    **layers(
        {
            "linear1": f"{_of('attn', _QKV)} proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        },
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
    ),
}

FLUX2: Templates = {
    **layers(
        {
            **_ENDS,
            **_perceptron("time_guidance_embed.timestep_embedder", "time_in.in_layer", "time_in.out_layer"),
            **_perceptron(
                "time_guidance_embed.guidance_embedder", "guidance_in.in_layer", "guidance_in.out_layer"
            ),
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        }
    ),
    **layers(
        {
            **_DOUBLE,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        "double_blocks.{i}",
        "transformer_blocks.{i}",
    ),
    **layers(
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
    ),
}

_WAN_BLOCK = {
    **{
        f"{original}.{end}": f"{live}.{part}"
        for original, live in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for end, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",  # of the blocks of VACE
    "after_proj": "proj_out",
}

WAN: Templates = {
    **layers(
        {
            "patch_embedding": "patch_embedding",
            "vace_patch_embedding": "vace_patch_embedding",
            **_perceptron("condition_embedder.time_embedder", "time_embedding.0", "time_embedding.2"),
            **_perceptron("condition_embedder.text_embedder", "text_embedding.0", "text_embedding.2"),
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "head.head": "proj_out",
        }
    ),
    **layers(_WAN_BLOCK, "blocks.{i}", "blocks.{i}"),
    **layers(_WAN_BLOCK, "vace_blocks.{i}", "vace_blocks.{i}"),
}

_Z_BLOCK = {
    "attention.qkv": _of("attention", _QKV),
    "attention.out": "attention.to_out.0",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
    "adaLN_modulation.0": "adaLN_modulation.0",
}

Z_IMAGE: Templates = {  # released in diffusers' naming; these are the names of ComfyUI, which stacks
    **layers(
        {
            "x_embedder": "all_x_embedder.2-1",
            "t_embedder.mlp.0": "t_embedder.mlp.0",
            "t_embedder.mlp.2": "t_embedder.mlp.2",
            "cap_embedder.1": "cap_embedder.1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    ),
    **layers(_Z_BLOCK, "noise_refiner.{i}", "noise_refiner.{i}"),
    **layers(_Z_BLOCK, "context_refiner.{i}", "context_refiner.{i}"),
    **layers(_Z_BLOCK, "layers.{i}", "layers.{i}"),
}

_CROSS = {  # attention of a block of PixArt and Sana
    "attn.qkv": _of("attn1", _QKV),
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
}
_CAPTION = _perceptron("caption_projection", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
_TIME = ("t_embedder.mlp.0", "t_embedder.mlp.2")

PIXART: Templates = {
    **layers(
        {
            **_CAPTION,
            "x_embedder.proj": "pos_embed.proj",
            **_perceptron("adaln_single.emb.timestep_embedder", *_TIME),
            **_perceptron(
                "adaln_single.emb.resolution_embedder", "csize_embedder.mlp.0", "csize_embedder.mlp.2"
            ),
            **_perceptron("adaln_single.emb.aspect_ratio_embedder", "ar_embedder.mlp.0", "ar_embedder.mlp.2"),
            "t_block.1": "adaln_single.linear",
            "final_layer.linear": "proj_out",
        }
    ),
    **layers(
        {**_CROSS, "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}, "blocks.{i}", "transformer_blocks.{i}"
    ),
}

_SANA: Templates = {
    **layers(
        {
            **_CAPTION,
            "x_embedder.proj": "patch_embed.proj",
            "t_block.1": "time_embed.linear",
            "final_layer.linear": "proj_out",
        }
    ),
    **layers(
        {
            **_CROSS,
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.point_conv.conv": "ff.conv_point",
        },
        "blocks.{i}",
        "transformer_blocks.{i}",
    ),
}
SANA: Templates = {**_SANA, **layers(_perceptron("time_embed.emb.timestep_embedder", *_TIME))}
SANA_SPRINT: Templates = {  # distilled, with an embedder of the guidance
    **_SANA,
    **layers(
        {
            **_perceptron("time_embed.timestep_embedder", *_TIME),
            **_perceptron("time_embed.guidance_embedder", "cfg_embedder.mlp.0", "cfg_embedder.mlp.2"),
        }
    ),
}
