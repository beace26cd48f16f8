"""What can be seen of a processor without knowing what it computes: what must matter, and what must not."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gendiff.attention.check.contracts import Finding
from gendiff.attention.check.scene import BATCH, Scene, setting
from gendiff.attention.check.values import difference, scaled_queries, seed, seeded


def last_layer(layer: Any) -> tuple[nn.Linear, nn.Dropout] | None:
    """The output layer and its dropout, where the layer has them so."""
    out = getattr(layer, "to_out", None)
    if isinstance(out, nn.ModuleList) and len(out) > 1 and isinstance(out[1], nn.Dropout):
        return out[0], out[1]  # pyright: ignore[reportReturnType]
    return None


def dropout(scene: Scene, processor: Any, exact: bool) -> Iterator[Finding]:
    """Whether the dropout behind the output layer is there, in train mode."""
    parts = last_layer(scene.layer)
    if parts is None:
        return
    scene.layer.train()
    with setting(parts[1], p=0.5), setting(scene.layer, **({} if exact else _off(scene))):
        got = seeded(scene, processor)
        if exact:
            seen = difference(got, seeded(scene, scene.oracle))
        else:
            share = float((got[0] == 0).double().mean())
            always = scene.family == "unet-added"  # whose residual is always there, in diffusers
            seen = "" if always or 0.2 < share < 0.8 else f"p = 0.5 leaves {share:.0%} zeros"
    if seen:
        yield Finding("dropout", scene.label, f"in train mode, {seen}")


def _off(scene: Scene) -> dict[str, Any]:
    off = {"residual_connection": False, "rescale_output_factor": 1.0}
    return {name: value for name, value in off.items() if hasattr(scene.layer, name)}


def ends(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether what is left without attention, a bias and the residual over the factor, is in its place."""
    parts = last_layer(scene.layer)
    if parts is None or scene.family not in ("unet", "unet-added"):
        return
    kept = [weight.detach().clone() for weight in parts[0].parameters()]
    with torch.no_grad():
        parts[0].weight.zero_()
    try:
        got, want = seeded(scene, processor), seeded(scene, scene.oracle)
        if seen := difference(got, want):
            contract = "rescale" if scene.layer.rescale_output_factor != 1 else "residual"
            contract = "image" if want[0].ndim > 3 else contract
            for name, off in _off(scene).items():
                with setting(scene.layer, **{name: off}):
                    if not difference(got, seeded(scene, scene.oracle)):
                        contract = "residual" if name == "residual_connection" else "rescale"
            yield Finding(contract, scene.label, f"without attention, {seen}")
    finally:
        with torch.no_grad():
            for weight, old in zip(parts[0].parameters(), kept, strict=True):
                weight.copy_(old)


