"""Which sigmas a run of a flow or of EDM visits: evenly spaced or given, shifted once, respaced."""

import math

import numpy as np
import torch

from gendiff.interop.diffusers.schedules import Settings, table_in
from gendiff.interop.diffusers.table_spacings import respaced
from gendiff.interop.diffusers.tables import Ask, Levels
from gendiff.math.numeric import Number

EXACT = 1e-6  # UniPC on a flow starts this far from pure noise


def flow(settings: Settings, levels: Levels, ask: Ask) -> tuple["np.ndarray", "np.ndarray", Number | None]:
    """Sigmas of a flow: evenly spaced or given, shifted once, stretched, respaced."""
    given, end = ask.sigmas, None
    if given is None and ask.timesteps is not None:
        given = np.asarray(ask.timesteps, dtype=float) / levels.size
    if given is not None:
        sigmas = np.asarray(given, dtype=float)
        if len(sigmas) > 1 and sigmas[-1] == 0:
            sigmas = sigmas[:-1]
    else:
        assert ask.steps is not None
        sigmas = _evenly(settings, levels, ask.steps)
    sigmas = _shifted(settings, sigmas, ask.mu)
    terminal = settings["shift_terminal"]
    if terminal and len(sigmas) > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    sigmas = _respaced_flow(settings, levels, sigmas)
    if settings.name == "UniPCMultistepScheduler" and abs(sigmas[0] - 1) < EXACT:
        sigmas = np.array([sigmas[0] - EXACT, *sigmas[1:]])
    timesteps = sigmas * levels.size
    if ask.timesteps is not None and not settings.name.startswith("DPMSolver"):
        timesteps = np.asarray(ask.timesteps, dtype=float)[: len(sigmas)]
    return timesteps, sigmas, end


def _evenly(settings: Settings, levels: Levels, steps: int) -> "np.ndarray":
    """Sigmas before the shift, as each class spaces them."""
    last = 1 / levels.size
    if levels.row.spacing == "flow":
        return np.linspace(1, last, steps)
    if settings.name == "UniPCMultistepScheduler":
        return np.linspace(1, last, steps + 1)[:-1]
    return (1 - np.linspace(1, last, steps + 1))[::-1][:-1]


def _shifted(settings: Settings, sigmas: "np.ndarray", mu: Number | None) -> "np.ndarray":
    """t -> s·t/(1 + (s - 1)·t) with the static shift, or the dynamic one that a pipeline gives as mu."""
    shift = settings["shift"] if settings.name.startswith("FlowMatch") else settings["flow_shift"]
    if settings["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError(
                "this scheduler shifts by the size of the image (use_dynamic_shifting): pass mu, the "
                "logarithm of the shift, as pipelines do; grid_of takes the size itself."
            )
        shift = mu if settings["time_shift_type"] == "linear" else math.exp(mu)
    return shift * sigmas / (shift * sigmas + (1 - sigmas))


def _respaced_flow(settings: Settings, levels: Levels, sigmas: "np.ndarray") -> "np.ndarray":
    if levels.row.spacing == "flow":
        changed = respaced(settings, (sigmas[0], sigmas[-1]), len(sigmas))
        return sigmas if changed is None else changed
    if settings["use_karras_sigmas"] and settings.name == "UniPCMultistepScheduler":
        table = table_in(settings)  # whose ends are those of the ratios, unless sigma_max and sigma_min are
        ends = (-table.log_snr(torch.tensor([1.0, table.t_min])) / 2).exp().tolist()
        changed = respaced(settings, tuple(ends), len(sigmas))
        assert changed is not None
        return changed / (1 + changed)
    if any(settings[f"use_{kind}_sigmas"] for kind in ("karras", "exponential", "beta")):
        raise ValueError(
            f"{settings.name} has no sigma schedule on a flow, such as use_karras_sigmas: "
            f"FlowMatchEulerDiscreteScheduler has them all, and UniPCMultistepScheduler has Karras's."
        )
    return sigmas


def edm(settings: Settings, levels: Levels, ask: Ask) -> tuple["np.ndarray", "np.ndarray", Number | None]:
    """Sigmas of EDM: on the ramp of the settings, or given (Karras et al. 2022, eq. 5)."""
    if ask.sigmas is not None or ask.timesteps is not None:
        given = ask.sigmas if ask.sigmas is not None else levels.value(np.asarray(ask.timesteps, dtype=float))
        values = np.asarray(given, dtype=float)
        values, end = (values[:-1], 0.0) if values[-1] == 0 else (values, None)
        return levels.timestep(values), values, end
    assert ask.steps is not None
    low, high = settings["sigma_min"], settings["sigma_max"]
    ramp = np.linspace(0, 1, ask.steps)
    if settings["sigma_schedule"] == "exponential":
        values = np.exp(np.linspace(math.log(high), math.log(low), ask.steps))
    else:
        inverse = 1 / settings["rho"]
        values = (high**inverse + ramp * (low**inverse - high**inverse)) ** settings["rho"]
    return levels.timestep(values), values, None
