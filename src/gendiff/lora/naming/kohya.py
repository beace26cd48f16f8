"""Names that are written with underscores: kohya's, and the live ones.

Names and prefixes are those that kohya-ss/sd-scripts writes (networks/lora.py, lora_flux.py, lora_sd3.py) and
ComfyUI reads (comfy/lora.py, which knows its own, hence the original, names with underscores).
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from gendiff._checks import unknown
from gendiff.attention.table import unwrapped
from gendiff.lora.naming.families import family_of, original_names
from gendiff.lora.naming.rows import Original, Rows
from gendiff.lora.naming.unet import is_sdxl
from gendiff.lora.targets import targets_of

T = TypeVar("T")
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def kohya_names(model: nn.Module) -> dict[str, Original]:
    """What kohya's tools call the layers of a model that can carry adapters, without the prefix of the part.

    Args:
        model: of diffusers, or a text encoder of transformers.

    Returns:
        By the stem of the keys, such as "double_blocks_0_img_attn_qkv", of which live rows a layer is
        stacked. UNets have the names of diffusers before SDXL, all else has the original ones.

    Raises:
        ValueError: for a family that is not known, with those that are.
    """
    root: Any = unwrapped(model)
    if type(root).__name__ == "UNet2DConditionModel" and not is_sdxl(root):
        return {
            underscored: Original(target.name, (Rows(target.name, 0, target.shape[0]),))
            for underscored, target in _underscored({one.name: one for one in targets_of(root)}).items()
        }
    return _underscored(original_names(root))


def diffusers_names(model: nn.Module) -> dict[str, str]:
    """The live names of the layers that can carry adapters, by themselves with underscores.

    Raises:
        ValueError: for two layers that are the same with underscores.

    >>> diffusers_names(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))
    {'0': '0', '1_0': '1.0'}
    """
    return _underscored({target.name: target.name for target in targets_of(model)})


def kohya_prefix(component: str, model: nn.Module, components: Mapping[str, nn.Module]) -> str:
    """What the keys of a part of a pipeline begin with, before an underscore.

    Args:
        component: what the pipeline calls it, such as "text_encoder_2".
        model: the part.
        components: the parts that are known, by name; a lone text encoder of Stable Diffusion 1 and 2 has
            no number, and the first of others has.

    Raises:
        ValueError: for a part that the naming has no prefix for.
    """
    if component in DENOISERS:
        return "lora_unet"
    if component not in ENCODERS:
        raise ValueError(
            f"{unknown('part in the naming of kohya', component, (*DENOISERS, *ENCODERS))} A second denoiser "
            f"goes into a file of its own, as 'transformer'."
        )
    encoder = family_of(model).encoder
    if encoder is None:
        raise ValueError(f"{component} is a {type(unwrapped(model)).__name__}, which is no text encoder.")
    if component == "text_encoder":
        return "lora_te" if encoder == "clip" and _alone(components) else "lora_te1"
    # sd-scripts counts CLIP-L, CLIP-G, T5: that of Flux is the third, though the second of its pipeline
    return "lora_te2" if encoder == "clip" else "lora_te3"


def _alone(components: Mapping[str, nn.Module]) -> bool:
    """Whether the first text encoder is the only one of its pipeline, as far as its parts tell."""
    unet: Any = components.get("unet")
    others = "transformer" in components or not components.keys().isdisjoint(ENCODERS[1:])
    return not others and (unet is None or not is_sdxl(unwrapped(unet)))


def _underscored(named: Mapping[str, T]) -> dict[str, T]:
    found: dict[str, str] = {}
    for name in named:
        first = found.setdefault(name.replace(".", "_"), name)
        if first != name:
            raise ValueError(
                f"{first!r} and {name!r} have the same name with underscores, {name.replace('.', '_')!r}: "
                f"take a format of dotted names."
            )
    return {underscored: named[name] for underscored, name in found.items()}
