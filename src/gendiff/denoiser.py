"""The denoiser: a network together with what its input and output mean, returning the pair (x0, eps)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gendiff._checks import positive_batch, unknown, working_dtype
from gendiff.condition import Condition as Condition
from gendiff.math.ddpm import split_variance
from gendiff.math.predictions import Name, Prediction, applied
from gendiff.math.schedules import Level, Moment, Schedule, Value

Cond = Mapping[str, Tensor] | None
Time = Tensor | float | Moment


@runtime_checkable
class Backbone(Protocol):
    """A network of any family: `backbone(x_t, timestep [B], cond) -> out`, and the conditions it knows."""

    accepts: frozenset[str]

    def __call__(self, x_t: Tensor, timestep: Tensor, cond: Condition, /) -> Tensor: ...


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Denoised:
    """What a denoiser says of x_t: the pair, in at least float32, with alpha·x0 + sigma·eps = x_t.

    Attributes:
        x0: predicted data, [B, *].
        eps: predicted noise, [B, *].
        out: the network's own output, [B, *]; training compares it with its target, without the detour.
        prediction: what `out` is; None where there is no network behind the pair.
        log_var: raw variance channels, [B, *], of a network that learned its variance, in at least float32.
        carry: what the next call is given as `carry`, such as a self-conditioning input.
    """

    x0: Float[Tensor, "B *dims"]
    eps: Float[Tensor, "B *dims"]
    out: Float[Tensor, "B *dims"] | None = None
    prediction: Prediction | None = None
    log_var: Float[Tensor, "B *dims"] | None = None
    carry: Any = None

    def replace(self, **changes: Any) -> "Denoised":
        """A copy with some fields replaced. `out` belongs to no changed pair: it is dropped with it."""
        if ({"x0", "eps"} & set(changes)) and "out" not in changes:
            changes["out"] = None
        return replace(self, **changes)


@runtime_checkable
class Denoise(Protocol):
    """Anything that denoises: a `Denoiser`, or a wrapper around one such as a guider."""

    @property
    def schedule(self) -> Schedule:
        """The schedule that its times are on."""
        ...

    def __call__(self, x_t: Tensor, t: Time, cond: Cond = None, carry: Any = None, /) -> Denoised: ...


@final
class Denoiser(nn.Module):
    r"""A backbone with its schedule and its prediction type.

    .. math:: \text{out} = \text{net}(c_\text{in} x_t,\ \text{timestep}(t),\ \text{cond}),\qquad
              x_0 = (q\,x_t - \sigma\,\text{out})/D,\quad \epsilon = (\alpha\,\text{out} - p\,x_t)/D

    The network is given x_t in its own dtype; the pair is computed in at least float32, from coefficients in
    float64.

    Args:
        backbone: `backbone(x_t, timestep, cond) -> out` with `accepts`, the names of conditions it knows.
            Without that attribute it accepts none.
        schedule: the noise schedule.
        prediction: what `out` is: a name (`x0 epsilon v flow edm`) or a `Prediction`.
        learned_variance: whether the network has twice the channels of x_t, the second half being its
            variance.

    Raises:
        ValueError: for a pair of schedule and prediction that cannot be, such as epsilon with zero terminal
            SNR.

    >>> from gendiff.math.schedules import Rectified
    >>> denoiser = Denoiser(lambda x, timestep, cond: 0 * x, Rectified(), "flow")
    >>> denoised = denoiser(torch.ones(1, 2), 0.5)
    >>> denoised.x0, denoised.eps
    (tensor([[1., 1.]]), tensor([[1., 1.]]))
    """

    def __init__(
        self,
        backbone: Backbone | Callable[[Tensor, Tensor, Condition], Tensor],
        schedule: Schedule,
        prediction: Prediction | Name,
        *,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        if not callable(backbone):
            raise TypeError(
                f"a backbone is called as backbone(x_t, timestep, cond), got {type(backbone).__name__}."
            )
        if not isinstance(schedule, Schedule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"the schedule of a denoiser is a gendiff Schedule, got {type(schedule).__name__}."
            )
        self.backbone = backbone
        self.schedule = schedule
        self.prediction = Prediction.of(prediction)
        self.learned_variance = learned_variance
        self.prediction.check(schedule)

    @property
    def accepts(self) -> frozenset[str]:
        """The names of the conditions that the backbone knows."""
        return frozenset(getattr(self.backbone, "accepts", ()))

    def replace(self, **changes: Any) -> "Denoiser":
        """A denoiser with some parts replaced; the modules are shared, not copied."""
        parts = {
            name: getattr(self, name) for name in ("backbone", "schedule", "prediction", "learned_variance")
        }
        for name in changes:
            if name not in parts:
                raise TypeError(unknown("part of a denoiser", name, parts))
        return Denoiser(**{**parts, **changes})

    def parts(self) -> tuple[Any, ...]:
        """What a captured step takes for granted; see `gendiff.sampling.static`."""
        return (self.schedule, self.prediction, self.learned_variance), (), (), (self.backbone,)

    def rebuilt(self, denoisers: tuple[Denoise, ...], tensors: tuple[Tensor, ...]) -> "Denoiser":
        """Itself: a denoiser reads no tensor but its network's weights."""
        return self

    def forward(
        self, x_t: Float[Tensor, "B *dims"], t: Value | Moment, cond: Cond = None, carry: Any = None
    ) -> Denoised:
        """Denoise.

        Args:
            x_t: noised data, [B, *].
            t: time in (0, 1], a scalar or [B], or what the schedule said of it.
            cond: named tensors with B rows; names that the backbone does not accept are a TypeError.
            carry: what the last call returned as `carry`; this denoiser has no use for it.
        """
        positive_batch(x_t, "x_t")
        moment = self._moment(t, x_t)
        cond, level = self._checked(cond, len(x_t)), moment.level
        dtype = working_dtype(x_t)
        scale = self.prediction.input_scale(level)
        x = x_t if scale is None else x_t.to(dtype) * Level(scale, scale).like(x_t, dtype)[0]
        out = self.backbone(x.to(self._dtype(x)), _timesteps(moment, x_t), cond)
        if not isinstance(out, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  (users' own)
            raise TypeError(
                f"a backbone returns a tensor, got {type(out).__name__}; return its `.sample` or first item."
            )
        out, log_var = self._split(out, x_t)
        x0, eps = applied(moment.solution(self.prediction), out.to(dtype), x_t.to(dtype))
        return Denoised(x0, eps, out, self.prediction, None if log_var is None else log_var.to(dtype))

    def _moment(self, t: Value | Moment, x_t: Tensor) -> Moment:
        moment = self.schedule.moment(t, x_t.device)
        t = moment.t
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x_t)):
            raise ValueError(
                f"t is a scalar or has one value per sample, got {tuple(t.shape)} for {len(x_t)} samples."
            )
        if t.device.type == "cpu" and bool((t == 0).any()):
            raise ValueError(
                "t = 0 is exactly the data, where there is nothing to denoise; give times above 0."
            )
        return moment

    def _checked(self, cond: Cond, rows: int) -> Condition:
        cond = Condition.of(cond)
        for name in cond:
            if name not in self.accepts:
                raise TypeError(unknown("condition", name, sorted(self.accepts)))
        if cond.rows not in (None, rows):
            raise ValueError(f"the condition has {cond.rows} rows for a batch of {rows} samples.")
        return cond

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the backbone's weights are in; that of x where it has none."""
        if isinstance(self.backbone, nn.Module):
            for parameter in self.backbone.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
        return x.dtype

    def _split(self, out: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.learned_variance:
            return split_variance(out, x_t)
        if out.shape != x_t.shape:
            hint = ""
            if x_t.ndim > 1 and out.ndim > 1 and out.shape[1] == 2 * x_t.shape[1]:
                hint = " If the second half of its channels is a variance, say learned_variance=True."
            raise ValueError(
                f"the backbone returned {tuple(out.shape)} for x_t of {tuple(x_t.shape)}; they must be "
                f"equal.{hint}"
            )
        return out, None


def _timesteps(moment: Moment, x_t: Tensor) -> Float[Tensor, "B"]:
    """What the network is given, one a sample, on the device of these."""
    timestep = moment.timestep
    if timestep.ndim == 0 and timestep.device != x_t.device:
        return torch.full((len(x_t),), float(timestep), dtype=torch.float32, device=x_t.device)
    return timestep.float().expand(len(x_t))


@runtime_checkable
class Oracle(Protocol):
    """A data law with a known posterior mean, at the level (alpha, sigma)."""

    def x0(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...


@final
class OracleDenoiser:
    """An exact denoiser made of an oracle of `gendiff.math.gaussians`: what solvers are tested on.

    >>> from gendiff.math.gaussians import GaussianOracle
    >>> from gendiff.math.schedules import Rectified
    >>> denoise = OracleDenoiser(GaussianOracle.isotropic(torch.zeros(1), 1.0), Rectified())
    >>> denoise(torch.ones(1, 1, dtype=torch.float64), 0.5).x0
    tensor([[1.]], dtype=torch.float64)
    """

    def __init__(self, oracle: Oracle, schedule: Schedule) -> None:
        self.oracle, self.schedule = oracle, schedule

    def __call__(self, x_t: Tensor, t: Time, cond: Cond = None, carry: Any = None) -> Denoised:
        if cond:
            raise TypeError(f"an oracle takes no condition, got {sorted(cond)}.")
        alpha, sigma = self.schedule.moment(t, x_t.device).level
        return Denoised(self.oracle.x0(x_t, alpha, sigma), self.oracle.eps(x_t, alpha, sigma))
