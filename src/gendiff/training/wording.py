"""How a run's numbers are written for a person: the same in a bar, in lines and in a notebook."""

import math
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any

GAP = "  "  # between two things told: every terminal has it

# What has a place of its own in every display, or is told in files only.
_APART = {"step", "samples", "epoch", "levels", "seconds", "loss_scale", "loss", "learning_rate"}
_APART |= {"images_per_second", "memory_gb", "skipped"}


def number(value: float | int) -> str:
    """Four digits that count.

    >>> [number(x) for x in (0.123, 12.3456, 1234.5, 0.00001, 0.0, 7, math.nan)]
    ['0.1230', '12.35', '1,234', '1.000e-05', '0', '7', 'nan']
    """
    if isinstance(value, Integral):
        return count(int(value))
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def count(value: int) -> str:
    """A whole number with its thousands apart.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{value:,}"


def span(seconds: float | int) -> str:
    """A time in its two largest units, or one where the second says little.

    >>> [span(s) for s in (0.4, 59.7, 599, 1100, 3725, 200_000)]
    ['0 s', '1 min 00 s', '9 min 59 s', '18 min', '1 h 02 min', '2 d 07 h']
    """
    whole = round(seconds)
    if 600 <= whole < 3600:
        return f"{whole // 60} min"
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small:02d} {smaller}"
    return f"{whole} s"


def rate(value: float | int) -> str:
    """Images per second.

    >>> [rate(x) for x in (1234.4, 45.67, 0.251)]
    ['1,234 images/s', '45.7 images/s', '0.25 images/s']
    """
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} images/s"


def learning_rate(value: Any) -> str:
    """A learning rate, or the range of several.

    >>> learning_rate(1e-4), learning_rate([1e-4, 1e-5, 1e-4])
    ('1.0e-04', '1.0e-05 to 1.0e-04')
    """
    values = value if isinstance(value, list | tuple) else [value]
    return " to ".join(f"{one:.1e}" if one else "0" for one in sorted({min(values), max(values)}))


def parts(row: Mapping[str, Any]) -> dict[str, str]:
    """What every display tells of a row, by name, in its order; what the row lacks is left out.

    >>> parts({"loss": 0.1234, "learning_rate": [1e-4], "memory_gb": 3.42, "skipped": 0})
    {'loss': 'loss 0.1234', 'learning_rate': 'lr 1.0e-04', 'memory_gb': '3.4 GB'}
    """
    forms = {
        "loss": lambda value: f"loss {number(value)}",
        "learning_rate": lambda value: f"lr {learning_rate(value)}",
        "images_per_second": rate,
        "memory_gb": lambda value: f"{value:.1f} GB",
        "skipped": lambda value: f"{count(value)} skipped" if value else "",
    }
    told = {name: form(row[name]) for name, form in forms.items() if row.get(name) not in (None, [])}
    return {name: text for name, text in told.items() if text}


def further(row: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a row that `parts` does not tell, by name.

    >>> further({"loss": 0.1, "grad_norm": 0.5, "metrics": {"fid": 12.0}})
    {'grad_norm': '0.5000', 'fid': '12.00'}
    """
    apart = {name: value for name, value in row.items() if name not in _APART}
    return {name.removeprefix("metrics/"): number(value) for name, value in numbers(apart).items()}


def numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row, by flat names.

    >>> numbers({"loss": 0.5, "metrics": {"fid": 12}, "note": "text", "learning_rate": [1e-4, 1e-5]})
    {'loss': 0.5, 'metrics/fid': 12, 'learning_rate/0': 0.0001, 'learning_rate/1': 1e-05}
    """
    result: dict[str, int | float] = {}
    for name, value in leaves(row):
        if name == "learning_rate" and isinstance(value, list | tuple):
            rates = {name: value[0]} if len(value) == 1 else {f"{name}/{i}": v for i, v in enumerate(value)}
            result.update(numbers(rates))
        elif isinstance(value, Real):
            result[name] = plain(value)
    return result


def leaves(value: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, with names `a/b`.

    >>> dict(leaves({"a": {"b": 1, "c": {"d": 2}}, "e": 3}))
    {'a/b': 1, 'a/c/d': 2, 'e': 3}
    """
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping):
            yield from leaves(inner, f"{name}/")
        else:
            yield name, inner


def plain(value: Real) -> int | float:
    """Python's own number, of numpy's and of a truth value too.

    >>> plain(True), plain(0.5)
    (1, 0.5)
    """
    return int(value) if isinstance(value, Integral) else float(value)
