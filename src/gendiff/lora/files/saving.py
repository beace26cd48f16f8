"""Adapters written to files, complete or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.lora.adapter import Adapter
from gendiff.lora.files import writing
from gendiff.lora.files.aside import replacing
from gendiff.lora.files.components import Models, check_name, component_of, components_of
from gendiff.lora.files.opening import CONFIG, WEIGHTS
from gendiff.lora.files.settings import HEADER_KEY, header, settings_of
from gendiff.lora.files.writing import Piece
from gendiff.lora.handle import LoraHandle

Source: TypeAlias = LoraHandle | Adapter
FORMATS = ("diffusers", "peft", *writing.WRITERS)


def save(
    what: Source | Mapping[str, Source],
    path: str | Path,
    format: str = "diffusers",
    *,
    model: Models = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Save adapters in a format of others, so that they add there exactly what they add here.

    - "diffusers": `unet.<layer>.lora_A.weight`, with strengths in the header, for
      `pipe.load_lora_weights(path)`; diffusers reads LoRA and DoRA there, and LoKr by
      `model.load_lora_adapter(path, use_safetensors=True)`, without which it overlooks the header.
    - "peft": a folder, for `PeftModel.from_pretrained(model, path)`; with a folder each for several networks.
    - "kohya": `lora_unet_<layer>.lora_down.weight` with an alpha for each layer, for kohya's tools, ComfyUI,
      and diffusers, which leaves the magnitudes of DoRA in it out.
    - "original": `diffusion_model.<layer>.lora_A.weight`, in the names of the original release, with an alpha
      for each layer.

    Where the last two stack layers that are apart here, adapters of the parts become one, whose rank is the
    sum of theirs; where their scales differ, these are multiplied into B and rounded in `dtype`. LoKr on such
    layers has names of LyCORIS in the kohya format. OFT has no names in either.

    Args:
        what: an adapter on a model, or by itself, or several by component: "unet", "transformer",
            "text_encoder", "text_encoder_2", "text_encoder_3".
        path: a file that ends with .safetensors, or for peft a folder. What is there is replaced when the new
            one is complete.
        format: one of these.
        model: the networks of adapters by themselves, as `load` takes them; and the other text encoders of a
            pipeline, on which names of kohya's depend.
        dtype: of the numbers; None is that of each. Alphas are float32.
        metadata: words for the header, beside and before those that came with the adapter.

    Returns:
        The path.

    Raises:
        ValueError: for what a format has no names for; for numbers that are not finite in the dtype; for a
            folder with something else in it.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is a floating-point dtype, got {dtype}.")
    pieces, components = _pieces(what, model)
    words = _words(pieces, metadata)
    path = Path(path).resolve()
    _check_path(path, format)
    with torch.no_grad():
        if format == "peft":
            return _save_peft(pieces, path, words, dtype)
        if format == "diffusers":
            fields = {
                f"{piece.component}.{name}": value
                for piece in pieces
                for name, value in settings_of(writing.configuration(piece.adapter)).items()
                if (name, value) != ("peft_type", "LORA")
            }
            words |= {HEADER_KEY: json.dumps(fields, indent=2, sort_keys=True)}
            keyed = [pair for one in pieces for pair in writing.live(one.adapter, f"{one.component}.")]
        else:
            keyed = [pair for piece in pieces for pair in writing.WRITERS[format](piece, components)]
        tensors = _ready(keyed, dtype)
    with replacing(path) as new:
        _write(tensors, new, words)
    return path


def _pieces(what: Source | Mapping[str, Source], model: Models) -> tuple[list[Piece], dict[str, nn.Module]]:
    """What is to be written, with the networks; and all networks that are known."""
    known = {} if model is None else components_of(model)
    if isinstance(what, Mapping):
        given = dict(what)
        for name in given:
            check_name(name)
    else:
        given = {_name(what, known): what}
    if not given:
        raise ValueError("no adapter is given, so that there is nothing to save.")
    pieces: list[Piece] = []
    for name, source in given.items():
        if not isinstance(source, LoraHandle | Adapter):
            raise TypeError(
                f"{name!r} is a {type(source).__name__}; what is saved is a LoraHandle or an Adapter, or a "
                f"mapping of components to them."
            )
        network = source.model if isinstance(source, LoraHandle) else known.get(name)
        if network is None:
            raise ValueError(
                f"the adapter of {name!r} is by itself: pass model=, the network that it is for, or "
                f"{{{name!r}: network}}."
            )
        pieces.append(Piece(name, source.adapter() if isinstance(source, LoraHandle) else source, network))
    return pieces, {**known, **{piece.component: piece.model for piece in pieces}}


def _name(what: object, known: Mapping[str, nn.Module]) -> str:
    """The component of an adapter that is given without one."""
    if isinstance(what, LoraHandle):
        own = [name for name, one in known.items() if one is what.model]
        return own[0] if own else component_of(what.model)
    if len(known) > 1:
        raise ValueError(
            f"the adapter may be of {', '.join(map(repr, known))}: give it as "
            f"{{{next(iter(known))!r}: adapter}}."
        )
    return next(iter(known), "model")


def _words(pieces: Iterable[Piece], given: Mapping[str, str] | None) -> dict[str, str]:
    """The words of the header: what is given, and what came with the adapters."""
    found: dict[str, str] = {}
    for name, text in (given or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata is text by text, got {name!r}: {text!r}.")
    for piece in pieces:
        for name, text in piece.adapter.metadata.items():
            if found.setdefault(name, text) != text and name not in (given or {}):
                raise ValueError(
                    f"the adapters came with different words for {name!r}: say which by metadata=, as "
                    f"{{{name!r}: ...}}."
                )
    return {**found, **(given or {}), "format": "pt"}


def _check_path(path: Path, format: str) -> None:
    if format != "peft":
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(f"the {format} format is a file that ends with .safetensors, got {path.name!r}.")
        return
    if path.suffix == ".safetensors" or path.is_file():
        raise ValueError(f"the peft format is a folder, got {path.name!r}.")
    inside = [file.name for file in path.iterdir()] if path.exists() else []
    ours = (path / CONFIG).exists() or any((path / name / CONFIG).exists() for name in inside)
    if inside and not ours:
        raise ValueError(
            f"{path.name} is a folder with something else in it, such as {inside[0]!r}, which saving would "
            f"replace: give a new or empty one, or one of an adapter."
        )


def _save_peft(pieces: list[Piece], path: Path, words: dict[str, str], dtype: torch.dtype | None) -> Path:
    made = []
    for piece in pieces:
        writing.check_same_blocks(piece.adapter)
        tensors = _ready(writing.live(piece.adapter, "base_model.model."), dtype)
        made.append((piece.component, header(writing.configuration(piece.adapter)), tensors))
    with replacing(path) as new:
        for component, config, tensors in made:
            folder = new / component if len(made) > 1 else new
            folder.mkdir(parents=True)
            _write(tensors, folder / WEIGHTS, words)
            (folder / CONFIG).write_text(config, encoding="utf-8")
    return path


def _ready(keyed: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors in memory of their own, since safetensors refuses what is shared, in the dtype."""
    found: dict[str, Tensor] = {}
    for key, tensor in keyed:
        if key in found:
            raise ValueError(f"two networks would both write {key!r}: save them to two files.")
        if tensor.is_meta:
            raise ValueError(f"{key} has no numbers, being on the meta device.")
        wanted = tensor.dtype if dtype is None or key.endswith(".alpha") else dtype
        found[key] = tensor.detach().to("cpu", wanted, copy=True).contiguous()
        if not bool(found[key].isfinite().all()):
            raise ValueError(f"{key} has numbers that are not finite in {wanted}: save in a wider dtype.")
    return found


def _write(tensors: Mapping[str, Tensor], path: Path, words: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=words)
