"""The step of a linear solver as one Triton kernel; its coefficients are read from a table on the device."""

from contextlib import nullcontext
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
MOST = 6  # registers that are written


@triton.jit
@no_type_check  # the compiler reads the source; a run-time type checker in between would hide it
def _mix(stack, x0, eps, rows, index, n, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at = at.to(tl.int64)
    row = rows + tl.load(index) * OUTPUTS * INPUTS
    first = tl.load(stack + at, mask=inside)
    a = tl.zeros_like(first)
    b, c, d, e, f = a, a, a, a, a
    for k in tl.static_range(INPUTS):
        # Terms are added in the order of registers, each with one rounding, as `combined` does.
        if k == 1:
            value = tl.load(x0 + at, mask=inside)
        elif k == 2:
            value = tl.load(eps + at, mask=inside)
        else:
            value = tl.load(stack + k * n + at, mask=inside)
        a += tl.load(row + k) * value
        if OUTPUTS > 1:
            b += tl.load(row + INPUTS + k) * value
        if OUTPUTS > 2:
            c += tl.load(row + 2 * INPUTS + k) * value
        if OUTPUTS > 3:
            d += tl.load(row + 3 * INPUTS + k) * value
        if OUTPUTS > 4:
            e += tl.load(row + 4 * INPUTS + k) * value
        if OUTPUTS > 5:
            f += tl.load(row + 5 * INPUTS + k) * value
    tl.store(stack + at, a, mask=inside)
    tl.store(stack + n + at, tl.load(x0 + at, mask=inside), mask=inside)
    tl.store(stack + 2 * n + at, tl.load(eps + at, mask=inside), mask=inside)
    if OUTPUTS > 1:
        tl.store(stack + 4 * n + at, b, mask=inside)
    if OUTPUTS > 2:
        tl.store(stack + 5 * n + at, c, mask=inside)
    if OUTPUTS > 3:
        tl.store(stack + 6 * n + at, d, mask=inside)
    if OUTPUTS > 4:
        tl.store(stack + 7 * n + at, e, mask=inside)
    if OUTPUTS > 5:
        tl.store(stack + 8 * n + at, f, mask=inside)


def mix(stack: Tensor, x0: Tensor, eps: Tensor, rows: Tensor, index: Tensor) -> None:
    """Write the answer and the combinations of row `index` of the table into the stack of registers.

    Args:
        stack: registers x, x0, eps, noise and the memory, [inputs, *], contiguous.
        x0: the answer, contiguous.
        eps: likewise.
        rows: coefficients, [M, outputs, inputs]; outputs are x and the memory.
        index: which of them, int64, a scalar on the device.
    """
    n, (_, outputs, inputs) = x0.numel(), rows.shape
    grid = (triton.cdiv(n, BLOCK),)
    with torch.cuda.device(stack.device) if stack.is_cuda else nullcontext():
        _mix[grid](stack, x0, eps, rows, index, n, inputs, outputs, BLOCK)
