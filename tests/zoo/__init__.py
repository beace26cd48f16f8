"""Tiny random-weight models of every denoising class that diffusers exports, for tests on the CPU.

Classes are read by name from `diffusers`; nothing is downloaded. Most models have tens of thousands of
parameters, and at least one block of each kind that their class knows. Height and width differ.
"""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from tests.zoo.core import Tiny
from tests.zoo.images import IMAGES
from tests.zoo.language import LANGUAGE
from tests.zoo.mixed import MIXED
from tests.zoo.sounds import SOUNDS
from tests.zoo.streams import STREAMS
from tests.zoo.unets import UNETS
from tests.zoo.videos import VIDEOS
from tests.zoo.wan import WAN

ZOO: Mapping[str, Tiny] = MappingProxyType(
    {**UNETS, **IMAGES, **LANGUAGE, **STREAMS, **VIDEOS, **WAN, **MIXED, **SOUNDS},
)
UNBUILT: Mapping[str, str] = MappingProxyType({})  # names of classes that do not run here, and why

_LAST = "it writes to the sound only, and no layer reads that after it"
_VIDEO_ONLY = "the weights of LTX-2 are there, but its forward knows the video only"
MUTE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "LTX2VideoTransformer3DModel": {"transformer_blocks.1.video_to_audio_attn": _LAST},
        "Kandinsky6Transformer3DModel": {
            "visual_transformer_blocks.1.audio_dec_block.cross_attention": _LAST,
            "visual_transformer_blocks.1.av_cross_attention": _LAST,
        },
        "SanaWMLTX2RefinerTransformer3DModel": {
            f"transformer_blocks.{block}.{name}": _VIDEO_ONLY
            for block in range(2)
            for name in ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        },
    }
)
"""By class, the attention layers on which the main output does not depend, and why."""

QUIET: tuple[str, ...] = (
    "ignore:`(FluxPosEmbed|Transformer2DModelOutput)` is deprecated:FutureWarning",  # Chroma, Stable Audio
    "ignore:To copy construct from a tensor:UserWarning",  # SkyReels
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",  # Mochi asks for float32
    "ignore:Initializing zero-element tensors is a no-op:UserWarning",  # Nucleus
    "ignore:flex_attention called without torch.compile:UserWarning",  # AnyFlow FAR, Kandinsky 6 SR
)
"""What diffusers warns of when these models are built and called, for `pytest.mark.filterwarnings`."""

QUERIES = (
    *("to_q", "to_query", "q_proj", "q_linear", "query", "add_q_proj"),
    *("to_qkv", "to_qkv_mlp_proj", "qkv", "img_qkv_proj", "img_attn_qkv"),
)
"""What diffusers calls the parts that make queries, or queries, keys and values at once."""


def exported() -> list[str]:
    """Names of the denoising model classes that diffusers exports."""
    homes = ("diffusers.models.transformers.", "diffusers.models.unets.")
    return [
        name
        for name in dir(diffusers)
        if name != "MotionAdapter"  # parts for a UNet, no model
        and inspect.isclass(kind := getattr(diffusers, name))
        and issubclass(kind, ModelMixin)
        and kind.__module__.startswith(homes)
    ]


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of that class in eval mode and float32, a function of the seed; nothing in it is switched off.

    Parameters that the class leaves at zero (gates, adaptive norms, last layers) or without values are drawn,
    since they would hide whatever is before them.
    """
    kind, exact = getattr(diffusers, name), torch.are_deterministic_algorithms_enabled()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.use_deterministic_algorithms(True)  # then torch.empty is filled with nan, and can be told
        try:
            model = kind(**ZOO[name].config)
        finally:
            torch.use_deterministic_algorithms(exact)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.isnan().any() or not weight.any():
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model.float().eval()


def run(model: nn.Module, name: str, **changes: Any) -> torch.Tensor:
    """The model's main output for its tiny inputs, some of which may be replaced by keyword."""
    return main(model(**{**ZOO[name].inputs(), **changes}))


def main(output: Any) -> torch.Tensor:
    """The sample in what a model returned; a list of samples is stacked, or joined if their shapes differ."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, list):
        parts = [main(part) for part in output]
        same = all(part.shape == parts[0].shape for part in parts)
        return torch.stack(parts) if same else torch.cat([part.flatten() for part in parts])
    return main(output[0])  # a tuple, or diffusers' mapping of fields, which is read by position too


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by name: what has a processor, or makes queries of its own."""
    # by its parts, not its name: SANA-WM's layers are called after their recurrence
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "processor") or queries(module)
    }


def queries(layer: nn.Module) -> list[nn.Parameter]:
    """The weights that make an attention layer's queries (and keys and values, where they are fused)."""
    makers = [part for name, part in layer.named_children() if name in QUERIES]
    return [weight for maker in makers for weight in maker.parameters()]
