"""Philox4x32-10: from sample ids to keys, from keys and counters to words, from words to numbers.

A sample's numbers are laid out in blocks of four: element e is word `e % 4` of the block whose counter is
`(e // 4, draw, stream_lo, stream_hi)`. Words are uint32 kept in int64 tensors, since torch has hardly any
arithmetic on uint32. On CUDA the same numbers come from one Triton kernel (`_philox_triton`).

References:
    Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*, doi:10.1145/2063384.2063405.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float32, Float64, Int, Int64, Shaped
from torch import Tensor

Kind = Literal["bits", "uniform", "normal"]
Ids = Iterable[SupportsIndex | str] | Int[Tensor, "B"]
Counts = SupportsIndex | Iterable[SupportsIndex] | Int[Tensor, "B"]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
CHUNK = 32768  # blocks of a thread at a time: few enough for the cache, enough to outweigh torch's overhead
CHUNK_ON_DEVICE = 1 << 22
FEW = 32  # up to so many blocks Python's integers are faster than torch's tensors
NARROW = 64  # rows of fewer blocks are too short for an inner loop over a key that is broadcast


def low_high(value: int) -> tuple[int, int]:
    """The two uint32 words of a 64-bit integer, signed or not; the low one first.

    >>> low_high(-1) == low_high(2**64 - 1) == (0xFFFFFFFF, 0xFFFFFFFF)
    True
    """
    return value & MASK, value >> 32 & MASK


def signed(value: int) -> int:
    """The int64 with the same 64 bits.

    >>> signed(2**64 - 1)
    -1
    """
    return (value + 2**63) % 2**64 - 2**63


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32: four words from four words of counter and two of key.

    The words are integers, or int64 tensors that broadcast against each other.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2^64, so that the shift fills with the sign. Only a factor of the next
        # product has to be a clean uint32: what is above bit 31 of c1, c3 and the key goes with its mask.
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product_1 >> 32) ^ c1 ^ k0) & MASK, product_1
        c2, c3 = ((product_0 >> 32) ^ c3 ^ k1) & MASK, product_0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & MASK, c2, c3 & MASK


def sample_keys(
    seed: SupportsIndex, ids: Ids, *, epoch: Counts = 0, occurrence: Counts = 0
) -> Int64[Tensor, "B"]:
    r"""The 64-bit key of every sample, on the host: words 0 and 1 of a Philox block.

    .. math:: w = \mathrm{philox}(\mathrm{counter} = (\mathrm{id}_{lo}, \mathrm{id}_{hi}, \mathrm{epoch},
              \mathrm{occurrence}),\ \mathrm{key} = \mathrm{seed}), \qquad \mathrm{key} = w_0 + 2^{32} w_1

    Args:
        seed: 0 … 2^64 - 1.
        ids: [B], integers of 64 bits (-2^63 … 2^63 - 1) or strings, which are hashed to 64 bits (BLAKE2b).
        epoch: 0 … 2^32 - 1, one for all or [B].
        occurrence: which of a sample's appearances in the epoch, 0 … 2^32 - 1, one for all or [B].

    Returns:
        The keys, [B], on the CPU; for `Rng.from_keys`.

    Raises:
        ValueError: a number out of its range, or not one epoch or occurrence per id.
        TypeError: an id that is neither an integer nor a string.

    References:
        Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*, doi:10.1145/2063384.2063405.

    >>> sample_keys(0, [0, 1], occurrence=[0, 5]).tolist() == [
    ...     sample_keys(0, [0]).item(), sample_keys(0, [1], occurrence=5).item()]
    True
    """
    key, numbers = low_high(ranged("seed", seed, 0, 2**64)), id_numbers(ids)
    size = len(numbers)
    when = _per_sample("epoch", epoch, size), _per_sample("occurrence", occurrence, size)
    if size <= FEW:
        rows = [philox((*low_high(i), *at), key) for i, *at in torch.stack((numbers, *when), 1).tolist()]
        return torch.tensor([signed(low | high << 32) for low, high, _, _ in rows], dtype=torch.int64)
    low, high, _, _ = philox((numbers & MASK, numbers >> 32 & MASK, *when), key)
    return low | high << 32


def id_numbers(ids: Ids) -> Int64[Tensor, "B"]:
    """Sample ids as int64."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point():
            raise TypeError(
                f"ids is a tensor of {ids.dtype} and shape {tuple(ids.shape)}; give integers, [B]."
            )
        return ids.to("cpu", torch.int64)
    if isinstance(ids, str | bytes):
        raise TypeError(
            f"ids is the single {type(ids).__name__} {ids!r}; give one id per sample: ids=[{ids!r}]."
        )
    return torch.tensor(
        [signed(hash64(i)) if isinstance(i, str) else ranged("a sample id", i, -(2**63), 2**63) for i in ids],
        dtype=torch.int64,
    )


