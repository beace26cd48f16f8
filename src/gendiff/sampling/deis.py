"""DEIS, under the name its users know."""

from dataclasses import dataclass
from typing import ClassVar, final

from gendiff.sampling.exponential import Integral, check_order, lowered, multistep, rising
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Path
from gendiff.sampling.stage import Plan


@final
@dataclass(frozen=True)
class DEIS(LinearSolver):
    r"""Diffusion exponential integrator sampler, log-ρ multistep (Zhang & Chen 2023).

    .. math:: \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}
                                     + \int_{\rho_t}^{\rho_s} P_\epsilon(\log\rho)\,d\rho,
              \qquad \rho = \sigma/\alpha

    Since :math:`\log\rho = -\lambda`, this is `Exponential(order, predict="eps")` with lower orders at the
    end of a short run, and both are computed by the same lines.

    Args:
        order: number of answers the polynomial P goes through, 1 or more; published for 1 to 4.
        lower_order_final: whether the last steps are of order 2 and 1 where there are fewer than 15 in all.

    Raises:
        ValueError: if the order is below 1.

    References:
        Zhang & Chen 2023, *Fast sampling of diffusion models with exponential integrator*, eq. 15.

    >>> DEIS().order, DEIS().start_order
    (2, 2)
    """

    order: int = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    lower_order_final: bool = True
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_order(self, self.order)

    @property
    def start_order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At most 2, since the first step is of order 1."""
        return min(self.order, 2)

    def plan(self, path: Path) -> Plan:
        orders = lowered(rising(path.steps, self.order), self.lower_order_final, False)
        return multistep(path, Integral("eps"), orders)
