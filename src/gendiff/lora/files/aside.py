"""Files and folders that are written beside their place, and take it when they are complete."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside one, for a file or folder that takes its place when all went well.

    What is there is replaced by a complete successor, or stays. Of a folder it stands beside it for an
    instant, as `.<name>.old-...`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    new, old = (path.with_name(f".{path.name}.{word}-{mark}") for word in ("new", "old"))
    try:
        yield new
        folder = new.is_dir()
        for file in [*new.rglob("*"), new] if folder else [new]:
            flush(file)
        if folder and path.exists():
            path.rename(old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        flush(path.parent)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder, and needs no flush of it
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