def _per_sample(name: str, value: Counts, size: int) -> Int64[Tensor, "{size}"]:
    """An epoch or occurrence for each of `size` samples."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, SupportsIndex):
        return torch.full((size,), ranged(name, value, 0, 2**32), dtype=torch.int64)
    given = [ranged(name, v, 0, 2**32) for v in value]
    if len(given) != size:
        raise ValueError(f"{name} has {len(given)} values for {size} ids; give one for all, or one per id.")
    return torch.tensor(given, dtype=torch.int64)


def ranged(name: str, value: object, low: int, high: int) -> int:
    """The integer `value`, which must lie in low … high - 1."""
    if type(value) is not int and not isinstance(value, SupportsIndex):  # the protocol takes 20 µs to ask
        raise TypeError(f"{name} is an integer, got {value!r} of type {type(value).__name__}.")
    number = operator.index(value)
    if not low <= number < high:
        raise ValueError(f"{name} is {number}, which is not in {low} … {high - 1}.")
    return number


def component(name: str | int) -> str:
    r"""One name of a path: escaped, so that "a/b" is not the b of a, and 1 is not "1"."""
    if name == "":
        raise ValueError("the name of a stream is empty; give it one, such as 'noise'.")
    if isinstance(name, str):
        return name.replace("\\", "\\\\").replace("/", "\\/")
    return f"\\{operator.index(name)}"


def hash64(text: str) -> int:
    # file names may hold lone surrogates, which strict UTF-8 refuses
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def words(keys: Int64[Tensor, "B"], first: int, last: int, counter: tuple[int, int, int]) -> Words:
    """The words of the blocks first … last - 1 of every key, four tensors [B, last - first]."""
    if keys.device.type == "cpu" and len(keys) * (last - first) <= FEW:
        rows = [philox((n, *counter), low_high(key)) for key in keys.tolist() for n in range(first, last)]
        c0, c1, c2, c3 = torch.tensor(rows).view(len(keys), last - first, 4).unbind(-1)
        return c0, c1, c2, c3
    k0, k1 = (keys & MASK)[:, None], (keys >> 32 & MASK)[:, None]
    if last - first < NARROW:
        k0, k1 = (k.expand(-1, last - first).contiguous() for k in (k0, k1))
    return philox((torch.arange(first, last, device=keys.device), *counter), (k0, k1))


def open32(word: Int64[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """The open unit interval in float32: ((x >> 9) + 1/2)·2^-23, exact, from 2^-24 to 1 - 2^-24."""
    return (word >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def open64(word: Int64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """The open unit interval in float64: (x + 1/2)·2^-32, exact, from 2^-33 to 1 - 2^-33."""
    return word.to(torch.float64).add_(0.5).mul_(2.0**-32)


def box_muller(
    word_0: Int64[Tensor, "..."], word_1: Int64[Tensor, "..."]
) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
    """Two unit normals: sqrt(-2·log u_0)·(cos 2π·u_1, sin 2π·u_1) (Box and Muller 1958, eq. 1)."""
    radius = open64(word_0).log_().mul_(-2.0).sqrt_()
    angle = open64(word_1).mul_(2 * math.pi)
    sine = angle.sin().mul_(radius)
    return angle.cos_().mul_(radius), sine


def numbers(words: Words, kind: Kind, dtype: torch.dtype) -> Sequence[Tensor]:
    """Four numbers of this kind from the four words of a block."""
    if kind == "bits":
        return words
    if kind == "uniform":
        return [open64(word) if dtype == torch.float64 else open32(word) for word in words]
    pairs = *box_muller(words[0], words[1]), *box_muller(words[2], words[3])
    return (
        pairs if dtype == torch.float64 else [x.to(torch.float32) for x in pairs]
    )  # 16 bits: by way of float32


def draw_with_torch(
    keys: Int64[Tensor, "B"], count: int, counter: tuple[int, int, int], kind: Kind, dtype: torch.dtype
) -> Shaped[Tensor, "B {count}"]:
    """`draw` on any device in plain torch, in chunks that stay in the cache."""
    samples, blocks = len(keys), -(-count // 4)
    out = torch.empty(samples, blocks, 4, dtype=dtype, device=keys.device)
    size = CHUNK * torch.get_num_threads() if keys.device.type == "cpu" else CHUNK_ON_DEVICE
    width = min(size, blocks)
    height = size // width
    for first in range(0, blocks, width):
        last = min(first + width, blocks)
        for row in range(0, samples, height):
            tile = out[row : row + height, first:last]
            block = words(keys[row : row + height], first, last, counter)
            for lane, value in enumerate(numbers(block, kind, dtype)):
                tile[..., lane] = value
    return out.view(samples, 4 * blocks)[:, :count].contiguous()


def draw(
    keys: Int64[Tensor, "B"], count: int, counter: tuple[int, int, int], kind: Kind, dtype: torch.dtype
) -> Shaped[Tensor, "B {count}"]:
    """`count` numbers for every key, the same whatever the device and whatever the other keys.

    Args:
        keys: 64-bit keys, [B].
        count: numbers per sample, at least 1.
        counter: (draw, stream_lo, stream_hi), three uint32.
        kind: "bits" (uint32 in int64), "uniform" or "normal".
        dtype: of the result.

    >>> draw(torch.zeros(2, dtype=torch.int64), 3, (0, 0, 0), "bits", torch.int64)[1].tolist()
    [1713891541, 3781805453, 3159862348]
    """
    if keys.device.type == "cuda" and (fill := kernel(keys.device)) is not None:
        out = torch.empty(len(keys), count, dtype=dtype, device=keys.device)
        fill(out, keys, counter, kind)
        return out
    return draw_with_torch(keys, count, counter, kind, dtype)


@cache
def kernel(device: torch.device) -> Callable[[Tensor, Tensor, tuple[int, int, int], str], None] | None:
    """The Triton kernel, or None where it cannot run: that is tried once for each device, and says why."""
    try:
        from gendiff._philox_triton import fill

        probe = torch.zeros(1, 4, dtype=torch.int64, device=device)
        fill(probe, probe[0, :1].clone(), (0, 0, 0), "bits")
    except Exception as error:
        # Whatever stops Triton (absent, no C compiler, an old GPU), what follows is the same.
        warnings.warn(
            f"gendiff.random uses its plain torch path on {device}, which gives the same numbers slower, "
            f"because its Triton kernel is not usable here: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return fill
