"""Changes of a weight as products of low rank: sums, norms and singular values without the large matrix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from gendiff._checks import working_dtype
from gendiff.lora.algorithms import ALGORITHMS, Tensors, delta
from gendiff.lora.plan import Planned

SMALL = 256  # up to here a dense matrix is decomposed exactly
MORE, POWERS = 16, 4  # directions beyond those asked for, and rounds of the subspace iteration


@final
@dataclass(frozen=True, eq=False)
class Product:
    """A matrix [out, in] as left @ right, of a low rank.

    The factors are in float64, since they are small, and since those of a difference cancel.

    Attributes:
        left: [out, rank].
        right: [rank, in].
        dtype: of the matrix, and of the adapter that is made of it.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """Columns of the left and rows of the right factor."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The matrix."""
        return self.left.to(self.dtype) @ self.right.to(self.dtype)

    def __mul__(self, weight: float | int) -> "Product":
        return Product(self.left * weight, self.right, self.dtype)


Change: TypeAlias = Product | Tensor


class SVD(NamedTuple):
    """Left vectors in columns, values from the highest, right vectors in rows, the dtype of the matrix."""

    left: Tensor
    values: Tensor
    right: Tensor
    dtype: torch.dtype


def change_of(row: Planned, parts: Tensors, weight: Tensor | None = None) -> Change:
    r"""What an adapter adds to a weight as a matrix, :math:`\Delta W`: a product wherever its rank is low.

    LoRA is one; LoHa is one of rank r squared, since the Hadamard product of two sums of outer products is a
    sum of outer products; LoKr is one of the rank of its small matrix times that of its other. DoRA and OFT
    change all singular values of a weight, and are no such products.

    Raises:
        ValueError: where the weight is needed and not given.
    """
    dtype = working_dtype(*parts.values())
    wide = {part: tensor.double() for part, tensor in parts.items()}
    if row.algorithm == "lora":
        return Product(wide["lora_B"].flatten(1), wide["lora_A"].flatten(1), dtype) * row.scale
    made: Product | None = None
    if row.algorithm == "loha" and row.rank**2 < min(row.shape[0], wide["hada_w1_b"].shape[1]):
        first, second = (wide[f"hada_w{i}_a"] for i in (1, 2))
        left = (first[:, :, None] * second[:, None, :]).flatten(1)
        first, second = (wide[f"hada_w{i}_b"] for i in (1, 2))
        made = Product(left, (first[:, None] * second[None]).flatten(0, 1), dtype)
    if row.algorithm == "lokr":
        first, second = (_of_kronecker(wide, part) for part in ("lokr_w1", "lokr_w2"))
        inward = first.right.shape[1] * second.right.shape[1]
        if first.rank * second.rank < min(row.shape[0], inward):
            left, right = torch.kron(first.left, second.left), torch.kron(first.right, second.right)
            made = Product(left, right, dtype)
    return delta(row, parts, weight).flatten(1) if made is None else made * row.scale


def _of_kronecker(parts: Tensors, part: str) -> Product:
    """A factor of a Kronecker product as a product, of the lesser of its widths where it is one matrix."""
    if part not in parts:
        return Product(parts[f"{part}_a"], parts[f"{part}_b"], torch.float64)
    matrix = parts[part].flatten(1)
    eye = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    pair = (matrix, eye) if matrix.shape[1] <= matrix.shape[0] else (eye, matrix)
    return Product(*pair, torch.float64)


def parts_of(row: Planned, made: Product) -> dict[str, Tensor]:
    """The lora_A and lora_B of a product, for a layer of its rank, without the scale of the layer."""
    left, right = made.left / row.scale, made.right
    shapes = ALGORITHMS["lora"].shapes(row)
    return {
        part: tensor.reshape(shapes[part]).to(made.dtype).contiguous()
        for part, tensor in (("lora_A", right), ("lora_B", left))
    }


def dense(change: Change) -> Tensor:
    """A change as a matrix."""
    return change.dense() if isinstance(change, Product) else change


def total(changes: Sequence[Change]) -> Change:
    """The sum: of products a product, whose rank is the sum of theirs."""
    products = [change for change in changes if isinstance(change, Product)]
    if len(products) < len(changes):
        return torch.stack([dense(change) for change in changes]).sum(0)
    left, right = [one.left for one in products], [one.right for one in products]
    return Product(torch.cat(left, 1), torch.cat(right), widest(one.dtype for one in products))


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of float32 and float64 that holds all."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def distance(change: Change, other: Change) -> float:
    r"""The norm of a difference, :math:`\lVert X - Y \rVert_F`."""
    return norm(total([change, other * -1]))


def norm(change: Change) -> float:
    r"""The norm :math:`\lVert X \rVert_F`, of a product from the triangles of its factors' QR."""
    if isinstance(change, Product):
        change = _triangles(change)[1]
    return float(torch.linalg.matrix_norm(change))


def values(change: Change) -> Tensor:
    """The singular values from the highest: of a product as many as its rank.

    Those of a dense matrix are roots of the eigenvalues of its lesser Gram matrix, in float64: many times
    faster, and exact to 1e-8 of the highest.
    """
    if isinstance(change, Product):
        return torch.linalg.svdvals(_triangles(change)[1])
    matrix = change.double()
    lesser = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
    return torch.linalg.eigvalsh(lesser @ lesser.mT).clamp(min=0).sqrt().flip(0)


def _triangles(change: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal columns, a small matrix and orthogonal rows whose product it is."""
    left, upper = torch.linalg.qr(change.left)
    right, lower = torch.linalg.qr(change.right.mT)
    return left, upper @ lower.mT, right.mT


def svd(change: Change, most: int, seed: int = 0) -> SVD:
    """The singular value decomposition, of which the highest `most` values are needed.

    Of a product it is exact: that of an r x r matrix between the orthogonal factors of two QR. A dense matrix
    whose lesser side is 256 at most, or near to what is needed, is decomposed exactly too; of a larger one a
    subspace is found by randomised iteration (Halko et al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).

    Args:
        change: the matrix.
        most: how many values are needed; more may come back.
        seed: of the random directions; torch's own generators are left as they were.
    """
    if isinstance(change, Product):
        left, small, right = _triangles(change)
        u, singular, v = torch.linalg.svd(small, full_matrices=False)
        return SVD(left @ u, singular, v @ right, change.dtype)
    matrix, lesser = change, min(change.shape)
    if lesser <= SMALL or 2 * (most + MORE) >= lesser:
        u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(u, singular, v, matrix.dtype)
    start = torch.randn(matrix.shape[1], most + MORE, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    return svd(Product(basis.double(), (basis.mT @ matrix).double(), matrix.dtype), most)


def cut(whole: SVD, rank: int) -> Product:
    """The nearest matrix of a rank (Eckart and Young 1936), with the values shared by both factors."""
    roots = whole.values[:rank].sqrt()
    left, right = whole.left[:, :rank] * roots, roots[:, None] * whole.right[:rank]
    return Product(left.double(), right.double(), whole.dtype)
