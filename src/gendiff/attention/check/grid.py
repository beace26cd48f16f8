"""Small fresh layers, each with one setting that a processor may forget, and the scenes of a model's own."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gendiff.attention.check.scene import (
    BATCH,
    TEXT,
    TOKENS,
    Scene,
    copied,
    drawn,
    family_of,
    inputs_of,
    oracle_of,
    own_layer,
)
from gendiff.attention.reference import ReferenceProcessor
from gendiff.attention.site import Site

LOW = -10000.0  # what diffusers adds to the scores of a masked key


class Row(NamedTuple):
    """A fresh layer: what it is, what a difference means, settings of `Attention`, and changes of inputs."""

    label: str
    contract: str
    settings: dict[str, Any]
    inputs: str = ""
    base: bool = False


PLAIN = {"query_dim": 12, "heads": 2, "dim_head": 4, "bias": True}
CROSS = PLAIN | {"cross_attention_dim": 6}
SPATIAL = PLAIN | {"query_dim": 32, "spatial_norm_dim": 4}
ADDED = PLAIN | {"query_dim": 8, "added_kv_proj_dim": 6, "norm_num_groups": 2, "residual_connection": True}
ONE = {"query_dim": 1, "heads": 1, "dim_head": 4, "cross_attention_dim": 1}

ROWS: dict[str, tuple[Row, ...]] = {
    "unet": (
        Row("self-attention", "heads", PLAIN, base=True),
        Row("cross-attention", "context", CROSS, base=True),
        Row("self-attention given a context", "context", PLAIN, "context"),
        Row("a context of one number, 0", "context", ONE, "zero"),
        Row("residual_connection=True", "residual", PLAIN | {"residual_connection": True}),
        Row("rescale_output_factor=2", "rescale", PLAIN | {"rescale_output_factor": 2.0}),
        Row(
            "a residual and rescale_output_factor=2",
            "rescale",
            PLAIN | {"residual_connection": True, "rescale_output_factor": 2.0},
        ),
        Row("an image [B, C, H, W]", "image", PLAIN, "image"),
        Row(
            "an image, with a residual",
            "image",
            PLAIN | {"residual_connection": True},
            "image",
        ),
        Row("norm_num_groups=3", "group norm", PLAIN | {"norm_num_groups": 3}),
        Row("norm_num_groups=3, an image", "image", PLAIN | {"norm_num_groups": 3}, "image"),
        Row("spatial_norm_dim=4", "spatial norm", SPATIAL),
        Row(
            "cross_attention_norm='layer_norm'",
            "context norm",
            CROSS | {"cross_attention_norm": "layer_norm"},
        ),
        Row(
            "cross_attention_norm='group_norm'",
            "context norm",
            CROSS | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
        ),
        Row(
            "cross_attention_norm='layer_norm' without a context",
            "context norm",
            PLAIN | {"cross_attention_norm": "layer_norm"},
        ),
        Row("qk_norm='layer_norm'", "norms", PLAIN | {"qk_norm": "layer_norm"}),
        Row("qk_norm='rms_norm'", "norms", CROSS | {"qk_norm": "rms_norm"}),
        Row("a mask [B, 1, K]", "mask", CROSS, "mask"),
        Row("a mask [B * heads, S, K]", "mask", PLAIN, "mask of heads"),
    ),
    "unet-added": (
        Row("added_kv_proj_dim=6", "heads", ADDED, base=True),
        Row("only_cross_attention=True", "streams", ADDED | {"only_cross_attention": True}),
        Row(
            "cross_attention_norm='group_norm'",
            "context norm",
            ADDED | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
        ),
        Row("a mask of the text [B, 1, K]", "mask", ADDED, "mask"),
    ),
}


def fresh(family: str, device: torch.device, exact: bool) -> Iterator[Scene]:
    """The fresh layers of a family; those that show nothing but values only where these are compared."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    for number, row in enumerate(ROWS.get(family, ())):
        if row.inputs == "zero" and not exact:
            continue
        stock: Any = AttnAddedKVProcessor2_0() if family == "unet-added" else None
        layer = drawn(Attention(**row.settings, processor=stock).to(device), seed=number)
        oracle = ReferenceProcessor()
        inputs = _changed(row.inputs, inputs_of(layer, oracle, number), row.settings)
        yield Scene(f"fresh, {row.label}", row.contract, layer, inputs, oracle, family, row.base)


