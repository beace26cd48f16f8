"""How good a solver is: its order of convergence, measured against exact flows and exact laws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from torch import Tensor

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math.gaussians import GaussianOracle, MixtureOracle
from gendiff.math.grids import Grid, uniform
from gendiff.math.schedules import Rectified, Schedule, VarianceExploding
from gendiff.math.tables import LinearBeta
from gendiff.sampling.solver import Solver

Oracle: TypeAlias = GaussianOracle | MixtureOracle

TOLERANCE = 0.15
START = 0.8  # where the check of a solver begins
POINTS = 16  # samples that a deterministic method is judged by
PAST = 8  # steps on the exact path before the first one measured, more than any published method remembers

LAWS: tuple[Oracle, ...] = (
    GaussianOracle.isotropic(torch.tensor([0.4]), 1.6),
    GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]])),
    MixtureOracle(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([[-1.0], [0.8]]),
        torch.tensor([[[0.25]], [[0.16]]]),
    ),
)
SCHEDULES: tuple[Schedule, ...] = (LinearBeta(), Rectified(), VarianceExploding(0.05, 10.0))


@final
@dataclass(frozen=True)
class Order:
    """What was measured: errors at numbers of steps.

    Attributes:
        steps: numbers of steps, rising.
        errors: error at each of them.

    >>> Order((10, 20, 40), (0.1, 0.025, 0.00625))
    Order(2.00: error 1.0e-01 at 10 steps, 2.5e-02 at 20, 6.3e-03 at 40)
    """

    steps: tuple[int, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.errors) or len(set(self.steps)) < 2:
            raise ValueError(
                f"an order is measured at two or more numbers of steps, got {self.steps} with {self.errors}."
            )

    @property
    def order(self) -> float:
        """The slope of log error over log step, by least squares."""
        log_step = -torch.tensor(self.steps, dtype=torch.float64).log()
        log_error = torch.tensor(self.errors, dtype=torch.float64).log()
        centred = log_step - log_step.mean()
        return float(centred @ log_error / centred.square().sum())

    @property
    def slopes(self) -> tuple[float, ...]:
        """The slopes between neighbours, which tend to the order where the steps are small enough."""
        pairs = zip(self.steps, self.steps[1:], self.errors, self.errors[1:], strict=False)
        return tuple(math.log(error / finer) / math.log(more / few) for few, more, error, finer in pairs)

    def __repr__(self) -> str:
        (steps, error), *rest = zip(self.steps, self.errors, strict=True)
        listed = "".join(f", {error:.1e} at {steps}" for steps, error in rest)
        return f"Order({self.order:.2f}: error {error:.1e} at {steps} steps{listed})"


def measure_order(
    solver: Solver,
    oracle: Oracle,
    schedule: Schedule,
    *,
    start: float | int = 1.0,
    end: float | int = 0.02,
    steps: tuple[int, ...] = (64, 128, 256, 512),
    exact_history: bool = False,
    grid: Callable[[int], Grid] | None = None,
) -> Order:
    r"""Measure how fast the error of a solver falls with its step, all else being exact.

    A deterministic method is run with the exact denoiser from exact samples at `start`, over uniform times;
    its error is the root mean square distance to the exact flow of the probability-flow ODE at `end` (Karras
    et al. 2022, eq. 4). A stochastic method on a Gaussian law is an affine map of its first samples and of
    the noise it draws:

    .. math:: x = M x_{start} + b + \sum_k N_k z_k, \qquad
              \text{mean} = M\mu + b, \quad \text{covariance} = M C M^\top + \sum_k N_k N_k^\top

    M, b and all N are read off one run of unit perturbations; the error is the distance of that mean and
    covariance to those of the exact marginal at `end`, and has no sampling noise in it.

    Args:
        solver: the method.
        oracle: law of the data; for a stochastic method a `GaussianOracle`, for a deterministic one also a
            `MixtureOracle` of one dimension.
        schedule: the schedule.
        start: time the run starts at, in (0, 1].
        end: time it ends at, in (0, start); at 0 many methods take a last step of another kind.
        steps: numbers of steps, at least two.
        exact_history: whether the method comes to `start` along the exact path, by up to 8 steps of the same
            length that lie before it, so that all it remembers is exact: the measured order is then to be
            its `order`, else its `start_order`. Needs a `start` below 1 with room for `order` - 1 steps.
        grid: from a number of steps to the times, in place of uniform ones from `start` to `end`; not with
            `exact_history`.

    Returns:
        The `Order`.

    Raises:
        ValueError: for a stochastic method on a law that is not Gaussian, or with `exact_history`; for an
            exact history without room before `start`.

    References:
        Hairer, Nørsett & Wanner 1993, *Solving ordinary differential equations I*, section II.3, for the
        order.

    >>> from gendiff.sampling import Heun
    >>> round(measure_order(Heun(), LAWS[1], Rectified(), steps=(16, 32)).order, 1)
    2.0
    """
    first, last = float(start), float(end)
    grids = [uniform(schedule, n, first, last) if grid is None else grid(n) for n in steps]
    x = oracle.marginal(*grids[0].level(0)).draw(POINTS, torch.Generator().manual_seed(0))
    if not solver.needs_noise(solver.init(x, grids[0])):
        if not exact_history:
            return Order(steps, tuple(_distance_to_flow(solver, oracle, grid, x) for grid in grids))
        if grid is not None:
            raise ValueError(
                "an exact history is made for uniform times: give exact_history or grid, not both."
            )
        pasts = [_past(solver, n, first, last) for n in steps]
        return Order(
            steps,
            tuple(
                _distance_to_flow(solver, oracle, uniform(schedule, n + past, start_of_past, last), x, past)
                for n, (past, start_of_past) in zip(steps, pasts, strict=True)
            ),
        )
    if not isinstance(oracle, GaussianOracle) or exact_history:
        raise ValueError(
            f"{solver!r} draws noise, so its law is measured, which is exact from a cold start on a "
            f"GaussianOracle only; got {type(oracle).__name__} and exact_history={exact_history}."
        )
    return Order(steps, tuple(_distance_to_marginal(solver, oracle, grid) for grid in grids))


def check_solver(
    solver: Solver,
    *,
    laws: Sequence[Oracle] = LAWS,
    schedules: Sequence[Schedule] = SCHEDULES,
    steps: tuple[int, ...] = (64, 128),
) -> None:
    """Raise an AssertionError with a table unless the measured orders of a solver are the declared ones.

    The cases are three laws (a Gaussian, an anisotropic one in two dimensions, a mixture) on three schedules
    (a table of betas, the straight path, variance exploding), over times from 0.8, where there is data in the
    samples and room for a past, to 0.02. `start_order` is measured from a cold start, and `order` from exact
    history where the method remembers anything. Both must be within 0.15. A stochastic method is measured by
    its law, on the two Gaussians, from a cold start.

    Args:
        solver: an instance of your own `Solver`.
        laws: the laws to measure on.
        schedules: the schedules it is made for.
        steps: numbers of steps; larger ones where a method needs small steps to show its order.

    Raises:
        AssertionError: with the table of all cases, those that failed marked.

    >>> from gendiff.sampling import Euler
    >>> check_solver(Euler(), schedules=[Rectified()], steps=(16, 32))
    """
    rows: list[tuple[str, int, Order]] = []
    for oracle in laws:
        for schedule in schedules:
            for kind, declared in _kinds(solver, oracle, schedule).items():
                measured = measure_order(
                    solver,
                    oracle,
                    schedule,
                    start=START,
                    steps=steps,
                    exact_history=kind == "from exact history",
                )
                name = f"{type(oracle).__name__}({oracle.size}) {type(schedule).__name__} {kind}"
                rows.append((name, declared, measured))
    bad = [abs(measured.order - declared) > TOLERANCE for _, declared, measured in rows]
    if any(bad):
        table = "\n".join(
            f"{'FAILS' if failed else 'holds'}  {name:52} declared {declared}, measured {measured}"
            for failed, (name, declared, measured) in zip(bad, rows, strict=True)
        )
        raise AssertionError(
            f"{solver!r} does not have the order it declares, in {sum(bad)} of {len(rows)} cases (tolerance "
            f"{TOLERANCE}):\n{table}"
        )


def _kinds(solver: Solver, oracle: Oracle, schedule: Schedule) -> dict[str, int]:
    """What there is to measure on a law, with what the solver declares for it."""
    grid = uniform(schedule, 4, START, 0.02)
    state = solver.init(torch.zeros(1, oracle.size, dtype=torch.float64), grid)
    if solver.needs_noise(state):
        return {"cold": solver.start_order} if isinstance(oracle, GaussianOracle) else {}
    state, _ = solver.step(state, OracleDenoiser(oracle, schedule))
    remembers = state.memory is not None
    return {"cold": solver.start_order} | ({"from exact history": solver.order} if remembers else {})


def _past(solver: Solver, steps: int, start: float, end: float) -> tuple[int, float]:
    """How many steps of the same length fit between t = 1 and `start`, and where the first of them begins."""
    length = (start - end) / steps
    past = min(PAST, int((1.0 - start) / length + 1e-9))
    if past < solver.order - 1:
        raise ValueError(
            f"{solver!r} has order {solver.order} from {solver.order - 1} exact steps before, and before "
            f"start={start} there is room for {past} of length {length:.3g}: give a smaller start, or more "
            f"steps than {steps}."
        )
    return past, start + past * length


def _distance_to_flow(solver: Solver, oracle: Oracle, grid: Grid, x: Tensor, past: int = 0) -> float:
    """Root mean square distance between a run and the exact flow, at the last time of a grid.

    Both pass through x after `past` steps; until then the run is put back on the exact flow after each step.
    """

    def flow(i: int) -> Tensor:
        return oracle.flow(x, *grid.level(past), *grid.level(i))

    denoise, state = OracleDenoiser(oracle, grid.schedule), solver.init(flow(0), grid)
    while not state.done:
        state, _ = solver.step(state, denoise)
        if state.i <= past:
            state = replace(state, x=flow(state.i))
    return float((state.x - flow(grid.steps)).square().mean().sqrt())


def _distance_to_marginal(solver: Solver, oracle: GaussianOracle, grid: Grid) -> float:
    """Distance between the mean and covariance that a run from the exact law ends with and the exact ones."""
    size, denoise = oracle.size, OracleDenoiser(oracle, grid.schedule)
    unit = torch.eye(size, dtype=torch.float64)
    first_kick = 1 + size  # rows: nothing, a unit in every direction of x, then of every noise drawn
    kicks = grid.steps * solver.evaluations * size
    x = torch.zeros(first_kick + kicks, size, dtype=torch.float64)
    x[1:first_kick] = unit
    row = first_kick

    def draw(like: Tensor, span: tuple[float, float]) -> Tensor:
        nonlocal row
        noise = torch.zeros_like(like)
        noise[row : row + size] = unit
        row += size
        return noise

    def exact(x: Tensor, t: Tensor) -> Denoised:
        return denoise(x, t)

    state = solver.init(x, grid)
    while not state.done:
        state, _ = solver.step(state, exact, draw)
    moved = state.x - state.x[0]
    start, end = oracle.marginal(*grid.level(0)), oracle.marginal(*grid.level(grid.steps))
    of_x, of_noise = moved[1:first_kick], moved[first_kick:]  # row vectors: x @ of_x
    mean = state.x[0] + start.mean @ of_x
    covariance = of_x.T @ start.covariance @ of_x + of_noise.T @ of_noise
    return float(torch.cat([mean - end.mean, (covariance - end.covariance).flatten()]).norm())
