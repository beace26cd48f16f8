"""A share of the parity table of benchmarks/parity.py, and the whole of it where slow tests are asked for."""

import pytest
import torch

from benchmarks.parity import EQUAL, class_of, compare, network, start
from benchmarks.parity_cells import FAULTS, Cell, fault_of, variants
from gendiff.interop.diffusers.scheduler import GendiffScheduler
from gendiff.interop.diffusers.tables import ROWS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
VARIANTS = list(variants())


def agree(cell: Cell) -> None:
    result = compare(cell)
    assert result.verdict != "DIFFERENT", f"{cell}: {result.worst:.2e} {result.crash}"


@pytest.mark.parametrize("number", range(0, len(VARIANTS), 5))
def test_a_fifth_of_the_variants(number) -> None:
    """At a number of steps that takes turns."""
    name, settings = VARIANTS[number]
    agree(Cell(name, settings, (10, 3, 7, 16)[number % 4]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROWS)
def test_the_whole_table(name) -> None:
    for kind, settings in VARIANTS:
        if kind == name:
            for steps in (1, 2, 3, 10, 25, 50, 999):
                agree(Cell(kind, settings, steps))


def test_every_class_and_every_reason_is_in_it() -> None:
    """A reason that explains nothing would excuse what is yet to come."""
    assert {name for name, _ in VARIANTS} == set(ROWS)
    assert all(len(fault_of(Cell(name, settings, 10)).split()) < 3 for name, settings in VARIANTS)
    used = {
        number
        for name, settings in VARIANTS
        for steps in (1, 2, 3, 10, 25, 50, 999)
        for number in fault_of(Cell(name, settings, steps)).split()
    }
    assert used == {str(number) for number in FAULTS}


OTHERS = ("LMSDiscreteScheduler", "PNDMScheduler", "DDIMInverseScheduler")  # paragraph 21
ENDS = [name for name in ROWS if ROWS[name].end == "final_sigmas_type" and not name.startswith("DEIS")]
IN_THE_MIDDLE = [(name, {}) for name in ROWS if name not in OTHERS]
IN_THE_MIDDLE += [(name, {"final_sigmas_type": "sigma_min"}) for name in ENDS]


@pytest.mark.parametrize(("name", "settings"), IN_THE_MIDDLE)
def test_a_run_begun_in_the_middle(name, settings) -> None:
    """As image-to-image begins it: without a memory, with the lower orders of the whole at the end."""
    order = GendiffScheduler.from_config({"_class_name": name}).order
    plain = {"clip_sample": False} if name.startswith("DD") else {}
    for steps in (12, 20):
        agree(Cell(name, settings | plain, steps, first=8 * order))


AS_SHIPPED = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
]


@pytest.mark.parametrize("name", AS_SHIPPED)
def test_as_shipped(name) -> None:
    """In float32, theirs with its float32 tables: within 2e-4, most of it their 1 - ᾱ where ᾱ is near 1."""
    settings = {"clip_sample": False} if name == "DDIMScheduler" else {}
    theirs = class_of(name)(**settings)
    results = []
    for scheduler in (theirs, GendiffScheduler.from_config(theirs)):
        scheduler.set_timesteps(25)
        x = start().float() * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network(given, float(t)), t, x).prev_sample
        results.append(x)
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4 * float(results[0].abs().max()))


def test_the_comparison_sees_a_wrong_step(monkeypatch) -> None:
    """A coefficient that is off by 1e-5 is a difference."""
    from gendiff.interop.diffusers import scheduler as module

    cell = Cell("EulerDiscreteScheduler", {}, 10)
    assert compare(cell).worst < 1e-12
    exact = module.combined
    monkeypatch.setattr(module, "combined", lambda terms, registers: exact(terms, registers) * (1 + 1e-5))
    assert compare(cell).worst > EQUAL
