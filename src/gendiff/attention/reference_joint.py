"""Reference processors of two streams in one attention: SD3 with the image first, Flux with the text."""

from typing import final, no_type_check

import torch
import torch.nn.functional as F  # the name under which a stack finds the kernel
from torch import Tensor

from gendiff.attention.project import project
from gendiff.attention.reference import dense_mask, join, split, through_output
from gendiff.attention.site import present


@final
class JointReferenceProcessor:
    r"""What an `Attention` of two streams computes in Stable Diffusion 3: the image before the text.

    .. math:: [y, z] = \text{softmax}\big([q_x, q_c][k_x, k_c]^\top \cdot \text{scale} + \text{mask}\big)
        [v_x, v_c]

    Each stream has projections, norms and an output layer of its own; y goes through `to_out`, z through
    `to_add_out` unless the layer is the last (`context_pre_only`), whose text nobody reads. Without a text,
    as in the second attention of a block with two (`attn2`), it is self-attention and returns one tensor.
    A mask is over the keys of both streams, image first; the processor of diffusers ignores it, and
    `attn.scale`.
    """

    @no_type_check  # a stack copies this function, and wants it bare
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """Attend; the arguments are those of diffusers. Returns (image, text), or the image alone."""
        text = encoder_hidden_states
        q, k, v = project(attn, hidden_states)
        head_dim = q.shape[-1] // attn.heads
        q, k, v = split(q, head_dim, attn.norm_q), split(k, head_dim, attn.norm_k), split(v, head_dim)
        if text is not None:
            more_q, more_k, more_v = project(attn, text, added=True)
            q = torch.cat([q, split(more_q, head_dim, attn.norm_added_q)], dim=2)
            k = torch.cat([k, split(more_k, head_dim, attn.norm_added_k)], dim=2)
            v = torch.cat([v, split(more_v, head_dim)], dim=2)
        mask = dense_mask(attention_mask, attn.heads, q, k)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=attn.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        out = join(out)
        if text is None:
            return through_output(attn, out)
        image, text = out.split([hidden_states.shape[1], text.shape[1]], dim=1)
        if present(attn, "to_add_out"):
            text = attn.to_add_out(text)
        return through_output(attn, image), text


@final
class FluxReferenceProcessor:
    r"""What a layer of Flux computes: the text's tokens before the image's, positions by rotation.

    .. math:: [z, y] = \text{softmax}\big(R[q_c, q_x]\,(R[k_c, k_x])^\top / \sqrt{d} + \text{mask}\big)
        [v_c, v_x]

    Norms act on each head before the rotation R. Layers with two streams return (image, text), each through
    its output layer; single blocks, whose tokens are both streams in one sequence, return them before any.
    A mask is over the keys of both streams, text first.
    """

    @no_type_check  # a stack copies this function, and wants it bare
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        """Attend; the arguments are those of diffusers. Returns (image, text), or one sequence."""
        text = encoder_hidden_states
        q, k, v = project(attn, hidden_states)
        head_dim = attn.head_dim
        q, k, v = split(q, head_dim, attn.norm_q), split(k, head_dim, attn.norm_k), split(v, head_dim)
        if text is not None:
            more_q, more_k, more_v = project(attn, text, added=True)
            q = torch.cat([split(more_q, head_dim, attn.norm_added_q), q], dim=2)
            k = torch.cat([split(more_k, head_dim, attn.norm_added_k), k], dim=2)
            v = torch.cat([split(more_v, head_dim), v], dim=2)
        if image_rotary_emb is not None:
            q, k = rotated(q, *image_rotary_emb), rotated(k, *image_rotary_emb)
        mask = dense_mask(attention_mask, attn.heads, q, k)
        out = join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        if text is None:
            return through_output(attn, out)
        text, image = out.split([text.shape[1], hidden_states.shape[1]], dim=1)
        text, image = text.contiguous(), image.contiguous()  # else bfloat16 is rounded before the bias, too
        return through_output(attn, image), attn.to_add_out(text)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Pairs of neighbouring numbers turned by an angle of their token, in float32.

    .. math:: (a, b) \mapsto (a \cos\theta - b \sin\theta,\ b \cos\theta + a \sin\theta)

    Args:
        x: [B, heads, S, head_dim].
        cos: cosines [S, head_dim], each written twice.
        sin: sines, likewise.

    >>> rotated(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[[[0., 1.]]]])
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)
