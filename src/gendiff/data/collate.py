"""Collation: from samples, which are nested dictionaries, to a batch, which is one of tensors and lists."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = {
    "bool": ((bool, np.bool_), torch.bool),
    "int": ((int, np.integer), torch.int64),
    "float": ((float, np.floating), torch.float32),
}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The batch of some samples: the same keys, each with the values of all samples.

    Tensors and NumPy arrays are stacked; numbers become a tensor [B], of int64, float32 or bool; strings
    become a list; mappings are collated in their turn. Two keys are reserved: `id`, an integer or a string,
    and `weight`, which is float32 and 1 where a sample has none.

    Args:
        samples: at least one, all with the same keys, shapes and dtypes.

    Returns:
        The batch, which always has a `weight`, [B].

    Raises:
        ValueError: for no samples, or two that do not fit together; names the key and the samples.
        TypeError: for a value of another type, such as a PIL image, or keys that are no strings.

    >>> samples = [{"id": "a", "x": torch.zeros(2), "label": 3}, {"id": "b", "x": torch.ones(2), "label": 5}]
    >>> batch = collate(samples)
    >>> batch["id"], batch["x"].shape, batch["label"].tolist(), batch["weight"].tolist()
    (['a', 'b'], torch.Size([2, 2]), [3, 5], [1.0, 1.0])
    """
    if not samples:
        raise ValueError("there is no sample to collate; a batch has at least one.")
    names = [sample.get("id", f"number {n}") for n, sample in enumerate(samples)]
    bare = [{key: value for key, value in sample.items() if key != "weight"} for sample in samples]
    batch = _mappings(bare, names, "")
    if "id" in batch:
        batch["id"] = _ids(batch["id"])
    weights = [
        _weight(sample["weight"], name) if "weight" in sample else 1.0
        for sample, name in zip(samples, names, strict=True)
    ]
    return {**batch, "weight": torch.tensor(weights, dtype=torch.float32)}


def _mappings(values: Sequence[Mapping[str, Any]], names: Sequence[object], path: str) -> dict[str, Any]:
    keys = list(values[0])
    for value, name in zip(values, names, strict=True):
        if odd := set(keys) ^ set(value):
            key = min(odd, key=str)
            has, lacks = (names[0], name) if key in keys else (name, names[0])
            raise ValueError(
                f"sample {has!r} has {f'{path}{key}'!r} but sample {lacks!r} of the same batch has not; "
                f"give every sample the same keys."
            )
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"sample {names[0]!r} has the key {key!r}; keys are strings.")
    return {key: _values([value[key] for value in values], names, f"{path}{key}") for key in keys}


def _values(values: Sequence[Any], names: Sequence[object], key: str) -> Any:
    first, kind, form = values[0], _kind(values[0], names[0], key), _form(values[0])
    for value, name in zip(values, names, strict=True):
        if _form(value) != form and (other := _kind(value, name, key)) != kind:
            raise ValueError(
                f"{key!r} is {kind} in sample {names[0]!r} but {other} in sample {name!r} of the "
                f"same batch; give all of them one type and shape: resize or crop images to one size, or "
                f"group them by size with gendiff.data.Buckets."
            )
    if isinstance(first, Mapping):
        return _mappings(values, names, f"{key}.")
    if isinstance(first, str):
        return list(values)
    if isinstance(first, Tensor | np.ndarray):
        return torch.stack([_tensor(value) for value in values])
    return torch.tensor(
        [value.item() if isinstance(value, np.generic) else value for value in values],
        dtype=_NUMBERS[kind][1],
    )


def _form(value: object) -> tuple[object, ...]:
    """Two values of one form are of one kind, which costs more to tell."""
    if isinstance(value, Tensor | np.ndarray):
        return type(value), value.dtype, value.shape
    return (type(value),)


def _kind(value: object, name: object, key: str) -> str:
    """What two values of a key must agree in."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return f"{value.dtype.name} of shape {list(value.shape)}"
    for kind, (types, _) in _NUMBERS.items():
        if isinstance(value, types):
            return kind
    what = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        what = f"a NumPy array of {value.dtype}"
    raise TypeError(
        f"{key!r} of sample {name!r} is {what}; accepted are tensors, NumPy arrays of numbers, numbers, "
        f"strings and mappings of them. Give pixels as a float32 tensor [3, H, W] in [0, 1], of a PIL image: "
        f"torch.tensor(np.array(image.convert('RGB'))).permute(2, 0, 1) / 255."
    )


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch takes neither a foreign byte order nor negative strides, and warns of arrays that are read-only
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))


def _weight(value: object, name: object) -> float:
    if isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(
            f"'weight' of sample {name!r} is {value!r}; it is reserved for how much the sample "
            f"counts, a number."
        )
    if not math.isfinite(value):
        raise ValueError(
            f"'weight' of sample {name!r} is {value}; give a finite number, such as 0 to leave it out."
        )
    return float(value)


def _ids(ids: object) -> list[str] | Tensor:
    if isinstance(ids, Tensor) and ids.ndim == 1 and not ids.is_floating_point() and ids.dtype != torch.bool:
        return ids.to(torch.int64)
    if isinstance(ids, list):
        return ids
    raise TypeError(
        "'id' is reserved for what a sample is known by, an integer or a string; rename this key."
    )
