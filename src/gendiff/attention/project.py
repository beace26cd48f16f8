"""Queries, keys and values of a layer: the one place where a faster or an adapted projection is put in."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from gendiff.attention.handle import Handle, changeable
from gendiff.attention.site import Site, is_plain, present

Projected: TypeAlias = tuple[Tensor, Tensor, Tensor]
Projector: TypeAlias = Callable[[nn.Module, Tensor, Tensor, bool], Projected]

PROJECTOR = "_gendiff_projector"
OWN = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def project(
    site: Site | nn.Module, x: Tensor, context: Tensor | None = None, *, added: bool = False
) -> Projected:
    r"""The queries of x and the keys and values of a context, :math:`q = W_q x,\ k = W_k c,\ v = W_v c`.

    What `set_projector` put in is used, else the layer's own linear layers, each by itself, so that adapters
    in them have their effect; fused ones where diffusers fused them.

    Args:
        site: the layer.
        x: tokens [B, S, C].
        context: tokens that are attended to [B, K, D]; None is x.
        added: whether the projections of the layer's second stream are meant.

    Returns:
        Queries [B, S, heads * head_dim], keys and values [B, K, heads * head_dim]; before norms, rotary
        embedding and the split into heads.

    Raises:
        ValueError: for a layer that lacks them, or whose fused projections leave out an adapter.
    """
    layer = site.module if isinstance(site, Site) else site
    context = x if context is None else context
    projector: Projector | None = getattr(layer, PROJECTOR, None)
    if projector is not None:
        return projector(layer, x, context, added)
    return linear(layer, x, context, added)


def linear(layer: nn.Module, x: Tensor, context: Tensor, added: bool = False) -> Projected:
    """The projections by the layer's own linear layers."""
    names = ADDED if added else OWN
    if is_fused(layer):
        refuse_fused(layer)
        whole, pair = ("to_added_qkv", None) if added else ("to_qkv", "to_kv")
        if present(layer, whole) and x is context:
            q, k, v = getattr(layer, whole)(x).chunk(3, dim=-1)
            return q, k, v
        if pair is not None and present(layer, pair):
            k, v = getattr(layer, pair)(context).chunk(2, dim=-1)
            return getattr(layer, names[0])(x), k, v
    missing = [name for name in names if not present(layer, name)]
    if missing:
        raise ValueError(
            f"{type(layer).__name__} has no {', '.join(missing)}: its projections are not those of three "
            f"linear layers; put them in with set_projector, or leave the layer its own processor."
        )
    to_q, to_k, to_v = (getattr(layer, name) for name in names)
    return to_q(x), to_k(context), to_v(context)


def set_projector(layer: Site | nn.Module, projector: Projector) -> Handle:
    """Compute the projections of a layer by another function, `projector(layer, x, context, added)`.

    Processors of other authors call the layer's own linear layers, and are not concerned.

    Raises:
        ValueError: where there is one already.
    """
    changeable()
    module = layer.module if isinstance(layer, Site) else layer
    if getattr(module, PROJECTOR, None) is not None:
        raise ValueError(f"{type(module).__name__} has a projector already; remove its handle first.")
    setattr(module, PROJECTOR, projector)
    return Handle(lambda: delattr(module, PROJECTOR), f"projector of {type(module).__name__}", projector)


def adapters_of(layer: nn.Module) -> list[str]:
    """The projections of a layer that carry an active adapter, by name."""
    found: list[str] = []
    for name in (*OWN, *ADDED):
        part = getattr(layer, name, None)
        active = getattr(part, "active_adapters", None)
        if active and not getattr(part, "disable_adapters", False) and not getattr(part, "merged", False):
            found.append(name)
    return found


def is_fused(layer: nn.Module, processor: object = None) -> bool:
    """Whether the fused projections of a layer are what its processor, or another, uses.

    The processors of `Attention` of diffusers have a class of their own for them, and the mark stays on the
    layer when it is unfused; other layers tell by the mark.
    """
    kind = type(layer.processor if processor is None else processor)
    return bool(getattr(layer, "fused_projections", False)) and (
        not is_plain(layer) or "Fused" in kind.__name__
    )


def refuse_fused(layer: nn.Module, name: str = "", processor: object = None) -> None:
    """Raise where projections were fused and adapters stay in the parts, where they have no effect."""
    if not is_fused(layer, processor):
        return
    adapted = adapters_of(layer)
    if adapted:
        raise ValueError(
            f"the projections of {name or type(layer).__name__} are fused, and the adapters in "
            f"{', '.join(adapted)} are not in the fused weights, so that they have no effect: call "
            f"model.unfuse_qkv_projections(), or merge the adapters before fusing."
        )
