"""Measured order of convergence of every solver, on exact laws: 15 seconds on one core.

Run: python benchmarks/order.py [--steps 64 128 256]
"""

import argparse
import time

import torch

from gendiff.math import GaussianOracle
from gendiff.sampling import DDIM, DDPM, Euler, Heun, Solver
from gendiff.testing.solvers import LAWS, SCHEDULES, measure_order

SOLVERS: tuple[Solver, ...] = (Euler(), DDIM(), Heun(), DDPM(), DDPM("fixed_large"), DDIM(eta=0.5))


def main(steps: tuple[int, ...]) -> None:
    began = time.perf_counter()
    names = [type(schedule).__name__ for schedule in SCHEDULES]
    laws = [f"{type(law).__name__.removesuffix('Oracle')} in {law.size}-D" for law in LAWS]
    print(f"measured order, steps {' '.join(map(str, steps))}; stochastic methods: of the law, on Gaussians")
    print(f"{'solver':34}{'law':16}" + "".join(f"{name:>20}" for name in names) + f"{'declared':>10}")
    worst = 0.0
    for solver in SOLVERS:
        stochastic = isinstance(solver, DDPM) or (isinstance(solver, DDIM) and solver.eta > 0)
        for law, name in zip(LAWS, laws, strict=True):
            if stochastic and not isinstance(law, GaussianOracle):
                continue
            orders = [measure_order(solver, law, schedule, steps=steps).order for schedule in SCHEDULES]
            worst = max(worst, *(abs(order - solver.order) for order in orders))
            print(
                f"{solver!r:34}{name:16}"
                + "".join(f"{order:20.2f}" for order in orders)
                + f"{solver.order:10}"
            )
    print(
        f"largest |measured - declared| = {worst:.2f} (allowed: 0.15)  [{time.perf_counter() - began:.0f} s]"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 128])
    torch.set_num_threads(1)  # tensors of 16 samples
    main(tuple(parser.parse_args().steps))
