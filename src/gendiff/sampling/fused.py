"""All linear combinations of an evaluation in one kernel, for steps that are launched one by one."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff.sampling.stage import Combination, ordered
from gendiff.sampling.table import Kernel, tried

MOST = 8  # registers that a kernel reads


@final
class Fused:
    """The combinations of every evaluation of a run, as a table on the device.

    Sums are taken in the order of `combined`, so that the numbers are the same.

    Args:
        rows: of every evaluation, its combinations, as many each time.
        like: a sample, for device and dtype.

    >>> rows = [[{"x": 2.0, "out": 1.0}, {"x": 1.0}], [{"x": 3.0}, {}]]
    >>> Fused(rows, torch.zeros(1)).names
    ('x', 'out')
    """

    def __init__(self, rows: Sequence[Sequence[Combination]], like: Float[Tensor, "B *dims"]) -> None:
        used = {name for row in rows for part in row for name, factor in part.items() if factor}
        self.names = ordered(tuple(sorted({"x", *used})))
        factors = [[[part.get(name, 0.0) for name in self.names] for part in row] for row in rows]
        table = torch.tensor(factors, dtype=torch.float64).to(like.dtype)
        on_device = like.device.type == "cuda"
        self.table = (table.pin_memory() if on_device else table).to(like.device, non_blocking=True)
        self.kernel = kernel(like.device) if len(self.names) <= MOST else None

    def fits(self, registers: Mapping[str, Tensor]) -> bool:
        """Whether one kernel can read these registers."""
        x = registers["x"]
        return self.kernel is not None and all(
            r.dtype == self.table.dtype == x.dtype and r.shape == x.shape and r.is_contiguous()
            for r in registers.values()
        )

    def __call__(self, row: int, registers: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The combinations of an evaluation."""
        assert self.kernel is not None
        inputs = [registers.get(name, registers["x"]) for name in self.names]  # times 0 where it is absent
        return self.kernel(inputs, self.table, row).unbind()


@cache
def kernel(device: torch.device) -> Kernel | None:
    """The Triton kernel on a CUDA device where it can run; elsewhere combinations are taken one by one."""
    if device.type != "cuda":
        return None

    def make() -> Kernel:
        from gendiff.sampling._mix_triton import combine

        combine([torch.zeros(1, device=device)], torch.zeros(1, 1, 1, device=device), 0)
        return combine

    return tried(make, f"steps on {device} take several kernels in place of one")