def norms(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether each norm is there: what it takes may be three times as large, and the output is as before."""
    layer, inputs = scene.layer, scene.inputs
    with setting(layer, **_off(scene)):
        plain = seeded(scene, processor)
        for contract, norm, name in (
            ("group norm", "group_norm", "hidden_states"),
            ("spatial norm", "spatial_norm", "hidden_states"),
            ("context norm", "norm_cross", "encoder_hidden_states"),
        ):
            always = scene.family == "unet-added" and contract == "group norm"  # the residual, in diffusers
            if getattr(layer, norm, None) is None or inputs.get(name) is None or always:
                continue
            if seen := difference(seeded(scene, processor, **{name: 3 * inputs[name]}), plain, 1e-2):
                yield Finding(contract, scene.label, f"three times the {name}: {seen}")
        norm = getattr(layer, "norm_q", None)
        if norm is not None and not isinstance(norm, nn.Identity) and hasattr(layer, "to_q"):
            with scaled_queries(layer, 3.0):
                if seen := difference(seeded(scene, processor), plain, 1e-2):
                    yield Finding("norms", scene.label, f"three times the queries: {seen}")


def dependence(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether the context, and what the spatial norm reads, have an effect."""
    plain = seeded(scene, processor)
    for name, contract in (("encoder_hidden_states", "context"), ("temb", "spatial norm")):
        value = scene.inputs.get(name)
        if value is None:
            continue
        other = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(value)
        if not difference(seeded(scene, processor, **{name: other}), plain, 1e-6):
            yield Finding(contract, scene.label, f"{name} has no effect")


def hidden_keys(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether masked tokens have no influence, and a row without any key gives no NaN."""
    image, text = scene.inputs["hidden_states"], scene.inputs.get("encoder_hidden_states")
    if scene.family not in ("unet", "flux") or image.ndim > 3:
        return
    name = "hidden_states" if text is None else "encoder_hidden_states"
    source = scene.inputs[name]
    keys = source.shape[1] + (image.shape[1] if scene.family == "flux" and text is not None else 0)
    last = source.shape[1] - 1
    changed = source.clone()
    changed[:, last] += 3
    for value in (-10000.0, -torch.inf):
        mask = torch.zeros(len(image), 1, keys).to(image)
        mask[..., last] = value
        mask = mask if scene.family == "unet" else mask[:, None]
        one = seeded(scene, processor, attention_mask=mask)[0]
        other = seeded(scene, processor, attention_mask=mask, **{name: changed})[0]
        others = slice(None) if text is not None else slice(0, last)
        if seen := difference((other[:, others],), (one[:, others],), 1e-6):
            yield Finding("mask", scene.label, f"a masked token has influence: {seen}")
            return
    mask = torch.zeros(len(image), 1, keys).to(image)
    mask[0] = -torch.inf
    out = seeded(scene, processor, attention_mask=mask if scene.family == "unet" else mask[:, None])
    if not all(bool(one.isfinite().all()) for one in out):
        yield Finding("empty rows", scene.label, "NaN in a row of which every key is masked")


def rows(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether rows are computed alike, whatever their number and order."""
    if any(isinstance(v, Tensor) and len(v) != BATCH for v in scene.inputs.values()):
        return
    for order in ((1, 0, 1), (1,)):
        one = scene.rows(*order)
        if seen := difference(seeded(one, processor), seeded(one, one.oracle)):
            yield Finding("rows", f"{scene.label}, rows {order} of the batch", seen)
            return


def resolutions(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether a call leaves something for the next one."""
    first = seeded(scene, processor)
    small = dict(scene.inputs)
    hidden = small["hidden_states"]
    cut = 2
    if hidden.ndim == 3:
        small["hidden_states"] = hidden[:, :-cut] + 1
    else:
        small["hidden_states"], cut = hidden[..., :-1] + 1, 0
    rotation = small.get("image_rotary_emb")
    if rotation is not None:
        small["image_rotary_emb"] = tuple(one[:-cut] for one in rotation)
    small = {name: value for name, value in small.items() if name != "attention_mask"}
    other = scene.changed(inputs=small)
    if seen := _leak(lambda: seeded(other, processor), lambda: seeded(other, scene.oracle)):
        yield Finding("resolutions", scene.label, f"at another resolution, {seen}")
    elif seen := difference(seeded(scene, processor), first, 1e-6):
        yield Finding("resolutions", scene.label, f"after another resolution, {seen}")


def _leak(got: Any, want: Any) -> str:
    """What happens at another resolution; the values themselves are compared elsewhere."""
    try:
        shapes = [one.shape for one in got()]
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return "the output has another shape" if shapes != [one.shape for one in want()] else ""


def gradients(scene: Scene, processor: Any, exact: bool) -> Iterator[Finding]:
    """Whether gradients reach the inputs and the weights, and are those of the oracle."""
    got, want = (gradients_of(scene, one) for one in (processor, scene.oracle))
    for name, wanted in want.items():
        found = got[name]
        if wanted is None or not bool(wanted.any()):
            continue
        if found is None or not bool(found.isfinite().all()):
            what = "no gradient" if found is None else "a gradient that is not finite"
        elif not bool(found.any()) and (exact or ("_q" not in name and "_k" not in name)):
            what = "a gradient of zero"
        else:
            what = difference((found,), (wanted,), 1e-3) if exact else ""
        if what:
            yield Finding("gradients", scene.label, f"of {name}: {what}")
            return


def gradients_of(scene: Scene, processor: Any, call: Any = None) -> dict[str, Tensor | None]:
    """Gradients of a fixed function of the outputs, by the names of inputs and weights."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in scene.inputs.items()
        if isinstance(value, Tensor) and name in ("hidden_states", "encoder_hidden_states")
    }
    weights = dict(scene.layer.named_parameters())
    weights = {name: weight for name, weight in weights.items() if not name.startswith("processor.")}
    seed(scene)
    run = call or (lambda **values: scene.run(processor, **values))
    with torch.enable_grad():
        outs = run(**{name: value * 1 for name, value in leaves.items()})
        flat = torch.cat([one.flatten() for one in outs])
        every = {**leaves, **weights}
        found = torch.autograd.grad((flat.sin() * flat).sum(), list(every.values()), allow_unused=True)
    return dict(zip(every, found, strict=True))
