"""The step of a linear solver as one Triton kernel; its coefficients are read from a table on the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, no_type_check

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


@triton.jit(do_not_specialize=["row"])
@no_type_check
def _combine(
    i0, i1, i2, i3, i4, i5, i6, i7, out, rows, row, n,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    at = at.to(tl.int64)
    first = rows + row * OUTPUTS * INPUTS
    for k in tl.static_range(OUTPUTS):
        own, value = first + k * INPUTS, tl.load(i0 + at, mask=inside)
        total = tl.zeros_like(value)  # else a compiler may choose which of two products is rounded
        total += tl.load(own) * value
        if INPUTS > 1:
            total += tl.load(own + 1) * tl.load(i1 + at, mask=inside)
        if INPUTS > 2:
            total += tl.load(own + 2) * tl.load(i2 + at, mask=inside)
        if INPUTS > 3:
            total += tl.load(own + 3) * tl.load(i3 + at, mask=inside)
        if INPUTS > 4:
            total += tl.load(own + 4) * tl.load(i4 + at, mask=inside)
        if INPUTS > 5:
            total += tl.load(own + 5) * tl.load(i5 + at, mask=inside)
        if INPUTS > 6:
            total += tl.load(own + 6) * tl.load(i6 + at, mask=inside)
        if INPUTS > 7:
            total += tl.load(own + 7) * tl.load(i7 + at, mask=inside)
        tl.store(out + k * n + at, total, mask=inside)


INPUTS = 8  # registers that are read at most
# Compiled kernels, launched without asking Triton again which one fits: that takes as long as three launches.
_COMPILED: dict[tuple[object, ...], Any] = {}


def combine(inputs: Sequence[Tensor], rows: Tensor, row: int) -> Tensor:
    """All combinations of row `row` of a table, [outputs, *]; the inputs are contiguous and alike.

    Args:
        inputs: registers, at most 8.
        rows: coefficients, [M, outputs, inputs], in the dtype of the inputs.
        row: which of them.
    """
    like, (_, outputs, count) = inputs[0], rows.shape
    out, n = like.new_empty(outputs, *like.shape), like.numel()
    every = (*inputs, *(like,) * (INPUTS - count))
    args, grid = (*every, out, rows, row, n, count, outputs, BLOCK), (triton.cdiv(n, BLOCK), 1, 1)
    # What Triton compiles for: the kinds of the arguments, addresses and n that 16 divides, and an n of 1.
    key = like.device, like.dtype, count, outputs, n % 16 == 0, n == 1
    aligned = all(x.data_ptr() % 16 == 0 for x in inputs)
    ready = _COMPILED.get(key) if aligned else None
    elsewhere = like.is_cuda and torch.cuda.current_device() != like.device.index
    with torch.cuda.device(like.device) if elsewhere else nullcontext():
        if ready is not None:
            ready[grid](*args)
        else:
            made = _combine[grid](*args)
            if aligned and made is not None:  # the interpreter makes nothing
                _COMPILED[key] = made
    return out
