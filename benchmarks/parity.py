"""Our scheduler against every scheduler of diffusers that it replaces, cell by cell.

    python benchmarks/parity.py [--only Euler] [--steps 1,2,3,10,25,50,999]      # 25 minutes on one core

Theirs computes in float32; here their modules are given float64 in its place, so that what is left is the
method. A cell is a class, its settings and a number of steps; the figure is the largest difference of any
sample of the run, relative to the largest value of that sample. Both have one fake network and one noise.
Below 1e-6 they are equal; else the number after the figure is that of the paragraph of docs/schedulers.md
that says why not. A cell that is neither makes the exit code 1.
"""

import argparse
import contextlib
import importlib
import inspect
import logging
import math
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.parity_cells import Cell, fault_of, variants

EQUAL = 1e-6
STEPS = (1, 2, 3, 10, 25, 50, 999)


class Wide:
    """A module in which float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def wide(module: Any) -> Iterator[None]:
    """Give a module of diffusers float64 in place of float32."""
    kept = {name: getattr(module, name) for name in ("torch", "np") if hasattr(module, name)}
    default = torch.get_default_dtype()
    try:
        for name, value in kept.items():
            setattr(module, name, Wide(value))
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(default)
        for name, value in kept.items():
            setattr(module, name, value)


@dataclass(frozen=True)
class Result:
    """What came of a cell."""

    cell: Cell
    worst: float
    fault: str = ""
    crash: str = ""

    @property
    def verdict(self) -> str:
        if self.worst <= EQUAL:
            return "equal"
        return self.fault or "DIFFERENT"


def class_of(name: str) -> Any:
    """A class of diffusers, also the one that needs torchsde, whose noise is replaced here anyway."""
    if name == "DPMSolverSDEScheduler":
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    return getattr(importlib.import_module("diffusers"), name)


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A fixed function of the sample and the timestep, bounded in the timestep."""
    return torch.sin(1.3 * x + timestep / 300) + 0.3 * x.roll(1, -1)


def start() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(scheduler: Any, stamps: list[float], begin: int = 0, **call: Any) -> list[torch.Tensor]:
    """The loop of a pipeline from some evaluation on: the samples after every one."""
    generator, result = torch.Generator().manual_seed(1), []
    x = start() * getattr(scheduler, "init_noise_sigma", 1.0)
    takes = inspect.signature(scheduler.step).parameters
    drawn = {"generator": generator} if "generator" in takes else {}
    for stamp, timestep in zip(stamps[begin:], scheduler.timesteps[begin:], strict=True):
        given = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        out = network(given, stamp)
        if scheduler.config.get("variance_type") in ("learned", "learned_range"):
            out = torch.cat([out, torch.cos(given - stamp / 300)], 1)
        x = scheduler.step(out, timestep, x, **drawn, **call, return_dict=False)[0]
        result.append(x)
    return result


def theirs(cell: Cell) -> tuple[list[float], list[torch.Tensor]]:
    kind = class_of(cell.name)
    module = sys.modules[kind.__module__]
    with wide(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = kind(**cell.settings)
        begin = {"num_inference_steps": cell.steps} if not {"timesteps", "sigmas"} & set(cell.begin) else {}
        scheduler.set_timesteps(**begin, **cell.begin)
        if cell.name == "DPMSolverSDEScheduler":
            drawn = torch.Generator().manual_seed(1)
            scheduler.noise_sampler = Increments(drawn)
        stamps = scheduler.timesteps.tolist()
        if hasattr(scheduler, "begin_index"):
            scheduler.set_begin_index(cell.first)  # or, of two equal timesteps, it begins at the second
        return stamps, run(scheduler, stamps, cell.first, **cell.call)


class Increments:
    """The two noises of a step in the noise sampler's place: parts of one Brownian motion, as the SDE has it.

    Theirs takes a Brownian motion in sigma, whose parts have other variances than the SDE's (paragraph 12).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.first = generator, None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(2, 4, 8, 8, generator=self.generator, dtype=torch.float64)
        span = abs(math.log(float(sigma)) - math.log(float(sigma_next)))
        if self.first is None:
            self.first = (drawn, span)
            return drawn
        (before, part), self.first = self.first, None
        share = math.expm1(-2 * part) / math.expm1(-2 * span) * math.exp(-2 * (span - part))
        return before * math.sqrt(share) + drawn * math.sqrt(1 - share)


def ours(cell: Cell) -> tuple[list[float], list[torch.Tensor]]:
    from gendiff.interop.diffusers.scheduler import GendiffScheduler

    scheduler = GendiffScheduler.from_config({"_class_name": cell.name, **cell.settings})
    begin = {"num_inference_steps": cell.steps} if not {"timesteps", "sigmas"} & set(cell.begin) else {}
    scheduler.set_timesteps(**begin, **cell.begin)
    scheduler.set_begin_index(cell.first)
    exact = [move.timestep for move in scheduler.run.moves()]  # `timesteps` has float32
    stamps = exact if scheduler.timesteps.is_floating_point() else scheduler.timesteps.tolist()
    return stamps, run(scheduler, stamps, cell.first, **cell.call)


def compare(cell: Cell) -> Result:
    """Both runs of a cell."""
    fault = fault_of(cell)
    if cell.name == "DDIMInverseScheduler" and cell.settings["prediction_type"] == "sample":
        return Result(cell, math.inf, "refused")
    try:
        mine_at, mine = ours(cell)
    except Exception as error:
        return Result(cell, math.inf, "", f"OURS {type(error).__name__}: {error}"[:160])
    try:
        at, other = theirs(cell)
    except Exception as error:  # what theirs cannot do is written down, whatever it is
        return Result(cell, math.inf, fault, f"{type(error).__name__}: {error}"[:60])
    assert all(x.isfinite().all() for x in mine), f"{cell}: ours is not finite"
    if len(at) != len(mine_at):
        return Result(cell, math.inf, fault, f"{len(at)} evaluations, ours {len(mine_at)}")
    apart = max((abs(a - b) for a, b in zip(at, mine_at, strict=True)), default=0.0)
    if apart > 1e-3:
        return Result(cell, math.inf, fault, f"timesteps {apart:.3g} apart")
    worst = 0.0
    for x, y in zip(mine, other, strict=True):
        difference = float((x - y).abs().max() / y.abs().max().clamp(min=1e-3))
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return Result(cell, worst, fault)


def word(result: Result) -> str:
    """The figure of a cell and, where they differ, why."""
    said = "" if result.worst <= EQUAL else f" [{result.verdict}] {result.crash}".rstrip()
    return f"{result.worst:.0e}{said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="classes whose name has this in it")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # theirs says that it changes its own settings
    steps, count = [int(n) for n in options.steps.split(",")], Counter[str]()
    for name, settings in variants():
        if options.only not in name:
            continue
        results = [compare(Cell(name, settings, n)) for n in steps]
        count.update(
            "different" if result.verdict == "DIFFERENT" else "fault"
            for result in results
            if result.worst > EQUAL
        )
        count.update("equal" for result in results if result.worst <= EQUAL)
        said = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"{name.removesuffix('Scheduler'):24} {said:60} " + " | ".join(map(word, results)), flush=True)
    print(f"{count['equal']} equal, {count['fault']} differ as documented, {count['different']} differ")
    return bool(count["different"])


if __name__ == "__main__":
    sys.exit(main())
