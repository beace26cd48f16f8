"""A run as moves: one evaluation each, a linear combination of sample, output of the network and memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from gendiff.interop.diffusers.tables import Levels
from gendiff.math.numeric import Number, numbers
from gendiff.math.predictions import Prediction
from gendiff.sampling.path import Point
from gendiff.sampling.stage import ANSWER, Combination, Plan, Stage


@final
@dataclass(frozen=True)
class Move:
    r"""An evaluation of the network, and what is made of its output.

    With :math:`\text{out} = p\,x_0 + q\,\epsilon` and :math:`x_t = \alpha x_0 + \sigma\epsilon` the pair is
    linear in the sample and the output, so that a combination of the pair is one of these.

    Attributes:
        stage: the solver's own, in terms of the pair.
        timestep: what the network is given.
        scale: what the sample is multiplied by before the network sees it.
        first: whether a step of the grid begins here.
        noisy: whether noise enters it.
        x: the sample after it, of `x`, `out`, `noise` and what was kept.
        keep: the memory after it, likewise.
        x0: the answer, of `x`, `out` and `noise`.
        eps: likewise.
    """

    stage: Stage
    timestep: float
    scale: float
    first: bool
    noisy: bool
    x: Combination
    keep: Mapping[str, Combination]
    x0: Combination
    eps: Combination

    @property
    def at(self) -> Point:
        """Where the network is evaluated."""
        return self.stage.at

    @property
    def stirred(self) -> bool:
        """Whether noise is added before the network is evaluated."""
        return bool(self.stage.query.get("noise"))

    @property
    def remembers(self) -> bool:
        """Whether it takes anything from before."""
        parts = (self.stage.x, self.stage.query, *self.stage.keep.values())
        return any(name not in ANSWER for part in parts for name in part)


def moves_of(plan: Plan, levels: Levels, prediction: Prediction) -> tuple[Move, ...]:
    """The moves of a plan.

    Raises:
        ValueError: where the output does not determine the pair, as epsilon at pure noise.
    """
    stages = [(stage, number == 0) for step in plan for number, stage in enumerate(step)]
    native = levels.native([stage.at for stage, _ in stages])
    scales = prediction.input_scale(native)
    given = [None] * len(stages) if scales is None else numbers(scales)
    rows = zip(*map(numbers, (*native, *prediction.pair(native))), given, stages, strict=True)
    return tuple(_move(levels, prediction, *row) for row in rows)


def _move(
    levels: Levels,
    prediction: Prediction,
    alpha: Number,
    sigma: Number,
    p: Number,
    q: Number,
    scale: Number | None,
    staged: tuple[Stage, bool],
) -> Move:
    (stage, first), at = staged, staged[0].at
    determinant = at.alpha * q - at.sigma * p
    if determinant == 0:
        raise ValueError(
            f"{prediction.name} prediction does not determine x0 and eps where alpha = {at.alpha:g} and "
            f"sigma = {at.sigma:g}, at timestep {levels.stamp(at):g}: the network needs 'v_prediction', or a "
            f"run that does not evaluate it there."
        )
    if scale is None:
        scale = alpha / at.alpha if at.alpha else sigma / at.sigma
    x0 = _merged({}, stage.query, q / determinant) | {"out": -at.sigma / determinant}
    eps = _merged({}, stage.query, -p / determinant) | {"out": at.alpha / determinant}
    kept = {name: _folded(part, x0, eps) for name, part in stage.keep.items()}
    stamp, x = levels.stamp(at), _folded(stage.x, x0, eps)
    return Move(stage, stamp, float(scale), first, stage.noisy, x, kept, x0, eps)


def _folded(combination: Combination, x0: Combination, eps: Combination) -> Combination:
    """A combination with the pair written out; zeros left out."""
    rest = {name: factor for name, factor in combination.items() if name not in ("x0", "eps")}
    result = _merged(rest, x0, combination.get("x0", 0.0))
    result = _merged(result, eps, combination.get("eps", 0.0))
    return {name: factor for name, factor in result.items() if factor}


def _merged(first: Combination, second: Combination, factor: float) -> dict[str, float]:
    result = dict(first)
    for name, value in second.items():
        result[name] = result.get(name, 0.0) + factor * value
    return result
