"""A denoiser made of several branches of one or more denoisers."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, Protocol, final, runtime_checkable

from torch import Tensor

from gendiff._checks import unknown
from gendiff.condition import Condition
from gendiff.denoiser import Cond, Denoise, Denoised, Time
from gendiff.math.schedules import Moment, Schedule


@runtime_checkable
class Told(Protocol):
    """What a guider tells of an evaluation, before it."""

    def name_rows(self, rows: tuple[str, ...]) -> None:
        """Which branches the batch has, in their order."""

    def at(self, *, t: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        """The time and the level."""


Batching = Literal["auto", "together", "separate"]


@final
class Guider:
    """Evaluate a denoiser under several conditions and combine the answers; itself a denoiser.

    >>> from functools import partial
    >>> import torch
    >>> from gendiff import Denoiser, cfg
    >>> from gendiff.math import Rectified
    >>> def net(x, timestep, cond): return cond["label"][:, None] * x
    >>> net.accepts = frozenset({"label"})
    >>> branches = {"cond": {"label": torch.ones(1)}, "uncond": {"label": torch.zeros(1)}}
    >>> guider = Guider(Denoiser(net, Rectified(), "x0"), branches, combine=partial(cfg, scale=3.0))
    >>> guider(torch.ones(2, 1), 0.5).x0
    tensor([[3.],
            [3.]])

    Args:
        denoise: the denoiser of every branch that does not bring its own.
        branches: names to conditions, or to (denoiser, condition). A condition of one row serves the whole
            batch. The names are the argument names of `combine`.
        combine: rule from the branches' answers to one, such as `partial(cfg, scale=7.5)`.
        when: branches that are only evaluated at times in [low, high], by name. Elsewhere such a branch is
            taken to say what the first of the others says, which switches its guidance off. At least one
            branch is evaluated always. It needs times that are numbers, as samplers give them.
        context: what is told before every evaluation which branches the batch has, and the time and level:
            the `context` of an attention stack.
        batching: "together" evaluates all branches of a denoiser in one batch and refuses conditions that
            cannot be joined, "separate" one after the other, "auto" together where the conditions can be
            joined.

    Raises:
        ValueError: for branches on different schedules, intervals that are none, or with batching="together"
            conditions that do not join.
        TypeError: if the branch names are not the arguments of `combine`.
    """

    def __init__(
        self,
        denoise: Denoise,
        branches: Mapping[str, Cond | tuple[Denoise, Cond]],
        combine: Callable[..., Denoised],
        *,
        when: Mapping[str, tuple[float | int, float | int]] | None = None,
        batching: Batching = "auto",
        context: Told | None = None,
    ) -> None:
        if batching not in ("auto", "together", "separate"):
            raise ValueError(unknown("batching", batching, ["auto", "together", "separate"]))
        self.denoise, self.combine, self.context = denoise, combine, context
        self.batching: Batching = batching
        self.branches: dict[str, tuple[Denoise, Condition]] = {}
        for name, branch in branches.items():
            own, cond = branch if isinstance(branch, tuple) else (denoise, branch)
            self.branches[name] = own, Condition.of(cond)
            if own.schedule != denoise.schedule:
                raise ValueError(
                    f"branch {name!r} is on {own.schedule!r}, the guider on {denoise.schedule!r}; branches "
                    f"can only be combined on one schedule."
                )
        signature = inspect.signature(combine)
        try:
            signature.bind(**self.branches)
        except TypeError as error:
            raise TypeError(
                f"the branches {sorted(self.branches)} must be the arguments of "
                f"combine({', '.join(signature.parameters)}): {error}."
            ) from None
        self.when = {name: _interval(name, ends, self.branches) for name, ends in (when or {}).items()}
        if not self.branches.keys() - self.when.keys():
            raise ValueError(
                f"every branch has an interval in `when`, {sorted(self.when)}; leave out one that is always "
                f"evaluated, such as 'cond'."
            )
        self._groups = self._grouped()

    def active(self, t: float | int) -> tuple[str, ...]:
        """The branches that are evaluated at a time.

        A step that is captured in a graph is one for each of these.
        """
        return tuple(name for name in self.branches if name not in self.when or self._holds(name, t))

    def _holds(self, name: str, t: float | int) -> bool:
        low, high = self.when[name]
        return low <= t <= high

    @property
    def schedule(self) -> Schedule:
        """The schedule that all branches are on."""
        return self.denoise.schedule

    def __call__(self, x_t: Tensor, t: Time, cond: Cond = None, carry: Any = None) -> Denoised:
        """Denoise under every branch and combine.

        Args:
            x_t: noised data, [B, *].
            t: time in (0, 1], a scalar or [B].
            cond: must be None: the branches hold the conditions.
            carry: what the last call returned as `carry`.
        """
        if cond:
            raise TypeError(
                f"the branches of a guider hold its conditions, so none is given at the call; got {cond!r}."
            )
        active = self.active(_number(t)) if self.when else tuple(self.branches)
        carries = carry if carry is not None else [None] * len(self._groups)
        answers: dict[str, Denoised] = {}
        after: list[Any] = []
        for group, group_carry in zip(self._groups, carries, strict=True):
            names = [name for name in group if name in active]
            if names:
                parts, group_carry = self._evaluate(names, x_t, t, group_carry)
                answers.update(zip(names, parts, strict=True))
            after.append(group_carry)
        always = next(name for name in self.branches if name not in self.when)
        answers = {name: answers.get(name, answers[always]) for name in self.branches}
        return self.combine(**answers).replace(carry=after if any(c is not None for c in after) else None)

    def parts(self) -> tuple[Any, ...]:
        """What it is made of; see `gendiff.sampling.static`."""
        rule = self.combine
        settings = rule.keywords if isinstance(rule, partial) else {}
        scales = {name: value for name, value in settings.items() if isinstance(value, Tensor)}
        plain = tuple((name, value) for name, value in settings.items() if name not in scales)
        what = (rule.func, rule.args, plain, tuple(scales)) if isinstance(rule, partial) else rule
        names = tuple((name, tuple(cond)) for name, (_, cond) in self.branches.items())
        key = names, what, self.batching, tuple(self.when.items()), id(self.context)
        conds = [value for _, cond in self.branches.values() for value in cond.values()]
        denoisers = self.denoise, *(denoise for denoise, _ in self.branches.values())
        return key, denoisers, (*conds, *scales.values())

    def rebuilt(self, denoisers: tuple[Denoise, ...], tensors: tuple[Tensor, ...]) -> "Guider":
        """The same with other conditions and scales."""
        given, own = iter(tensors), zip(self.branches.items(), denoisers[1:], strict=True)
        branches = {
            name: (denoise, Condition({key: next(given) for key in cond}))
            for (name, (_, cond)), denoise in own
        }
        rule = self.combine
        if isinstance(rule, partial):
            scales = {k: next(given) for k, value in rule.keywords.items() if isinstance(value, Tensor)}
            rule = partial(rule.func, *rule.args, **{**rule.keywords, **scales})
        return Guider(
            denoisers[0], branches, rule, when=self.when, batching=self.batching, context=self.context
        )

    def _evaluate(self, names: list[str], x_t: Tensor, t: Time, carry: Any) -> tuple[list[Denoised], Any]:
        """The answers of the branches of a group, from one call of their denoiser."""
        rows, count = len(x_t), len(names)
        denoise = self.branches[names[0]][0]
        conds = [_fitted(name, self.branches[name][1], rows) for name in names]
        cond = Condition.concat(conds) if count > 1 else conds[0]
        if isinstance(t, Moment) or (isinstance(t, Tensor) and t.ndim == 1):
            t = t.repeat(count)
        if self.context is not None:
            moment = self.schedule.moment(t, x_t.device)
            self.context.name_rows(tuple(names))
            self.context.at(t=moment.t, alpha=moment.level.alpha, sigma=moment.level.sigma)
        denoised = denoise(x_t.repeat(count, *[1] * (x_t.ndim - 1)), t, cond, carry)
        return [_rows(denoised, slice(i * rows, (i + 1) * rows)) for i in range(count)], denoised.carry

    def _grouped(self) -> list[list[str]]:
        """The names of the branches, those that share a call together."""
        groups: list[list[str]] = []
        for name, (denoise, cond) in self.branches.items():
            for group in groups:
                first, like = self.branches[group[0]]
                if (
                    self.batching != "separate"
                    and first is denoise
                    and self._joins(name, cond, group[0], like)
                ):
                    group.append(name)
                    break
            else:
                groups.append([name])
        return groups

    def _joins(self, name: str, cond: Condition, first: str, like: Condition) -> bool:
        shapes = {key: value.shape[1:] for key, value in cond.items()}
        joins = shapes == {key: value.shape[1:] for key, value in like.items()}
        if not joins and self.batching == "together":
            raise ValueError(
                f"branches {first!r} ({like!r}) and {name!r} ({cond!r}) cannot be one batch: their "
                f"conditions differ in names or shapes; pad them, or use batching='auto'."
            )
        return joins


def _interval(
    name: str, ends: tuple[float | int, float | int], branches: Mapping[str, Any]
) -> tuple[float, float]:
    if name not in branches:
        raise ValueError(unknown("branch in `when`", name, branches))
    low, high = (float(end) for end in ends)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"`when` gives {name!r} the times [{low:g}, {high:g}]; they lie in [0, 1], low first."
        )
    return low, high


def _number(t: Time) -> float:
    if isinstance(t, Moment) and t.number is not None:
        return t.number
    if isinstance(t, float | int) or (isinstance(t, Tensor) and t.ndim == 0 and t.device.type == "cpu"):
        return float(t)
    raise ValueError(
        f"a guider with `when` is asked for one time that the host knows (a number, or a scalar on the CPU), "
        f"got {t!r}; guidance in an interval is for sampling, not for training."
    )


def _fitted(name: str, cond: Condition, rows: int) -> Condition:
    """The condition with as many rows as the batch, from as many or from one."""
    if cond.rows in (None, rows):
        return cond
    if cond.rows != 1:
        raise ValueError(
            f"branch {name!r} has {cond.rows} rows for a batch of {rows} samples; give {rows}, or 1."
        )
    return Condition({key: value.expand(rows, *value.shape[1:]) for key, value in cond.items()})


def _rows(denoised: Denoised, index: slice) -> Denoised:
    """Some rows of every tensor of an answer; the carry belongs to the whole batch."""
    values = {f.name: getattr(denoised, f.name) for f in fields(denoised)}
    cut = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(denoised, **{**cut, "carry": None})
