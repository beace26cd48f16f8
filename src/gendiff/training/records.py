"""The files that a run writes line by line: what it measured, and how long that took."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, final

LOG, TIMING = "log.jsonl", "timing.jsonl"


@final
class Records:
    """`log.jsonl`, which is the same in every run of the same settings, and `timing.jsonl`, which is not.

    Args:
        folder: of the run.
        writes: whether this process writes; the others keep silent.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.left: dict[str, int] = {}  # where a process that goes on in the same run opens them again
        self._files: dict[str, TextIO] = {}

    def open(self, position: Mapping[str, int] | None = None) -> None:
        """Open the files to write behind a position of the log, dropping what lies beyond; None empties both.

        Times are no part of a run's state: of `timing.jsonl` no more than a broken last line is dropped.

        Raises:
            ValueError: for a log that has become shorter than the position.
        """
        if not self.writes:
            return
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        lengths = {name: _whole_lines(self.folder / name) for name in (LOG, TIMING)}
        begins = {LOG: 0, TIMING: 0} if position is None else {**lengths, **position}
        if lengths[LOG] < begins[LOG]:
            raise ValueError(
                f"{LOG} has {lengths[LOG]} bytes and had {begins[LOG]} when the checkpoint was written: "
                f"lines are missing. Put the file back, or begin anew in another output_dir."
            )
        for name, at in begins.items():
            path = self.folder / name
            file = path.open("r+" if path.exists() else "w+", encoding="utf-8")
            file.truncate(at)
            file.seek(at)
            self._files[name] = file

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line and hand it to the system."""
        if self.writes:
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()

    def position(self) -> dict[str, int]:
        """The length of the log, after everything in it is on the disk; nothing where no file is open."""
        if LOG not in self._files:
            return {}
        file = self._files[LOG]
        file.flush()
        os.fsync(file.fileno())
        return {LOG: file.tell()}

    def close(self) -> None:
        self.left = self.position() or self.left
        for file in self._files.values():
            file.close()
        self._files.clear()


def _whole_lines(path: Path) -> int:
    """The bytes of a file up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `log.jsonl`."""
    path = Path(folder) / LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
