"""A nested state as named tensors and strict JSON, and back: the same bits, and no code in it."""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {  # by their names in a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DEPTH = 64  # levels of nesting
LONGEST = 200  # characters of a tensor's name
SECTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SURROGATE = re.compile("[\ud800-\udfff]")
ACCEPTED = "a checkpoint holds dicts with text keys, lists, tensors, int, float, bool, text and None"

# What JSON cannot say is {"$tensor": name}, {"$int": hexadecimal} or {"$float": bits}; a "$" that begins a
# key of the user is doubled.
Sections = dict[str, dict[str, Tensor]]


def pack(state: Mapping[str, Any]) -> tuple[Sections, bytes]:
    """Split a nested state into tensors by section (its top-level keys) and the JSON of the rest.

    Args:
        state: dicts with text keys, lists, tensors, int, float, bool, text and None.

    Returns:
        Copies of the tensors, on the CPU, by section and name, and the JSON that says where they belong.

    Raises:
        TypeError: for anything else, by its path; nothing has been copied then.
        ValueError: for a section that is no file name, and for nesting deeper than 64 levels.

    >>> pack({"net": {"weight": torch.ones(2)}, "step": 3})
    ({'net': {'weight': tensor([1., 1.])}}, b'{"net":{"weight":{"$tensor":"weight"}},"step":3}')
    """
    live: Sections = {}
    rest: dict[str, Any] = {}
    for section, value in state.items():
        found: dict[str, Tensor] = {}
        rest[_section(section, rest)] = _plain(value, (section,), found)
        if found:
            live[section] = found
    text = json.dumps(rest, separators=(",", ":"), allow_nan=False).encode("ascii")
    with torch.no_grad():
        copies = {s: {name: _copy(tensor) for name, tensor in found.items()} for s, found in live.items()}
    return copies, text


def unpack(text: bytes, sections: Sections) -> dict[str, Any]:
    """The state that `pack` split.

    Raises:
        ValueError: for JSON that `pack` does not write, and for tensors that it does not name once each.

    >>> unpack(b'{"net":[{"$tensor":"0"}]}', {"net": {"0": torch.ones(2)}})
    {'net': [tensor([1., 1.])]}
    """
    rest = strict_json(text)
    if not isinstance(rest, dict):
        raise ValueError("is no JSON object")
    left = {section: dict(tensors) for section, tensors in sections.items()}
    state = {section: _filled(value, left.get(section, {})) for section, value in rest.items()}
    for section, tensors in left.items():
        if tensors or section not in rest:
            raise ValueError(f"does not say where the tensors {sorted(tensors)[:5]} of {section!r} belong")
    return state


def strict_json(text: bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        ValueError: for what is no JSON, for NaN and infinity, for a key that is there twice, and for nesting
            deeper than `DEPTH` and a few.

    >>> strict_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: has the key 'a' twice
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is no JSON ({error})") from error
    except RecursionError:
        raise ValueError(f"is nested deeper than {DEPTH} levels") from None
    level = [value]
    for _ in range(DEPTH + 2):  # a section is one level below the object that holds it, and a tag one more
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError(f"is nested deeper than {DEPTH} levels")
    return value


def safetensors_of(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file, piece by piece, so that they are hashed on their way to the disk.

    The library that reads them hashes nothing, and what it has written could only be hashed by reading the
    file, when it may already differ from the tensors.

    Args:
        tensors: contiguous ones on the CPU, by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all aligned
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def _section(name: Any, others: Mapping[str, Any]) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"the state has the section {name!r} of type {type(name).__name__}; sections are text."
        )
    if not SECTION.fullmatch(name):
        raise ValueError(f"{name!r} is no section: use letters, digits, _ and -, 64 at most, for its file.")
    if name.casefold() in map(str.casefold, others):
        raise ValueError(
            f"two sections are called {name!r} but for upper case; files may not tell them apart."
        )
    return name


def _plain(value: Any, path: tuple[str, ...], found: dict[str, Tensor]) -> Any:
    """JSON of a value, with its tensors put into `found` under names of their own."""
    if len(path) > DEPTH:
        raise ValueError(f"{'.'.join(path[:5])}… is nested deeper than {DEPTH} levels; is it inside itself?")
    if isinstance(value, Tensor):
        name = _name(path[1:], found)
        found[name] = _savable(value, path)
        return {"$tensor": name}
    if isinstance(value, Mapping):
        keys = {key: _key(key, path) for key in value}
        return {keys[key]: _plain(item, (*path, str(key)), found) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item, (*path, str(i)), found) for i, item in enumerate(value)]
    if type(value) is int:
        return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if type(value) is str:
        return _text(value, path)
    if value is None or type(value) is bool:
        return value
    hint = "; make it a list" if isinstance(value, (tuple, set)) else ""
    raise TypeError(f"{'.'.join(path)} is a {type(value).__name__}; {ACCEPTED}{hint}.")


def _key(key: Any, path: tuple[str, ...]) -> str:
    if type(key) is not str:
        raise TypeError(f"{'.'.join(path)} has the key {key!r} of type {type(key).__name__}; {ACCEPTED}.")
    return f"${key}" if _text(key, path).startswith("$") else key


def _text(text: str, path: tuple[str, ...]) -> str:
    """The text; halves of a character (lone surrogates) would come back joined."""
    if SURROGATE.search(text):
        raise TypeError(f"{'.'.join(path)} has the text {text!r}, which is not valid Unicode.")
    return text


def _savable(tensor: Tensor, path: tuple[str, ...]) -> Tensor:
    name = ".".join(path)
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"{name} is sharded over processes; gather it first: tensor.full_tensor().")
    if hasattr(tensor, "__tensor_flatten__") or tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise TypeError(f"{name} is a {type(tensor).__name__} ({kind}); a checkpoint holds dense tensors.")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is a tensor of {tensor.dtype}; accepted: {', '.join(map(str, DTYPES))}.")
    return tensor


def _name(path: tuple[str, ...], taken: Mapping[str, Tensor]) -> str:
    """A name in the file: the path as far as it is one, so that other programs find the tensor."""
    name = stem = re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(path))[-LONGEST:] or "tensor"
    number = 1
    while name in taken or name == "__metadata__":
        number += 1
        name = f"{stem}~{number}"
    return name


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _filled(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `_plain` wrote; each tensor is taken out of `tensors`."""
    if isinstance(value, list):
        return [_filled(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("has a number that is too large")
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$") and not key.startswith("$$")]
    if not tags:
        return {key.removeprefix("$"): _filled(item, tensors) for key, item in value.items()}
    if len(value) != 1 or not isinstance(value[tags[0]], str):
        raise ValueError(f"has the key {tags[0]!r} where it means nothing")
    return _tagged(tags[0], value[tags[0]], tensors)


def _tagged(tag: str, said: str, tensors: dict[str, Tensor]) -> Any:
    if tag == "$tensor" and said in tensors:
        return tensors.pop(said)
    if tag == "$int" and re.fullmatch("-?0x[0-9a-f]+", said):
        return int(said, 16)
    if tag == "$float" and re.fullmatch("[0-9a-f]{16}", said):
        return struct.unpack(">d", bytes.fromhex(said))[0]
    raise ValueError(f"has {tag!r} of {said[:80]!r}, which is not there or is there twice")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"has the key {key!r} twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"has {name}, which is no JSON")
