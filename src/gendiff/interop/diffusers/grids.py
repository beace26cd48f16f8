"""The grid that a pipeline of diffusers would visit, as a grid of ours."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gendiff._checks import unknown
from gendiff.interop.diffusers.schedules import Settings, schedule_of, settings_of
from gendiff.interop.diffusers.table_runs import Table, table_of
from gendiff.interop.diffusers.table_spacings import SPACINGS
from gendiff.interop.diffusers.tables import Ask
from gendiff.math import grids
from gendiff.math.grids import Grid
from gendiff.math.numeric import numbers

# pipelines that give their schedulers sigmas of their own, from 1 to 1/steps
OWN_SIGMAS = ("Flux", "QwenImage", "Lumina2", "ZImage", "Chroma", "LTX", "Bria", "OvisImage", "VisualCloze")


def grid_of(
    pipe_or_scheduler: Any,
    steps: int,
    size: int | tuple[int, int] | None = None,
    spacing: str | None = None,
) -> Grid:
    """The grid that a pipeline, or a scheduler, visits in so many steps.

    Spacing, sigma schedule, final sigma and shift are the settings' own; a shift is applied once. Where the
    levels decide (Karras's and its like), their times are those of the levels on our schedule, so that the
    network's timesteps may be fractions where theirs are rounded.

    Args:
        pipe_or_scheduler: a pipeline, a scheduler of diffusers, or its config.
        steps: number of steps.
        size: height and width of the image in pixels, which with a pipeline say how many tokens there are,
            or the number of tokens itself; needed where the shift depends on it (`use_dynamic_shifting`).
        spacing: leading, trailing or linspace, in place of the settings' own.

    Raises:
        ValueError: for an unknown spacing, a missing size, or a number of steps that a spacing does not have.

    >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    >>> grid_of(DDIMScheduler(), 4, spacing="trailing").times
    (1.0, 0.75, 0.5, 0.25, 0.0)
    >>> [round(t, 3) for t in grid_of(FlowMatchEulerDiscreteScheduler(shift=3.0), 3).times]
    [1.0, 0.75, 0.003, 0.0]
    """
    settings = settings_of(pipe_or_scheduler)
    if spacing is not None:
        if spacing not in SPACINGS or "timestep_spacing" not in settings.values:
            accepted = SPACINGS if "timestep_spacing" in settings.values else ()
            raise ValueError(unknown(f"spacing of {settings.name}", spacing, accepted))
        settings = replace(settings, values={**settings.values, "timestep_spacing": spacing})
    pipe = pipe_or_scheduler if hasattr(pipe_or_scheduler, "scheduler") else None
    own = type(pipe).__name__.startswith(OWN_SIGMAS) and settings.name.startswith("FlowMatch")
    sigmas = np.linspace(1, 1 / steps, steps).tolist() if own and steps > 0 else None
    mu = _mu(settings, pipe, size, steps) if settings["use_dynamic_shifting"] else None
    return _grid(settings, table_of(settings, Ask(steps, sigmas=sigmas, mu=mu)))


def _grid(settings: Settings, table: Table) -> Grid:
    schedule, values, levels = schedule_of(settings), table.values, table.levels
    if levels.row.spacing == "inverse":
        raise ValueError(
            "an inversion goes up, and a grid falls: gendiff.sampling.invert goes a grid backwards."
        )
    if levels.flow:
        return Grid(schedule, values.tolist())
    exact = levels.tabular and not levels.continuous
    if exact and np.array_equal(levels.value(table.timesteps), values[:-1]):
        end = (levels.timestep(values[-1:]).item() + 1) / levels.size if values[-1] else 0.0
        whole = table.timesteps == np.round(table.timesteps)
        times = (table.timesteps + 1) / levels.size
        if bool(whole.all()):
            return Grid(schedule, [*times.tolist(), end])
    if np.isinf(values[0]):
        return Grid(schedule, [1.0, *numbers(grids.from_sigmas(schedule, torch.from_numpy(values[1:])).t)])
    return grids.from_sigmas(schedule, torch.from_numpy(values))


def _mu(settings: Settings, pipe: Any, size: int | tuple[int, int] | None, steps: int) -> float:
    """The shift that pipelines compute from the number of tokens: on a line through two points."""
    tokens = size if isinstance(size, int) else _tokens(settings, pipe, size)
    if type(pipe).__name__.startswith("Flux2"):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def known(key: str, default: float | int) -> float | int:
        value = settings.config.get(key, settings[key])
        return default if value is None else value

    few, many = known("base_image_seq_len", 256), known("max_image_seq_len", 4096)
    low, high = known("base_shift", 0.5), known("max_shift", 1.15)
    return low + (high - low) / (many - few) * (tokens - few)


def _tokens(settings: Settings, pipe: Any, size: tuple[int, int] | None) -> int:
    if size is None:
        raise ValueError(
            f"{settings.name} shifts by the size of the image (use_dynamic_shifting): give size=(height, "
            f"width) in pixels with a pipeline, or the number of tokens."
        )
    if pipe is None:
        raise ValueError(
            "a scheduler alone does not know how many pixels a token is: give the number of tokens."
        )
    side = getattr(pipe, "vae_scale_factor", 8) * 2  # every one of these makes tokens of 2 by 2 latents
    return (size[0] // side) * (size[1] // side)
