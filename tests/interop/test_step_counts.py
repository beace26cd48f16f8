"""Any number of steps from 1 to T, of every class with its spacings and sigma schedules: no NaN, no error."""

import inspect
import math

import diffusers
import numpy as np
import pytest

from gendiff.interop.diffusers.scheduler import GendiffScheduler
from gendiff.interop.diffusers.table_runs import table_of
from gendiff.interop.diffusers.tables import ROWS, Ask

SIZE = 1000
FEW = (1, 2, 3, 4, 5, 7, 15, 61, 999, 1000)
PLANNED = {*range(1, 65), *range(67, 1000, 59), *range(990, SIZE + 1)}  # whose every coefficient is looked at
SIGMAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
FIXED = {"clip_sample": False, "steps_offset": 1}


def kinds(name):
    """The settings of the class that lay out its timesteps, one of each choice."""
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    fixed = {key: value for key, value in FIXED.items() if key in taken}
    spacings = ("leading", "trailing", "linspace") if "timestep_spacing" in taken else (None,)
    if ROWS[name].spacing == "consistency":  # which has one way to choose timesteps
        spacings = (None,)
    for spacing in spacings:
        yield fixed | ({"timestep_spacing": spacing} if spacing else {})
    for sigmas in SIGMAS:
        if sigmas in taken:
            prediction = {"prediction_type": "flow_prediction"} if sigmas == "use_flow_sigmas" else {}
            yield fixed | {sigmas: True} | prediction


CASES = [
    pytest.param(name, settings, id="-".join([name.removesuffix("Scheduler"), *map(str, settings.values())]))
    for name in ROWS
    for settings in kinds(name)
]


def is_beta(case) -> bool:
    return "use_beta_sigmas" in case.values[1]


def has_steps(scheduler: GendiffScheduler, steps: int) -> None:
    """As many steps as asked for, one timestep an evaluation, all in the table, all coefficients finite."""
    scheduler.set_timesteps(steps)
    moves, stamps = scheduler.run.moves(), scheduler.run.stamps
    assert scheduler.num_inference_steps == steps == sum(move.first for move in moves)
    assert len(moves) == len(stamps)
    for move in moves:
        for part in (move.x, move.x0, move.eps, *move.keep.values()):
            assert math.isfinite(math.fsum(part.values())), f"{move} at {steps} steps"
    if not scheduler.run.levels.edm:  # whose timesteps are logarithms
        assert 0 <= min(stamps) <= max(stamps) <= SIZE


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_numbers_of_steps(name, settings) -> None:
    """Also at 61, where theirs has 62 of trailing."""
    scheduler = GendiffScheduler.from_config({"_class_name": name, **settings})
    for steps in FEW:
        has_steps(scheduler, steps)


def has_table(scheduler: GendiffScheduler, steps: int) -> None:
    """As many timesteps and values as asked for, and every coefficient where it is looked at."""
    table = table_of(scheduler.settings, Ask(steps=steps))
    assert len(table.timesteps) == len(table.values) - 1 == steps
    assert np.isfinite(table.timesteps).all()
    assert np.isfinite(table.values[1:]).all()
    if steps in PLANNED:
        has_steps(scheduler, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if not is_beta(case)])
def test_every_number_of_steps(name, settings) -> None:
    """A table for each number; every coefficient for the first 64, the last 11 and each 59th between."""
    scheduler = GendiffScheduler.from_config({"_class_name": name, **settings})
    for steps in range(1, SIZE + 1):
        has_table(scheduler, steps)


@pytest.mark.slow
def test_every_number_of_steps_of_beta_sigmas() -> None:
    """The classes together, which share the quantiles of a number of steps."""
    cases = [case.values for case in CASES if is_beta(case)]
    schedulers = [GendiffScheduler.from_config({"_class_name": name, **settings}) for name, settings in cases]
    for steps in range(1, SIZE + 1):
        for scheduler in schedulers:
            has_table(scheduler, steps)
