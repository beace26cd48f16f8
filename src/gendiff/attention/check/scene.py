"""What a processor is tried on: copies of a model's own layers and small fresh ones, with inputs for them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff.attention.reference import ReferenceProcessor
from gendiff.attention.reference_joint import FluxReferenceProcessor, JointReferenceProcessor
from gendiff.attention.site import Site, is_plain, present

BATCH, TOKENS, TEXT = 2, 6, 5
BY_ROW = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
REFERENCES: dict[str, type] = {
    **dict.fromkeys(("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0"), ReferenceProcessor),
    **dict.fromkeys(("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"), ReferenceProcessor),
    **dict.fromkeys(("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"), JointReferenceProcessor),
    **dict.fromkeys(("FluxAttnProcessor",), FluxReferenceProcessor),
    **{one.__name__: one for one in (ReferenceProcessor, JointReferenceProcessor, FluxReferenceProcessor)},
}


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """A layer of our own, inputs for it, and what a difference there means.

    Attributes:
        label: what it is, for the table.
        contract: what is broken where outputs differ.
        layer: the layer, a copy or fresh, with weights drawn anew.
        inputs: by keyword of the layer.
        oracle: the processor to compare with.
        family: unet, unet-added, joint, flux or other.
        base: whether it asks for nothing in particular, so that all else fails where it does.
        site: the layer's place in the model; None for a fresh one.
    """

    label: str
    contract: str
    layer: nn.Module
    inputs: Mapping[str, Any] = field(repr=False)
    oracle: Any = field(repr=False)
    family: str = "unet"
    base: bool = False
    site: Site | None = None

    def run(self, processor: Any, **changes: Any) -> tuple[Tensor, ...]:
        """The layer's outputs with a processor."""
        return streams(self.raw(processor, **changes))

    def raw(self, processor: Any, **changes: Any) -> Any:
        """What the layer returns with a processor."""
        put(self.layer, processor)
        return self.layer(**{**self.inputs, **changes})

    def want(self, **changes: Any) -> tuple[Tensor, ...]:
        """The outputs to compare with."""
        return self.run(self.oracle, **changes)

    def changed(self, **changes: Any) -> "Scene":
        """The same with some of it changed."""
        return replace(self, **changes)

    def apart(self) -> "Scene":
        """The same with a layer of its own."""
        return self.changed(layer=copied(self.layer))

    def cast(self, dtype: torch.dtype) -> "Scene":
        """The same in another dtype."""
        inputs = {
            name: _cast(value, dtype) if name in BY_ROW else value for name, value in self.inputs.items()
        }
        return self.changed(layer=copied(self.layer).to(dtype), inputs=inputs)

    def rows(self, *order: int) -> "Scene":
        """The same with these rows of the batch."""
        index = torch.tensor(order)
        inputs = {
            name: value[index.to(value.device)] if name in BY_ROW and isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return self.changed(inputs=inputs)


def streams(out: Any) -> tuple[Tensor, ...]:
    """What a layer returned, as a tuple; a stream that is None is an empty one."""
    several = out if isinstance(out, tuple | list) else (out,)
    return tuple(torch.zeros(0) if one is None else one for one in several)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def put(layer: nn.Module, processor: Any) -> None:
    """Give a layer of our own a processor."""
    layer._modules.pop("processor", None)
    layer.__dict__.pop("processor", None)
    layer.processor = processor


@contextmanager
def setting(thing: Any, **values: Any) -> Iterator[None]:
    """Some attributes of a layer of our own, for a while."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def copied(layer: nn.Module) -> nn.Module:
    """A copy of a layer without its processor, and without what this package attached."""
    attached = [name for name in layer.__dict__ if name.startswith("_gendiff")]
    without = [layer.processor, *(layer.__dict__[name] for name in attached)]
    copy = deepcopy(layer, {id(one): nn.Identity() for one in without})
    for name in attached:
        del copy.__dict__[name]
    return copy


def drawn(layer: nn.Module, seed: int) -> nn.Module:
    """Give a layer of our own weights that hide nothing: no zeros, no norms of ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            if not weight.is_floating_point():
                continue
            new = torch.randn(weight.shape, generator=generator)
            new = new / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3 * new
            weight.copy_(new)
            weight.requires_grad_(True)
        for part in layer.modules():
            weight = getattr(part, "weight", None)
            if "Norm" in type(part).__name__ and isinstance(weight, Tensor):
                weight += 1
    return layer.eval()


def own_layer(site: Site, seed: int) -> nn.Module:
    """A copy of a model's layer in float32, and with weights of our own."""
    if any(weight.is_meta for weight in site.module.parameters()):
        raise ValueError(f"{site.name or type(site.module).__name__} has no weights yet: it is on 'meta'.")
    return drawn(copied(site.module).float(), seed)


def oracle_of(site: Site) -> Any:
    """The reference for a layer, by its processor, or by its class where that is not of diffusers."""
    found = REFERENCES.get(site.processor)
    if found is not None:
        return found()
    processor = site.module.processor
    if type(processor).__module__.startswith("diffusers."):
        return processor
    if type(site.module).__name__ == "FluxAttention":
        return FluxReferenceProcessor()
    default = getattr(type(site.module), "_default_processor_cls", None)
    if default is not None:
        return default()
    return JointReferenceProcessor() if site.family == "joint" else ReferenceProcessor()


def family_of(site: Site, oracle: Any) -> str:
    """Which calls, inputs and settings a layer is tried with."""
    by_oracle = {JointReferenceProcessor: "joint", FluxReferenceProcessor: "flux"}
    if type(oracle) is ReferenceProcessor:
        return "unet-added" if site.family == "unet-added" else "unet"
    return by_oracle.get(type(oracle), "other")


def like(layer: nn.Module) -> torch.device:
    """Where a layer's weights are."""
    return next(layer.parameters()).device


def widths(layer: Any) -> tuple[int, int | None]:
    """How many numbers the tokens of a layer have, and those of its context, where it wants one."""
    width = getattr(layer, "query_dim", None) or getattr(getattr(layer, "to_q", None), "in_features", None)
    if width is None:
        raise ValueError(
            f"{type(layer).__name__} does not say how wide its tokens are; pass `inputs`, what the layer is "
            f"called with, by keyword."
        )
    if is_plain(layer):
        crossing = getattr(layer, "is_cross_attention", False)
        return width, getattr(layer, "added_kv_proj_dim", None) or (
            layer.cross_attention_dim if crossing else None
        )
    if present(layer, "add_q_proj"):
        return width, layer.add_q_proj.in_features
    keys = getattr(getattr(layer, "to_k", None), "in_features", width)
    return width, keys if getattr(layer, "is_cross_attention", False) or keys != width else None


def inputs_of(layer: Any, oracle: Any, seed: int) -> dict[str, Any]:
    """Random inputs of the widths of a layer."""
    generator, device = torch.Generator().manual_seed(seed), like(layer)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    width, other = widths(layer)
    inputs: dict[str, Any] = {"hidden_states": noise(BATCH, TOKENS, width)}
    if other is not None:
        inputs["encoder_hidden_states"] = noise(BATCH, TEXT, other)
    if present(layer, "spatial_norm"):
        inputs["temb"] = noise(BATCH, layer.spatial_norm.conv_y.in_channels, 2, 3)
    if present(layer, "spatial_norm") or (
        is_plain(layer) and present(layer, "add_k_proj") and not present(layer, "add_q_proj")
    ):
        inputs["hidden_states"] = noise(BATCH, width, 2, 3)
    if isinstance(oracle, FluxReferenceProcessor):
        angle = noise(TOKENS + (TEXT if other is not None else 0), layer.head_dim // 2)
        angle = angle.repeat_interleave(2, dim=-1)
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    return inputs


def names_of(processor: Any) -> list[str]:
    """The names of the arguments in a processor's call that a layer can see; of a bare function, none."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    seen = inspect.signature(processor.__call__).parameters
    return [name for name, one in seen.items() if one.kind not in kinds]
