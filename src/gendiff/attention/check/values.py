"""What a processor's outputs are compared with, and which mistake explains a difference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gendiff.attention.check.contracts import Finding, of_error
from gendiff.attention.check.scene import Scene, like, names_of, setting, streams
from gendiff.attention.project import project

SEED = 20


def difference(got: tuple[Tensor, ...], want: tuple[Tensor, ...], bound: float = 1e-4) -> str:
    """How far outputs are from those wanted; "" within bound * (1 + the largest of them)."""
    for one, other in zip(got, want, strict=True):
        if one.shape != other.shape:
            return f"of shape {tuple(one.shape)}, not {tuple(other.shape)}"
        if not one.numel():
            continue
        far = float((one.double() - other.double()).abs().max())
        most = float(other.double().abs().max())
        if not far <= bound * (1 + most):
            return f"off by {far:.2g} where outputs reach {most:.2g}"
    return ""


def seed(scene: Scene) -> None:
    """Set the generator that the scene's layer draws from, and no other."""
    device = like(scene.layer)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(SEED)
    else:
        torch.default_generator.manual_seed(SEED)


def seeded(scene: Scene, processor: Any, **changes: Any) -> tuple[Tensor, ...]:
    """The outputs of a scene under a fixed seed, without a graph."""
    seed(scene)
    with torch.no_grad():
        return scene.run(processor, **changes)


def outputs(scene: Scene, processor: Any, exact: bool) -> Iterator[Finding]:
    """Whether a processor gives the outputs of a scene, in shape, kind, dtype, and value."""
    if "temb" in scene.inputs and "temb" not in names_of(processor):
        yield Finding("keywords", scene.label, f"its call does not name temb: {names_of(processor)}")
        return
    kept = {name: _clone(value) for name, value in scene.inputs.items()}
    want = seeded(scene, scene.oracle)
    before = _plain(scene.layer)
    seed(scene)
    with torch.no_grad():
        raw = scene.raw(processor)
    if any(not _same(value, kept[name]) for name, value in scene.inputs.items()):
        written = [name for name, value in scene.inputs.items() if not _same(value, kept[name])]
        for name in written:
            _restore(scene.inputs[name], kept[name])
        yield Finding("inputs", scene.label, f"wrote into {', '.join(written)}")
        return
    if changed := sorted(name for name, _ in before ^ _plain(scene.layer)):
        yield Finding("layer", scene.label, f"changed the layer's {', '.join(changed)}")
        return
    problem = shape_problem(raw, want, scene)
    if problem is not None:
        yield problem
        return
    got = streams(raw)
    if not all(bool(one.isfinite().all()) for one in got):
        yield Finding(scene.contract, scene.label, "outputs are not finite")
    elif not all(map(torch.equal, got, seeded(scene, processor))):
        yield Finding("determinism", scene.label, "two calls with equal inputs differ")
    elif exact and (seen := difference(got, want)):
        yield Finding(mistake(scene, got) or scene.contract, scene.label, seen)


def shape_problem(raw: Any, want: tuple[Tensor, ...], scene: Scene) -> Finding | None:
    """Whether a layer returned other things than it has to."""
    several = isinstance(raw, tuple | list)
    if several != (len(want) > 1) or (several and len(raw) != len(want)):
        seen = f"returned {f'{len(raw)} tensors' if several else type(raw).__name__}, not {len(want)}"
        return Finding("streams", scene.label, seen)
    got = streams(raw)
    shapes, wanted = [list(one.shape) for one in got], [list(one.shape) for one in want]
    if shapes != wanted:
        which = "streams" if len(want) > 1 else "image" if len(wanted[0]) > 3 else scene.contract
        bare = shapes[0][-1] != wanted[0][-1] and shapes[0][:-1] == wanted[0][:-1]
        return Finding(
            "output layer" if bare else which, scene.label, f"returned {shapes[0]}, not {wanted[0]}"
        )
    if any(one.numel() and one.dtype != other.dtype for one, other in zip(got, want, strict=True)):
        return Finding("dtype", scene.label, f"returned {got[0].dtype} for {want[0].dtype}")
    return None


