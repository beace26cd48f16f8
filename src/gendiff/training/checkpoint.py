"""Checkpoints: folders that are complete or not there, that prove what is in them, and that hold no code.

`checkpoint-00000042` in the folder of a run holds

- `<section>.safetensors`: the tensors of each top-level key of the state that has any;
- `state.json`: the rest of the state, and where in it the tensors belong;
- `manifest.json`: the format, the step, the size and SHA-256 of every other file, and its own SHA-256.

Files are hashed on their way to the disk and flushed, the manifest last, in a folder beside the place, which
then takes it by a rename. Whatever a crash interrupts, a folder of that name is whole.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gendiff.training.folder import aside, discard, erase, written_aside
from gendiff.training.manifest import (
    FORMAT,
    MANIFEST,
    NAME,
    STATE,
    CheckpointError,
    check_length,
    damaged,
    put,
    reading,
    sealed,
    step_in,
    verified,
)
from gendiff.training.packing import DTYPES, pack, safetensors_of, unpack


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is.

    >>> path_of(Path("run"), 42).name
    'checkpoint-00000042'
    """
    return root / f"checkpoint-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps that have a checkpoint, by the names alone, in order."""
    if not root.is_dir():
        return []
    names = [name for name in os.listdir(root) if NAME.fullmatch(name)]
    return sorted(step for name in names if path_of(root, step := step_in(name)).name == name)


def write(root: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step; one that is there already is replaced, and not before this is whole.

    Args:
        root: the folder of the run.
        step: updates applied, 0 … 10^18 - 1.
        state: dicts with text keys, lists, tensors on any device, int, float, bool, text and None. All of it
            comes back with the same bits. Its top-level keys are the sections.

    Returns:
        The folder of the checkpoint.

    Raises:
        TypeError: for anything else in the state, by its path, before a file is written.
        ValueError: for a step, a section or a nesting that the format cannot hold.
        OSError: where the disk is full or fails; the folder is then as it was.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> folder = write(root, 42, {"position": {"epoch": 3}, "rates": [0.1, float("inf")]})
    >>> sorted(file.name for file in folder.iterdir())
    ['manifest.json', 'state.json']
    >>> read(folder)
    {'position': {'epoch': 3}, 'rates': [0.1, inf]}
    """
    if type(step) is not int or not 0 <= step < 10**18:
        raise ValueError(f"the step of a checkpoint is an int of 0 … 10^18 - 1, got {step!r}.")
    sections, rest = pack(state)
    check_length(STATE, len(rest))
    with written_aside(path_of(root, step)) as folder:
        files = {STATE: put(folder / STATE, [rest])}
        for section, tensors in sections.items():
            name = f"{section}.safetensors"
            files[name] = put(folder / name, safetensors_of(tensors))
        text = sealed({"format": FORMAT, "step": step, "files": files})
        check_length(MANIFEST, len(text))
        put(folder / MANIFEST, [text])
    return path_of(root, step)


def read(path: Path) -> dict[str, Any]:
    """The state that a checkpoint holds, once all of it has been verified; its tensors are on the CPU.

    Args:
        path: the folder of the checkpoint.

    Raises:
        CheckpointError: for anything but a whole checkpoint under its own name.
    """
    files = verified(path)
    with reading(path):
        rest = (path / STATE).read_bytes()
        names = [name for name in files if name != STATE]
        sections = {name.removesuffix(".safetensors"): _tensors(path, name) for name in names}
    try:
        return unpack(rest, sections)
    except ValueError as error:
        raise damaged(path, STATE, str(error)) from error


def verify(path: Path) -> None:
    """Read a checkpoint to the last byte, in little memory, and compare it with its manifest.

    Args:
        path: the folder of the checkpoint.

    Raises:
        CheckpointError: for anything but a whole checkpoint under its own name.
    """
    verified(path)


def newest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and its state; None where there is no checkpoint.

    Each newer one that is damaged is named in a RuntimeWarning.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    places = {step: path_of(root, step) for step in steps(root)}
    if root.is_dir():  # a crash while a checkpoint was replaced may have left it aside
        for path, name, word in aside(root):
            if NAME.fullmatch(name) and word == "old":
                places.setdefault(step_in(name), path)
    errors: list[str] = []
    for _, path in sorted(places.items(), reverse=True):
        try:
            state = read(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for error in errors:
            warnings.warn(f"{error} {path.name} is used instead.", RuntimeWarning, stacklevel=2)
        return path, state
    if errors:
        told = "\n- ".join(errors)
        raise CheckpointError(
            f"{root.name} has checkpoints, and none of them can be read; to begin anew, give another "
            f"output_dir.\n- {told}"
        )
    return None


def prune(root: Path, keep: int | None) -> None:
    """Verify the newest checkpoint, and only then remove the oldest ones beyond a number.

    The newest is read to the last byte. The others were when they were the newest: they are compared with
    their manifests by names and sizes, down to the number that is kept. One that is damaged does not count
    among these; it stays, and is named in a RuntimeWarning. So is one that cannot be removed.

    Args:
        root: the folder of the run.
        keep: checkpoints to keep, >= 1, or None for all.

    Raises:
        ValueError: for another number.
    """
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep is at least 1 checkpoint, or None for all, got {keep!r}.")
    kept = 0
    for step in reversed(steps(root)):
        if kept == keep:
            discard(path_of(root, step))
            continue
        if kept and keep is None:
            break
        try:
            verified(path_of(root, step), hashes=not kept)
            kept += 1
        except CheckpointError as error:
            warnings.warn(f"{error} It does not count among those kept.", RuntimeWarning, stacklevel=2)


def clean(root: Path) -> None:
    """Remove what interrupted writes and removals left; what was only set aside is put back."""
    if not root.is_dir():
        return
    for path, name, word in aside(root):
        if not NAME.fullmatch(name):
            continue
        if word == "old" and not os.path.lexists(root / name):
            path.rename(root / name)
        else:
            erase(path)


def _tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file, as copies: mapped memory would go on depending on the file."""
    try:
        with safe_open(path / name, framework="pt", backend="pread") as opened:
            kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 - no mapping
            if not kinds <= set(DTYPES.values()):
                raise damaged(path, name, f"has tensors of {sorted(kinds)}, and some are none of ours")
            return opened.get_tensors()
    except SafetensorError as error:
        raise damaged(path, name, f"is no safetensors file ({error})") from error
