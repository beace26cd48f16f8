"""Sampling with captured steps: a CUDA graph for every set of branches, with its step index on the device."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gendiff.condition import Condition
from gendiff.denoiser import Denoise, Denoised
from gendiff.sampling.linear import LinearSolver, Memory
from gendiff.sampling.solver import Draw, Solver, State
from gendiff.sampling.stage import Stage
from gendiff.sampling.static import active, rebuilt, root, structure, tensors_of
from gendiff.sampling.table import Table

WARM_UP = 2  # runs of a step before it is captured, in which libraries set themselves up
CAPACITY = 64  # fewest rows of a table, so that a run of more steps seldom needs another capture


@final
class Program:
    """One step of a sampler with its registers, conditions and coefficients at fixed places.

    Args:
        memory: names of what the solver keeps.
        stirs: whether some stage noises the samples first.
        capacity: the most evaluations of a run.
        x: a sample.
        tensors: what the denoiser reads, to be copied in before every run.
        capture: False runs the same step without a graph, on any device.
    """

    def __init__(
        self,
        memory: Sequence[str],
        stirs: bool,
        capacity: int,
        x: Tensor,
        tensors: Sequence[Tensor],
        capture: bool,
    ) -> None:
        self.table, self.stirs, self.capture = Table(memory, capacity, x), stirs, capture
        self.stack = torch.zeros(len(self.table.registers), *x.shape, dtype=x.dtype, device=x.device)
        self.tensors = [tensor.clone() for tensor in tensors]
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.run: object = None  # whose registers these are

    def load(self, state: State, stages: Sequence[Stage], tensors: Sequence[Tensor]) -> None:
        """Take the samples, the memory, the rows and the conditions of a run."""
        self.table.load(stages, state.grid.schedule)
        self.stack.zero_()
        self.stack[0].copy_(state.x)
        kept: dict[str, Tensor] = {} if state.memory is None else state.memory.registers
        for name, value in kept.items():
            self.stack[self.table.registers.index(name)].copy_(value)
        for mine, given in zip(self.tensors, tensors, strict=True):
            mine.copy_(given)

    def step(self, denoise: Denoise, cond: Condition, t: float) -> None:
        """One evaluation of the network and what is made of it, by the row that is due."""
        x = self.table.query(self.stack) if self.stirs else self.stack[0]
        denoised = denoise(x, self.table.moment(t), cond or None, None)
        if denoised.carry is not None:
            raise ValueError("a step with a carry (self-conditioning) is not captured; use engine='eager'.")
        self.table.mix(self.stack, denoised.x0, denoised.eps)

    def replay(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step, capturing it where that has not been done."""
        if not self.capture:
            step()
            return
        if key not in self.graphs:
            self.graphs[key] = self._captured(step)
        self.graphs[key].replay()

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        before = self.stack.clone(), self.table.index.clone()
        stream = torch.cuda.Stream(self.stack.device)
        stream.wait_stream(torch.cuda.current_stream(self.stack.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.table.index.copy_(before[1])
                step()
        torch.cuda.current_stream(self.stack.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            step()
        self.pool = graph.pool()
        self.stack.copy_(before[0])
        self.table.index.copy_(before[1])
        return graph

    def denoised(self) -> Denoised:
        """A copy of what the network last said."""
        return Denoised(self.stack[1].clone(), self.stack[2].clone())

    def state(self, state: State, i: int, kept: Sequence[str]) -> State:
        """The solver's state after step i, with copies of the registers."""
        registers = {name: self.stack[self.table.registers.index(name)].clone() for name in kept}
        memory = Memory(0, registers) if kept else None
        return State(self.stack[0].clone(), state.grid, i + 1, memory, state.plan)


@final
class Graphs:
    """Captured steps, found again by what they compute: other prompts, grids and numbers of steps reuse them.

    A step belongs to the networks it was captured with, their weights in place; it is captured again where
    modules, modes, processors or the place of weights have changed. What else a network reads on the host,
    such as a number that an adapter is scaled by, is as it was at capture: `clear` after changing it.

    Args:
        limit: programs that are kept, each with the memory of one evaluation; the oldest goes first.
        capture: False runs the same steps without graphs, on any device.
    """

    def __init__(self, limit: int = 4, *, capture: bool = True) -> None:
        if limit < 1:
            raise ValueError(f"at least one program is kept, got limit={limit}.")
        self.limit, self.capture = limit, capture
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()

    def clear(self) -> None:
        """Give back all memory; a step is captured anew when it is next run."""
        self.programs.clear()

    def run(
        self, denoise: Denoise, state: State, solver: Solver, cond: Condition, draw: Draw | None
    ) -> Iterator[tuple[State, Denoised]]:
        """Run to the end of the grid, yielding the state after every step and what the network last said.

        Raises:
            TypeError: for a solver that is no table.
            ValueError: for samples that are on no CUDA device, or noise without randomness.
        """
        if not isinstance(solver, LinearSolver):
            raise TypeError(f"only linear solvers are captured, got {solver!r}; use engine='eager'.")
        if self.capture and state.x.device.type != "cuda":
            raise ValueError(f"graphs need a CUDA device, and x is on {state.x.device}; use engine='eager'.")
        steps = solver.plan_of(state)[state.i :]
        stages = [stage for step in steps for stage in step]
        if any(stage.spread for stage in stages):
            raise ValueError(
                f"{solver!r} reads variance channels, which is not captured; use engine='eager'."
            )
        program, tensors = self._program(denoise, state, stages, cond)
        with torch.no_grad():
            program.load(state, stages, tensors)
        program.run = mark = object()
        mine = iter(program.tensors)
        inner = rebuilt(denoise, mine)
        inside = Condition(dict(zip(cond, mine, strict=True)))
        for i, step in enumerate(steps, start=state.i):
            if program.run is not mark:
                raise RuntimeError(
                    "another run of the same captured step began before this one ended, and has its "
                    "registers: run one after the other, or give each its own engine=Graphs()."
                )
            with torch.no_grad():
                for stage in step:
                    if stage.noisy:
                        ends = stage.span or (float(state.grid.t[i]), float(state.grid.t[i + 1]))
                        program.stack[3].copy_(_drawn(draw, solver)(program.stack[0], ends))
                    t = stage.at.t
                    program.replay(active(denoise, t), partial(program.step, inner, inside, t))
                done = program.state(state, i, sorted(step[-1].keep)), program.denoised()
            yield done

    def _program(
        self, denoise: Denoise, state: State, stages: Sequence[Stage], cond: Condition
    ) -> tuple[Program, list[Tensor]]:
        begun = set[str]() if state.memory is None else {*state.memory.registers}
        memory = sorted(begun | {name for stage in stages for name in stage.keep})
        stirs = any("noise" in stage.query for stage in stages)
        tensors = [*tensors_of(denoise), *cond.values()]
        shapes = tuple((name, tuple(value.shape), value.dtype, value.device) for name, value in cond.items())
        x = tuple(state.x.shape), state.x.dtype, state.x.device
        key = structure(denoise), shapes, x, tuple(memory), stirs, state.grid.schedule
        program = self.programs.pop(key, None)
        if program is None or len(program.table.facts) < len(stages):
            program = Program(memory, stirs, max(CAPACITY, len(stages)), state.x, tensors, self.capture)
        self.programs[key] = program
        while len(self.programs) > self.limit:
            self.programs.popitem(last=False)
        return program, tensors


_OWN: WeakKeyDictionary[Denoise, Graphs] = WeakKeyDictionary()


def graphs_of(denoise: Denoise) -> Graphs:
    """The captured steps that live as long as the innermost denoiser."""
    return _OWN.setdefault(root(denoise), Graphs())


def _drawn(draw: Draw | None, solver: Solver) -> Draw:
    if draw is None:
        raise ValueError(f"{solver!r} adds noise in every step: pass rng=Rng(seed) or a torch.Generator.")
    return draw
