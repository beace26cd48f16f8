"""The manifest of a checkpoint: what proves that every file is the one that was written."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gendiff.training.packing import strict_json

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"checkpoint-[0-9]{8,18}")
OWN_NAME = re.compile(rf"({NAME.pattern})|\.({NAME.pattern})\.old-[0-9a-f]{{8}}")  # the second while replaced
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.safetensors|state\.json")
LARGEST = {MANIFEST: 2**20, STATE: 2**26}  # bytes of what is parsed whole
REMEDY = "Use another checkpoint of the run, or copy this one again from where it is whole."


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which folder and file, what is wrong and what to do."""


def put(file: Path, pieces: Iterable[memoryview | bytes]) -> dict[str, Any]:
    """Write a file to the disk; returns its entry in the manifest, made of what it was to be."""
    size, digest = 0, hashlib.sha256()
    with file.open("xb") as opened:
        for piece in pieces:
            digest.update(piece)
            size += opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def sealed(content: Mapping[str, Any]) -> bytes:
    """The one text of a manifest with this content and its SHA-256; any other text is damaged."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    whole = {"content": content, "sha256": hashlib.sha256(canonical.encode("ascii")).hexdigest()}
    return (json.dumps(whole, sort_keys=True, indent=2) + "\n").encode("ascii")


def check_length(file: str, length: int) -> None:
    """Raise a ValueError for a text that would be longer than what is read."""
    if length > LARGEST[file]:
        raise ValueError(
            f"{file} would have {length} bytes, and {LARGEST[file]} is the most; keep long lists of numbers "
            f"in tensors."
        )


def verified(path: Path, hashes: bool = True) -> dict[str, Any]:
    """The entries of the manifest by file, once the folder agrees with them.

    Args:
        path: the folder of a checkpoint.
        hashes: whether to read all files and compare their SHA-256; False compares names and sizes.

    Raises:
        CheckpointError: where it does not agree.
    """
    path = path.absolute()
    with reading(path):
        sizes = _sizes(path)
        files = _entries(path)
        for name in sorted(files.keys() ^ (sizes.keys() - {MANIFEST})):
            if name in files:
                raise damaged(path, name, "is missing")
            raise damaged(
                path, repr(name), "is not in the manifest", "If somebody put it there, take it out."
            )
        for name, entry in files.items():
            if sizes[name] != entry["size"]:
                raise damaged(path, name, f"has {sizes[name]} bytes, and had {entry['size']} when written")
        _check_size(path, STATE, sizes)
        for name, entry in files.items():
            if hashes and digest_of(path / name) != entry["sha256"]:
                raise damaged(path, name, "is damaged: its SHA-256 is not the one in the manifest")
    return files


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says against reading a checkpoint into a CheckpointError."""
    try:
        yield
    except OSError as error:
        name = Path(error.filename or path).name
        raise damaged(path, name, f"cannot be read ({error.strerror})") from error


def damaged(path: Path, name: str, what: str, remedy: str = REMEDY) -> CheckpointError:
    """The error for a file of a checkpoint."""
    return CheckpointError(f"{path.name}: {name} {what}. {remedy}")


def step_in(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix("checkpoint-"))


def _sizes(path: Path) -> dict[str, int]:
    """The sizes of the files in a folder, which has nothing else in it."""
    if path.is_symlink() or not path.is_dir():
        what = "is no folder" if os.path.lexists(path) else "is not there"
        raise CheckpointError(
            f"{path.name} {what}; give the folder of a checkpoint itself, and no link to it."
        )
    sizes: dict[str, int] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise damaged(path, repr(entry.name), "is no plain file, but a link, a folder or the like")
            sizes[entry.name] = status.st_size
    if MANIFEST not in sizes:
        raise damaged(path, MANIFEST, "is missing")
    _check_size(path, MANIFEST, sizes)
    return sizes


def _check_size(path: Path, name: str, sizes: Mapping[str, int]) -> None:
    if sizes[name] > LARGEST[name]:
        raise damaged(path, name, f"has {sizes[name]} bytes, and {LARGEST[name]} is the most")


def _entries(path: Path) -> dict[str, Any]:
    """The entries of the manifest, once it agrees with itself and with the name of the folder."""
    text = (path / MANIFEST).read_bytes()
    try:
        whole = strict_json(text)
    except ValueError as error:
        raise damaged(path, MANIFEST, str(error)) from error
    content = whole.get("content") if isinstance(whole, dict) else None
    if not isinstance(content, dict) or sealed(content) != text:
        raise damaged(path, MANIFEST, "is damaged: it does not agree with its own SHA-256")
    if content.get("format") != FORMAT:
        has = f"has format {content.get('format')!r}, and this version of gendiff reads {FORMAT}"
        raise damaged(path, MANIFEST, has, "Use the version that wrote it, or a newer one.")
    step, files = content.get("step"), content.get("files")
    if len(content) != 3 or type(step) is not int or not isinstance(files, dict) or STATE not in files:
        raise damaged(path, MANIFEST, "does not say its step and its files, and nothing more")
    for name, entry in files.items():
        if not FILE.fullmatch(name) or not _is_entry(entry):
            raise damaged(path, MANIFEST, f"says of {name!r} what it says of no file of a checkpoint")
    match = OWN_NAME.fullmatch(path.name)
    if not match or step_in(match[1] or match[2]) != step:
        remedy = f"If the folder was renamed, call it checkpoint-{step:08d}."
        raise damaged(path, MANIFEST, f"says that this is step {step}", remedy)
    return files


def _is_entry(entry: Any) -> bool:
    kinds = {"size": int, "sha256": str}
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds
