"""Saving what was trained, in the formats that diffusers, transformers and peft load, and loading it back."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.lora.words import NEW
from gendiff.training.card import card as card_text
from gendiff.training.card import check_facts
from gendiff.training.folder import check_target, written_aside
from gendiff.training.loading import FORMAT, LORA_FILE, LORA_METADATA, MANIFEST, listed
from gendiff.training.loading import load_pretrained as load_pretrained
from gendiff.training.names import parameters
from gendiff.training.parts import Part, base_state, core, find, library_of, metadata


def save_pretrained(
    components: Mapping[str, nn.Module],
    path: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    pipeline: Any = None,
    card: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save what trains in some components, and nothing of it moves.

    - The outermost diffusers or transformers model with a trainable parameter: whole, by its own
      `save_pretrained`, in a folder of its name.
    - LoRA adapters of peft in it, where they are what trains: as `pytorch_lora_weights.safetensors` with
      rank and alpha, for `pipeline.load_lora_weights(path)`; several adapters have a folder each.
    - Whatever else trains: as `<component>.safetensors`, with the buffers beside it.
    - With `pipeline`, if one of its models was saved whole: the rest of it, so that
      `DiffusionPipeline.from_pretrained(path)` opens the result.
    - `README.md`, a model card, and `gendiff.json`, which `load_pretrained` reads.

    Everything is written beside `path`, flushed, and renamed: there is never half a result. Neither the live
    tensors nor the pipeline are changed.

    Args:
        components: modules by name.
        path: a folder that is new, empty, or an earlier result, which is replaced.
        weights: tensors to save in place of the live ones, such as averages, by canonical name
            (`gendiff.training.names.parameters`): all that train.
        pipeline: a diffusers pipeline that the models belong to.
        card: facts for the model card: title, text, base_model, license, tags, steps, seed, weights,
            settings.
        dtype: floating-point dtype of the saved parts; None keeps that of each tensor.

    Returns:
        The folder.

    Raises:
        ValueError: nothing trains; a tensor is not finite, sharded or empty; `weights` are not those that
            train; two parts have one name; the folder holds something else.

    >>> import tempfile
    >>> net, folder = nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "result"
    >>> sorted(file.name for file in save_pretrained({"net": net}, folder).iterdir())
    ['README.md', 'gendiff.json', 'net.safetensors']
    >>> load_pretrained({"net": net}, folder)
    """
    facts = check_facts(card)
    parts = find(components, pipeline)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is a floating-point dtype, got {dtype}.")
    chosen = _chosen(parameters(components), weights, dtype)
    path = Path(path).resolve()
    check_target(path, MANIFEST)
    owned = {} if pipeline is None else pipeline.components
    whole = any(part.kind == "model" and part.name in owned for part in parts)
    if whole:
        _refuse_words(owned)
    with written_aside(path) as folder, torch.no_grad():
        twins = {
            part.name: _twin(part.module, _ready(part, chosen, dtype))
            for part in parts
            if part.kind == "model"
        }
        if whole:
            _save_pipeline(pipeline, twins, folder)
        for name, twin in twins.items():
            if not (whole and name in owned):
                twin.save_pretrained(folder / name)
            _note_dtype(folder / name, twin)
        files = _save_adapters(parts, chosen, dtype, folder)
        _save_rest(parts, chosen, dtype, folder)
        (folder / "README.md").write_text(
            card_text(parts, files.values(), facts, pipeline, whole), encoding="utf-8"
        )
        text = json.dumps({"format": FORMAT, "parts": [_entry(part, files) for part in parts]}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return path


def _chosen(
    trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor] | None, dtype: torch.dtype | None
) -> dict[int, Tensor]:
    """What is saved for each trained parameter, by the parameter's identity."""
    for name in weights or {}:
        if name not in trained:
            raise ValueError(unknown("trained parameter", name, trained))
    missing = [name for name in trained if weights is not None and name not in weights]
    if missing:
        raise ValueError(
            f"weights are given for some trained parameters but not for {listed(missing)}; give all of them, "
            f"or None for the live ones."
        )
    given = {name: p if weights is None else weights[name] for name, p in trained.items()}
    for name, tensor in given.items():
        _check_whole(name, tensor)
        if tensor.shape != trained[name].shape or tensor.numel() == 0:
            raise ValueError(
                f"{name} to save has shape {tuple(tensor.shape)}, and the parameter has "
                f"{tuple(trained[name].shape)}; they must be equal, and not empty."
            )
    chosen = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in given.items()}
    broken = [name for name, tensor in chosen.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(
            f"NaN or infinity in {listed(broken)}{'' if dtype is None else f' as {dtype}'}; nothing was "
            f"saved: save a wider dtype, or go back to a checkpoint from before."
        )
    return {id(trained[name]): tensor for name, tensor in chosen.items()}


def _ready(part: Part, chosen: Mapping[int, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a part as they are saved; tensors that are tied stay tied."""
    made: dict[int, Tensor] = {}
    for key, live in part.tensors.items():
        tensor = chosen.get(id(live), live).detach()
        _check_whole(f"{part.where}.{key}", tensor)
        made[id(live)] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return {key: made[id(live)] for key, live in part.tensors.items()}


def _check_whole(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{name} is sharded over processes; gather it first: tensor.full_tensor().")


def _twin(module: Any, state: dict[str, Tensor]) -> Any:
    """A shallow copy of a model whose state is another one: its own save_pretrained then writes that."""
    twin = copy.copy(module)
    twin.state_dict = lambda *args, **kwargs: dict(state)
    twin._hf_peft_config_loaded = False  # with it, transformers would write the adapter and nothing else
    if library_of(module) == "transformers":
        twin.config = copy.deepcopy(module.config)  # it notes the dtype in it while saving
    return twin


def _refuse_words(components: Mapping[str, Any]) -> None:
    """A saved pipeline would have a tokenizer that knows new words, and no numbers for them."""
    for name, one in components.items():
        if isinstance(one, nn.Module) and any(NEW in key for key, _ in one.named_parameters()):
            raise ValueError(
                f"{name} has new words on, of which a pipeline saves the names and not the numbers: write "
                f"them by handle.save(path), take them off, and save the pipeline then."
            )


def _save_pipeline(pipeline: Any, twins: Mapping[str, Any], folder: Path) -> None:
    """All of a pipeline, from a copy that holds twins of its models."""
    copied = copy.copy(pipeline)
    for name, one in pipeline.components.items():
        if name in twins:
            setattr(copied, name, twins[name])
        elif isinstance(one, nn.Module):
            model = core(one)
            if library_of(model):
                setattr(copied, name, _twin(model, base_state(model)))
    copied.save_pretrained(folder)


def _note_dtype(folder: Path, twin: Any) -> None:
    """Let config.json say the widest dtype in the files: transformers casts to what it says when it loads."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "dtype" in config:
        wide = torch.float16
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point():
                wide = tensor.dtype if wide == torch.float16 else torch.promote_types(wide, tensor.dtype)
        config["dtype"] = str(wide).removeprefix("torch.")
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_adapters(
    parts: list[Part], chosen: Mapping[int, Tensor], dtype: torch.dtype | None, folder: Path
) -> dict[str, str]:
    """One file for each adapter, for all models that have it; returns the files by adapter."""
    files: dict[str, str] = {}
    adapters = dict.fromkeys(part.adapter for part in parts if part.adapter is not None)
    for adapter in adapters:
        tensors, facts = {}, {}
        for part in parts:
            if part.adapter == adapter:
                ready = _ready(part, chosen, dtype)
                tensors |= {f"{part.name}.{key}": tensor for key, tensor in ready.items()}
                facts |= {f"{part.name}.{key}": value for key, value in metadata(part).items()}
        files[adapter] = LORA_FILE if len(adapters) == 1 else f"{adapter}/{LORA_FILE}"
        (folder / files[adapter]).parent.mkdir(exist_ok=True)
        notes = {"format": "pt", LORA_METADATA: json.dumps(facts, indent=2, sort_keys=True)}
        save_file(_separate(tensors), folder / files[adapter], metadata=notes)
    return files


def _save_rest(
    parts: list[Part], chosen: Mapping[int, Tensor], dtype: torch.dtype | None, folder: Path
) -> None:
    for part in parts:
        if part.kind == "rest":
            file = folder / f"{part.name}.safetensors"
            if file.exists():
                raise ValueError(f"{part.name!r} would be saved over {file.name}; rename that component.")
            save_file(_separate(_ready(part, chosen, dtype)), file)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in memory of their own, since safetensors refuses what is shared."""
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def _entry(part: Part, files: Mapping[str, str]) -> dict[str, Any]:
    file = {"model": part.name, "adapter": files.get(part.adapter or ""), "rest": f"{part.name}.safetensors"}
    return {
        "kind": part.kind,
        "name": part.name,
        "where": part.where,
        "adapter": part.adapter,
        "class": type(part.module).__name__,
        "file": file[part.kind],
    }
