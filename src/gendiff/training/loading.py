"""Loading what was saved back into components made as in training: strictly, or not at all."""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gendiff.training.parts import Part, find, library_of, metadata

MANIFEST = "gendiff.json"
FORMAT = 1
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_METADATA = "lora_adapter_metadata"  # the key that diffusers reads an adapter's alpha under
STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
FILE = re.compile(r"([\w-]+/)?[\w-]+(\.safetensors)?")  # no way out of the folder
SHOWN = 5


def load_pretrained(components: Mapping[str, nn.Module], path: str | Path) -> None:
    """Load what `save_pretrained` wrote into components made as in training; strictly, or not at all.

    The files are trusted with nothing but numbers: what is built, and how large, is what the components say.

    Args:
        components: modules by name, in which the same parts train as in those that were saved.
        path: the folder.

    Raises:
        ValueError: for a folder that is none of ours or is damaged; for parts, classes, names, shapes, ranks
            or alphas that are not those of the components; for trained weights that are not finite. Nothing
            has been changed then.
    """
    path = Path(path)
    saved = {(e["kind"], e["where"], e["adapter"]): e for e in _entries(path)}
    found = {(part.kind, part.where, part.adapter): part for part in find(components)}
    if set(saved) != set(found):
        raise ValueError(
            f"{path.name} holds {_listed(saved)}, but what trains in the components is {_listed(found)}; "
            f"make them, and their adapters, as they were when it was saved."
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, part in found.items():
        pairs += _pairs(part, saved[key], path)
    with torch.no_grad():
        for live, tensor in pairs:
            live.copy_(tensor)


# ---- the manifest


def _entries(path: Path) -> list[dict[str, Any]]:
    """What the manifest says of each part, once it is known to be ours."""
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path.name} has no {MANIFEST}: it is no folder that save_pretrained wrote.")
    manifest = _parsed(file.read_text(encoding="utf-8"), MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{MANIFEST} has format {manifest.get('format')!r}; this version of gendiff reads {FORMAT}."
        )
    entries = manifest.get("parts")
    if not isinstance(entries, list):
        raise ValueError(f"{MANIFEST} is damaged: it lists no parts.")
    for entry in entries:
        _check_entry(entry, path)
    return entries


def _check_entry(entry: Any, path: Path) -> None:
    texts = ("kind", "name", "where", "class", "file")
    whole = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in texts)
    if not whole or not isinstance(entry.get("adapter"), str | None):
        raise ValueError(f"{MANIFEST} is damaged: {entry!r} does not say what a part is.")
    if not FILE.fullmatch(entry["file"]) or not (path / entry["file"]).exists():
        raise ValueError(f"{MANIFEST} names {entry['file']!r}, which is not in the folder {path.name}.")


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: a mapping is expected, got {type(found).__name__}.")
    return found


def _listed(keys: Mapping[tuple[str, str, Any], Any]) -> str:
    named = (f"{where} ({kind}{f' {adapter!r}' if adapter else ''})" for kind, where, adapter in keys)
    return ", ".join(named) or "nothing"


# ---- the tensors


def _pairs(part: Part, entry: Mapping[str, Any], path: Path) -> list[tuple[Tensor, Tensor]]:
    """The live tensors of a part, each with what will be copied into it."""
    kind = type(part.module).__name__
    if entry["class"] != kind:
        raise ValueError(f"{part.where} was saved from a {entry['class']}, and the live one is a {kind}.")
    file = path / entry["file"]
    if part.kind == "rest":
        tensors = _read(part, [file])
    elif part.kind == "adapter":
        tensors = _read_adapter(replace(part, name=entry["name"]), file)  # a pipeline may have named it
    elif library_of(part.module) == "diffusers":
        tensors = _read(part, sorted(file.glob("*.safetensors")))
    else:
        tensors = _translated(part, sorted(file.glob("*.safetensors")))
    for key, live in part.tensors.items():
        _check_values(f"{part.where}.{key}", live, tensors[key])
    return [(live, tensors[key]) for key, live in part.tensors.items()]


def _read(part: Part, files: Iterable[Path], prefix: str = "") -> dict[str, Tensor]:
    """The tensors under a prefix, of the names and shapes that the live ones have."""
    shapes, load = {}, {}
    with ExitStack() as stack:
        for file in files:
            opened = stack.enter_context(_opened(file))
            for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                if key.startswith(prefix):
                    shapes[key.removeprefix(prefix)] = tuple(opened.get_slice(key).get_shape())
                    load[key.removeprefix(prefix)] = opened
        _check_shapes(part, shapes)
        return {key: opened.get_tensor(prefix + key) for key, opened in load.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} cannot be read as safetensors: {error}.") from error


def _check_shapes(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [key for key in part.tensors if key not in shapes]
    extra = [key for key in shapes if key not in part.tensors]
    if missing or extra:
        raise ValueError(
            f"the saved names of {part.where} are not those of the live one: missing {listed(missing)}; "
            f"unknown {listed(extra)}."
        )
    for key, live in part.tensors.items():
        if tuple(live.shape) != shapes[key]:
            raise ValueError(
                f"{key} of {part.where} was saved with shape {shapes[key]}, and the live one has "
                f"{tuple(live.shape)}."
            )


def _translated(part: Part, files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of a transformers model, whose files leave out tied ones and may have other names.

    transformers is given the live configuration and the tensors, and no file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    model: Any = part.module
    floats = [tensor.dtype for tensor in part.tensors.values() if tensor.is_floating_point()]
    try:
        loaded, report = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=tensors,
            dtype=torch.float64 if torch.float64 in floats else torch.float32,
            output_loading_info=True,
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"the saved {part.where} does not fit the live one: {error}.") from error
    wrong = {name: keys for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the saved names of {part.where} are not those of the live one: {wrong}.")
    found = loaded.state_dict()
    _check_shapes(part, {key: tuple(tensor.shape) for key, tensor in found.items()})
    return dict(found)


def _read_adapter(part: Part, file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        facts = _parsed((opened.metadata() or {}).get(LORA_METADATA, "{}"), f"the metadata of {file.name}")
    prefix = f"{part.name}."
    live = metadata(part)
    for name in STRENGTH:
        saved = facts.get(prefix + name)
        if saved != live.get(name):
            raise ValueError(
                f"the adapter {part.adapter!r} of {part.where} was saved with {name}={saved}, and the live "
                f"one has {live.get(name)}; make it with the same LoraConfig."
            )
    return _read(part, [file], prefix)


def _check_values(name: str, live: Tensor, saved: Tensor) -> None:
    if saved.dtype != live.dtype and not (saved.is_floating_point() and live.is_floating_point()):
        raise ValueError(f"{name} was saved as {saved.dtype}, and the live one is {live.dtype}.")
    if live.requires_grad and not bool(torch.isfinite(saved.to(live.dtype)).all()):
        raise ValueError(f"NaN or infinity in the saved {name} as {live.dtype}; nothing was loaded.")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are beside."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more if names else "none"
