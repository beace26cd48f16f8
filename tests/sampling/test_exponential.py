"""Exponential integrators: their integrals, their orders, and their ends."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import GaussianOracle, grids
from gendiff.math.schedules import Rectified
from gendiff.sampling import DDIM, LinearSolver, Path, sample
from gendiff.sampling.deis import DEIS
from gendiff.sampling.dpm import DPM, DPMpp
from gendiff.sampling.exponential import Exponential, Integral, Predict, check_choice, moments
from gendiff.sampling.singlestep import SinglestepDPM, SinglestepDPMpp, sizes
from gendiff.sampling.stage import combined
from gendiff.sampling.unipc import UniPC
from gendiff.testing.solvers import LAWS, SCHEDULES, measure_order

START, END, STEPS, PAST = 0.6, 0.15, (64, 128), 8
LINE, PLANE, MIXTURE = LAWS
BETAS, STRAIGHT, EXPLODING = SCHEDULES
FEW = ((LINE, BETAS), (PLANE, STRAIGHT), (MIXTURE, EXPLODING))
EVERY = tuple((law, schedule) for law in LAWS for schedule in SCHEDULES)

MULTISTEP = [Exponential(3), Exponential(3, "eps"), DPMpp(2), UniPC(2)]
MORE = [Exponential(1), Exponential(2, "eps"), DPM(2), UniPC(1, variant="bh1"), UniPC(2, corrector=False)]
SINGLESTEP = [SinglestepDPMpp(2), SinglestepDPMpp(3), SinglestepDPM(2, "heun"), SinglestepDPM(3)]
STOCHASTIC = [DPMpp(2, sde=True), DPM(2, sde=True), SinglestepDPMpp(2, sde=True)]
MORE_STOCHASTIC = [
    DPMpp(1, sde=True),
    DPMpp(3, sde=True),
    DPM(1, sde=True),
    SinglestepDPM(2, sde=True),
]
ALL = [
    *MULTISTEP,
    *MORE,
    *SINGLESTEP,
    *STOCHASTIC,
    *MORE_STOCHASTIC,
    DEIS(3),
    DPMpp(3, "heun"),
    UniPC(3, predict="eps"),
]
ALL += [
    SinglestepDPMpp(3, blocks=True),
    SinglestepDPM(2, blocks=True, sde=True),
    UniPC(4, lower_order_final=True),
]


def walk(solver, path, x, answer):
    """The samples after every step; what is sent back replaces them."""
    memory = {}
    for stages in solver.plan(path):
        for stage in stages:
            registers = {"x": x, **memory}
            registers |= answer(combined(stage.query, registers), stage.at)
            x = combined(stage.x, registers)
            memory = {name: combined(kept, registers) for name, kept in stage.keep.items()}
        x = yield x


def error(solver, law, schedule, steps, past):
    """Distance to the exact flow from START to END; what is remembered of `past` steps before is exact."""
    first = START + past * (START - END) / steps
    grid = grids.uniform(schedule, steps + past, first, END)
    x = law.marginal(*grid.level(0)).draw(16, torch.Generator().manual_seed(0))

    def exact(i):
        return law.flow(x, *grid.level(0), *grid.level(i))

    def answer(x, at):
        x0 = law.x0(x, at.alpha, at.sigma)
        return {"x0": x0, "eps": (x - at.alpha * x0) / at.sigma}

    run = walk(solver, Path.of(grid), x, answer)
    after = next(run)
    for i in range(1, grid.steps):
        after = run.send(exact(i) if i <= past else after)
    return (after - exact(grid.steps)).square().mean().sqrt().item()


def slopes(solver, past=0, cases=FEW, steps=STEPS):
    """The slope of log error over log step, case by case."""
    result = {}
    for law, schedule in cases:
        coarse, fine = (error(solver, law, schedule, n, past) for n in steps)
        name = f"{type(law).__name__}({law.size}) {type(schedule).__name__}"
        result[name] = round(math.log(coarse / fine) / math.log(steps[1] / steps[0]), 2)
    return result


def test_blocks_have_the_order_of_their_end() -> None:
    """A last step of order 1 costs order 3; whole blocks keep it."""
    for lower, declared in ((True, 2), (False, 3)):
        solver = SinglestepDPMpp(3, blocks=True, lower_order_final=lower)
        assert solver.start_order == declared
        measured = slopes(solver, steps=(48, 96))
        assert all(abs(value - declared) < 0.3 for value in measured.values()), (lower, measured)


@pytest.mark.parametrize("z", [-40.0, -6.0, -2.5, -0.3, -1e-3, -1e-12, 1e-9, 0.01, 1.0, 4.0, 11.0])
def test_the_integrals_are_those_of_quadrature(z) -> None:
    """Gauss-Legendre with 60 nodes, to 12 digits: on both sides of where series and recurrence meet."""
    nodes, weights = map(torch.from_numpy, __import__("numpy").polynomial.legendre.leggauss(60))
    v = (nodes + 1) / 2
    for k, moment in enumerate(moments(z, 8)):
        exact = (z * torch.exp(z * (1 - v)) * v**k @ weights / 2).item()
        assert moment == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("sde", [False, True])
def test_a_polynomial_is_integrated_exactly(predict, sde) -> None:
    """f = 2 - v + 3v² + v³ through four answers, against quadrature of the exact solution with that f."""
    path = Path.of(grids.uniform(STRAIGHT, 10, 0.9, 0.1))
    *past, t, s = path.points[2:7]
    h = s.log_ratio - t.log_ratio

    def f(log_ratio):
        v = (log_ratio - t.log_ratio) / h
        return 2 - v + 3 * v**2 + v**3

    integral = Integral(predict, sde)
    terms = integral.higher(t, s, "now", {str(i): point for i, point in enumerate(past)})
    values = {str(i): f(point.log_ratio) for i, point in enumerate(past)} | {"now": f(t.log_ratio)}
    added = sum(c * values[name] for name, c in terms.items())

    nodes, weights = map(torch.from_numpy, __import__("numpy").polynomial.legendre.leggauss(40))
    u = (nodes + 1) / 2 * h  # λ - λ_t
    rate = 2 if sde else 1
    change = f(t.log_ratio + u) - f(t.log_ratio)
    if predict == "x0":
        exact = s.alpha * rate * (torch.exp(-rate * (h - u)) * change) @ weights * h / 2
    else:
        exact = -s.alpha * rate * (torch.exp(-(t.log_ratio + u)) * change) @ weights * h / 2
    assert added == pytest.approx(exact.item(), rel=1e-10)


@pytest.mark.parametrize("solver", MULTISTEP + SINGLESTEP, ids=repr)
def test_every_declared_order_is_reached(solver) -> None:
    """Each law on a schedule of its own, from a cold start and from exact history."""
    remembers = solver in MULTISTEP
    for past, declared in ((0, solver.start_order), (PAST, solver.order))[: 1 + remembers]:
        measured = slopes(solver, past, steps=STEPS if remembers else (32, 64))
        assert min(measured.values()) > declared - 0.15, (past, measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        *MULTISTEP,
        *MORE,
        Exponential(2),
        Exponential(4),
        Exponential(4, "eps"),
        UniPC(2, predict="eps"),
        UniPC(3),
    ],
    ids=repr,
)
def test_orders_are_reached_on_every_law_and_schedule(solver) -> None:
    for past, declared in ((0, solver.start_order), (PAST, solver.order)):
        measured = slopes(solver, past, EVERY, (128, 256))
        assert min(measured.values()) > declared - 0.15, (past, measured)


@pytest.mark.parametrize(
    "solver",
    [*STOCHASTIC, *(pytest.param(solver, marks=pytest.mark.slow) for solver in MORE_STOCHASTIC)],
    ids=repr,
)
def test_the_order_of_the_law_is_reached(solver) -> None:
    for law, schedule in ((LINE, EXPLODING), (PLANE, BETAS)):
        measured = measure_order(solver, law, schedule, start=0.6, end=0.1, steps=(32, 64))
        assert measured.slopes[-1] > solver.start_order - 0.15, (law, schedule, measured)


@dataclass(frozen=True)
class Tilted(LinearSolver):
    """A multistep method whose past answers count a tenth too much."""

    of: LinearSolver
    evaluations: ClassVar[int] = 1

    def plan(self, path):
        def tilted(x):
            more = {name: 0.1 * c for name, c in x.items() if name[-2:] in ("_1", "_2")}
            now = next((name for name in ("x0", "eps") if f"{name}_1" in x), "x0")
            return x | {n: x[n] + c for n, c in more.items()} | {now: x[now] - sum(more.values())}

        return tuple(
            tuple(replace(stage, x=tilted(stage.x)) for stage in step) for step in self.of.plan(path)
        )


@pytest.mark.parametrize("solver", [Exponential(3), UniPC(2)], ids=repr)
def test_a_wrong_weight_of_the_past_is_caught(solver) -> None:
    """The measure itself: answers that count too much leave a consistent method of order 1."""
    assert max(slopes(Tilted(solver), PAST).values()) < 1.2


def test_what_is_published_as_order_3_of_dpm_solver_multistep_is_of_order_2(monkeypatch) -> None:
    """Half of the second difference is what the code of the authors and of diffusers takes."""

    def halved(z, count):
        return [m / 2 if k == 2 else m for k, m in enumerate(moments(z, count))]

    monkeypatch.setattr("gendiff.sampling.exponential.moments", halved)
    measured = slopes(DPMpp(3), PAST)
    assert all(1.7 < value < 2.3 for value in measured.values()), measured


def test_one_method_by_two_names_is_one_plan() -> None:
    path = Path.of(grids.uniform(STRAIGHT, 6, 0.9))
    long = Path.of(grids.uniform(STRAIGHT, 16, 0.9))
    assert DPMpp(2, "heun", lower_order_final=False).plan(path) == Exponential(2).plan(path)
    assert DPMpp(3, "heun").plan(long) == Exponential(3).plan(long)
    assert DEIS(4, lower_order_final=False).plan(path) == Exponential(4, "eps").plan(path)
    assert DEIS(3).plan(path) == DPM(3, "heun").plan(path)
    assert UniPC(3, corrector=False).plan(path)[2:] == Exponential(3).plan(path)[2:]
    assert UniPC(2, corrector=False).plan(path) == DPMpp(2, lower_order_final=False).plan(path)
    for one in (Exponential(1), DPM(1), SinglestepDPMpp(1), SinglestepDPM(1, blocks=True)):
        assert one.plan(path) == DDIM().plan(path)


def test_the_stochastic_step_of_order_1_is_ddpm() -> None:
    """eta = 1 of DDIM is the exact step of the SDE with a constant x0 (Lu et al. 2022b, section 6)."""
    path = Path.of(grids.uniform(STRAIGHT, 7))
    for (mine,), (other,) in zip(DPMpp(1, sde=True).plan(path), DDIM(eta=1).plan(path), strict=True):
        for name in ("x0", "eps", "noise"):
            assert mine.x.get(name, 0.0) == pytest.approx(other.x.get(name, 0.0), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=lambda schedule: type(schedule).__name__)
def test_any_number_of_steps_ends_at_the_data(solver, schedule) -> None:
    """From t = 1, where alpha may be 0, to t = 0: finite, and exactly x0 where the law is a point."""
    point = OracleDenoiser(GaussianOracle.isotropic(torch.full((1,), 3.0), 1e-9), schedule)
    for steps in (1, 2, 3, 16):
        grid = grids.uniform(schedule, steps)
        x = sample(
            point, torch.full((2, 1), 0.7, dtype=torch.float64) * grid.level(0).sigma, grid, solver, rng=0
        )
        assert torch.allclose(x, torch.full_like(x, 3.0), atol=1e-6), (steps, x)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_thousand_steps_have_finite_coefficients(solver) -> None:
    plan = solver.plan(Path.of(grids.uniform(Rectified(), 1000)))
    values = [
        c
        for step in plan
        for stage in step
        for part in (stage.x, *stage.keep.values())
        for c in part.values()
    ]
    assert all(map(math.isfinite, values))
    registers = {"x", "x0", "eps", "noise"}
    for stage in (stage for step in plan for stage in step):
        named = {name for part in (stage.x, *stage.keep.values()) for name in part}
        assert named <= registers, (stage, registers)
        registers = {"x", "x0", "eps", "noise", *stage.keep}


def test_a_repeated_level_changes_nothing() -> None:
    """A table with two equal sigmas: the step between is empty, and the next divides by no distance of 0."""
    points = Path.of(grids.uniform(STRAIGHT, 6, 0.9)).points
    path = Path((*points[:4], points[3], *points[4:]), lambda log_ratio: points[0])
    for solver in (Exponential(3), UniPC(3), SinglestepDPM(2), DPMpp(2, sde=True)):
        for step in solver.plan(path):
            assert all(math.isfinite(c) for stage in step for c in stage.x.values())
    (empty,) = Exponential(3).plan(path)[3]
    assert empty.x == {"x0": points[3].alpha, "eps": points[3].sigma}


def test_blocks_end_as_those_of_diffusers() -> None:
    assert [sizes(n, 2, True, to_data=False) for n in (1, 2, 3, 4)] == [[1], [1, 1], [2, 1], [2, 1, 1]]
    assert [sizes(n, 3, True, to_data=True) for n in (1, 2, 3, 4)] == [[1], [1, 1], [2, 1], [3, 1]]
    assert [sizes(n, 3, False, to_data=False) for n in (3, 4, 5)] == [[3], [3, 1], [3, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0), r"the order of Exponential is 1 or more, got 0\."),
        (lambda: DPMpp(4), r"the order of DPMpp is 1 to 3, got 4; Exponential has any order\."),
        (lambda: check_choice("predict", "v", Predict), r"unknown predict 'v'.*'x0', 'eps'"),
        (lambda: UniPC(disable_corrector=(-1,)), r"numbers of steps, from 0 .* got \(-1,\); corrector=False"),
    ],
)
def test_bad_fields_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unipc_corrects_where_it_is_told_to() -> None:
    path = Path.of(grids.uniform(STRAIGHT, 6, 0.9))
    full, part, bare = (
        UniPC(2, **fields).plan(path) for fields in ({}, {"disable_corrector": (0, 2)}, {"corrector": False})
    )
    same = [a[0].x == b[0].x for a, b in zip(part, bare, strict=True)]
    assert same == [True, True, False, True, False, False]
    assert [a[0].x == b[0].x for a, b in zip(part, full, strict=True)] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
