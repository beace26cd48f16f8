"""Files of others, opened for their numbers and words and nothing else: no code of theirs runs."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

WEIGHTS, PIPELINE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
HEADER, JSON = 32 * 2**20, 4 * 2**20  # bytes that names and words may take
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAGIC = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")  # a zip as torch.save writes it, or a bare pickle


@final
@dataclass(frozen=True, eq=False)
class Opened:
    """A file of safetensors whose header was checked, and whose numbers were not read yet.

    Attributes:
        path: of the file.
        shapes: by key.
        metadata: its words.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    _file: Any = field(repr=False)

    def read(self, key: str) -> Tensor:
        """The numbers of a key, in memory of their own.

        Raises:
            ValueError: where some are not finite.
        """
        tensor = self._file.get_tensor(key).clone()
        narrow = tensor.float() if tensor.dtype == torch.float64 else tensor  # as it is put on a model
        if not bool(narrow.isfinite().all()):
            raise ValueError(
                f"{short(key)} has numbers that are not finite: the file is of a training that went wrong, "
                f"or broken."
            )
        return tensor


@final
@dataclass(frozen=True)
class Source:
    """A file of weights, and what stands beside it.

    Attributes:
        path: of the file.
        component: that it is for, where its folder says so.
        config: of peft, where there is one.
    """

    path: Path
    component: str | None = None
    config: Mapping[str, Any] | None = None


def sources(path: Path) -> list[Source]:
    """The files of weights at a path: itself, or those of a folder as peft or diffusers writes it.

    Raises:
        ValueError: for a path with nothing of that kind.
    """
    if not path.is_dir():
        return [Source(path)]
    if (path / CONFIG).exists():
        return [_peft(path)]
    below = [folder for folder in sorted(path.iterdir()) if (folder / CONFIG).exists()]
    if below:
        return [_peft(folder, folder.name) for folder in below]
    if (path / PIPELINE).exists():
        return [Source(path / PIPELINE)]
    raise ValueError(
        f"a folder of an adapter has {CONFIG} and {WEIGHTS}, folders with them, or {PIPELINE}, and this one "
        f"has {_few(sorted(file.name for file in path.iterdir()))}."
    )


def _peft(folder: Path, component: str | None = None) -> Source:
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{CONFIG} stands without {WEIGHTS}, beside {_few(sorted(f.name for f in folder.iterdir()))}: "
            f"other files of weights are pickles, which run code when they are read; save it again with "
            f"safe_serialization=True."
        )
    _check_regular(folder / CONFIG)
    if (folder / CONFIG).stat().st_size > JSON:
        raise ValueError(f"{CONFIG} is larger than {JSON:,} bytes, which no configuration is.")
    text = (folder / CONFIG).read_bytes()
    return Source(folder / WEIGHTS, component, mapping(text, CONFIG))


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """A file of safetensors within a block; its header is checked before any memory is taken for numbers.

    Raises:
        ValueError: for a pickle, whatever its name; for what is no such file, or a broken one; for numbers
            that are no floating point.
    """
    from safetensors import SafetensorError, safe_open

    _check_regular(path)
    header = _header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            for key in shapes:
                said = file.get_slice(key).get_dtype()
                if said not in DTYPES:
                    raise ValueError(f"{short(key)} holds {said}: weights are one of {', '.join(DTYPES)}.")
            if not shapes:
                raise ValueError("there are no tensors in it.")
            yield Opened(path, shapes, header.get("__metadata__") or {}, file)
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file, or a damaged one ({error}).") from error


def mapping(text: bytes | str, what: str) -> dict[str, Any]:
    """JSON of a mapping in which no name stands twice.

    Raises:
        ValueError: for anything else.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: {error or 'it is too deep'}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is damaged: it holds {type(found).__name__}, where a mapping belongs.")
    return found


def short(key: object, longest: int = 120) -> str:
    """A name of a file of others, as an error shows it."""
    text = repr(key)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {short(name)} stands twice in it")
        found[name] = value
    return found


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise ValueError("there is no such file.")
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file, such as adapters are kept in.")


def _header(path: Path) -> dict[str, Any]:
    """Names, shapes and words of a file of safetensors; what they say of numbers is not checked here."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length, most = int.from_bytes(start[:8], "little"), min(HEADER, size - 8)
        whole = length <= most and start[8:] == b"{"
        if path.suffix.lower() in PICKLES or (not whole and MAGIC.match(start)):
            raise ValueError(
                "it is a pickle, which runs code when it is read, whatever its name is: convert it to "
                "safetensors where you trust it."
            )
        if not whole:
            raise ValueError(
                f"it is no safetensors file, or a damaged one: it begins by a header of {length:,} bytes, of "
                f"which there may be {max(most, 0):,}."
            )
        return mapping(start[8:] + file.read(length - 1), "its header")


def _few(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(short(name) for name in names[:shown]) or "nothing") + more
