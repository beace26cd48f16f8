"""What an adapter of each kind adds to a weight, and of which tensors: one equation, one place."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gendiff.lora.plan import Planned

Tensors: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = dict[str, tuple[int, ...]]
Scale: TypeAlias = float | Tensor
Kinds: TypeAlias = tuple[type[nn.Module], ...]

LAYERS: Kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
@dataclass(frozen=True)
class Algorithm:
    r"""A way to say a change of a weight in few numbers.

    Attributes:
        shapes: the tensors of a planned layer, by part, with their shapes.
        delta: what they add to the weight, :math:`\Delta W`, from the tensors, the scale and the weight;
            weights are matrices here, with a row for each output.
        options: its own settings, with what they are where none is given.
        scaled: whether it has a scale, lora_alpha over the rank.
        needs_weight: whether what it adds depends on the weight that it is added to.
        kinds: the classes of the layers that can carry it.
        limit: the highest rank of a weight of so many rows and columns.
        pads: whether rows and columns of zeros in its parts, for ranks that are not there, change nothing.
        rests: whether zeros in all of its parts add nothing, and learn nothing.
    """

    shapes: Callable[["Planned"], Shapes]
    delta: Callable[["Planned", Tensors, Scale, Tensor | None], Tensor]
    options: Mapping[str, Any]
    limit: Callable[[int, int], int] = min
    scaled: bool = True
    needs_weight: bool = False
    kinds: Kinds = LAYERS
    pads: bool = True
    rests: bool = True


def _flat(row: "Planned") -> tuple[int, int]:
    """Rows and columns of the weight of a layer as a matrix."""
    return row.shape[0], math.prod(row.shape[1:])


# ---- LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1; DoRA: Liu et al. 2024, arXiv 2402.09353, eq. 5


def _lora_shapes(row: "Planned") -> Shapes:
    out, inward, *kernel = row.shape
    return {"lora_A": (row.rank, inward, *kernel), "lora_B": (out, row.rank, *(1 for _ in kernel))}


def _lora(row: "Planned", given: Tensors, scale: Scale, weight: Tensor | None) -> Tensor:
    return scale * (given["lora_B"].flatten(1) @ given["lora_A"].flatten(1))


def _dora_shapes(row: "Planned") -> Shapes:
    return {**_lora_shapes(row), "magnitude": (row.shape[0],)}


def _dora(row: "Planned", given: Tensors, scale: Scale, weight: Tensor | None) -> Tensor:
    assert weight is not None
    directed = weight + _lora(row, given, scale, None)
    return given["magnitude"][:, None] * directed / directed.norm(dim=1, keepdim=True) - weight


# ---- LoHa: Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098, eq. 3


def _loha_shapes(row: "Planned") -> Shapes:
    out, inward = _flat(row)
    return {
        f"hada_w{i}_{side}": shape
        for i in (1, 2)
        for side, shape in (("a", (out, row.rank)), ("b", (row.rank, inward)))
    }


def _loha(row: "Planned", given: Tensors, scale: Scale, weight: Tensor | None) -> Tensor:
    first, second = (given[f"hada_w{i}_a"] @ given[f"hada_w{i}_b"] for i in (1, 2))
    return scale * first * second


# ---- LoKr: Yeh et al. 2024, LyCORIS, arXiv 2309.14859, section 3.2


def factors(dimension: int, factor: int) -> tuple[int, int]:
    """The two factors of a width, of which the first is the given one; else the lesser is, and near to it.

    Args:
        dimension: the width.
        factor: -1 is the root of the width, for factors that are near to each other.

    >>> factors(128, -1), factors(250, -1), factors(512, 16), factors(16, 8), factors(360, 7)
    ((8, 16), (10, 25), (16, 32), (8, 2), (6, 60))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    highest = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    lesser = max(one for one in range(1, highest + 1) if dimension % one == 0)
    return lesser, dimension // lesser


