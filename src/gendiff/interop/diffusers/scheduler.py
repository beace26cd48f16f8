"""Solvers of gendiff inside any pipeline of diffusers: a scheduler in place of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin  # pipelines look here
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import cast, working_dtype
from gendiff.interop.diffusers.scheduler_base import ConfiguredScheduler
from gendiff.interop.diffusers.scheduler_moves import Move
from gendiff.interop.diffusers.scheduler_run import Run
from gendiff.interop.diffusers.tables import Ask
from gendiff.math.bounds import Bound
from gendiff.math.numeric import Number
from gendiff.sampling import LCM
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Point
from gendiff.sampling.stage import SAMPLE, combined


@dataclass
class GendiffSchedulerOutput(BaseOutput):
    """What `step` returns: the sample, and the x0 that the network's output stood for."""

    prev_sample: Tensor
    pred_original_sample: Tensor


@final
@dataclass(frozen=True, eq=False)
class Progress:
    """Where a run stands: all that `step` changes, so that keeping it and putting it back repeats a step.

    Attributes:
        index: number of the next evaluation; None before the first.
        registers: what the solver remembers, by name.
        noise: what was added to the sample that the network is looking at.
        origin: the evaluation that the memory begins at.
        idle: whether the run began in the middle of a step, at the level at which the next one begins; that
            evaluation moves nothing.
    """

    index: int | None = None
    registers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    noise: Tensor | None = None
    origin: int = 0
    idle: bool = False


