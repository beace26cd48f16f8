r"""The likelihood of data under a denoiser, by the probability-flow ODE.

The ODE :math:`dx = x_0\,d\alpha + \epsilon\,d\sigma` carries the noise that sampling starts from to samples,
and the change of variables along it says what density they have. It is integrated in polar coordinates of the
level, :math:`(\alpha, \sigma) = r(\cos\varphi, \sin\varphi)` and :math:`x = r y`, in which it is the same for
every schedule, regular at both ends and free of derivatives of the schedule:

.. math:: \frac{dy}{d\varphi} = v(y, \varphi) = \cos\varphi\,\epsilon - \sin\varphi\,x_0, \qquad
          \log p_{\varphi_0}(y_0) = \log p_{\varphi_1}(y_1)
              + \int_{\varphi_0}^{\varphi_1} \mathrm{tr}\frac{\partial v}{\partial y}\,d\varphi

The first equation is that of DDIM (Salimans & Ho 2022, appendix D), the second Chen et al. 2018, eq. 8, and
Song et al. 2021, *Score-based generative modeling*, eq. 39. The approximations are the steps in phi and, for
data of many values, probes for the trace; both have an error that can be made as small as one likes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gendiff._checks import finite_on_host, positive_batch, unknown, working_dtype
from gendiff.denoiser import Cond, Denoise
from gendiff.math.grids import Grid
from gendiff.math.numeric import Number, numbers
from gendiff.math.schedules import Schedule
from gendiff.sampling.divergence import Divergence, Hutchinson, Source
from gendiff.sampling.solver import check_schedule

Method = Literal["heun", "rk4"]

# Runge-Kutta methods whose every stage starts from the one before: where the stages lie, and their weights.
_STAGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "heun": ((0.0, 1.0), (1 / 2, 1 / 2)),
    "rk4": ((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@final
@dataclass(frozen=True, eq=False)
class Likelihood:
    """What `log_likelihood` finds.

    Attributes:
        log_prob: log density of every sample, over all its values, in nats, [B].
        standard_error: what the probes leave open of it, [B], as their scatter says: 0 for `Exact`, None for
            a single probe. The error of the steps is not in it.
        noise: where the ODE carries the samples to at t = 1, [B, *]: sampling from there gives them back.
    """

    log_prob: Float64[Tensor, "B"]
    standard_error: Float64[Tensor, "B"] | None
    noise: Float[Tensor, "B *dims"]


def log_likelihood(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    *,
    divergence: Divergence | None = None,
    method: Method = "rk4",
    cond: Cond = None,
    rng: Source = None,
) -> Likelihood:
    r"""The log density of data under the law that a deterministic sampler draws from.

    The grid's last time t, above 0, says what density this is: that of data with the noise of that level on
    it, in units of the data, i.e. of :math:`x_0 + \rho\,n` with :math:`\rho = \sigma_t/\alpha_t` and unit
    Gaussian n, at the point x (which is not noised). For a law p with a smooth density it differs from log p
    by :math:`\tfrac12\rho^2\,\Delta p/p`, and a law without one, such as pictures on a grid of 8 bits, has
    only this: `dequantise` those first. At t = 1 the density is that of sigma(1) times a unit Gaussian.

    Nothing of the caller's mode is needed or changed: gradients are taken for the divergence alone, and none
    reaches a parameter. The denoiser is evaluated without a carry, and its answer must not be detached from
    x. Put networks into `eval()`: dropout would make the field another one at every evaluation.

    Args:
        denoise: a `Denoiser`, a guider, or any wrapper round one.
        x: data, [B, *].
        grid: the times, falling from 1 to a last time above 0, on the schedule of `denoise`: `angle_grid`
            makes steps that are equal for the integration, but any grid will do.
        divergence: `Exact()` or `Hutchinson(...)`, which is the default, with one probe of signs.
        method: `rk4`, of order 4, four evaluations a step, some of them halfway between times; or `heun`, of
            order 2, two evaluations a step, at times of the grid only.
        cond: the condition given to every call.
        rng: randomness of the probes: an `Rng`, a `torch.Generator` or a seed. With an `Rng` of ids a
            sample's probes are its own, however the batch is split.

    Returns:
        `Likelihood(log_prob, standard_error, noise)`; the first two in float64.

    Raises:
        ValueError: a grid on another schedule, or that does not run from 1 to a time above 0; probes without
            rng; an unknown method; x that is empty or not finite; a denoiser that carries no gradient.

    References:
        Song et al. 2021, *Score-based generative modeling*, eq. 39 and 40; Chen et al. 2018, *Neural ordinary
        differential equations*, eq. 8.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, Rectified
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(2), 1.0), Rectified())
    >>> grid = angle_grid(Rectified(), 16, start=1e-3)
    >>> log_likelihood(exact, torch.zeros(1, 2), grid, rng=0).log_prob  # -log(2π)
    tensor([-1.8379], dtype=torch.float64)
    """
    positive_batch(x, "x")
    finite_on_host(x, "x")
    if method not in _STAGES:
        raise ValueError(unknown("method", method, _STAGES))
    check_schedule(denoise, grid)
    _check_ends(grid)
    with torch.inference_mode(False), torch.no_grad():
        divergence = Hutchinson() if divergence is None else divergence
        start, *_, end = nodes = _nodes(grid.schedule, grid.t.flip(0))
        y = x.to(working_dtype(x)) * start.cos
        field = _Field(denoise, cond, divergence.directions(y, rng))
        products = torch.zeros(len(field.directions), len(y), dtype=torch.float64, device=y.device)
        for h, stages in _steps(grid.schedule, nodes, method):
            y, change = _step(field, y, h, stages, _STAGES[method])
            products += change
        trace, error = divergence.combine(products)
        scaled = y.to(torch.float64).reshape(len(y), -1)
        size = scaled.shape[1]
        prior = -(scaled / end.sin).square().sum(1) / 2 - size * math.log(math.sqrt(2 * math.pi) * end.sin)
        return Likelihood(prior + trace + size * math.log(start.cos), error, end.r * y)


def angle_grid(schedule: Schedule, steps: int, start: Number) -> Grid:
    """Times at equal distances of the angle atan2(sigma, alpha), from 1 to `start`: equal steps for the ODE.

    Args:
        schedule: the schedule.
        steps: number of steps, at least 1.
        start: the last time, in (0, 1), which says what `log_likelihood` is the likelihood of.

    >>> from gendiff.math.schedules import Rectified
    >>> [round(t, 4) for t in angle_grid(Rectified(), 2, start=0.5).times]
    [1.0, 0.7071, 0.5]
    """
    if steps < 1 or not 0 < start < 1:
        raise ValueError(f"a grid has at least one step and starts in (0, 1), got {steps} and {start}.")
    alpha, sigma = schedule.level(torch.tensor([1.0, start], dtype=torch.float64))
    noisiest, cleanest = torch.atan2(sigma, alpha)
    inner = torch.lerp(noisiest, cleanest, torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1])
    return Grid(schedule, [1.0, *numbers(_time_at(schedule, inner)), start])


class _Node(NamedTuple):
    """A level in polar coordinates, with its time, as numbers of the host."""

    t: float
    r: float
    angle: float
    cos: float
    sin: float


def _nodes(schedule: Schedule, t: Float64[Tensor, "N"]) -> list[_Node]:
    alpha, sigma = schedule.level(t)
    r = torch.hypot(alpha, sigma)
    columns = (t, r, torch.atan2(sigma, alpha), alpha / r, sigma / r)
    return [_Node(*row) for row in zip(*map(numbers, columns), strict=True)]


def _time_at(schedule: Schedule, angle: Float64[Tensor, "N"]) -> Float64[Tensor, "N"]:
    return schedule.time(-2 * angle.tan().log())


def _steps(schedule: Schedule, nodes: list[_Node], method: Method) -> list[tuple[float, list[_Node]]]:
    """The width in phi of every step, and the levels of its stages."""
    pairs = list(itertools.pairwise(nodes))
    halves = torch.tensor([(a.angle + b.angle) / 2 for a, b in pairs], dtype=torch.float64)
    middle = _nodes(schedule, _time_at(schedule, halves))
    return [
        (b.angle - a.angle, [{0.0: a, 1.0: b}.get(c, between) for c in _STAGES[method][0]])
        for (a, b), between in zip(pairs, middle, strict=True)
    ]


class _Field:
    """The velocity of y, with its derivative along every direction."""

    def __init__(self, denoise: Denoise, cond: Cond, directions: Sequence[Tensor]) -> None:
        self.denoise, self.cond, self.directions = denoise, cond, directions

    def __call__(self, y: Tensor, node: _Node) -> tuple[Tensor, Float64[Tensor, "k B"]]:
        with torch.enable_grad():
            x = (node.r * y).requires_grad_()
            denoised = self.denoise(x, node.t, self.cond)
            v = node.cos * denoised.eps - node.sin * denoised.x0
        products = [
            self._product(v, x, direction, keep=i + 1 < len(self.directions))
            for i, direction in enumerate(self.directions)
        ]
        return v.detach().to(y.dtype), node.r * torch.stack(products)

    def _product(self, v: Tensor, x: Tensor, direction: Tensor, *, keep: bool) -> Float64[Tensor, "B"]:
        gradient = None
        if v.requires_grad:
            (gradient,) = torch.autograd.grad(
                v, x, direction.to(v.dtype), retain_graph=keep, allow_unused=True
            )
        if gradient is None:
            raise ValueError(
                "the denoiser's answer carries no gradient with respect to x_t, which the divergence is made "
                "of: take no_grad, inference_mode and detach() out of its backbone and wrappers."
            )
        products = gradient.to(torch.float64) * direction.to(torch.float64)
        return products.reshape(len(x), -1).sum(1)


def _step(
    field: _Field,
    y: Tensor,
    h: float,
    stages: list[_Node],
    table: tuple[tuple[float, ...], tuple[float, ...]],
) -> tuple[Tensor, Float64[Tensor, "k B"]]:
    """One Runge-Kutta step of y together with the integrals of the products along it."""
    v, moved, change = torch.zeros_like(y), y, torch.zeros((), dtype=torch.float64, device=y.device)
    for c, weight, node in zip(*table, stages, strict=True):
        v, products = field(y + c * h * v, node)
        moved, change = moved + weight * h * v, change + weight * h * products
    return moved, change


def _check_ends(grid: Grid) -> None:
    first, last = grid.times[0], grid.times[-1]
    if abs(first - 1) > 1e-6 or not last > 0:
        raise ValueError(
            f"a likelihood needs times from 1, where the law is known, to a last one above 0, got {first:g} "
            f"to {last:g}; angle_grid(schedule, steps, start) makes them, other grids do with end=start."
        )
