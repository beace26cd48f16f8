r"""Averages of the weights over training: constant decay or power functions, moved on the device.

Whether an average moves is a tensor, as in `update`: nothing is read by the host.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from gendiff._checks import unknown

WIDEST = 1 / math.sqrt(12)  # relative standard deviation of the uniform average, gamma = 0


@final
@dataclass(frozen=True)
class EMA:
    r"""Which average of the weights is kept.

    .. math:: \hat\theta \leftarrow \beta\,\hat\theta + (1 - \beta)\,\theta

    ===============================  ==================================================================
    setting                          beta at update t, moved at t = k, 2k, … with k = `every`
    ===============================  ==================================================================
    `EMA(d)`                         d^k
    `EMA(d, warmup=True)`            product of min(d, (1 + n)/(10 + n)) over the k updates since
    `EMA(sigma_rel=s)`               (1 - k/t)^(gamma + 1), where gamma follows from s
    ===============================  ==================================================================

    n counts the updates applied before one: the first has 0. diffusers' `EMAModel` has this ramp, with 0 in
    place of 0.1 at the first update.

    A power function gives update τ of t the weight τ^gamma: the average is as wide as a share of the run
    so far, and forgets where it began. `sigma_rel` is that width, the standard deviation of τ/t. An update
    counts what the continuous function has between it and the one before, so that at an interval of k the
    width is the declared one but for (k/(sigma_rel·t))²/24 of it.

    Args:
        decay: d, in [0, 1).
        warmup: begin with the ramp.
        sigma_rel: width, in (0, 0.2887); several are kept at once, and the first is the one that samples and
            is saved. 0.05 is gamma = 16.97, and 0.1 is 6.94.
        every: k, applied updates between two moves of the average.
        snapshot_steps: applied updates between two stored snapshots of the power functions, from which
            `gendiff.training.posthoc.reconstruct` makes other widths; a multiple of `every`. None for none.

    Raises:
        ValueError: for neither or both of the kinds, and for values out of range.

    References:
        Karras et al. 2024, *Analyzing and improving the training dynamics of diffusion models*, eqs. 121 (the
        function), 123 (sigma_rel) and 127 (beta).

    >>> EMA(0.999) == EMA(decay=0.999), EMA(sigma_rel=0.1) == EMA(sigma_rel=(0.1,))
    (True, True)
    >>> [round(gamma, 2) for gamma in EMA(sigma_rel=(0.05, 0.1)).gammas]
    [16.97, 6.94]
    """

    decay: float | int | None = None
    _: KW_ONLY
    warmup: bool = False
    sigma_rel: float | Sequence[float] | None = None
    every: int = 1
    snapshot_steps: int | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError(
                f"an average has a constant decay or power functions: give one of the two, such as "
                f"EMA(0.999) or EMA(sigma_rel=0.1); got decay={self.decay!r}, sigma_rel={self.sigma_rel!r}."
            )
        for name, value in (("every", self.every), ("snapshot_steps", self.snapshot_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
        if self.decay is not None:
            self._check_decay(self.decay)
        if self.sigma_rel is not None:
            self._check_power(self.sigma_rel)

    @property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the power functions; none for a constant decay."""
        return tuple(map(gamma_of, self.widths))

    @property
    def widths(self) -> tuple[float, ...]:
        """`sigma_rel` of every profile; none for a constant decay."""
        return () if self.sigma_rel is None else tuple(self.sigma_rel)  # pyright: ignore[reportArgumentType]

    def _check_decay(self, decay: float | int) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay lies in [0, 1), got {decay!r}: 0.999 keeps 99.9 % of the average at each update."
            )
        if self.snapshot_steps is not None:
            raise ValueError(
                "snapshot_steps is for power functions, from which other averages can be made afterwards; "
                "give sigma_rel=(0.05, 0.1) in place of a decay."
            )

    def _check_power(self, given: float | Sequence[float]) -> None:
        if self.warmup:
            raise ValueError(
                "warmup is for a constant decay: power functions forget the start by themselves."
            )
        widths = tuple(map(float, given)) if isinstance(given, Sequence) else (float(given),)
        if not widths or len(set(widths)) < len(widths):
            raise ValueError(f"sigma_rel is one width or several different ones, got {given!r}.")
        for width in widths:
            gamma_of(width)
        object.__setattr__(self, "sigma_rel", widths)
        over = (self.snapshot_steps or 0) % self.every
        if self.snapshot_steps is not None and over:
            near = [n for n in (self.snapshot_steps - over, self.snapshot_steps + self.every - over) if n]
            raise ValueError(
                f"snapshot_steps={self.snapshot_steps} is no multiple of every={self.every}: the average "
                f"would not have moved at some snapshots; {' or '.join(map(str, near))} would do."
            )