def _changed(what: str, inputs: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    hidden = inputs["hidden_states"]
    generator = torch.Generator().manual_seed(99)
    if what == "context":
        inputs["encoder_hidden_states"] = torch.randn(BATCH, TEXT, hidden.shape[-1], generator=generator).to(
            hidden
        )
    elif what == "zero":
        inputs["hidden_states"] = hidden[:1]
        inputs["encoder_hidden_states"] = torch.zeros(1, 1, 1).to(hidden)
    elif what == "image":
        inputs["hidden_states"] = hidden.transpose(1, 2).reshape(BATCH, -1, 2, 3)
    elif what == "mask":
        inputs["attention_mask"] = text_mask(hidden)
    elif what == "mask of heads":
        hide = torch.rand(BATCH * settings["heads"], TOKENS, TOKENS, generator=generator) < 0.4
        inputs["attention_mask"] = torch.where(hide, LOW, 0.0).to(hidden)
    return inputs


def text_mask(like: Tensor) -> Tensor:
    """Numbers to add [B, 1, K] that hide the last two tokens of the text, in the first row."""
    mask = torch.zeros(BATCH, 1, TEXT)
    mask[0, :, -2:] = LOW
    return mask.to(like)


def own(sites: list[Site], inputs: Mapping[str, Any] | None) -> Iterator[Scene]:
    """The layers of a model, one of each kind.

    Raises:
        ValueError: where nothing is known of the inputs of a layer, and none were given.
    """
    seen: set[Any] = set()
    for site in sites:
        oracle = oracle_of(site)
        key = (type(site.module), type(oracle), _settings(site.module))
        if key in seen:
            continue
        seen.add(key)
        layer = own_layer(site, seed=len(seen))
        given = inputs_of(layer, oracle, len(seen)) if inputs is None else deepcopy(dict(inputs))
        label, family = site.name or type(layer).__name__, family_of(site, oracle)
        yield from _features(_possible(Scene(label, "heads", layer, given, oracle, family, site=site)))


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """What tells layers of one class apart."""
    plain = {
        name: value for name, value in vars(layer).items() if isinstance(value, int | float | str | None)
    }
    shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
    plain.pop("training", None)
    return tuple(sorted(plain.items(), key=lambda one: one[0])), shapes


def _possible(scene: Scene) -> Scene:
    """A scene that its own processor can run, with a context where it cannot do without."""
    context = (
        {"encoder_hidden_states": torch.randn_like(scene.inputs["hidden_states"])}
        if scene.family == "other"
        else {}
    )
    first: Exception | None = None
    for more in ({}, context):
        try:
            with torch.no_grad():
                scene.want(**more)
        except Exception as error:
            first = first or error
        else:
            return scene.changed(inputs={**scene.inputs, **more})
    raise ValueError(
        f"{scene.label} ({type(scene.layer).__name__}) does not run with its own processor on "
        f"{sorted(scene.inputs)}: {first}; pass `inputs`, what the layer is called with, by keyword."
    ) from first


def _features(scene: Scene) -> Iterator[Scene]:
    """A layer of two streams bare, with its norms, and as it is, so that a difference has one reason."""
    if scene.family not in ("joint", "flux"):
        yield scene
        return
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    there = [name for name in names if getattr(scene.layer, name, None) is not None]
    rotation = scene.inputs.get("image_rotary_emb")
    without = {"image_rotary_emb": None} if rotation is not None else {}
    bare = scene.changed(layer=own_copy(scene, {name: nn.Identity() for name in there}))
    if there:
        inputs = {**scene.inputs, **without}
        yield bare.changed(label=f"{scene.label} without norms", inputs=inputs, base=True)
        label = f"{scene.label} without rotation" if without else scene.label
        yield scene.changed(label=label, contract="norms", inputs=inputs)
    if without:
        yield scene.changed(contract="rotation")
    if scene.family == "flux":
        image, text = scene.inputs["hidden_states"], scene.inputs.get("encoder_hidden_states")
        mask = torch.zeros(BATCH, 1, 1, image.shape[1] + (0 if text is None else TEXT))
        mask[0, ..., :2] = LOW
        for kind, value in (("numbers", mask.to(image)), ("booleans", (mask == 0).to(image.device))):
            given = {**scene.inputs, **without, "attention_mask": value}
            yield bare.changed(label=f"{scene.label}, a mask of {kind}", contract="mask", inputs=given)


def own_copy(scene: Scene, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a scene's layer with other parts."""
    layer = copied(scene.layer)
    for name, part in parts.items():
        setattr(layer, name, part)
    return layer
