"""A run of a scheduler of diffusers as a table: what the network is given, at which levels, and the end."""

from dataclasses import dataclass
from typing import final

import numpy as np

from gendiff._checks import unknown
from gendiff.interop.diffusers.schedules import Settings
from gendiff.interop.diffusers.table_flows import edm, flow
from gendiff.interop.diffusers.table_spacings import respaced, rounded, spaced
from gendiff.interop.diffusers.tables import Ask, Levels
from gendiff.math.numeric import Number
from gendiff.sampling.path import Path

ROUNDING = 1e-6  # relative: levels this close are the same


@final
@dataclass(frozen=True, eq=False)
class Table:
    """Timesteps, values and the end of a run.

    Attributes:
        levels: how values become levels.
        timesteps: what the network is given, one a step.
        values: sigma/alpha, or sigma of a flow, one a step and one at the end.
    """

    levels: Levels
    timesteps: "np.ndarray"
    values: "np.ndarray"

    @property
    def path(self) -> Path:
        """The path through it."""
        levels, (*values, end) = self.levels, self.values.tolist()
        last = levels.timestep(np.array(end)).item() if end else 0.0
        points = [*map(levels.point, self.timesteps.tolist(), values), levels.point(last, end)]
        if not end:
            points[-1] = points[-1]._replace(t=0.0)  # exactly the data
        return Path(tuple(points), levels.between)


def table_of(settings: Settings, ask: Ask) -> Table:
    """The table of a run.

    Raises:
        ValueError: for a number of steps that a spacing does not have, and for values that do not fall.
    """
    levels = Levels(settings)
    if ask.steps is not None and ask.steps < 1:
        raise ValueError(f"a run needs at least one step, got {ask.steps}.")
    if levels.row.spacing == "inverse":
        return _inverse(settings, levels, ask)
    timesteps, values, end = _visited(settings, levels, ask)
    if end is None:
        end = _end(settings, levels)
    if end > values[-1] * (1 - ROUNDING):  # a step of no length: an evaluation for nothing, and noise left
        end = 0.0
    values = np.append(values, end)
    if not bool((np.diff(values) < 0).all()):
        raise ValueError(
            f"the noise levels of a run fall strictly, got {_shortened(values)} for {settings.name}: ask for "
            f"fewer steps, or for falling timesteps or sigmas."
        )
    return Table(levels, _stamped(levels, timesteps, values[:-1]), values)


def _visited(
    settings: Settings, levels: Levels, ask: Ask
) -> tuple["np.ndarray", "np.ndarray", Number | None]:
    """Timesteps and values at which the network is evaluated, and the end where the caller gave it."""
    if levels.row.spacing == "edm":
        return edm(settings, levels, ask)
    if settings.flow:
        return flow(settings, levels, ask)
    if ask.sigmas is not None:
        values = np.asarray(ask.sigmas, dtype=float)
        return levels.timestep(values[:-1]), values[:-1], float(values[-1])
    if ask.timesteps is not None:
        timesteps = np.asarray(ask.timesteps, dtype=float)
        return timesteps, levels.value(timesteps), None
    timesteps = spaced(settings, levels, ask)
    values = levels.value(timesteps)
    ends = (levels.ratios[-1], levels.ratios[0]) if levels.row.whole else (values[0], values[-1])
    changed = respaced(settings, ends, len(timesteps))
    if changed is None:
        return timesteps, values, None
    return rounded(settings, levels, levels.timestep(changed)), changed, None


def _end(settings: Settings, levels: Levels) -> Number:
    """The value at which a run ends."""
    first = 1 / levels.size if settings.flow else None
    if levels.edm:
        first = settings["sigma_min"]
    elif first is None:
        first = float(levels.ratios[0])
    if levels.row.end == "final_sigmas_type":
        final = settings["final_sigmas_type"]
        if final not in ("zero", "sigma_min", None):
            raise ValueError(unknown("final_sigmas_type", final, ["zero", "sigma_min"]))
        return first if final == "sigma_min" or settings.name == "DEISMultistepScheduler" else 0.0
    if levels.row.end == "set_alpha_to_one":
        return 0.0 if settings["set_alpha_to_one"] else first
    return 0.0


def _inverse(settings: Settings, levels: Levels, ask: Ask) -> Table:
    """An inversion's way up: to the level of every timestep, with what the network says there.

    The first step leaves the data (set_alpha_to_one) or the first entry.
    """
    size, steps = levels.size, ask.steps
    if steps is None or ask.timesteps is not None or ask.sigmas is not None:
        raise ValueError("an inversion is given a number of steps.")
    falling = spaced(settings, levels, ask)
    timesteps = falling[::-1].copy()
    start = 0.0 if settings["set_alpha_to_one"] else float(levels.ratios[0])
    values = np.append(start, levels.value(timesteps))
    assert len(timesteps) == steps <= size
    return Table(levels, timesteps, values)


def _stamped(levels: Levels, timesteps: "np.ndarray", values: "np.ndarray") -> "np.ndarray":
    """Timesteps as the network gets them: integers are cut, those of inverted sigmas run the other way."""
    if levels.continuous:
        return levels.timestep(values)
    if levels.inverted:
        return levels.size - timesteps
    return np.trunc(timesteps + 1e-9) if levels.row.integer else timesteps


def _shortened(values: "np.ndarray") -> str:
    text = [f"{value:g}" for value in values.tolist()]
    return ", ".join(text if len(text) <= 8 else [*text[:4], "…", *text[-3:]])