@final
class GendiffScheduler(ConfiguredScheduler):
    r"""A scheduler for any pipeline of diffusers that runs a solver of gendiff.

    It is made from a scheduler, or its config, and does what that one does where that is right: its spacing,
    sigma schedule, prediction type, bounds and scaling of samples are kept. `solver` chooses another method
    on the same timesteps. Coefficients are computed in float64 when the timesteps are set, and a step is one
    linear combination,

    .. math:: x_s = a\,x_t + b\,\text{out} + \sum_j c_j\,\text{memory}_j + d\,z

    that waits for no device. What a run remembers is `state`, which can be kept and put back.

    The config keeps every key of the one it was made from, so that theirs can be made of it again.

    >>> from diffusers import EulerDiscreteScheduler
    >>> scheduler = GendiffScheduler.from_config(EulerDiscreteScheduler().config, solver="dpmpp-2")
    >>> scheduler.set_timesteps(3)
    >>> scheduler.timesteps, scheduler.solver.order
    (tensor([999.0000, 499.5000,   0.0000]), 2)
    """

    generator: torch.Generator | None = None  # for noise that is added before the network is run

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._begin_index: int | None = None
        self.state = Progress()
        self.run: Run | None = None
        self._planned_for: tuple[Any, Ask | None] = (None, None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Number | None = None,
        original_inference_steps: int | None = None,
        strength: Number = 1.0,
    ) -> None:
        """Begin a clean run.

        Args:
            num_inference_steps: number of steps; may be left out where timesteps or sigmas are given.
            device: where `timesteps` are to be; nothing else lies on a device.
            timesteps: the network's own timesteps, falling, in place of a spacing.
            sigmas: noise levels, sigma/alpha, for a flow sigma, falling. For a table the last one is where
                the run ends, as 0; for flows and EDM a last 0 may be left out.
            mu: logarithm of the shift, of a flow that is shifted by the size of the image.
            original_inference_steps: timesteps that a consistency model was distilled at.
            strength: share of these that is used.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            raise ValueError("set_timesteps needs a number of steps, timesteps or sigmas.")
        given = [None if values is None else _numbers(values) for values in (timesteps, sigmas)]
        self._check(num_inference_steps, *given)
        ask = Ask(num_inference_steps, given[0], given[1], mu, original_inference_steps, strength)
        config, asked = self._planned_for
        if self.run is None or config is not self.config or asked != ask:  # who changes a config replaces it
            self.run, self._planned_for = Run(self.settings, ask, self.solver), (self.config, ask)
            self.levels, self.num_inference_steps = self.run.levels, self.run.steps
        self._begin_index, self.state = None, Progress()
        self.timesteps = self._issued = self.run.timesteps.to(device)

    def _check(self, steps: int | None, timesteps: list[float] | None, sigmas: list[float] | None) -> None:
        flow = self.levels.flow
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None and steps is not None and not (flow and len(values) == steps):
                raise ValueError(
                    f"give a number of steps or {name}, not both: got {steps} steps and {len(values)} {name}."
                )
        if timesteps is not None and sigmas is not None and not flow:
            raise ValueError("give timesteps or sigmas, not both: one follows from the other.")
        if timesteps and self.levels.tabular and max(timesteps) >= len(self):
            raise ValueError(f"timesteps of this table go to {len(self) - 1}, got {max(timesteps):g}.")

    @property
    def points(self) -> tuple[Point, ...]:
        if self.run is None:
            return tuple(self.levels.point(0, value) for value in self.levels.ratios[::-1].tolist())
        return self.run.points

    def _begun(self) -> int | None:
        if self.state.index is not None and self._begin_index is not None:
            return self.state.index
        return self._begin_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation that a run begins with, where a pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at an evaluation other than the first, as image-to-image does."""
        self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """Number of the next evaluation; None before the first."""
        return self.state.index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The first evaluation at a timestep that begins a step; reads the timestep from its device."""
        if schedule_timesteps is None:
            return self._ready().index_of(float(timestep))
        return _numbers(schedule_timesteps).index(float(timestep))

    def _seen(self, run: Run, timestep: Any, expected: int | None) -> int:
        """The evaluation that a timestep stands for, where that can be told without waiting for a device."""
        if isinstance(timestep, Tensor):
            issued = timestep._base is self._issued or _storage(timestep) == _storage(self._issued)
            if timestep.ndim == 0 and issued:
                return int(timestep.storage_offset())  # one of those that set_timesteps handed out
            if expected is not None and (timestep.device.type != "cpu" or timestep.numel() != 1):
                return expected
            timestep = timestep.flatten()[0]
        value = float(timestep)
        if expected is not None and expected < len(run.stamps) and run.stamps[expected] == value:
            return expected
        return run.index_of(value)

    def _locate(self, run: Run, timestep: Any) -> int:
        """The evaluation that is due; where a caller jumps to another, the memory is left behind."""
        expected = self.state.index if self.state.index is not None else self._begin_index
        index = self._seen(run, timestep, expected)
        if index != self.state.index or index >= len(run.stamps):
            idle = run.begun_at(index)
            self.state = Progress(index, origin=index + idle, idle=idle)
        return index

    def _ready(self) -> Run:
        """The run; where theirs go through the whole table without being told, that."""
        if self.run is None:
            if self.levels.coordinates != "ve" and self.settings.name != "DDPMScheduler":
                raise ValueError("call set_timesteps before step, to say how many steps there are.")
            if self.levels.tabular:
                self.set_timesteps(timesteps=list(range(len(self) - 1, -1, -1)))
            else:
                self.set_timesteps(len(self))
        assert self.run is not None
        return self.run

    def scale_model_input(
        self, sample: Float[Tensor, "B *dims"], timestep: Any = None
    ) -> Float[Tensor, "B *dims"]:
        """What the network is to be given for a sample: scaled to the level it was trained at."""
        if self.run is None and self.levels.coordinates != "ve":
            return sample
        run = self._ready()
        index = self._locate(run, timestep)
        move = run.moves(origin=self.state.origin)[index]
        if move.stirred:
            noise = randn_tensor(sample.shape, self.generator, sample.device, sample.dtype)
            self.state = replace(self.state, noise=noise)
            sample = combined(move.stage.query, {"x": sample, "noise": noise})
        return sample if move.scale == 1 else sample * move.scale

    def step(
        self,
        model_output: Float[Tensor, "B *out"],
        timestep: Any,
        sample: Float[Tensor, "B *dims"],
        eta: Number | None = None,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Float[Tensor, "B *dims"] | None = None,
        noise: Float[Tensor, "B *dims"] | None = None,
        use_clipped_model_output: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample after an evaluation of the network.

        Args:
            model_output: what the network said.
            timestep: the timestep it was given, one of `timesteps`; not read from a device.
            sample: the sample as it was before `scale_model_input`.
            eta: share of fresh noise, of DDIM and TCD; others take 0, which pipelines pass to all.
            generator: of the noise of stochastic methods.
            variance_noise: the noise itself.
            noise: another name for it.
            use_clipped_model_output: False keeps the network's own noise beside a bounded x0, as
                DDIMScheduler does unless told otherwise; the two do not belong together.
            return_dict: whether to return an output with names in place of a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`.
        """
        run = self._ready()
        index = self._locate(run, timestep)
        move, row = run.moves(eta, self.state.origin)[index], run.levels.row
        x = cast(sample, working_dtype(sample))
        out, channels = _split(model_output, x, run.learned_variance)
        registers = {"x": x, "out": cast(out, x.dtype), **self.state.registers}
        if move.noisy and not self.state.idle:
            drawn = self._noise(run, move, x, out, generator, noise, variance_noise)
            spread = move.stage.spread
            registers["noise"] = drawn if spread is None else drawn * spread.deviation(channels)
        new, memory, answer = self._moved(run, move, index, registers, eta, use_clipped_model_output)
        self.state = Progress(index + 1, memory, origin=self.state.origin)
        alike = row.like_output or sample.dtype == out.dtype
        new = cast(new, out.dtype if alike else torch.promote_types(sample.dtype, out.dtype))
        if not row.answers and not return_dict:
            return (new,)
        if answer is None:
            answer = _answer(run.method, move, run.points[index + 1], registers)
        if not return_dict:
            return (new, cast(answer, new.dtype))
        return GendiffSchedulerOutput(prev_sample=new, pred_original_sample=cast(answer, new.dtype))

    def _moved(
        self,
        run: Run,
        move: Move,
        index: int,
        registers: dict[str, Tensor],
        eta: Number | None,
        clipped: bool | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The sample, the memory and, where one kernel computes all, the answer."""
        plain = run.bound is None and not self.state.idle and not isinstance(run.method, LCM)
        if plain and registers["x"].is_cuda:
            fused, names = run.fused(eta, self.state.origin)
            if fused.fits(registers):
                new, *kept, answer = fused(index, registers)
                memory = {name: value for name, value in zip(names, kept, strict=True) if name in move.keep}
                return new, memory, answer
        target, keep = move.x, move.keep
        if run.bound is not None:
            _bind(run.bound, move, registers, clipped)
            target, keep = move.stage.x, move.stage.keep
        if self.state.idle:
            target, keep = SAMPLE, {}
        memory = {name: combined(part, registers) for name, part in keep.items()}
        return combined(target, registers), memory, None

    def _noise(self, run: Run, move: Move, x: Tensor, out: Tensor, *sources: Any) -> Tensor:
        """The noise of an evaluation: given, drawn, or what was added before it."""
        if self.state.noise is not None:
            return self.state.noise
        if move.stirred:
            raise ValueError(
                f"{run.method!r} adds noise to what the network sees: call scale_model_input first."
            )
        given = [source for source in sources if source is not None]
        if len(given) > 1:
            raise ValueError("the noise of a step is given by one of generator, noise and variance_noise.")
        if given and isinstance(given[0], Tensor):
            return given[0]
        dtype = x.dtype if run.levels.row.wide_noise else out.dtype
        source = given[0] if given else None
        if source is None or (isinstance(source, torch.Generator) and source.device == x.device):
            return x.new_empty(x.shape, dtype=dtype).normal_(generator=source)  # torch.randn's, sooner
        return randn_tensor(tuple(x.shape), source, x.device, dtype)


def _answer(method: LinearSolver, move: Move, s: Point, registers: Mapping[str, Tensor]) -> Tensor:
    """The x0 of an evaluation; of a consistency model what its function says."""
    if isinstance(method, LCM):
        parts = {name: factor / s.alpha for name, factor in move.stage.x.items() if name != "noise"}
        pair = registers if "x0" in registers else {**registers, "x0": combined(move.x0, registers)}
        return combined(parts, pair)
    return registers["x0"] if "x0" in registers else combined(move.x0, registers)


def _split(model_output: Tensor, x: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
    """The output and its variance channels, where it has them."""
    if not learned or model_output.shape == x.shape:
        return model_output, model_output
    return model_output[:, : x.shape[1]], model_output[:, x.shape[1] :]


def _bind(bound: Bound, move: Move, registers: dict[str, Tensor], clipped: bool | None) -> None:
    """The pair with a bounded x0 and the eps that goes with it."""
    registers["x0"] = bound(combined(move.x0, registers))
    if clipped is False or not move.at.sigma:
        registers["eps"] = combined(move.eps, registers)
        return
    query, (_, alpha, sigma) = combined(move.stage.query, registers), move.at
    registers["eps"] = combined({"query": 1 / sigma, "x0": -alpha / sigma}, {**registers, "query": query})


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _numbers(values: Any) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    return [float(value) for value in values]
