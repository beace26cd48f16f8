"""What a run has logged, read from its folder or given as rows, and which rows a phase of it covers."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gendiff.plot.figure import numbers

LOG = "log.jsonl"
EDGES = np.arange(-10.0, 11.0)  # of log-SNR; with the two open ends these are 22 levels

Row: TypeAlias = Mapping[str, Any]
Log: TypeAlias = str | PathLike[str] | Sequence[Row]


def read(source: Log) -> list[Row]:
    """The rows that have a loss, by rising step; a last line that is being written is left out.

    Raises:
        FileNotFoundError: where there is no log.
        ValueError: for a line that is no row, rows without "loss", and steps that do not rise.
    """
    rows = _lines(Path(source)) if isinstance(source, (str, PathLike)) else list(source)
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(f"a row of a log is a mapping with 'step' and 'loss', got {row!r}.")
    kept = [row for row in rows if "loss" in row]
    if not kept:
        raise ValueError(
            f"none of the {len(rows)} rows has a 'loss' to draw; give the folder of a run that has logged "
            f"one, or rows with 'step' and 'loss'."
        )
    for row in kept:
        if "step" not in row:
            raise ValueError(f"a row with a 'loss' has its 'step' too, got one with {sorted(row)}.")
    steps = [row["step"] for row in kept]
    for before, after in pairwise(steps):
        if not before < after:
            raise ValueError(
                f"steps of a log rise, got {after} after {before}; give the rows of one run, in their order."
            )
    return kept


def _lines(path: Path) -> list[Row]:
    file = path / LOG if path.is_dir() else path
    if not file.is_file():
        near = sorted(str(found.parent) for found in path.glob(f"*/{LOG}")) if path.is_dir() else []
        hint = f"; there is one in {', '.join(near)}" if near else "; give the output_dir of a run"
        raise FileNotFoundError(f"there is no {LOG} at {path}{hint}.")
    *lines, last = file.read_text(encoding="utf-8").split("\n")
    rows = []
    for i, line in enumerate([*lines, last]):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if i == len(lines):  # it does not end in a newline: the run is writing it now
                break
            raise ValueError(f"line {i + 1} of {file} is no JSON: {error}.") from error
    return rows


def column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """One number of every row; what is missing or null is NaN."""
    values = (row.get(name) for row in rows)
    return numbers([np.nan if value is None else value for value in values], f"{name!r} of a log")


def spans(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The steps (after, up to) that each row is about: those since the row before."""
    steps = column(rows, "step").tolist()
    first = max(0.0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0.0
    first = min(first, steps[0] - 1)  # a row of step 0 is about what was before training
    return list(zip([first, *steps], steps, strict=False))


def within(rows: Sequence[Row], share: tuple[float | int, float | int]) -> list[int]:
    """The rows that are about a phase of the run, given as shares of its steps."""
    about = spans(rows)
    start, length = about[0][0], about[-1][1] - about[0][0]
    low, high = (start + part * length for part in share)
    rounding = 1e-9 * length
    return [i for i, (a, b) in enumerate(about) if min(b, high) - max(a, low) > rounding]


def levels(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of losses and numbers of samples by level, added over the rows.

    Raises:
        ValueError: for sums and counts that are not 22 numbers.
    """
    total = np.zeros((2, len(EDGES) + 1))
    for row in rows:
        for i, name in enumerate(("loss", "count")):
            value = column([{name: x} for x in row["levels"].get(name, ())], name)
            if len(value) != len(EDGES) + 1:
                raise ValueError(
                    f"'levels' of a row has {len(EDGES) + 1} sums in 'loss' and counts in 'count', for "
                    f"log-SNR below -10, from -10 to -9, … and above 10; got {len(value)} in {name!r} at "
                    f"step {row['step']}."
                )
            total[i] += value
    return total[0], total[1]
