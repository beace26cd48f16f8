"""Measured order of convergence of every solver, on exact laws: 4 minutes on one core.

Run: python benchmarks/order.py [--only LMS Heun] [--steps 96 192] [--start 0.6] [--end 0.15]

A figure is the finest slope of log error over log step. From a cold start it is to be `start_order` or more,
and after the bar, from exact history (8 steps before that lie on the exact path), `order` or more, within
0.15; if one falls short, the exit status is 1. Of a stochastic method it is the order of the law. Pairs of
order 5 get a sixteenth of the steps, since their error soon is rounding. The first time is below t = 1: at
alpha = 0 methods that interpolate in sigma/alpha, or in its logarithm, have order 2 at most, and churn has no
room above. LCM, and TCD with noise, are no integrators; that they keep exact laws is in the tests.
"""

import argparse
import sys
import time

import torch

from gendiff.math import GaussianOracle, Schedule
from gendiff.math.grids import uniform
from gendiff.sampling import (
    DDIM,
    DDPM,
    DEIS,
    DPM,
    DPM2,
    LMS,
    PNDM,
    TCD,
    Adaptive,
    DPM2Ancestral,
    DPMpp,
    Euler,
    EulerAncestral,
    Exponential,
    Heun,
    SinglestepDPM,
    SinglestepDPMpp,
    Solver,
    UniPC,
)
from gendiff.testing.solvers import LAWS, SCHEDULES, Oracle, measure_order

ALLOWED = 0.15
HUGE = 1e9  # a tolerance at which an adaptive pair accepts every step of the grid

SOLVERS: tuple[Solver, ...] = (
    Euler(),
    DDIM(),
    TCD(gamma=0.0),
    Heun(),
    DPM2(),
    PNDM(),
    PNDM("runge_kutta"),
    *(LMS(order) for order in (2, 3, 4)),
    *(Adaptive(HUGE, HUGE, order, first=9.0) for order in (2, 3, 5)),
    *(SinglestepDPM(order) for order in (1, 2, 3)),
    *(SinglestepDPMpp(order) for order in (1, 2, 3)),
    *(DPM(order) for order in (2, 3)),
    *(DPMpp(order) for order in (2, 3)),
    *(Exponential(order) for order in (2, 3, 4)),
    *(DEIS(order) for order in (2, 3)),
    *(UniPC(order) for order in (1, 2, 3)),
    DDPM(),
    DDPM("fixed_large"),
    DDIM(eta=0.5),
    EulerAncestral(),
    EulerAncestral(down="flow"),
    DPM2Ancestral(),
    DPM2Ancestral(down="flow"),
    Euler(churn=5),
    Heun(churn=5),
    DPM2(churn=5),
    DPMpp(1, sde=True),
    DPMpp(2, sde=True),
    SinglestepDPMpp(1, sde=True),
    SinglestepDPMpp(2, sde=True),
)


def stochastic(solver: Solver, start: float, end: float) -> bool:
    """Whether a solver draws noise, on a grid as it is measured on."""
    state = solver.init(torch.zeros(1, 1, dtype=torch.float64), uniform(SCHEDULES[0], 4, start, end))
    return solver.needs_noise(state)


def measured(
    solver: Solver, law: Oracle, schedule: Schedule, start: float, end: float, steps: tuple[int, ...]
) -> tuple[str, bool]:
    """What is printed of one case, and whether it is as declared."""
    if solver.order >= 5:
        steps = tuple(max(n // 16, 4) for n in steps)
    cold = measure_order(solver, law, schedule, start=start, end=end, steps=steps).slopes[-1]
    text, holds = f"{cold:.2f}", cold >= solver.start_order - ALLOWED
    if not stochastic(solver, start, end):
        exact = measure_order(solver, law, schedule, start=start, end=end, steps=steps, exact_history=True)
        warm = exact.slopes[-1]
        text, holds = f"{text} | {warm:.2f}", holds and warm >= solver.order - ALLOWED
    return text + (" " if holds else "!"), holds


def main(steps: tuple[int, ...], start: float, end: float, only: list[str]) -> int:
    began = time.perf_counter()
    names = [type(schedule).__name__ for schedule in SCHEDULES]
    laws = [f"{type(law).__name__.removesuffix('Oracle')} in {law.size}-D" for law in LAWS]
    print(f"finest slopes at {steps[-2]} and {steps[-1]} steps from t = {start:g} to {end:g}: cold | warm")
    print(f"{'solver':48}{'law':16}" + "".join(f"{name:>18}" for name in names) + f"{'declared':>10}")
    short = 0
    for solver in SOLVERS:
        if only and type(solver).__name__ not in only:
            continue
        noisy = stochastic(solver, start, end)
        declared = f"{solver.start_order}" if noisy else f"{solver.start_order} | {solver.order}"
        for law, name in zip(LAWS, laws, strict=True):
            if noisy and not isinstance(law, GaussianOracle):
                continue
            cases = [measured(solver, law, schedule, start, end, steps) for schedule in SCHEDULES]
            failed = sum(not holds for _, holds in cases)
            short += failed
            print(
                f"{name_of(solver):48}{name:16}"
                + "".join(f"{text:>18}" for text, _ in cases)
                + f"{declared:>10}  {'FALLS SHORT' if failed else 'holds'}",
                flush=True,
            )
    print(f"{short} cases fall short (allowed: {ALLOWED} below)  [{time.perf_counter() - began:.0f} s]")
    return int(short > 0)


def name_of(solver: Solver) -> str:
    """Its name and what was chosen, as far as it fits."""
    text = f"Adaptive(order={solver.order})" if isinstance(solver, Adaptive) else repr(solver)
    return text if len(text) < 47 else text[:44] + "..."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[96, 192])
    parser.add_argument("--start", type=float, default=0.6)
    parser.add_argument("--end", type=float, default=0.15)
    parser.add_argument("--only", nargs="+", default=[], metavar="CLASS")
    torch.set_num_threads(1)  # tensors of 16 samples
    arguments = parser.parse_args()
    sys.exit(main(tuple(arguments.steps), arguments.start, arguments.end, arguments.only))
