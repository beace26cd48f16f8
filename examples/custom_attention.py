"""Attention of one's own: a processor on some layers of a UNet, checked, and the same idea on Flux.

    python examples/custom_attention.py --temperature 3   # tiny networks of random weights: a few seconds

Expected: the check passes; the latents of both change, and come back bit for bit.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from local_pipeline import arguments
from torch import Tensor

from gendiff.attention import Kind, Middleware, check_processor, project, register, set_processor, stack
from gendiff.testing import tiny_pipeline


@register("warm")
class Warm:
    """Scores divided by a temperature: above 1, a query attends to more of the text."""

    def __init__(self, temperature: float = 1.5) -> None:
        self.temperature = temperature

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x, context = hidden_states, encoder_hidden_states
        x = x if attn.spatial_norm is None else attn.spatial_norm(x, temb)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        x = x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in project(attn, x, context))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[-2], len(q))
            attention_mask = mask.view(len(q), attn.heads, -1, mask.shape[-1])
        scale = attn.scale / self.temperature
        out = F.scaled_dot_product_attention(q, k, v, attention_mask, scale=scale)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        out = out.transpose(1, 2).reshape(hidden_states.shape) if hidden_states.ndim == 4 else out
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class Warmer(Middleware):
    """The same for any family: the layer does the rest."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def on_qkv(self, site, context, q, k, v):
        return q / self.temperature, k, v


def draw(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe("a red fox", num_inference_steps=4, generator=noise, output_type="latent")[0]


def compare(pipe: Any, before: Tensor, attached: AbstractContextManager[Any]) -> None:
    with attached:
        moved = (draw(pipe) - before).abs().max()
        print(f"{type(pipe).__name__}: latents moved by {moved:.2g}")
    assert torch.equal(draw(pipe), before)  # the layers are as they were


if __name__ == "__main__":
    args = arguments(__doc__, temperature=1.5)
    pipe, flux = tiny_pipeline("sd15"), tiny_pipeline("flux")
    check_processor(Warm(1.0), pipe.unet, on=Kind.CROSS)  # at 1 it is plain attention
    check_processor("warm", pipe.unet, on=Kind.CROSS, exact=False)
    compare(pipe, draw(pipe), set_processor(pipe.unet, Warm(args.temperature), on=Kind.CROSS))
    with stack(flux.transformer) as layers:
        compare(flux, draw(flux), layers.add(Warmer(args.temperature)))
    print("both undone exactly")
