"""Inpainting as data: a denoiser that is told what it knows already."""

from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import unknown, working_dtype
from gendiff.denoiser import Cond, Denoise, Denoised, Time
from gendiff.math.bounds import eps_of
from gendiff.math.schedules import Schedule

Kind = Literal["soft", "differential"]


@final
@dataclass(frozen=True, eq=False)
class Known:
    r"""Data of which a part is known: `Known(x0, keep)(denoise)` is a denoiser that says so.

    .. math:: \hat x_0 \leftarrow m\,x_0 + (1 - m)\,\hat x_0, \qquad
              \hat\epsilon \leftarrow (x_t - \alpha\,\hat x_0)/\sigma

    The blend is in the space of x0, before a solver sees the answer: what a multistep method remembers is
    blended too, and a deterministic method keeps the noise of the known part fixed, so that the network sees
    one noise level everywhere. Where m = 1, a run that ends at the data ends with x0, bit for bit.

    Binary masks are soft ones of 0 and 1. A differential mask is binary at every time: what has `keep` = k is
    held while t > 1 - k, and free from there on, so that 1 - k is the strength with which it is repainted.

    Args:
        x0: the known data, [B, *] or [1, *].
        keep: m, how much of it is kept, in [0, 1]; broadcasts over x0, such as [B, 1, H, W].
        kind: "soft" or "differential".

    Raises:
        ValueError: for a mask outside [0, 1] or one that does not fit x0.

    References:
        Lugmayr et al. 2022, *RePaint*, eq. 8 (there in x_s); Levin & Fried 2023, *Differential diffusion*,
        algorithm 1.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified, grids
    >>> from gendiff.sampling import Euler, sample
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(2), 1.0), Rectified())
    >>> known = Known(torch.tensor([[5.0, 5.0]]), keep=torch.tensor([[1.0, 0.0]]))
    >>> sample(known(exact), torch.ones(1, 2), grids.uniform(Rectified(), 4), Euler())[0, 0].item()
    5.0
    """

    x0: Float[Tensor, "B *dims"]
    keep: Float[Tensor, "..."]
    kind: Kind | str = "soft"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(unknown("kind of mask", self.kind, get_args(Kind)))
        pairs = zip(self.keep.shape, self.x0.shape, strict=False)
        if self.keep.ndim not in (0, self.x0.ndim) or any(size not in (1, of) for size, of in pairs):
            raise ValueError(
                f"keep has shape {tuple(self.keep.shape)}, which does not fit x0 of {tuple(self.x0.shape)}; "
                f"give one value a place, such as [B, 1, H, W] (codec.mask makes it of a picture's mask)."
            )
        if self.keep.device.type == "cpu" and not bool(((self.keep >= 0) & (self.keep <= 1)).all()):
            raise ValueError(
                f"keep lies in [0, 1] (1 keeps x0, 0 is free), got {self.keep.min():g} … {self.keep.max():g}."
            )

    def __call__(self, denoise: Denoise) -> "KnownDenoiser":
        return KnownDenoiser(denoise, self)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The mask m at a time, a scalar or one per sample."""
        if self.kind == "soft":
            return self.keep
        t = t.reshape(t.shape + (1,) * (self.x0.ndim - 1)) if t.ndim else t
        return (self.keep > 1 - t).to(self.keep.dtype)


@final
class KnownDenoiser:
    """A denoiser whose x0 is blended with what is known; see `Known`."""

    def __init__(self, denoise: Denoise, known: Known) -> None:
        self.denoise, self.known = denoise, known

    @property
    def schedule(self) -> Schedule:
        """The schedule of the wrapped denoiser."""
        return self.denoise.schedule

    def __call__(self, x_t: Tensor, t: Time, cond: Cond = None, carry: Any = None) -> Denoised:
        if len(self.known.x0) not in (1, len(x_t)) or self.known.x0.shape[1:] != x_t.shape[1:]:
            raise ValueError(
                f"the known x0 has shape {tuple(self.known.x0.shape)} but x_t has {tuple(x_t.shape)}; they "
                f"are of one size, x0 with one row or as many as x_t."
            )
        denoised = self.denoise(x_t, t, cond, carry)
        moment = self.schedule.moment(t, x_t.device)
        weight = self.known.weight(moment.t)
        x0 = blend(self.known.x0.to(denoised.x0), denoised.x0, weight.to(denoised.x0))
        eps = torch.where(weight == 0, denoised.eps, eps_of(x0, x_t.to(working_dtype(x_t)), moment.level))
        return denoised.replace(x0=x0, eps=eps)

    def parts(self) -> tuple[Any, ...]:
        """What it is made of; see `gendiff.sampling.static`."""
        return self.known.kind, (self.denoise,), (self.known.x0, self.known.keep)

    def rebuilt(self, denoisers: tuple[Denoise, ...], tensors: tuple[Tensor, ...]) -> "KnownDenoiser":
        """The same with other tensors."""
        return KnownDenoiser(denoisers[0], Known(*tensors, kind=self.known.kind))

    def finish(self, x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """A finished sample, with what is kept whole put back exactly."""
        return torch.where(self.known.keep == 1, self.known.x0.to(x), x)


def blend(known: Tensor, free: Tensor, weight: Tensor) -> Tensor:
    """m·known + (1 - m)·free, exactly one of them where m is 1 or 0."""
    mixed = torch.lerp(free, known, weight)
    return torch.where(weight == 1, known, torch.where(weight == 0, free, mixed))
