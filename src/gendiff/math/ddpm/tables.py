"""The tables of a schedule of N betas, all in float64 and all from log ᾱ."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from gendiff.math.ddpm.equations import coefficients
from gendiff.math.numeric import Number
from gendiff.math.tables import TableSchedule, Tabulated


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Tables:
    r"""Every coefficient of a DDPM as a table over its N entries (Ho et al. 2020, eq. 4, 6, 7).

    Entry i is the step from i to i - 1; before entry 0 lies the data, with ᾱ = 1. Float64 until `.to(dtype)`
    casts a copy, which is then right to the last digit of that dtype.

    =================================  ======================================================================
    `betas`, `alphas`                  :math:`\beta_i`, :math:`1 - \beta_i`
    `alpha_bar`, `alpha_bar_prev`      :math:`\bar\alpha_i`, :math:`\bar\alpha_{i-1}`
    `log_alpha_bar`                    :math:`\log\bar\alpha_i`, what everything else is computed from
    `sqrt_alpha_bar`                   signal coefficient alpha of x_t
    `sqrt_one_minus_alpha_bar`         noise coefficient sigma of x_t
    `sqrt_recip_alpha_bar`             :math:`1/\sqrt{\bar\alpha_i}`: x0 from (x_t, eps), eq. 15
    `sqrt_recipm1_alpha_bar`           :math:`\sqrt{1/\bar\alpha_i - 1}`: likewise
    `posterior_mean_coef1`, `…_coef2`  of x0 and of x_t in :math:`\tilde\mu`, eq. 7
    `posterior_variance`               :math:`\tilde\beta_i`, eq. 7
    `posterior_log_variance_clipped`   its logarithm, with entry 1 in the place of entry 0, where it is -inf
    =================================  ======================================================================

    >>> tables = Tables.from_betas([0.1, 0.2])
    >>> tables.alpha_bar
    tensor([0.9000, 0.7200], dtype=torch.float64)
    """

    betas: Float[Tensor, "N"]
    alphas: Float[Tensor, "N"]
    alpha_bar: Float[Tensor, "N"]
    alpha_bar_prev: Float[Tensor, "N"]
    log_alpha_bar: Float[Tensor, "N"]
    sqrt_alpha_bar: Float[Tensor, "N"]
    sqrt_one_minus_alpha_bar: Float[Tensor, "N"]
    sqrt_recip_alpha_bar: Float[Tensor, "N"]
    sqrt_recipm1_alpha_bar: Float[Tensor, "N"]
    posterior_mean_coef1: Float[Tensor, "N"]
    posterior_mean_coef2: Float[Tensor, "N"]
    posterior_variance: Float[Tensor, "N"]
    posterior_log_variance_clipped: Float[Tensor, "N"]

    @classmethod
    def from_betas(cls, betas: Sequence[Number] | Float[Tensor, "N"]) -> "Tables":
        """The tables of a list of betas in (0, 1), the last of which may be 1."""
        return cls.from_schedule(Tabulated(betas))

    @classmethod
    def from_schedule(cls, schedule: TableSchedule) -> "Tables":
        """The tables of a schedule that is a table."""
        log_bar = schedule.log_alpha_bar
        log_prev = torch.cat([log_bar.new_zeros(1), log_bar[:-1]])
        c = coefficients(log_bar, log_prev)
        second = c.variance[min(1, len(log_bar) - 1)]
        clipped = torch.cat([second[None], c.variance[1:]]).log()
        return cls(
            betas=-torch.expm1(schedule.log_alphas),
            alphas=schedule.log_alphas.exp(),
            alpha_bar=log_bar.exp(),
            alpha_bar_prev=log_prev.exp(),
            log_alpha_bar=log_bar,
            sqrt_alpha_bar=(log_bar / 2).exp(),
            sqrt_one_minus_alpha_bar=(-torch.expm1(log_bar)).sqrt(),
            sqrt_recip_alpha_bar=(-log_bar / 2).exp(),
            sqrt_recipm1_alpha_bar=torch.expm1(-log_bar).sqrt(),
            posterior_mean_coef1=c.x0,
            posterior_mean_coef2=c.x_t,
            posterior_variance=c.variance,
            posterior_log_variance_clipped=clipped,
        )

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Tables":
        """A copy in another dtype or on another device; rounded once, from float64."""
        moved = {f.name: getattr(self, f.name).to(device=device, dtype=dtype) for f in fields(self)}
        return Tables(**moved)

    def __len__(self) -> int:
        return len(self.betas)
