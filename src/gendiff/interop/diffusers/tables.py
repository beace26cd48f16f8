"""What differs between scheduler classes of diffusers, one row a class, and the level they are at when."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np
import torch

from gendiff._checks import unknown
from gendiff.interop.diffusers.schedules import Settings, schedule_in
from gendiff.math.numeric import Number
from gendiff.math.schedules import Level
from gendiff.math.tables import TableSchedule
from gendiff.sampling.path import Point

Coordinates = Literal["vp", "ve", "flow"]
FLOOR = 2.0**-24  # ᾱ that stands for 0 where the coordinates have no place for pure noise, if none is below


@final
@dataclass(frozen=True)
class Ask:
    """What a run is asked for: a number of steps, or timesteps, or sigmas, and what a pipeline knows.

    Attributes:
        steps: number of steps.
        timesteps: the network's timesteps, falling.
        sigmas: sigma/alpha, for a flow sigma, falling; a last 0 is where the run ends.
        mu: shift of a flow with `use_dynamic_shifting`, a logarithm.
        original_steps: steps a consistency model was distilled with.
        strength: part of these that is used.
    """

    steps: int | None = None
    timesteps: Sequence[Number] | None = None
    sigmas: Sequence[Number] | None = None
    mu: Number | None = None
    original_steps: int | None = None
    strength: Number = 1.0


@final
@dataclass(frozen=True)
class Row:
    """How a class lays out a run.

    Attributes:
        coordinates: what its samples are scaled by: variance preserving, exploding (alpha = 1), flow.
        spacing: which timesteps of the table: N of them, N of N + 1 without the cleanest, consistency's
            subset of the distilled ones, in ascending order for an inversion, flow's, EDM's.
        integer: whether timesteps are integers, and those of a linspace therefore rounded.
        rounds: what happens to the timesteps of a sigma schedule.
        whole: whether a sigma schedule runs over the whole table, or from the first to the last timestep.
        end: where the last step goes: a setting's word for it, or always the data.
        floored: whether zero terminal SNR is ᾱ = 2⁻²⁴.
        answers: whether `step` returns x0 beside the sample.
        like_output: whether the sample comes back in the dtype of the output, in place of the wider one.
        wide_noise: whether noise is drawn in the dtype that is computed in, in place of the output's.
        by_timestep: whether data is noised to any timestep of the table, in place of those of the run.
    """

    coordinates: Coordinates
    spacing: Literal["n", "n+1", "singlestep", "consistency", "inverse", "flow", "edm"]
    integer: bool = False
    rounds: Literal["no", "nearest", "cut"] = "no"
    whole: bool = False
    end: Literal["data", "set_alpha_to_one", "final_sigmas_type"] = "data"
    floored: bool = False
    answers: bool = True
    like_output: bool = False
    wide_noise: bool = False
    by_timestep: bool = False


_KARRAS = Row("ve", "n")
_MULTISTEP = Row(
    "vp", "n+1", integer=True, whole=True, end="final_sigmas_type", floored=True, rounds="cut", answers=False
)
ROWS: dict[str, Row] = {
    "DDPMScheduler": Row("vp", "n", integer=True, by_timestep=True),
    "DDIMScheduler": Row("vp", "n", integer=True, by_timestep=True, end="set_alpha_to_one"),
    "DDIMInverseScheduler": Row("vp", "inverse", integer=True, by_timestep=True, end="set_alpha_to_one"),
    "PNDMScheduler": Row("vp", "n", integer=True, by_timestep=True, end="set_alpha_to_one", answers=False),
    "EulerDiscreteScheduler": Row("ve", "n", end="final_sigmas_type", floored=True, like_output=True),
    "EulerAncestralDiscreteScheduler": Row("ve", "n", floored=True, like_output=True),
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": Row("ve", "n", rounds="nearest"),
    "KDPM2AncestralDiscreteScheduler": Row("ve", "n", rounds="nearest"),
    "LMSDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverMultistepScheduler": replace(_MULTISTEP, wide_noise=True),
    "DPMSolverSinglestepScheduler": Row(
        "vp", "singlestep", integer=True, whole=True, end="final_sigmas_type", rounds="cut", answers=False
    ),
    "UniPCMultistepScheduler": _MULTISTEP,
    "DEISMultistepScheduler": _MULTISTEP,
    "EDMEulerScheduler": Row("ve", "edm", end="final_sigmas_type", like_output=True),
    "EDMDPMSolverMultistepScheduler": Row("ve", "edm", end="final_sigmas_type", answers=False),
    "FlowMatchEulerDiscreteScheduler": Row("flow", "flow", answers=False, like_output=True, wide_noise=True),
    "FlowMatchHeunDiscreteScheduler": Row("flow", "flow", answers=False, like_output=True, wide_noise=True),
    "LCMScheduler": Row("vp", "consistency", integer=True, by_timestep=True),
    "TCDScheduler": Row("vp", "consistency", integer=True, by_timestep=True, end="set_alpha_to_one"),
}


def row_of(settings: Settings) -> Row:
    """The row of a class, or an error that lists the classes there are."""
    if settings.name not in ROWS:
        raise ValueError(unknown("scheduler", settings.name, ROWS))
    return ROWS[settings.name]


@final
class Levels:
    """The levels of a class: from a timestep of its network to (alpha, sigma), and back.

    What a class counts in, its value, is sigma/alpha, or for flow sigma itself.

    Args:
        settings: which class, and its settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.row = row_of(settings)
        self.schedule = schedule = schedule_in(settings)
        self.tabular = isinstance(schedule, TableSchedule)
        self.flow, self.edm = settings.flow, settings.edm
        self.coordinates: Coordinates = "flow" if self.flow else self.row.coordinates
        self.continuous = settings.continuous
        self.inverted = bool(settings["invert_sigmas"])
        self.size: int = settings["num_train_timesteps"]
        self.ratios = np.empty(0)
        if isinstance(schedule, TableSchedule):
            self.size = schedule.size
            log_alpha_bar = schedule.log_alpha_bar.numpy().copy()
            if settings["rescale_betas_zero_snr"] and self.row.floored:
                log_alpha_bar[-1] = min(math.log(FLOOR), log_alpha_bar[-2] - math.log(2))
            with np.errstate(over="ignore"):
                self.ratios = np.sqrt(np.expm1(-log_alpha_bar))

    def value(self, timesteps: "np.ndarray") -> "np.ndarray":
        """The values at timesteps, linear between two entries of a table."""
        if self.flow:
            return np.asarray(timesteps / self.size)
        if self.edm:
            return np.asarray(np.exp(4 * timesteps))
        below = np.clip(np.floor(timesteps).astype(int), 0, self.size - 1)
        above = np.minimum(below + 1, self.size - 1)
        part = np.clip(timesteps, 0, self.size - 1) - below
        with np.errstate(invalid="ignore"):
            between = self.ratios[below] * (1 - part) + self.ratios[above] * part
        return np.where(part == 0, self.ratios[below], between)

    def timestep(self, values: "np.ndarray") -> "np.ndarray":
        """What the network is given at values; between two entries of a table linear in their logarithm."""
        if self.flow:
            return np.asarray(values * self.size)
        if self.continuous:
            return np.asarray(np.log(values) / 4)
        logs = np.log(np.maximum(values, 1e-10))
        return np.asarray(np.interp(logs, np.log(self.ratios), np.arange(self.size)))

    def level(self, value: Number) -> tuple[float, float]:
        """(alpha, sigma) of a value, in the coordinates of the class."""
        if self.coordinates == "flow":
            return float(1 - value), float(value)
        if self.coordinates == "ve":
            return 1.0, float(value)
        if math.isinf(value):
            return 0.0, 1.0
        scale = 1 / math.hypot(1.0, value)
        return scale, value * scale

    def point(self, timestep: Number, value: Number) -> Point:
        """The point of a path: the time of what the network is given there, and the level."""
        return Point(self.time(timestep, value), *self.level(value))

    def time(self, timestep: Number, value: Number) -> float:
        """The time in [0, 1] of a timestep, as in the schedule."""
        if self.continuous:
            return float(self.schedule.time(-2 * math.log(value) if value else math.inf))
        steps = self.size - timestep if self.inverted else timestep + (not self.flow)
        return float(steps / self.size)

    def stamp(self, point: Point) -> float:
        """The timestep that the network is given at a point."""
        if self.continuous:
            return math.log(point.ratio) / 4
        steps = self.size * point.t
        steps = round(steps) if abs(steps - round(steps)) < 1e-9 * self.size else steps
        return float(self.size - steps if self.inverted else max(steps - (not self.flow), 0))

    def between(self, log_ratio: float) -> Point:
        """The point of a half log-SNR, for methods that evaluate the network inside a step."""
        ratio = math.exp(-log_ratio)
        value = ratio / (1 + ratio) if self.flow else ratio
        timestep = float(self.timestep(np.array(value)))
        return self.point(self.size - timestep if self.inverted else timestep, value)

    def native(self, points: Sequence[Point]) -> Level:
        """The levels that the network was trained at: variance preserving where its schedule is a table."""
        alpha, sigma = torch.tensor([point[1:] for point in points], dtype=torch.float64).T
        scale = torch.hypot(alpha, sigma) if self.tabular else torch.ones_like(alpha)
        return Level(alpha / scale, sigma / scale)
