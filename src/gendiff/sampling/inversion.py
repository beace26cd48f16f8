"""Inversion: from data up a grid to the noise that a deterministic method makes them of."""

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import positive_batch, working_dtype
from gendiff.denoiser import Cond, Denoise, Denoised
from gendiff.math.grids import Grid
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.onestep import DDIM
from gendiff.sampling.path import Path, Point
from gendiff.sampling.solver import Solver, State, check_schedule
from gendiff.sampling.stage import Plan, Stage


def invert(
    denoise: Denoise,
    x: Float[Tensor, "B *dims"],
    grid: Grid,
    solver: Solver | None = None,
    *,
    cond: Cond = None,
    grad: bool = False,
) -> Float[Tensor, "B *dims"]:
    r"""Run a deterministic method up a grid, from its last time to its first.

    Its formulas hold in either direction, with t the cleaner end of a step and s the noisier one; DDIM's is

    .. math:: x_s = \alpha_s\,\hat x_0(x_t, t) + \sigma_s\,\hat\epsilon(x_t, t), \qquad s > t

    (Dhariwal & Nichol 2021, appendix F; Song et al. 2021, section 4.3). Sampling what it returns over the
    same grid gives x again, up to an error of the method's order. The network cannot be evaluated at the
    data, so that the first step from there asks at its upper end:
    :math:`x_s = (\alpha_s/\alpha_t)\,x_t + \sigma_s\hat\epsilon(\tfrac{\alpha_s}{\alpha_t}x_t, s)`, the
    inverse of the step by which methods reach the data.

    Args:
        denoise: a `Denoiser`, a guider, or any wrapper round one.
        x: samples at the last time of the grid, [B, *]: the data, where that is 0.
        grid: the times, falling as for sampling.
        solver: a deterministic method, DDIM unless one is given.
        cond: the condition given to every call.
        grad: whether gradients flow through the steps.

    Returns:
        Samples at the first time of the grid, [B, *].

    Raises:
        ValueError: if the grid is on another schedule than the denoiser, or the method draws noise.
        TypeError: if the method has no table of steps, as adaptive ones.

    >>> from gendiff.denoiser import OracleDenoiser
    >>> from gendiff.math import GaussianOracle, LinearBeta, grids
    >>> from gendiff.sampling import Heun, sample
    >>> exact = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), LinearBeta())
    >>> x0, grid = torch.ones(1, 1), grids.uniform(LinearBeta(), 50)
    >>> round(sample(exact, invert(exact, x0, grid, Heun()), grid, Heun()).item(), 2)
    1.0
    """
    positive_batch(x, "x")
    solver = DDIM() if solver is None else solver
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"a LinearSolver can be run up a grid, such as DDIM() or Heun(); got {solver!r}.")
    check_schedule(denoise, grid)
    plan = rising(solver, Path.of(Grid(grid.schedule, grid.times)))
    carry = None

    def ask_network(x: Tensor, t: Tensor) -> Denoised:
        nonlocal carry
        denoised = denoise(x, t, cond, carry)
        carry = denoised.carry
        return denoised

    state = State(x.to(working_dtype(x)), grid, plan=(solver, plan))
    with torch.set_grad_enabled(grad):
        while not state.done:
            state, _ = solver.step(state, ask_network)
    return state.x


def rising(solver: LinearSolver, path: Path) -> Plan:
    """The plan of a deterministic method up a path, for ask and tell.

    Raises:
        ValueError: for a method that draws noise.
    """
    if any(stage.noisy for step in solver.plan(path) for stage in step):
        raise ValueError(
            f"{solver!r} draws noise, so that there is no noise that its samples are made of; invert with a "
            f"deterministic method such as DDIM() or Heun()."
        )
    points = path.points[::-1]
    t, s = points[:2]
    from_data: Plan = ()
    if t.sigma == 0:
        from_data, points = ((_from_data(t, s),),), points[1:]
    return from_data + solver.plan(Path(points, path.between))


def _from_data(t: Point, s: Point) -> Stage:
    scaled = {"x": s.alpha / t.alpha}
    return Stage(s, {**scaled, "eps": s.sigma}, query=scaled)
