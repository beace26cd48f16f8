r"""Counter-based randomness: the same numbers on every device, in every split of a batch, on every rank.

A number is a pure function of (key, stream, draw, element), computed by Philox4x32-10. The key is a sample's:
(seed, epoch, sample id, occurrence). The stream is a name, the draw is the n-th of that name, and the element
is the position inside the sample. Nothing else matters: no other sample of the batch, and no other stream.
"""

import math
import operator
from collections.abc import Sequence
from typing import Protocol, SupportsIndex, final, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gendiff._philox import (
    MASK,
    Counts,
    Ids,
    Kind,
    component,
    draw,
    hash64,
    low_high,
    open32,
    open64,
    ranged,
    sample_keys,
    signed,
)

Device = torch.device | str | int | None

_UNIFORM = (torch.float32, torch.float64)
_NORMAL = (torch.float16, torch.bfloat16, *_UNIFORM)


@runtime_checkable
class Randomness(Protocol):
    """What every source of random numbers here can do; `Rng` and `GeneratorRng` are the two sources."""

    def normal(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        """Unit Gaussian numbers."""
        ...

    def uniform(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        """Uniform numbers of the open interval (0, 1)."""
        ...

    def integers(
        self, name: str, high: int, shape: Sequence[int], *, low: int = 0, device: Device = None
    ) -> Int64[Tensor, "..."]:
        """Integers of low … high - 1."""
        ...

    def fold(self, name: str | int) -> "Randomness":
        """A child with streams of its own."""
        ...


@final
class Rng:
    r"""Philox4x32-10, keyed for each sample, with named streams.

    Element e of the n-th draw (n = 0, 1, …) of a stream is word e mod 4 of
    :math:`\mathrm{philox}(\mathrm{counter}=(\lfloor e/4 \rfloor, n, \mathrm{stream}), \mathrm{key})`, where
    stream is a 64-bit hash of the name. Without `ids` there is one key, the seed, and any shape may be drawn.
    With `ids` there is one key a sample and the first dimension of every shape is B.

    The Rng counts its draws of each name, on the host: drawing a name again gives new numbers, and a new Rng,
    or `rewind`, starts over. Drawing does not synchronise with a CUDA device, unless keys of samples have to
    be moved there first. A CUDA graph that captures a draw repeats that same draw: write new keys to the
    buffer given to `from_keys`, and draw once before capturing, which compiles the kernel.

    Args:
        seed: 0 … 2^64 - 1.
        ids: sample ids, [B], int64 or strings; None for an Rng that is not batched.
        epoch: 0 … 2^32 - 1, one for all or [B].
        occurrence: which of a sample's appearances in the epoch, 0 … 2^32 - 1, one for all or [B].
        device: where the keys lie and, unless a draw says otherwise, its numbers; None is the CPU.

    Raises:
        ValueError: a number out of its range, or a shape whose first dimension is not B.
        TypeError: ids or dtypes of a wrong type.

    References:
        Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*, doi:10.1145/2063384.2063405.

    >>> batch = Rng(0, ids=["cat.png", "dog.png"], epoch=3)
    >>> alone = Rng(0, ids=["dog.png"], epoch=3)
    >>> torch.equal(batch.normal("noise", (2, 4, 8, 8))[1:], alone.normal("noise", (1, 4, 8, 8)))
    True
    """

    def __init__(
        self,
        seed: SupportsIndex = 0,
        ids: Ids | None = None,
        *,
        epoch: Counts = 0,
        occurrence: Counts = 0,
        device: Device = None,
    ) -> None:
        at = torch.device("cpu" if device is None else device)
        self._path, self._draws, self._moved = "", dict[str, int](), dict[torch.device, Tensor]()
        self._seed: int | None = None
        if ids is not None:
            self._keys, self._owned = sample_keys(seed, ids, epoch=epoch, occurrence=occurrence).to(at), True
            return
        if not (isinstance(epoch, int) and isinstance(occurrence, int) and epoch == occurrence == 0):
            raise ValueError(
                f"epoch={epoch} and occurrence={occurrence} belong to samples, but no ids were given; "
                f"give ids=[...], or fold the epoch in: Rng(seed).fold(epoch)."
            )
        self._seed, self._owned = signed(ranged("seed", seed, 0, 2**64)), True
        self._keys = torch.full((), self._seed, dtype=torch.int64, device=at)

    @classmethod
    def from_keys(cls, keys: Int64[Tensor, "..."]) -> "Rng":
        """An Rng on keys that exist already, [B] or [] (not batched), used as they are and never copied.

        The tensor may be a static buffer: a captured CUDA graph reads it again at every replay, so that
        `keys.copy_(new, non_blocking=True)` gives a replay its new randomness.

        >>> keys = sample_keys(0, [7, 8])
        >>> Rng.from_keys(keys).keys is keys
        True
        """
        if keys.dtype != torch.int64 or keys.ndim > 1:
            raise ValueError(
                f"keys are int64 of shape [B], or [] for an Rng that is not batched; got {keys.dtype} of "
                f"shape {tuple(keys.shape)}; `sample_keys` makes them."
            )
        rng = cls()
        rng._keys, rng._seed, rng._owned = keys, None, False
        return rng

    @property
    def keys(self) -> Int64[Tensor, "..."]:
        """The 64-bit keys, [B] or [], not to be written to unless they came by `from_keys`."""
        return self._keys

    @property
    def device(self) -> torch.device:
        """Where the keys lie, and the default of every draw."""
        return self._keys.device

    def fold(self, name: str | int) -> "Rng":
        """A child whose streams are its own and whose draws start at 0; every child of one name is the same.

        Nothing happens on the device.

        >>> rng = Rng(0)
        >>> a, b = rng.fold("loss").normal("noise", (3,)), rng.fold("loss").normal("noise", (3,))
        >>> torch.equal(a, b), torch.equal(a, rng.normal("noise", (3,)))
        (True, False)
        """
        child = self._with(self._keys)
        child._path, child._draws = f"{self._path}{component(name)}/", {}
        return child

    def to(self, device: Device) -> "Rng":
        """This Rng at this point of its streams, with its keys on `device`; the two go on separately."""
        return self._with(self._keys_on(self.device if device is None else torch.device(device)))

    def rewind(self) -> None:
        """Start over: the next draw of every stream is its first; children are not touched."""
        self._draws.clear()

    def __getitem__(self, samples: slice) -> "Rng":
        """The Rng of these samples at this point of their streams; it goes on separately from this one.

        Micro-batches that draw the same names get what the whole batch would have got:

        >>> rng = Rng(0, ids=range(4))
        >>> parts = [rng[:1].normal("noise", (1, 5)), rng[1:].normal("noise", (3, 5))]
        >>> torch.equal(torch.cat(parts), rng.normal("noise", (4, 5)))
        True
        """
        if self._keys.ndim == 0:
            raise TypeError(f"rng[{samples!r}]: this Rng was made without ids and has no samples to slice.")
        keys = self._keys[samples]
        if keys.ndim == 0:
            raise TypeError(f"rng[{samples!r}]: give a slice; rng[i : i + 1] is the Rng of sample i.")
        return self._with(keys)

    def bits(self, name: str, shape: Sequence[int], *, device: Device = None) -> Int64[Tensor, "..."]:
        """Uniform words, 0 … 2^32 - 1, in int64.

        >>> Rng(0).bits("order", (3,)).tolist() == [int(x) for x in Rng(0).bits("order", (9,))[:3]]
        True
        """
        return self._draw(name, shape, "bits", torch.int64, device)

    def normal(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        r"""Unit Gaussian numbers: :math:`\sqrt{-2\ln u_0}\,(\cos 2\pi u_1,\ \sin 2\pi u_1)`, in float64.

        Args:
            name: of the stream.
            shape: of the result; [B, *] if this Rng is batched.
            dtype: float16, bfloat16, float32 or float64; the 16-bit ones are rounded from float32.
            device: of the result; by default that of the keys.

        Returns:
            Numbers of magnitude below 6.8. CPU and CUDA agree within one unit in the last place, and within
            four in float64.

        References:
            Box and Muller 1958, *A note on the generation of random normal deviates*, eq. 1.

        >>> x = Rng(0).normal("noise", (10_000,))
        >>> round(x.mean().item(), 1), round(x.std().item(), 1)
        (0.0, 1.0)
        """
        _one_of("normal", dtype, _NORMAL)
        return self._draw(name, shape, "normal", dtype, device)

    def uniform(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        r"""Uniform numbers of the open interval (0, 1): :math:`(\lfloor x/2^9 \rfloor + 1/2)/2^{23}`.

        They are never 0 nor 1. float64 is :math:`(x + 1/2)/2^{32}`. The 16-bit dtypes would round to 1 and
        raise a TypeError. The other arguments are as for `normal`.

        >>> u = Rng(0).uniform("time", (10_000,))
        >>> bool(((u > 0) & (u < 1)).all())
        True
        """
        _one_of("uniform", dtype, _UNIFORM)
        return self._draw(name, shape, "uniform", dtype, device)

    def integers(
        self, name: str, high: int, shape: Sequence[int], *, low: int = 0, device: Device = None
    ) -> Int64[Tensor, "..."]:
        r"""Integers of low … high - 1: :math:`low + \lfloor x\,(high - low)/2^{32} \rfloor`.

        high - low is at most 2^32. The probability of a value is off by less than 2^-32, that is by less than
        (high - low)/2^32 of itself: 2·10^-7 for 1000 timesteps. The other arguments are as for `normal`.

        References:
            Lemire 2019, *Fast random integer generation in an interval*, section 3, without the rejection.

        >>> Rng(0).integers("timestep", 10, (1000,)).unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        low, high = _interval(low, high)
        product = self.bits(name, shape, device=device).mul_(high - low)
        return product.bitwise_right_shift_(32).bitwise_and_(MASK).add_(low)  # masked, since 2^63 wraps

    def __repr__(self) -> str:
        samples = "" if self._keys.ndim == 0 else f"{len(self._keys)} samples, "
        return f"Rng({samples}path={self._path!r}, device={str(self.device)!r})"

    def _with(self, keys: Tensor) -> "Rng":
        """A copy on these keys; whether they are the caller's to change is inherited."""
        rng = type(self)()
        rng._keys, rng._seed, rng._owned = keys, self._seed, self._owned
        rng._path, rng._draws = self._path, dict(self._draws)
        return rng

    def _keys_on(self, device: torch.device) -> Tensor:
        if device == self.device:
            return self._keys
        if self._seed is not None:  # a fill: it does not synchronise as a copy from the host would
            return torch.full((), self._seed, dtype=torch.int64, device=device)
        if not self._owned:  # the buffer may have been written to since the last draw
            return self._keys.to(device)
        if device not in self._moved:
            self._moved[device] = self._keys.to(device)
        return self._moved[device]

    def _draw(
        self, name: str, shape: Sequence[int], kind: Kind, dtype: torch.dtype, device: Device
    ) -> Tensor:
        shape, path = self._shape(name, shape), f"{self._path}{component(name)}"
        target = self.device if device is None else torch.device(device)
        nth = self._draws.get(path, 0)
        if nth > MASK:
            raise ValueError(f"stream {name!r} has been drawn 2^32 times, which is all it has; use `fold`.")
        self._draws[path] = nth + 1
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=target)
        # Devices without float64 or a kernel of their own get numbers made on the CPU, which are the same.
        keys = self._keys_on(target if target.type in ("cpu", "cuda") else torch.device("cpu"))
        counter = nth, *low_high(hash64(path))
        result = draw(keys.reshape(-1), math.prod(shape) // keys.numel(), counter, kind, dtype)
        return result.view(shape).to(target)

    def _shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        result = tuple(operator.index(size) for size in shape)
        batched = self._keys.ndim == 1
        if batched and (not result or result[0] != len(self._keys)):
            raise ValueError(
                f"{name!r} asks for shape {result}, but the first dimension must be {len(self._keys)}, the "
                f"samples of this Rng; for numbers that are not per sample use an Rng without ids."
            )
        if any(size < 0 for size in result) or math.prod(result[batched:]) > 2**34:
            raise ValueError(
                f"{name!r} asks for shape {result}: no size below 0, no more than 2^34 numbers a sample."
            )
        return result


@final
class GeneratorRng:
    """A `torch.Generator` with the methods of an `Rng`, for callers who bring one.

    A generator is one stream: names are ignored, `fold` returns the same source, and what is drawn depends on
    the order of the draws, the device and the split of the batch. `normal` gives what `torch.randn` gives.

    Args:
        generator: numbers are made on its device and then moved to where they are wanted.

    >>> a = GeneratorRng(torch.Generator().manual_seed(0)).normal("noise", (2, 3))
    >>> torch.equal(a, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    True
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        """Unit Gaussian numbers, `torch.randn` of this generator; the name is ignored."""
        _one_of("normal", dtype, _NORMAL)
        made_on = self.generator.device
        result = torch.randn(tuple(shape), generator=self.generator, dtype=dtype, device=made_on)
        return result.to(made_on if device is None else device)

    def uniform(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> Float[Tensor, "..."]:
        """Uniform numbers of the open interval (0, 1), where `torch.rand` may give 0; the name is ignored."""
        _one_of("uniform", dtype, _UNIFORM)
        words = self.integers(name, 2**32, shape, device=device)
        return open64(words) if dtype == torch.float64 else open32(words)

    def integers(
        self, name: str, high: int, shape: Sequence[int], *, low: int = 0, device: Device = None
    ) -> Int64[Tensor, "..."]:
        """Integers of low … high - 1, `torch.randint` of this generator; the name is ignored."""
        low, high = _interval(low, high)
        made_on = self.generator.device
        result = torch.randint(low, high, tuple(shape), generator=self.generator, device=made_on)
        return result.to(made_on if device is None else device)

    def fold(self, name: str | int) -> "GeneratorRng":
        """This same source, since a generator cannot be split."""
        return self


def as_rng(source: Randomness | torch.Generator | SupportsIndex | None) -> Randomness:
    """The source of random numbers that an argument stands for.

    Args:
        source: an `Rng` or other `Randomness`, used as it is; a `torch.Generator`; or a seed, 0 … 2^64 - 1.

    Returns:
        The source itself, a `GeneratorRng` of the generator, or an `Rng` of the seed.

    Raises:
        ValueError: None was given. Randomness is explicit here: nothing draws from a hidden global generator.

    >>> torch.equal(as_rng(3).normal("noise", (2,)), Rng(3).normal("noise", (2,)))
    True
    """
    accepted = "give Rng(seed), a torch.Generator or a seed"
    if source is None:
        raise ValueError(
            f"rng is None, but this draws random numbers and there is no hidden generator; {accepted}."
        )
    if isinstance(source, torch.Generator):
        return GeneratorRng(source)
    if isinstance(source, Randomness):
        return source
    if isinstance(source, SupportsIndex) and not isinstance(source, bool):
        return Rng(source)
    raise TypeError(f"{source!r} of type {type(source).__name__} is no source of random numbers; {accepted}.")


def _interval(low: int, high: int) -> tuple[int, int]:
    low, high = ranged("low", low, -(2**63), 2**63), ranged("high", high, -(2**63), 2**63)
    if not 1 <= high - low <= 2**32:
        raise ValueError(
            f"integers of {low} … {high - 1} asked for: high - low is {high - low}, not in 1 … 2^32."
        )
    return low, high


def _one_of(what: str, dtype: torch.dtype, accepted: Sequence[torch.dtype]) -> None:
    if dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise TypeError(f"{what} numbers come in {names}, got {dtype}; draw torch.float32 and cast.")
