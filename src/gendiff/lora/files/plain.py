"""The parts of an adapter in a file as those of its equation: shapes checked, then products of cores."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gendiff.lora.files.opening import short

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]


@final
@dataclass(frozen=True)
class Form:
    """What the shapes of a layer's parts say.

    Attributes:
        algorithm: of the equation.
        rank: None where no part tells it, as of LoKr with two whole factors.
        expected: the shapes that the parts have in a file.
        factors: of LoKr, those of the outputs and of the inputs.
    """

    algorithm: str
    rank: int | None
    expected: Shapes
    factors: tuple[Shape, Shape] | None = None


def form_of(shapes: Shapes, weight: Shape, keys: Mapping[str, str]) -> Form:
    """What the parts of a layer are, from their shapes alone.

    Args:
        shapes: by part.
        weight: shape of the weight that they change.
        keys: the key of each part, for errors.

    Raises:
        ValueError: for parts that are missing, of two algorithms, or of shapes that do not fit the weight.
    """
    given = {part: shape for part, shape in shapes.items() if part not in ("magnitude", "dora_scale")}
    for part, shape in shapes.items():
        if not shape or 0 in shape:
            raise ValueError(
                f"{short(keys[part])} is of shape {shape}: it holds nothing, where the rank is 1 at least."
            )
    kinds = {part.partition("_")[0] for part in given}
    if len(kinds) != 1:
        raise ValueError(
            f"{', '.join(map(short, keys.values()))} are "
            f"{'parts of ' + ' and '.join(sorted(kinds)) if kinds else 'beside no lora_A and lora_B'}: a "
            f"layer has the parts of one algorithm."
        )
    form = _FORMS[kinds.pop()](given, weight)
    missing, more = sorted(set(form.expected) - set(given)), sorted(set(given) - set(form.expected))
    if missing or more:
        raise ValueError(
            f"beside {short(next(iter(keys.values())))} "
            f"{f'{missing[0]} is missing' if missing else f'{more[0]} has no meaning'}: the file is not "
            f"whole."
        )
    for part, expected in form.expected.items():
        if _bare(given[part]) != _bare(expected):
            raise ValueError(
                f"{short(keys[part])} is of shape {given[part]}, and {expected} fits the weight of shape "
                f"{weight}: the file is of another model, or broken."
            )
    lengths = [part for part in shapes if part not in given]
    if not lengths:
        return form
    if len(lengths) > 1 or form.algorithm != "lora":
        raise ValueError(
            f"{short(keys[lengths[0]])} has no meaning beside {form.algorithm}: DoRA here is of lora_A and "
            f"lora_B, with one magnitude."
        )
    _check_lengths(keys[lengths[0]], shapes[lengths[0]], lengths[0], weight)
    return Form("dora", form.rank, {**form.expected, lengths[0]: shapes[lengths[0]]})


def plain(form: Form, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts as the equation takes them, with the core of a Tucker decomposition multiplied in."""
    found = {part: given[part].reshape(shape) for part, shape in form.expected.items()}
    for name in ("dora_scale", "magnitude"):
        if name in found:
            found["magnitude"] = found.pop(name).flatten()
    if "lora_mid" in found:
        core = found.pop("lora_mid")  # up [o, r], core [r, s, *kernel], down [s, i]
        found["lora_A"] = _times("rs...,si->ri...", core, found["lora_A"].flatten(1))
    for a, b, core in _CORES:
        if core in found:  # a [r, o], core [r, s, *kernel], b [s, i]
            found[b] = _times("rs...,si->ri...", found.pop(core), found[b]).flatten(1)
            found[a] = found[a].mT.contiguous()
    return found


