r"""What a network is trained to predict, as one table of pairs in place of converters between every two.

A network output is read as :math:`\text{out} = p\,x_0 + q\,\epsilon`. With
:math:`x_t = \alpha x_0 + \sigma\epsilon` these are two equations in two unknowns, whose determinant is
:math:`D = \alpha q - \sigma p`:

.. math:: x_0 = (q\,x_t - \sigma\,\text{out})/D, \qquad \epsilon = (\alpha\,\text{out} - p\,x_t)/D

An error e of the output is therefore an error (sigma/D)·e of x0 and (alpha/D)·e of eps, which gives every
loss weighting a common currency (`gendiff.objectives`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import same_shape, unknown, working_dtype
from gendiff.math.numeric import Number, numbers
from gendiff.math.schedules import Level, Schedule

Name = Literal["x0", "epsilon", "v", "flow", "edm"]
Pair = tuple[Tensor, Tensor]


class Coefficients(NamedTuple):
    """What x0 and eps are made of: x_t and the output, each times one of these."""

    x0_of_x_t: Tensor
    x0_of_out: Tensor
    eps_of_x_t: Tensor
    eps_of_out: Tensor


_PAIRS: dict[str, Callable[[Tensor, Tensor, Number], Pair]] = {
    "x0": lambda alpha, sigma, data: (torch.ones_like(alpha), torch.zeros_like(sigma)),
    "epsilon": lambda alpha, sigma, data: (torch.zeros_like(alpha), torch.ones_like(sigma)),
    "v": lambda alpha, sigma, data: (-sigma, alpha),
    "flow": lambda alpha, sigma, data: (-torch.ones_like(alpha), torch.ones_like(sigma)),
    "edm": lambda alpha, sigma, data: (
        sigma / (data * torch.hypot(data * alpha, sigma)),
        -alpha * data / torch.hypot(data * alpha, sigma),
    ),
}


@final
@dataclass(frozen=True)
class Prediction:
    r"""One row of the table: what `out` is made of, at any level.

    ========  =====================  =====================  ================================================
    name      p                      q                      published as
    ========  =====================  =====================  ================================================
    x0        1                      0                      `sample`
    epsilon   0                      1                      Ho et al. 2020, eq. 12
    v         -sigma                 alpha                  Salimans & Ho 2022, appendix D
    flow      -1                     1                      Liu et al. 2023, eq. 1 (eps - x0)
    edm       :math:`\sigma/(s S)`   :math:`-\alpha s/S`    Karras et al. 2022, eq. 7, table 1
    ========  =====================  =====================  ================================================

    with :math:`s` the standard deviation of the data and :math:`S = \sqrt{s^2\alpha^2 + \sigma^2}`; `edm`
    also divides the input of the network by S, so that it has unit variance, and for any alpha, not only for
    alpha = 1.

    Args:
        name: a row of the table.
        sign: -1 for a network that predicts the negative of the row, as some families do.
        sigma_data: standard deviation s of the data, read by `edm` only.

    >>> level = Level(torch.tensor(0.8), torch.tensor(0.6))
    >>> Prediction("v").pair(level)
    (tensor(-0.6000), tensor(0.8000))
    """

    name: Name
    sign: Literal[1, -1] = 1
    sigma_data: Number = 0.5

    def __post_init__(self) -> None:
        if self.name not in _PAIRS:
            raise ValueError(unknown("prediction", self.name, get_args(Name)))
        if self.sign not in (1, -1):
            raise ValueError(f"the sign of a prediction is 1 or -1, got {self.sign!r}.")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {self.sigma_data!r}.")

    @classmethod
    def of(cls, prediction: "Prediction | Name") -> "Prediction":
        """The prediction itself, or the one of that name."""
        return prediction if isinstance(prediction, cls) else cls(prediction)  # pyright: ignore[reportArgumentType]

    def pair(self, level: Level) -> Pair:
        """(p, q) at a level, in the shape and dtype of the level."""
        p, q = _PAIRS[self.name](level.alpha, level.sigma, self.sigma_data)
        return self.sign * p, self.sign * q

    def determinant(self, level: Level) -> Tensor:
        """D = alpha·q - sigma·p; zero where the output does not determine x0 and eps."""
        p, q = self.pair(level)
        return level.alpha * q - level.sigma * p

    def input_scale(self, level: Level) -> Tensor | None:
        """What x_t is multiplied by before the network sees it (c_in); None where that is nothing."""
        if self.name != "edm":
            return None
        return 1 / torch.hypot(self.sigma_data * level.alpha, level.sigma)

    def output(
        self, x0: Float[Tensor, "B *dims"], eps: Float[Tensor, "B *dims"], level: Level
    ) -> Float[Tensor, "B *dims"]:
        """The network output that stands for (x0, eps): p·x0 + q·eps, which is the target of training."""
        same_shape(x0=x0, eps=eps)
        dtype = working_dtype(x0, eps)
        p, q = Level(*self.pair(level)).like(x0, dtype)
        return p * x0.to(dtype) + q * eps.to(dtype)

    def solve(
        self, out: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"], level: Level
    ) -> tuple[Float[Tensor, "B *dims"], Float[Tensor, "B *dims"]]:
        """The pair (x0, eps) that a network output stands for at x_t.

        The coefficients are divided by D in the precision of the level, before they are cast to that of x_t.
        On a CPU a D of zero is a ValueError.

        >>> level = Level(torch.tensor(0.8), torch.tensor(0.6))
        >>> x0, eps = Prediction("flow").solve(torch.tensor([[2.0]]), torch.tensor([[1.0]]), level)
        >>> 0.8 * x0 + 0.6 * eps, eps - x0
        (tensor([[1.]]), tensor([[2.0000]]))
        """
        return applied(self.coefficients(level), out, x_t)

    def coefficients(self, level: Level) -> "Coefficients":
        """What `solve` multiplies by, in the precision of the level."""
        (p, q), determinant = self.pair(level), self.determinant(level)
        if determinant.device.type == "cpu" and bool((determinant == 0).any()):
            raise ValueError(
                f"{self.name} prediction does not determine x0 and eps where alpha = {numbers(level.alpha)} "
                f"and sigma = {numbers(level.sigma)}: one of them enters neither x_t nor the output there."
            )
        return Coefficients(
            q / determinant, -level.sigma / determinant, -p / determinant, level.alpha / determinant
        )

    def check(self, schedule: Schedule) -> None:
        """Raise a ValueError if the output does not determine x0 at t = 1, the noisiest level."""
        if self.determinant(schedule.level(1.0)) == 0:
            raise ValueError(
                f"{self.name} prediction cannot be used with {schedule!r}: at t = 1 alpha is 0, so the noise "
                f"says nothing of the data. Use 'v' or 'flow' prediction, or a schedule whose terminal SNR "
                f"is not zero."
            )


def applied(
    coefficients: "Coefficients", out: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"]
) -> tuple[Float[Tensor, "B *dims"], Float[Tensor, "B *dims"]]:
    """The pair (x0, eps) of an output and x_t."""
    same_shape(out=out, x_t=x_t)
    of_x_t, of_out = Level(*coefficients[:2]).like(x_t, x_t.dtype)
    x0 = of_x_t * x_t + of_out * out
    of_x_t, of_out = Level(*coefficients[2:]).like(x_t, x_t.dtype)
    return x0, of_x_t * x_t + of_out * out
