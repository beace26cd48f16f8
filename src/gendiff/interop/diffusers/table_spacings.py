"""Which timesteps of a table a run visits: spacings, and sigma schedules between their ends."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gendiff._checks import unknown
from gendiff.interop.diffusers.schedules import Settings
from gendiff.interop.diffusers.tables import Ask, Levels
from gendiff.math.numeric import beta_quantile

SPACINGS = ("leading", "trailing", "linspace")
RHO = 7.0  # Karras et al. 2022, section 3
BETA = 0.6  # both parameters of the beta law (Lee et al. 2024)


def spaced(settings: Settings, levels: Levels, ask: Ask) -> "np.ndarray":
    """Timesteps of the table by the spacing of the settings (Lin et al. 2024, table 2), falling."""
    row, size, steps = levels.row, levels.size, ask.steps
    assert steps is not None
    if row.spacing == "consistency":
        return _consistency(settings, size, ask)
    spacing = "linspace" if row.spacing == "singlestep" else settings["timestep_spacing"]
    if spacing not in SPACINGS:
        raise ValueError(unknown("timestep_spacing", spacing, SPACINGS))
    if steps > size and (row.integer or spacing != "linspace"):
        raise ValueError(f"a table of {size} betas has 1 to {size} steps, got {steps}.")
    top = size - _clipped(settings, levels)
    if spacing == "trailing":
        count = steps if top == size else math.ceil(top * steps / size)
        stride = size - (size - size / steps)  # as numpy.arange rounds it, which decides ties
        return np.array([np.round(top - i * stride) - 1 for i in range(count)])
    if spacing == "linspace":
        return _linspace(row.spacing, row.integer, top, steps)
    extra = 1 if row.spacing == "n+1" and top // (steps + 1) else 0
    stride = max(top // (steps + extra), 1)
    timesteps = np.arange(extra, steps + extra)[::-1] * stride
    offset = settings["steps_offset"] or 0
    return (timesteps + min(offset, size - 1 - timesteps[0])).astype(float)


def _linspace(spacing: str, integer: bool, top: int, steps: int) -> "np.ndarray":
    if spacing == "n":
        if steps == 1:
            return np.array(
                [top - 1.0]
            )  # at the noise: a linspace of one number would be its first, the data
        timesteps = np.linspace(0, top - 1, steps)
    else:
        timesteps = np.linspace(0, top - 1, min(steps + 1, top))
        timesteps = timesteps[-steps:]
    return (timesteps.round() if integer else timesteps)[::-1].copy()


def _clipped(settings: Settings, levels: Levels) -> int:
    """How many of the noisiest entries `lambda_min_clipped` leaves out."""
    clip = settings["lambda_min_clipped"]
    if clip is None or math.isinf(clip):
        return 0
    return int(np.searchsorted(-np.log(levels.ratios)[::-1], clip))


def _consistency(settings: Settings, size: int, ask: Ask) -> "np.ndarray":
    """Evenly chosen among the timesteps that the model was distilled at; more than these where asked for."""
    steps = ask.steps
    assert steps is not None
    original = ask.original_steps or settings["original_inference_steps"]
    if settings.name == "TCDScheduler" and ask.original_steps is not None:
        distilled = np.arange(int(size * ask.strength))
    else:
        if original > size:
            raise ValueError(f"a table of {size} betas has at most {size} original steps, got {original}.")
        original = max(original, math.ceil(steps / ask.strength))
        distilled = np.arange(1, int(original * ask.strength) + 1) * (size // original) - 1
    if not 1 <= steps <= len(distilled):
        raise ValueError(
            f"{steps} steps at strength {ask.strength:g} need as many distilled timesteps, and there are "
            f"{len(distilled)}; ask for fewer steps or a higher strength."
        )
    chosen = np.floor(np.linspace(0, len(distilled), num=steps, endpoint=False)).astype(int)
    return distilled[::-1][chosen].astype(float)


def respaced(settings: Settings, ends: tuple[Any, Any], steps: int) -> "np.ndarray | None":
    """The values of a sigma schedule between two ends, where there is one."""
    ramp = np.linspace(0, 1, steps)
    high, low = ends
    high = high if settings["sigma_max"] is None else settings["sigma_max"]
    low = low if settings["sigma_min"] is None else settings["sigma_min"]
    if settings["use_karras_sigmas"]:  # Karras et al. 2022, eq. 5
        return (high ** (1 / RHO) + ramp * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
    if settings["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if settings["use_beta_sigmas"]:
        return low + _beta_quantiles(steps) * (high - low)
    if settings["use_lu_lambdas"]:  # Lu et al. 2022, section 3.3
        return np.exp(np.linspace(math.log(ends[0]), math.log(ends[1]), steps))
    if settings["interpolation_type"] == "log_linear":
        return np.exp(np.linspace(math.log(ends[0]), math.log(ends[1]), steps + 1))[:-1]
    return None


@lru_cache(maxsize=16)
def _beta_quantiles(steps: int) -> "np.ndarray":
    """Quantiles of the beta law from 1 to 0; it is symmetric, so that one half says the other."""
    ramp = np.linspace(1, 0, steps)
    upper = np.array([1 - beta_quantile(float(1 - u), BETA, BETA) for u in ramp[: (steps + 1) // 2]])
    return np.append(upper, 1 - upper[: steps // 2][::-1])


def rounded(settings: Settings, levels: Levels, timesteps: "np.ndarray") -> "np.ndarray":
    """The timesteps of a sigma schedule as the class rounds them."""
    karras = settings["use_karras_sigmas"] or settings["use_lu_lambdas"]
    cosine = (
        settings.name == "DPMSolverMultistepScheduler" and settings["beta_schedule"] == "squaredcos_cap_v2"
    )
    if karras and levels.row.rounds != "no" and not cosine:
        return timesteps.round()
    return timesteps