def _lokr_shapes(row: "Planned") -> Shapes:
    out, inward, *kernel = row.shape
    factor = row.option("decompose_factor")
    (out_1, out_2), (in_1, in_2) = factors(out, factor), factors(inward, factor)
    taps = math.prod(kernel)
    if row.option("decompose_both") and row.rank < max(out_1, in_1) / 2:
        shapes: Shapes = {"lokr_w1_a": (out_1, row.rank), "lokr_w1_b": (row.rank, in_1)}
    else:
        shapes = {"lokr_w1": (out_1, in_1)}
    if row.rank < max(out_2, in_2) / 2:
        return {**shapes, "lokr_w2_a": (out_2, row.rank), "lokr_w2_b": (row.rank, in_2 * taps)}
    return {**shapes, "lokr_w2": (out_2, in_2, *kernel)}


def _lokr(row: "Planned", given: Tensors, scale: Scale, weight: Tensor | None) -> Tensor:
    first, second = (
        given[part] if part in given else given[f"{part}_a"] @ given[f"{part}_b"]
        for part in ("lokr_w1", "lokr_w2")
    )
    return scale * torch.kron(first, second.flatten(1))


# ---- OFT: Qiu et al. 2023, arXiv 2306.07280, section 3; on the input's side, rank is the size of a block


def _oft_shapes(row: "Planned") -> Shapes:
    return {"oft_R": (row.shape[1] // row.rank, row.rank * (row.rank - 1) // 2)}


def rotations(skew: Tensor, size: int) -> Tensor:
    r"""Cayley's orthogonal matrices :math:`(I - Q)(I + Q)^{-1}` of what is above the diagonals of Q.

    Args:
        skew: [blocks, size (size - 1) / 2], rows first.
        size: of a block.
    """
    upper = torch.triu_indices(size, size, 1, device=skew.device)
    matrix = skew.new_zeros(len(skew), size, size)
    matrix[:, upper[0], upper[1]] = skew
    matrix = matrix - matrix.mT
    eye = torch.eye(size, dtype=skew.dtype, device=skew.device).expand_as(matrix)
    return torch.linalg.solve(eye + matrix, eye - matrix, left=False)


def _oft(row: "Planned", given: Tensors, scale: Scale, weight: Tensor | None) -> Tensor:
    assert weight is not None
    blocks = weight.unflatten(1, (-1, row.rank))  # x R in each block is what W takes
    turned = torch.einsum("obj,bij->obi", blocks, rotations(given["oft_R"], row.rank))
    return turned.flatten(1) - weight


ALGORITHMS: Mapping[str, Algorithm] = {
    "lora": Algorithm(_lora_shapes, _lora, {}),
    "dora": Algorithm(_dora_shapes, _dora, {}, needs_weight=True, rests=False),
    "loha": Algorithm(_loha_shapes, _loha, {}, kinds=LAYERS[:3]),
    "lokr": Algorithm(
        _lokr_shapes,
        _lokr,
        {"decompose_both": False, "decompose_factor": -1},
        limit=max,
        kinds=LAYERS[:3],
        pads=False,
    ),
    "oft": Algorithm(
        _oft_shapes,
        _oft,
        {},
        limit=lambda out, inward: inward,
        scaled=False,
        needs_weight=True,
        kinds=LAYERS[:1],
        pads=False,
        rests=False,
    ),
}


def delta(
    row: "Planned", tensors: Tensors, weight: Tensor | None = None, scale: Scale | None = None
) -> Tensor:
    r"""What an adapter adds to the weight of its layer, :math:`\Delta W`, in its shape.

    Args:
        row: the layer as planned.
        tensors: the parts of its adapter.
        weight: of the layer, where what is added depends on it.
        scale: in the place of the planned one.

    Returns:
        The change in float32 at least.

    Raises:
        ValueError: where the weight is needed and not given.
    """
    algorithm = ALGORITHMS[row.algorithm]
    if algorithm.needs_weight and weight is None:
        raise ValueError(
            f"what {row.algorithm} adds to {row.name} depends on the weight of the layer: give it."
        )
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = {part: tensor.to(dtype) for part, tensor in tensors.items()}
    base = None
    if weight is not None:
        device = next(iter(tensors.values())).device
        base = weight.detach().to(device, dtype).flatten(1)
    strength = row.scale if scale is None else scale
    return algorithm.delta(row, wide, strength, base).reshape(row.shape)
