"""A denoiser whose x0 is kept in the range of the data."""

from typing import Any, final

from torch import Tensor

from gendiff._checks import working_dtype
from gendiff.denoiser import Cond, Denoise, Denoised, Time
from gendiff.math.bounds import Bound, eps_of
from gendiff.math.schedules import Schedule


@final
class Bounded:
    """Bound the x0 of a denoiser and recompute eps, so that the pair still stands for x_t.

    Round a guider it bounds what guidance made, which is where bounds are needed; without the recomputed eps
    the next step would add back what the bound took away.

    Args:
        denoise: a denoiser or a wrapper round one.
        bound: `Clip(limit)`, `DynamicThreshold(quantile, limit)` or any map x0 -> x0.
    """

    def __init__(self, denoise: Denoise, bound: Bound) -> None:
        self.denoise, self.bound = denoise, bound

    @property
    def schedule(self) -> Schedule:
        """The schedule of the wrapped denoiser."""
        return self.denoise.schedule

    def __call__(self, x_t: Tensor, t: Time, cond: Cond = None, carry: Any = None) -> Denoised:
        denoised = self.denoise(x_t, t, cond, carry)
        x0 = self.bound(denoised.x0)
        level = self.schedule.moment(t, x_t.device).level
        return denoised.replace(x0=x0, eps=eps_of(x0, x_t.to(working_dtype(x_t)), level))

    def parts(self) -> tuple[Any, ...]:
        """What it is made of; see `gendiff.sampling.static`."""
        return self.bound, (self.denoise,), ()

    def rebuilt(self, denoisers: tuple[Denoise, ...], tensors: tuple[Tensor, ...]) -> "Bounded":
        """The same round another denoiser."""
        return Bounded(denoisers[0], self.bound)
