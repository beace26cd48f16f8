"""Which models have names of an original release, and what these are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from torch import nn

from gendiff._checks import unknown
from gendiff.attention.table import unwrapped
from gendiff.lora.naming import releases, unet
from gendiff.lora.naming.rows import Original, Templates, fill, layers
from gendiff.lora.targets import targets_of


@final
@dataclass(frozen=True)
class Family:
    """Models of one naming.

    Attributes:
        templates: original names of a live model's layers.
        shift_first: whether the original modulates by shift and scale in this order, where diffusers'
            AdaLayerNormContinuous has the scale first.
        encoder: "clip" or "t5" for text encoders.
    """

    templates: Callable[[Any], Templates]
    shift_first: bool = False
    encoder: str | None = None


def _same(model: nn.Module) -> Templates:
    """Released in the live names."""
    return {target.name: (target.name,) for target in targets_of(model)}


def _clip(model: nn.Module) -> Templates:
    # files say text_model.encoder...; CLIPTextModel has this level up to transformers 4
    level = "" if hasattr(model, "text_model") else "text_model"
    return layers({target.name: target.name for target in targets_of(model)}, level)


def _sana(model: Any) -> Templates:
    sprint = hasattr(model.time_embed, "guidance_embedder")
    return releases.SANA_SPRINT if sprint else releases.SANA


_wan = Family(lambda _: releases.WAN)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "UNet2DConditionModel": Family(unet.templates),
        "SD3Transformer2DModel": Family(lambda _: releases.SD3, shift_first=True),
        "FluxTransformer2DModel": Family(lambda _: releases.FLUX, shift_first=True),
        "Flux2Transformer2DModel": Family(lambda _: releases.FLUX2, shift_first=True),
        "WanTransformer3DModel": _wan,
        "WanVACETransformer3DModel": _wan,
        "SkyReelsV2Transformer3DModel": _wan,
        "ChronoEditTransformer3DModel": _wan,
        "QwenImageTransformer2DModel": Family(_same),
        "ZImageTransformer2DModel": Family(lambda _: releases.Z_IMAGE),
        "PixArtTransformer2DModel": Family(lambda _: releases.PIXART),
        "SanaTransformer2DModel": Family(_sana),
        "CLIPTextModel": Family(_clip, encoder="clip"),
        "CLIPTextModelWithProjection": Family(_clip, encoder="clip"),
        "T5EncoderModel": Family(_same, encoder="t5"),
    }
)


def family_of(model: nn.Module) -> Family:
    """The family of a model, by the name of its class or of one that it derives from.

    Raises:
        ValueError: for one that is not known, with those that are.
    """
    kind = type(unwrapped(model))
    for one in kind.__mro__:
        if one.__name__ in FAMILIES:
            return FAMILIES[one.__name__]
    raise ValueError(
        f"{unknown('model with names of an original release', kind.__name__, FAMILIES)} The diffusers and "
        f"peft formats take any model."
    )


def original_names(model: nn.Module) -> dict[str, Original]:
    """What the original release of a model calls its layers that can carry adapters.

    Args:
        model: of diffusers, or a text encoder of transformers.

    Returns:
        By original name, of which live rows a layer is stacked. Layers without a counterpart are left out.

    Raises:
        ValueError: for a family that is not known, with those that are.
    """
    root, family = unwrapped(model), family_of(model)
    widths = {target.name: target.shape[0] for target in targets_of(root)}
    swapped = [
        f"{name}.linear"
        for name, module in root.named_modules()
        if family.shift_first and type(module).__name__ == "AdaLayerNormContinuous"
    ]
    return fill(family.templates(root), widths, swapped)