def mistake(scene: Scene, got: tuple[Tensor, ...]) -> str:
    """The contract whose known mistake gives just these outputs; "" where none does."""
    layer: Any = scene.layer
    scale = float(getattr(layer, "scale", 0.0))
    attributes: list[tuple[str, dict[str, Any]]] = []
    if scale:
        attributes += [("scale", {"scale": other}) for other in (scale**2, 1.0)]
        attributes += [("heads", {"heads": 1, "scale": s}) for s in (scale, scale / layer.heads**0.5)]
    elif scene.base and scene.family == "flux":
        attributes.append(("heads", {"head_dim": layer.inner_dim}))
        for power in (-0.5, 0.5):
            with scaled_queries(layer, layer.head_dim**power):
                if _explains(scene, got):
                    return "scale"
    for contract, name, off in (
        ("residual", "residual_connection", False),
        ("rescale", "rescale_output_factor", 1.0),
        ("group norm", "group_norm", None),
        ("context norm", "norm_cross", None),
    ):
        if getattr(layer, name, off) is not off:
            attributes.append((contract, {name: off}))
    for pair in (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")):
        if all(getattr(layer, name, None) is not None for name in pair):
            attributes.append(("norms", dict.fromkeys(pair)))
    for contract, values in attributes:
        with setting(layer, **values):
            if _explains(scene, got):
                return contract
    if len(got) > 1 and (found := _streams(scene, got)):
        return found
    changes = [("mask", {"attention_mask": None}), ("context", {"encoder_hidden_states": None})]
    for contract, values in changes:
        if scene.inputs.get(next(iter(values))) is not None and _explains(scene, got, **values):
            return contract
    return "transposes" if scene.family == "unet" and scene.base and _untransposed(scene, got) else ""


def _streams(scene: Scene, got: tuple[Tensor, ...]) -> str:
    """Whether streams were joined in one order and split in another, or the text has no output layer."""
    layer: Any = scene.layer
    last = nn.ModuleList([nn.Identity(), nn.Identity()])
    with setting(layer, to_out=last, to_add_out=nn.Identity()):
        image, text = seeded(scene, scene.oracle)
    if image.shape[:2] != got[0].shape[:2] or image.shape[-1] != text.shape[-1]:
        return ""
    if text.shape == got[1].shape and not difference(got[1:], (text,)):
        return "output layer"
    swapped = torch.cat([text, image], dim=1)[:, : image.shape[1]]
    with torch.no_grad():
        return "" if difference(got[:1], (layer.to_out[0](swapped),)) else "streams"


@contextmanager
def scaled_queries(layer: nn.Module, factor: float) -> Iterator[None]:
    """A layer of our own whose queries are multiplied, for a while."""
    found = [getattr(layer, name, None) for name in ("to_q", "add_q_proj")]
    weights = [weight for part in found if isinstance(part, nn.Module) for weight in part.parameters()]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def _explains(scene: Scene, got: tuple[Tensor, ...], **changes: Any) -> bool:
    try:
        want = seeded(scene, scene.oracle, **changes)
    except Exception:
        return False
    return len(want) == len(got) and not difference(got, want)


def _untransposed(scene: Scene, got: tuple[Tensor, ...]) -> bool:
    """Whether heads were split or joined without a transpose."""
    layer: Any = scene.layer
    x, context = scene.inputs["hidden_states"], scene.inputs.get("encoder_hidden_states")
    shape = (len(x), layer.heads, -1, layer.inner_dim // layer.heads)
    with torch.no_grad():
        parts = project(layer, x, context)
        for split in (True, False):
            q, k, v = (
                one.reshape(shape) if split else one.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                for one in parts
            )
            out = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) @ v
            for joined in (out, out.transpose(1, 2)):
                flat = joined.reshape(len(x), x.shape[1], -1)
                if not difference(got, (layer.to_out[0](flat),)):
                    return True
    return False


def _plain(layer: nn.Module) -> set[tuple[str, str]]:
    """The names of a layer's attributes, and the values of plain ones."""
    kinds = (bool, int, float, str)
    own = {name: value for name, value in vars(layer).items() if name != "processor"}
    return {(name, str(value) if isinstance(value, kinds) else "") for name, value in own.items()}


def _clone(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_clone(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def _same(value: Any, kept: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_same, value, kept))
    return torch.equal(value, kept) if isinstance(value, Tensor) else True


def _restore(value: Any, kept: Any) -> None:
    if isinstance(value, tuple | list):
        for one, other in zip(value, kept, strict=True):
            _restore(one, other)
    elif isinstance(value, Tensor):
        value.copy_(kept)


def tried(check: Any, scene: Scene, *args: Any, contract: str = "") -> Iterator[Finding]:
    """The findings of a check, an exception among them."""
    try:
        yield from check(scene, *args)
    except Exception as error:
        yield of_error(error, contract or scene.contract, scene.label)