def gamma_of(sigma_rel: float) -> float:
    r"""The exponent of the power function of a width.

    .. math:: \sigma_\text{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    Args:
        sigma_rel: relative standard deviation, in (0, 0.2887), where gamma is above 0.

    Raises:
        ValueError: for a width out of that range.

    References:
        Karras et al. 2024, eqs. 123 and 126 (a cubic equation, solved here by Newton's method).

    >>> round(gamma_of(0.1), 2)
    6.94
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(
            f"sigma_rel lies in (0, {WIDEST:.4f}), where the upper end is the uniform average, got "
            f"{sigma_rel!r}; 0.05 and 0.1 are usual."
        )
    inverse = sigma_rel**-2
    gamma = math.sqrt(inverse)  # above the root, where the cubic is convex: Newton comes down without a jump
    while True:
        value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
        lower = gamma - value / ((3 * gamma + 14) * gamma + 16 - inverse)
        if not lower < gamma:
            return gamma
        gamma = lower


@final
class Averages:
    """Averages of some parameters, in float32 (float64 for float64), by name.

    Args:
        parameters: the trained parameters by name, on one device.
        ema: which averages.

    Raises:
        ValueError: for no parameters, or parameters on several devices.
        TypeError: for parameters that are not real floating-point numbers.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> averages = Averages({"w": weight}, EMA(0.75))
    >>> with torch.no_grad():
    ...     _ = weight.fill_(4.0)
    >>> averages.update(applied=torch.tensor(1), finite=torch.tensor(True))
    >>> averages.weights()
    {'w': tensor([1.])}
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ema: EMA) -> None:
        if not parameters:
            raise ValueError("there is no parameter to average; check that something has requires_grad=True.")
        devices = {parameter.device for parameter in parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"the averages of one run lie on one device, got parameters on "
                f"{', '.join(sorted(map(str, devices)))}; make one `Averages` for each."
            )
        self.parameters, self.ema = dict(parameters), ema
        copies = max(1, len(ema.widths))
        self.shadows = [{name: _shadow(name, p) for name, p in parameters.items()} for _ in range(copies)]
        device = self.device
        self._exponents = torch.tensor([g + 1 for g in ema.gammas], dtype=torch.float64, device=device)
        self._since = torch.arange(1, ema.every + 1, device=device)

    @property
    def device(self) -> torch.device:
        """Where the averages lie."""
        return next(iter(self.shadows[0].values())).device

    @torch.no_grad()
    def update(self, applied: Int64[Tensor, ""], finite: Bool[Tensor, ""]) -> None:
        """Move the averages, if the last update was applied and is one of every `every`-th.

        Args:
            applied: updates applied so far, the last one included, on the device of the averages.
            finite: whether the last one was applied.
        """
        due = finite & (applied % self.ema.every == 0)  # a share of 0 gives the average back as it is
        shares = torch.where(due, self._shares(applied), 0.0)
        for shadow, share in zip(self.shadows, shares.unbind(), strict=True):
            ours = [_local(tensor) for tensor in shadow.values()]
            live = [_local(p).to(s.dtype) for p, s in zip(self.parameters.values(), ours, strict=True)]
            by_dtype = {torch.float64: share, torch.float32: share.float()}
            each = [by_dtype[tensor.dtype] for tensor in ours]
            torch._foreach_lerp_(ours, live, each)  # pyright: ignore[reportPrivateImportUsage]

    def weights(self, profile: int = 0) -> dict[str, Tensor]:
        """The averages by name: the live tensors, which move on.

        Args:
            profile: which width, counted as in `EMA.sigma_rel`.
        """
        if not 0 <= profile < len(self.shadows):
            raise ValueError(unknown("profile", profile, range(len(self.shadows))))
        return dict(self.shadows[profile])

    def state_dict(self) -> dict[str, Any]:
        """The averages, and what they are, by profile; the tensors are live."""
        widths = self.ema.widths or (None,)
        return {
            str(i): {"sigma_rel": width, "every": self.ema.every, "weights": dict(shadow)}
            for i, (width, shadow) in enumerate(zip(widths, self.shadows, strict=True))
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; a constant decay, its ramp and interval may be other than they were.

        Raises:
            ValueError: for averages of other widths or, with power functions, another interval, and for
                other names, shapes or dtypes. Nothing has moved then.
        """
        own = self.state_dict()
        widths, saved = (
            {key: (one["sigma_rel"], one["sigma_rel"] and one["every"]) for key, one in each.items()}
            for each in (own, state)
        )
        if widths != saved:
            raise ValueError(
                f"the state has averages of (sigma_rel, every) = {list(saved.values())}, and those here are "
                f"{list(widths.values())}, where None is a constant decay; use the EMA it was saved with."
            )
        pairs: list[tuple[Tensor, Tensor]] = []
        for key, one in own.items():
            pairs += _matched(one["weights"], state[key]["weights"])
        for ours, theirs in pairs:
            ours.copy_(theirs)

    def _shares(self, applied: Int64[Tensor, ""]) -> Float64[Tensor, "profiles"]:
        """What the weights of an update count in each average, 1 - beta, if it is one of the `every`-th."""
        ema = self.ema
        if ema.decay is None:
            t = applied.clamp(min=ema.every).double()
            return -torch.expm1(self._exponents * torch.log1p(-ema.every / t))
        if not ema.warmup:
            return applied.new_full((1,), 1 - ema.decay**ema.every, dtype=torch.float64)
        before = (applied - self._since).clamp(min=0).double()
        decays = ((1 + before) / (10 + before)).clamp(max=ema.decay)
        return 1 - decays.prod().reshape(1)


def _shadow(name: str, parameter: nn.Parameter) -> Float[Tensor, "..."]:
    if not parameter.dtype.is_floating_point:
        raise TypeError(f"only floating-point parameters have an average, but {name} is {parameter.dtype}.")
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, for which torch 2.11 has no lerp: averages are elementwise."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _matched(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors of one name; a ValueError unless names, shapes and dtypes are the same."""
    for name in given:
        if name not in own:
            raise ValueError(unknown("averaged parameter", name, own))
    missing = [name for name in own if name not in given]
    if missing:
        raise ValueError(f"the state has no average of {len(missing)} parameters, such as {missing[0]!r}.")
    for name, ours in own.items():
        theirs = given[name]
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ValueError(
                f"the average of {name} in the state is {theirs.dtype} of shape {tuple(theirs.shape)}, and "
                f"the one here is {ours.dtype} of shape {tuple(ours.shape)}; they must be equal."
            )
    return [(ours, given[name]) for name, ours in own.items()]
