"""Philox4x32-10 as one Triton kernel: key and counter to words, to bits, uniform or normal numbers.

Imported only where it runs, because it needs Triton. The numbers are those of `_philox`, whose docstring has
the layout; nothing here reads from the device, so a draw can be captured in a CUDA graph.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # counters of one program, four numbers each


@triton.jit
@no_type_check  # the compiler reads the source; a run-time type checker in between would hide it
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, 0xD2511F53)
        high_1 = tl.umulhi(c2, 0xCD9E8D57)
        low_0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low_1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
@no_type_check
def _open_interval(word):
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
@no_type_check
def _pair(word_0, word_1):
    radius = tl.sqrt(tl.log(_open_interval(word_0)) * -2.0)
    angle = _open_interval(word_1) * 6.283185307179586
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["nth", "stream_lo", "stream_hi", "blocks"])
@no_type_check
def _fill(
    out, keys, nth, stream_lo, stream_hi, count, padded, blocks,
    KIND: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    DOUBLE: tl.constexpr = DTYPE.primitive_bitwidth == 64
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)  # over the blocks of all samples
    sample = index // (padded // 4)
    key = tl.load(keys + sample, mask=index < blocks, other=0)
    block = (index - sample * (padded // 4)).to(tl.uint32)
    c1 = tl.zeros_like(block) + nth.to(tl.uint32)
    c2 = tl.zeros_like(block) + stream_lo.to(tl.uint32)
    c3 = tl.zeros_like(block) + stream_hi.to(tl.uint32)
    x0, x1, x2, x3 = _philox(block, c1, c2, c3, key.to(tl.uint32), (key >> 32).to(tl.uint32))
    if KIND == "normal":
        x0, x1 = _pair(x0, x1)
        x2, x3 = _pair(x2, x3)
    # x0[0] x1[0] x2[0] x3[0] x0[1] …: the order of memory, so that a warp writes one contiguous piece
    x = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    if KIND == "uniform":
        x = _open_interval(x) if DOUBLE else ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    if KIND == "normal" and not DOUBLE:
        x = x.to(tl.float32)
    where = 4 * first + tl.arange(0, 4 * BLOCK)
    live = where < 4 * blocks.to(tl.int64)
    if CUT:  # the last block of every sample is not whole
        sample = where // padded
        within = where - sample * padded
        live = live & (within < count)
        where = sample * count + within
    tl.store(out + where, x.to(DTYPE), mask=live)


def fill(out: Tensor, keys: Tensor, counter: tuple[int, int, int], kind: str) -> None:
    """Write `out.shape[1]` numbers for every key into the contiguous `out`, [B, count]."""
    count = out.shape[1]
    padded = -(-count // 4) * 4  # to whole blocks
    blocks = len(keys) * padded // 4
    # as int32 whatever the value, so that one compiled kernel serves all streams
    words = [(word + 2**31) % 2**32 - 2**31 for word in counter]
    with torch.cuda.device_of(keys):  # Triton launches on the current device
        _fill[(triton.cdiv(blocks, BLOCK),)](
            out, keys.contiguous(), *words, count, padded, blocks, KIND=kind, CUT=count % 4 != 0, BLOCK=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
