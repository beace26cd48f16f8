"""What happens to a processor in its life: copies, errors, adapters, checkpointing, compiling, leaving."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from gendiff.attention.check.contracts import Finding
from gendiff.attention.check.probes import gradients_of
from gendiff.attention.check.scene import Scene, copied, drawn, put, streams
from gendiff.attention.check.values import difference, seeded

PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
BF16 = 0.06  # what a few roundings to bfloat16 amount to


def dtype(scene: Scene, processor: Any, exact: bool) -> Iterator[Finding]:
    """Whether bfloat16 comes out where it went in, near what float32 gives."""
    half = scene.cast(torch.bfloat16)
    got = seeded(half, processor)
    for one in got:
        if one.numel() and one.dtype != torch.bfloat16:
            yield Finding("dtype", scene.label, f"returned {one.dtype} for bfloat16")
            return
    if exact and (seen := difference(got, seeded(scene, scene.oracle), BF16)):
        yield Finding("dtype", scene.label, f"in bfloat16, {seen}")


def inference(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether it runs on inference tensors, and keeps none that a later graph would refuse."""
    with torch.inference_mode():
        got = scene.run(processor, hidden_states=scene.inputs["hidden_states"].clone())
    if seen := difference(tuple(one.clone() for one in got), seeded(scene, processor), 1e-6):
        yield Finding("inputs", scene.label, f"under torch.inference_mode, {seen}")
    with torch.enable_grad():
        scene.run(processor)


def copies(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether a copy and a pickled one do the same."""
    want = seeded(scene, processor)
    for contract, make in (("copies", deepcopy), ("pickling", _pickled)):
        try:
            other = make(processor)
        except Exception as error:
            yield Finding(contract, scene.label, f"{type(error).__name__}: {str(error)[:120]}")
            continue
        if seen := difference(seeded(scene, other), want, 1e-6):
            yield Finding(contract, scene.label, f"a copy differs: {seen}")


def _pickled(processor: Any) -> Any:
    return pickle.loads(pickle.dumps(processor))


def errors(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether a call that fails leaves something for the next one."""
    want, hidden = seeded(scene, processor), scene.inputs["hidden_states"]
    wrong = hidden[..., :-1] if hidden.ndim == 3 else hidden[:, :-1]
    with suppress(Exception):
        seeded(scene, processor, hidden_states=wrong)
    if seen := difference(seeded(scene, processor), want, 1e-6):
        yield Finding("errors", scene.label, f"after a call that failed, {seen}")


def sharing(scene: Scene, processor: Any, make: Callable[[Scene], Any]) -> Iterator[Finding]:
    """Whether one processor serves two layers as one of its own would."""
    other = scene.changed(layer=drawn(copied(scene.layer), seed=1000))
    first, second = seeded(scene, processor), seeded(other, processor)
    if seen := difference(seeded(scene, processor), first, 1e-6):
        yield Finding("sharing", scene.label, f"after it served another layer, {seen}")
    elif seen := difference(second, seeded(other, make(other)), 1e-6):
        yield Finding("sharing", scene.label, f"a second layer's output is {seen}")


def leaving(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether the layer is as it was when the processor is gone."""
    layer = copied(scene.layer)
    mine = scene.changed(layer=layer)
    before, names = seeded(mine, scene.oracle), set(vars(layer))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    seeded(mine, processor)
    after = seeded(mine, scene.oracle)
    more = sorted(set(vars(layer)) ^ names)
    now = {name: value for name, value in layer.state_dict().items() if not name.startswith("processor.")}
    if more:
        yield Finding("layer", scene.label, f"the layer has other attributes: {', '.join(more)}")
    elif set(now) != set(state) or not all(torch.equal(now[name], value) for name, value in state.items()):
        yield Finding("layer", scene.label, "the layer has other weights")
    elif not all(map(torch.equal, before, after)):
        yield Finding("layer", scene.label, "with its own processor again, the layer has another output")


def adapters(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether LoRA in a projection does what the same change merged into its weights does."""
    from peft import LoraConfig, inject_adapter_in_model

    layer = copied(scene.layer)
    mine, parts = scene.changed(layer=layer), dict(layer.named_modules())
    names = [name for name in PARTS if isinstance(parts.get(name), nn.Linear)]
    if not names:
        return
    put(layer, None)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=names), layer)
    adapted = dict(layer.named_modules())
    generator = torch.Generator().manual_seed(3)
    for name in names:
        part: Any = adapted[name]
        up = part.lora_B["default"].weight
        with torch.no_grad():
            up.copy_(torch.randn(up.shape, generator=generator))
            got = seeded(mine, processor)
            part.merge()
            want = seeded(mine, processor)
            part.unmerge()
            up.zero_()
        if seen := difference(got, want):
            yield Finding("adapters", scene.label, f"a LoRA in {name} and the same merged: {seen}")


def fusing(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether fused projections change nothing."""
    layer: Any = copied(scene.layer)
    if not hasattr(layer, "fuse_projections") or scene.family not in ("unet", "joint", "flux"):
        return
    mine = scene.changed(layer=layer)
    put(layer, scene.oracle)
    layer.fuse_projections()
    if seen := difference(seeded(mine, processor), seeded(scene, processor)):
        yield Finding("fusing", scene.label, f"with fused projections, {seen}")


def checkpointing(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether gradients are the same where the layer is computed twice."""
    from torch.utils.checkpoint import checkpoint

    def twice(**values: Any) -> Any:
        return streams(checkpoint(lambda: scene.run(processor, **values), use_reentrant=False))

    got, want = gradients_of(scene, processor, twice), gradients_of(scene, processor)
    for name, wanted in want.items():
        found = got[name]
        if wanted is not None and (found is None or difference((found,), (wanted,), 1e-6)):
            yield Finding("checkpointing", scene.label, f"the gradient of {name} differs")
            return


def compiling(scene: Scene, processor: Any) -> Iterator[Finding]:
    """Whether the layer compiles in one graph and gives the same."""
    want = seeded(scene, processor)

    def call(values: Any) -> Any:
        return scene.layer(**values)

    call.__code__ = call.__code__.replace()  # which shares no cache, nor its limit, with other compiled code
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        got = streams(compiled(dict(scene.inputs)))
    if seen := difference(got, want):
        yield Finding("compile", scene.label, f"compiled, {seen}")
