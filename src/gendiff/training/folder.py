"""A folder that is written beside its place and takes it when it is complete."""

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# new: being written; old: complete, set aside while its successor takes the place; gone: being removed
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<word>new|old|gone)-[0-9a-f]{8}")


def check_target(path: Path, marker: str) -> None:
    """Raise a ValueError for a folder that holds something and not the file that marks what we wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path.name} is a file; give a folder to save into.")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise ValueError(
            f"{path.name} is a folder with something else in it, which saving would replace; give a new or "
            f"empty one, or one that save_pretrained wrote."
        )


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when all went well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, old = _aside(path, "new"), _aside(path, "old")
    folder.mkdir()
    try:
        yield folder
        for file in [*folder.rglob("*"), folder]:
            _flush(file)
        try:
            if os.path.lexists(path):
                path.rename(old)
            folder.rename(path)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(path):
                old.rename(path)
            raise
        _flush(path.parent)
        if os.path.lexists(old):
            discard(old, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def discard(path: Path, named: Path | None = None) -> None:
    """Remove a folder or file; what is half removed is never found under its name.

    Args:
        path: what to remove. If it cannot be, there is a RuntimeWarning.
        named: what its name is made from while it is removed; by default its own.
    """
    gone = _aside(named or path, "gone")
    try:
        path.rename(gone)
        _flush(path.parent)  # on the disk it must have lost its name before it loses its files
    except OSError as error:
        _warn(path, error)
    else:
        erase(gone)


def erase(path: Path) -> None:
    """Remove a folder or file that is already aside; if it cannot be removed, there is a RuntimeWarning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _warn(path, error)


def aside(folder: Path) -> list[tuple[Path, str, str]]:
    """What interrupted writes and removals left in a folder: the path, the name it is for, its word."""
    found = [(path, ASIDE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, match["name"], match["word"]) for path, match in found if match]


def _aside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}-{uuid.uuid4().hex[:8]}")


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path.name} cannot be removed ({error.strerror}); remove it by hand.", RuntimeWarning, stacklevel=3
    )


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder, and needs no flush of it
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
