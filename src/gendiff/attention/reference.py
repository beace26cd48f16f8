"""Reference processors: attention of diffusers written plainly from the list of what a layer may ask for.

They are oracles to compare with, and a model to write from. `ReferenceProcessor` is for UNets and everything
else that uses `Attention` with one stream; those of two streams are in `reference_joint`.
"""

import math
from typing import Any, final, no_type_check

import torch
import torch.nn.functional as F  # the name under which a stack finds the kernel
from torch import Tensor, nn

from gendiff.attention.project import project
from gendiff.attention.site import present


@final
class ReferenceProcessor:
    r"""What an `Attention` of one stream computes, with every setting of the layer honoured.

    .. math:: y = \Big(x + W_o\,\text{softmax}\big(q k^\top \cdot \text{scale} + \text{mask}\big)\,v\Big) / f

    with the queries of the tokens x, the keys and values of the context (or of x, where there is none), a
    residual where the layer has one, and its rescale factor f. It honours, in this order: the spatial norm,
    images [B, C, *] as well as tokens [B, S, C], the group norm, the norm of the context, fewer heads of keys
    than of queries, norms of queries and keys (of a head, or across heads), the mask, computing in float32
    (`upcast_attention`, `upcast_softmax`), causal order, `attn.scale`, the output layer and its dropout, the
    residual, and the rescale factor. Where the layer has projections for a text (`add_k_proj` without
    `add_q_proj`), the keys of the text come first and those of the tokens after them, unless it has
    `only_cross_attention`.

    Masks are booleans (True takes part) or numbers to add, [B, K], [B, S or 1, K], [B * heads, S or 1, K] or
    [B, heads or 1, S, K]; keys behind the end of a mask take part. A query that may see no key attends to
    nothing. The fast processor of diffusers ignores `attn.scale`, both upcasts and causal order, refuses
    fewer heads of keys and norms across heads, and pads a short mask by the number of keys in place of to it.

    >>> from diffusers.models.attention_processor import Attention
    >>> layer = Attention(query_dim=8, heads=2, dim_head=4, processor=ReferenceProcessor())
    >>> layer(torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    @no_type_check  # a stack copies this function, and wants it bare
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """Attend; the arguments are those of diffusers."""
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        q, k, v = projections(attn, tokens(x), encoder_hidden_states)
        head_dim = q.shape[-1] // attn.heads
        q, k = split(q, head_dim, attn.norm_q), split(k, head_dim, attn.norm_k)
        v = split(v, head_dim)
        mask = dense_mask(attention_mask, attn.heads, q, k)
        dtype = q.dtype
        if attn.upcast_attention or attn.upcast_softmax:
            q, k, v = q.float(), k.float(), v.float()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=attn.is_causal,
            scale=attn.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        out = through_output(attn, join(out).to(dtype))
        if hidden_states.ndim > 3:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def tokens(x: Tensor) -> Tensor:
    """The cells of an image [B, C, *] as tokens [B, S, C]; tokens stay as they are."""
    return x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


def projections(attn: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values behind the norms of the tokens and of the context, heads not yet split."""
    layer: Any = attn
    normed = x if layer.group_norm is None else layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if context is not None and present(attn, "norm_cross"):
        context = layer.norm_encoder_hidden_states(context)
    if not present(attn, "add_k_proj"):
        return project(attn, normed, context)
    text = x if context is None else context  # as diffusers has it: before the group norm
    k, v = layer.add_k_proj(text), layer.add_v_proj(text)
    if layer.only_cross_attention:
        return layer.to_q(normed), k, v
    q, own_k, own_v = project(attn, normed)
    return q, torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)


def split(x: Tensor, head_dim: int, norm: nn.Module | None = None) -> Tensor:
    """Tokens [B, S, heads * head_dim] by heads, [B, heads, S, head_dim], and normed.

    A norm as wide as all heads together acts before the split, any other on each head.
    """
    if norm is not None and norm_width(norm) == x.shape[-1]:
        x, norm = norm(x), None
    x = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return x if norm is None else norm(x)


def norm_width(norm: nn.Module) -> int | None:
    """How many numbers a norm takes together; None where it does not say."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return math.prod(shape) if isinstance(shape, tuple) else None


def join(x: Tensor) -> Tensor:
    """Heads [B, heads, S, head_dim] side by side, [B, S, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2)


def through_output(attn: nn.Module, x: Tensor) -> Tensor:
    """The output layer and its dropout, which blocks with `pre_only` have not."""
    if not present(attn, "to_out"):
        return x
    out: Any = attn.to_out
    return out[1](out[0](x))


def dense_mask(mask: Tensor | None, heads: int, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask as [B, heads or 1, S or 1, K], of booleans or of the queries' dtype.

    Raises:
        ValueError: for a mask of another shape.
    """
    if mask is None:
        return None
    batch, given = len(q), tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[:, None]
    if mask.ndim == 3:
        each = heads if len(mask) == batch * heads and heads > 1 else 1
        mask = mask.unflatten(0, (-1, each))
    keys = k.shape[-2]
    if mask.ndim != 4 or len(mask) not in (1, batch) or mask.shape[-1] > keys:
        raise ValueError(
            f"a mask of shape {given} does not fit {batch} rows, {heads} heads and {keys} keys: it is "
            f"[B, K], [B, S or 1, K], [B * heads, S or 1, K] or [B, heads or 1, S or 1, K]."
        )
    if mask.dtype == torch.bool:
        return F.pad(mask, (0, keys - mask.shape[-1]), value=True)
    return F.pad(mask, (0, keys - mask.shape[-1])).to(q.dtype)