_CORES = (
    ("hada_w1_a", "hada_w1_b", "hada_t1"),
    ("hada_w2_a", "hada_w2_b", "hada_t2"),
    ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def _times(equation: str, core: Tensor, side: Tensor) -> Tensor:
    """A product that is rounded once, to the precision of its factors."""
    return torch.einsum(equation, core.double(), side.double()).to(core.dtype)


def _bare(shape: Shape) -> Shape:
    """A shape without the ones that a convolution of one tap has and a matrix has not."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _axis(shape: Shape | None, axis: int) -> int:
    """A size, or 0 where there is none, which fits nothing."""
    return shape[axis] if shape is not None and axis < len(shape) else 0


def _lora(given: Shapes, weight: Shape) -> Form:
    out, inward, *kernel = weight
    rank = _axis(given.get("lora_B"), 1) or _axis(given.get("lora_A"), 0)
    found: dict[str, Shape] = {"lora_B": (out, rank, *(1 for _ in kernel))}
    if "lora_mid" in given:
        inner = _axis(given["lora_mid"], 1)
        found |= {"lora_mid": (rank, inner, *kernel), "lora_A": (inner, inward, *(1 for _ in kernel))}
    else:
        found["lora_A"] = (rank, inward, *kernel)
    return Form("lora", rank, found)


def _loha(given: Shapes, weight: Shape) -> Form:
    out, inward, *kernel = weight
    rank = _axis(given.get("hada_w1_b"), 0)
    found: dict[str, Shape] = {}
    for i in (1, 2):
        found |= _pair(f"hada_w{i}", f"hada_t{i}", given, (out, inward, *kernel), rank)
    return Form("loha", rank, found)


def _lokr(given: Shapes, weight: Shape) -> Form:
    out, inward, *kernel = weight
    first = given.get("lokr_w1") or (_axis(given.get("lokr_w1_a"), 0), _axis(given.get("lokr_w1_b"), 1))
    out_1, in_1 = _axis(first, 0) or 1, _axis(first, 1) or 1
    second = (out // out_1, inward // in_1, *kernel)
    rank: int | None = None
    if "lokr_w2" in given:
        found: dict[str, Shape] = {"lokr_w2": second}
    else:
        rank = _axis(given.get("lokr_w2_b"), 0)
        found = _pair("lokr_w2", "lokr_t2", given, second, rank)
    if "lokr_w1" in given:
        found["lokr_w1"] = (out_1, in_1)
    else:
        rank = rank or _axis(given.get("lokr_w1_b"), 0)
        found |= {"lokr_w1_a": (out_1, rank), "lokr_w1_b": (rank, in_1)}
    if out_1 * second[0] != out or in_1 * second[1] != inward:
        raise ValueError(
            f"the first factor of a lokr adapter is of shape {(out_1, in_1)}, which does not divide the "
            f"weight of shape {weight}: the file is of another model, or broken."
        )
    return Form("lokr", rank, found, ((out_1, second[0]), (in_1, second[1])))


def _pair(name: str, core: str, given: Shapes, weight: Shape, rank: int) -> dict[str, Shape]:
    """Two factors of a matrix, or of a Tucker decomposition, whose first factor lies on its side."""
    out, inward, *kernel = weight
    if core in given:
        return {f"{name}_a": (rank, out), f"{name}_b": (rank, inward), core: (rank, rank, *kernel)}
    return {f"{name}_a": (out, rank), f"{name}_b": (rank, inward * math.prod(kernel))}


def _oft(given: Shapes, weight: Shape) -> Form:
    inward = weight[1]
    blocks = _axis(given.get("oft_R"), 0) or 1
    size = inward // blocks
    if blocks * size != inward or size < 2:
        raise ValueError(
            f"an oft adapter of {blocks} blocks does not fit the {inward} inputs of a weight of "
            f"shape {weight}."
        )
    return Form("oft", size, {"oft_R": (blocks, size * (size - 1) // 2)})


_FORMS: Mapping[str, Callable[[Shapes, Shape], Form]] = {
    "lora": _lora,
    "hada": _loha,
    "lokr": _lokr,
    "oft": _oft,
}


def _check_lengths(key: str, shape: Shape, part: str, weight: Shape) -> None:
    """Magnitudes of DoRA are one for each output."""
    out, inward = weight[:2]
    if part == "dora_scale" and len(shape) > 1 and out > 1 and _bare(shape) == (1, inward):
        raise ValueError(
            f"{short(key)} is of shape {shape}, a length for each input (wd_on_out=False of LyCORIS): DoRA "
            f"here has one for each of {out} outputs, as it is published."
        )
    places = [place for place, size in enumerate(shape) if size != 1]
    allowed = ([0], [1]) if part == "magnitude" else ([0],)  # peft's convolutions have it second
    if math.prod(shape) != out or (out > 1 and places not in allowed):
        raise ValueError(
            f"{short(key)} is of shape {shape}, and one length for each of {out} outputs is expected: the "
            f"file is of another model, or broken."
        )
