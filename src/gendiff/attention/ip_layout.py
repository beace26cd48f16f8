"""The layout of published image-prompt weights: which names and sizes there are, for which layers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from gendiff.attention.selectors import On
from gendiff.attention.site import Site
from gendiff.attention.table import Sites, sites

State: TypeAlias = Mapping[str, Any]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
ORDER = {"down": 0, "up": 1, "mid": 2}  # of a UNet's parts in the published files
PLAIN = ("image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias")


def published_order(model: nn.Module | Sites, on: On) -> list[Site]:
    """Sites in the order of the published files: down, up, middle."""
    found = (model if isinstance(model, Sites) else sites(model)).on(on)
    return sorted(found, key=lambda site: ORDER.get(site.stage, 0))


def linears_of(site: Site) -> tuple[nn.Linear, nn.Linear]:
    """The linear layers of keys and values."""
    parts = (getattr(site.module, name, None) for name in ("to_k", "to_v"))
    k, v = (getattr(part, "base_layer", part) for part in parts)  # an adapter of peft is round it
    if not isinstance(k, nn.Linear) or not isinstance(v, nn.Linear):
        raise ValueError(f"{site.name} has no linear keys and values to begin with; select others.")
    return k, v


def flattened(state: State) -> dict[str, Tensor]:
    """Weights by one name each, from names of parts to names."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[name] = value
    for name, value in flat.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{name!r} is no tensor of real numbers, which the weights of an adapter are.")
    return flat


def check_layout(shapes: Shapes, found: Sequence[Site]) -> int:
    """The numbers of a token, where names and sizes are those of an adapter for these sites."""
    want = {f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight": s for i, s in enumerate(found) for part in "kv"}
    missing = [name for name in want if name not in shapes]
    extra = [name for name in shapes if name not in want and not name.startswith("image_proj.")]
    if missing or extra:
        lora = (
            "; LoRA weights, as FaceID has them, are not read"
            if any("lora" in name for name in extra)
            else ""
        )
        raise ValueError(
            f"these are no weights of an IP-Adapter for {len(found)} cross-attention layers: missing "
            f"{missing[:3]}, unknown {extra[:3]}{lora}."
        )
    dim = getattr(getattr(found[0].module, "to_k", None), "in_features", None) or shapes[next(iter(want))][-1]
    for name, site in want.items():
        takes = site.heads * site.head_dim, dim
        if shapes[name] != takes:
            raise ValueError(
                f"{name} has shape {shapes[name]}, and {site.name} takes {takes}: the adapter is for "
                f"another model."
            )
    check_projection({name: shape for name, shape in shapes.items() if name.startswith("image_proj.")}, dim)
    return dim


def check_projection(shapes: Shapes, dim: int) -> None:
    """Raise where a plain projection is incomplete or of another size."""
    if PLAIN[0] not in shapes:
        return  # none, or another one, whose tokens are given
    out = shapes[PLAIN[0]][0]
    want = {PLAIN[0]: (out, *shapes[PLAIN[0]][1:]), PLAIN[1]: (out,), PLAIN[2]: (dim,), PLAIN[3]: (dim,)}
    if shapes != want or len(shapes[PLAIN[0]]) != 2 or out % dim or not out:
        raise ValueError(
            f"the projection of the image has {dict(shapes)}; it is {PLAIN[0]} of [tokens * {dim}, embed], "
            f"its bias, and a norm of {dim}."
        )
