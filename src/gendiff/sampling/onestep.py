"""Solvers that need nothing from before: DDPM, DDIM, Euler and Heun."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, final, get_args

from jaxtyping import Float
from torch import Tensor

from gendiff._checks import unknown
from gendiff.denoiser import Denoised
from gendiff.math import ddpm
from gendiff.sampling.solver import Query, Solver, State, required, scalars


class OneStep(Solver):
    """A method of one evaluation a step, at the time the samples are at."""

    evaluations: ClassVar[int] = 1

    @final
    def ask(self, state: State) -> Query | None:
        return None if state.done else Query(state.x, state.t[state.i])

    @final
    def tell(self, state: State, denoised: Denoised, noise: Float[Tensor, "B *dims"] | None = None) -> State:
        return state.advance(self.move(state, denoised, noise))

    @abstractmethod
    def move(self, state: State, denoised: Denoised, noise: Tensor | None) -> Tensor:
        """The samples at the end of the step."""


@final
@dataclass(frozen=True)
class Euler(OneStep):
    r"""Euler's method for the probability-flow ODE :math:`dx = x_0\,d\alpha + \epsilon\,d\sigma`.

    .. math:: x_s = x_t + (\alpha_s - \alpha_t)\,\hat x_0 + (\sigma_s - \sigma_t)\,\hat\epsilon
                  = \alpha_s\,\hat x_0 + \sigma_s\,\hat\epsilon

    The second form, in which it is computed, is DDIM's: the two are one method. With alpha = 1 it is the
    Euler of Karras et al. 2022, with the rectified schedule that of flow matching.

    >>> Euler().order
    1
    """

    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1

    def move(self, state: State, denoised: Denoised, noise: Tensor | None) -> Tensor:
        alpha, sigma = scalars(*state.ends[1])
        return alpha * denoised.x0 + sigma * denoised.eps


@final
@dataclass(frozen=True)
class DDIM(OneStep):
    r"""Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    .. math:: x_s = \alpha_s\,\hat x_0 + \sqrt{\sigma_s^2 - v}\;\hat\epsilon + \sqrt v\,z,
              \qquad v = \eta^2\tilde\beta

    with :math:`\tilde\beta` the variance of q(x_s | x_t, x0). `eta=0` is deterministic, and Euler's method;
    `eta=1` has the law of DDPM with its small variance.

    Args:
        eta: share of the posterior's standard deviation that is fresh noise, in [0, 1].

    >>> DDIM(eta=2.0)
    Traceback (most recent call last):
    ValueError: eta lies in [0, 1] (0 is deterministic, 1 is DDPM), got 2.0.
    """

    eta: float | int = 0.0
    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta lies in [0, 1] (0 is deterministic, 1 is DDPM), got {self.eta}.")

    def needs_noise(self, state: State) -> bool:
        return self.eta > 0 and not _ends_at_data(state)

    def move(self, state: State, denoised: Denoised, noise: Tensor | None) -> Tensor:
        level_t, level_s = state.ends
        variance = self.eta**2 * ddpm.transition(level_t, level_s).variance
        fresh = variance.sqrt()
        kept = (level_s.sigma.square() - variance).clamp(min=0).sqrt()
        alpha, kept, fresh = scalars(level_s.alpha, kept, fresh)
        x = alpha * denoised.x0 + kept * denoised.eps
        return x + fresh * required(noise, self) if self.needs_noise(state) else x


@final
@dataclass(frozen=True)
class DDPM(OneStep):
    r"""Ancestral sampling (Ho et al. 2020, algorithm 2), over any grid and any (alpha, sigma).

    .. math:: x_s = \tilde\mu(\hat x_0, x_t) + \sqrt v\,z,\qquad z = 0 \text{ at the data}

    Its `order` is that of the law it draws from: mean and variance are right to first order in the step.

    Args:
        variance: v of the step: one of the six names of `gendiff.math.ddpm.log_variance`. The learned ones
            read the network's variance channels (`Denoiser(..., learned_variance=True)`).
    """

    variance: ddpm.Variance = "fixed_small"
    order: ClassVar[int] = 1
    start_order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.variance not in get_args(ddpm.Variance):
            raise ValueError(unknown("variance", self.variance, get_args(ddpm.Variance)))

    def needs_noise(self, state: State) -> bool:
        return not _ends_at_data(state)

    def move(self, state: State, denoised: Denoised, noise: Tensor | None) -> Tensor:
        c = ddpm.transition(*state.ends)
        of_x0, of_x_t = scalars(c.x0, c.x_t)
        mean = of_x0 * denoised.x0 + of_x_t * state.x
        if not self.needs_noise(state):
            return mean
        raw = denoised.log_var if self.variance.startswith("learned") else None
        std = (ddpm.log_variance(self.variance, c, mean, raw) / 2).exp()
        return mean + std * required(noise, self)


class _Tried(NamedTuple):
    """What Heun's method knows between its two evaluations: the first answer, and Euler's guess."""

    first: Denoised
    guess: Tensor


@final
@dataclass(frozen=True)
class Heun(Solver):
    r"""Heun's method, the trapezoid rule, for :math:`dx = x_0\,d\alpha + \epsilon\,d\sigma`.

    .. math:: x_s = x_t + (\alpha_s-\alpha_t)\,\tfrac{\hat x_0 + \hat x_0'}2
                        + (\sigma_s-\sigma_t)\,\tfrac{\hat\epsilon + \hat\epsilon'}2

    where the primes are the answers at Euler's guess for x_s. With alpha = 1 this is algorithm 1 of Karras et
    al. 2022, with the rectified schedule Heun's method of flow matching. A step to the data is Euler's, since
    nothing evaluates a network at sigma = 0.

    >>> Heun().order, Heun().evaluations
    (2, 2)
    """

    order: ClassVar[int] = 2
    start_order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def ask(self, state: State) -> Query | None:
        if state.done:
            return None
        if isinstance(state.memory, _Tried):
            return Query(state.memory.guess, state.t[state.i + 1])
        return Query(state.x, state.t[state.i])

    def tell(self, state: State, denoised: Denoised, noise: Float[Tensor, "B *dims"] | None = None) -> State:
        level_t, level_s = state.ends
        if isinstance(state.memory, _Tried):
            first = state.memory.first
            d_alpha, d_sigma = scalars(level_s.alpha - level_t.alpha, level_s.sigma - level_t.sigma)
            slope = d_alpha * (first.x0 + denoised.x0) + d_sigma * (first.eps + denoised.eps)
            return state.advance(state.x + slope / 2)
        alpha, sigma = scalars(*level_s)
        guess = alpha * denoised.x0 + sigma * denoised.eps
        return (
            state.advance(guess) if _ends_at_data(state) else replace(state, memory=_Tried(denoised, guess))
        )


def _ends_at_data(state: State) -> bool:
    """Whether the current step ends at sigma = 0, which on every schedule is t = 0."""
    return bool(state.grid.times[state.i + 1] == 0)
