r"""The update of the weights, decided on the device: clipped, gated, counted, without the host.

Whether an update is applied is a tensor. Parameters, moments, learning rate, averages and counters all move
by it, so that nothing can move alone, and a step can be captured in a CUDA graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from gendiff.training.ema import Averages
from gendiff.training.optimizer import load_named_state, named_state


@final
class LossScaler:
    """The factor of the loss under fp16, whose gradients would underflow without it.

    An update with an overflow is skipped and halves the factor; `interval` applied ones in a row double it.

    Args:
        device: of the factor.
        scale: at the start, > 0.
        interval: applied updates in a row after which it doubles.

    References:
        Micikevicius et al. 2018, *Mixed precision training*, section 3.2.

    >>> scaler = LossScaler("cpu", scale=4.0)
    >>> scaler.update(torch.tensor(False)); scaler.scale
    tensor(2.)
    """

    def __init__(self, device: torch.device | str, scale: float = 2.0**16, interval: int = 2000) -> None:
        if not scale > 0 or interval < 1:
            raise ValueError(f"scale is positive and interval at least 1, got {scale} and {interval}.")
        self.interval = interval
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.streak = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Bool[Tensor, ""]) -> None:
        """Adapt to whether the last gradient was finite."""
        self.streak.copy_(torch.where(finite, self.streak + 1, 0))
        grown = self.streak >= self.interval
        self.scale.mul_(torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)).clamp_(2.0**-24, 2.0**48)
        self.streak.masked_fill_(grown, 0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "streak": self.streak}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.streak.copy_(state["streak"])


@final
class Update:
    r"""One update of the weights from their gradients.

    .. math:: g \leftarrow \frac{g}{s}\min\Big(1, \frac{c}{\lVert g/s\rVert}\Big),\qquad
              \text{applied} \leftarrow \text{applied} + [\,\lVert g\rVert < \infty\,]

    with the scaler's factor s and the norm c over all parameters together. Where the norm is not finite,
    weights, moments, averages, the learning rate and the count stay as they are, bit for bit; only the
    scaler moves.

    torch's fused optimizers are gated on the device. Any other optimizer is stepped by the host, which reads
    one flag at each update (`gate` is then "host").

    Args:
        parameters: what the optimizer has, by name; float32 or float64.
        optimizer: the optimizer.
        rates: learning rates of update 0, 1, …, one row a group of the optimizer; the last one stays.
        max_norm: the norm c to clip at, or None.
        scaler: the loss scaler, or None.
        averages: averages of the weights, or None.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> update = Update({"w": weight}, torch.optim.SGD([weight], fused=True), [[0.5, 0.25]])
    >>> for gradient in (1.0, float("nan"), 1.0):
    ...     weight.grad = torch.full((1,), gradient)
    ...     update()
    >>> weight.item(), update.applied.item()
    (0.25, 2)
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        rates: Sequence[Sequence[float]],
        *,
        max_norm: float | None = None,
        scaler: LossScaler | None = None,
        averages: Averages | None = None,
    ) -> None:
        assert_full_precision(parameters)
        if len(rates) != len(optimizer.param_groups):
            raise ValueError(
                f"one row of learning rates a group of the optimizer, got {len(rates)} rows for "
                f"{len(optimizer.param_groups)} groups."
            )
        self.parameters, self.optimizer, self.max_norm = dict(parameters), optimizer, max_norm
        self.scaler, self.averages = scaler, averages
        device = next(iter(self.parameters.values())).device
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.applied = torch.zeros((), dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.norm = torch.zeros((), dtype=torch.float32, device=device)
        self.learning_rates = torch.zeros(len(rates), dtype=torch.float32, device=device)
        self.gate = "device" if getattr(optimizer, "_step_supports_amp_scaling", False) else "host"
        self.link()

    def link(self) -> None:
        """Make the groups of the optimizer read the learning rate that is decided here."""
        self.learning_rates.copy_(self._due())
        if self.gate == "device":
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = rate  # a view: the optimizer reads what is written to the buffer

    def __call__(self) -> None:
        """Apply the gradients, if they are finite, and drop them."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        inverse = torch.ones_like(norm) if self.scaler is None else 1 / self.scaler.scale
        norm = norm * inverse
        self.norm.copy_(norm)
        self.finite.copy_(torch.isfinite(norm))
        if self.max_norm is not None:
            inverse = inverse * (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.max_norm is not None or self.scaler is not None:
            torch._foreach_mul_(gradients, inverse)  # pyright: ignore[reportPrivateImportUsage]
        self.learning_rates.copy_(torch.where(self.finite, self._due().float(), self.learning_rates))
        (self._gated if self.gate == "device" else self._by_host)()
        self.optimizer.zero_grad(set_to_none=True)
        self.applied.add_(self.finite)
        if self.averages is not None:
            self.averages.update(self.applied, self.finite)
        if self.scaler is not None:
            self.scaler.update(self.finite)

    def rates_of(self, number: int) -> list[float]:
        """The learning rates of update `number`, from 0, one a group."""
        return self.rates[:, min(number, self.rates.shape[1] - 1)].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves with an update but the weights; by the names of the parameters."""
        return {
            "applied": self.applied,
            "optimizer": named_state(self.optimizer, self.parameters),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "averages": None if self.averages is None else self.averages.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the parts that it has must be the parts that are here."""
        for name in ("scaler", "averages"):
            mine, theirs = getattr(self, name), state[name]
            if (mine is None) != (theirs is None):
                raise ValueError(
                    f"the {name} is {'absent here' if mine is None else 'on here'} but "
                    f"{'absent' if theirs is None else 'present'} in the state; use the settings of the run "
                    f"that wrote it."
                )
            if mine is not None:
                mine.load_state_dict(theirs)
        load_named_state(self.optimizer, self.parameters, state["optimizer"])
        self.applied.copy_(state["applied"])
        assert_full_precision(self.parameters)
        self.link()

    def _due(self) -> Float64[Tensor, "G"]:
        """The learning rates of the next update."""
        last = self.rates.shape[1] - 1
        return self.rates.index_select(1, self.applied.clamp(max=last).reshape(1)).squeeze(1)

    def _gated(self) -> None:
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, (~self.finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def _by_host(self) -> None:
        if not self.finite:
            return
        for group, rate in zip(self.optimizer.param_groups, self._due().tolist(), strict=True):
            group["lr"] = rate
        self.optimizer.step()


def assert_full_precision(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise a TypeError that names the parameters which are not float32 or float64."""
    low = [name for name, p in parameters.items() if p.dtype not in (torch.float32, torch.float64)]
    if low:
        raise TypeError(
            f"trained weights are float32 (small updates vanish in 16 bits), but {len(low)} are not, such as "
            f"{low[0]} in {parameters[low[0]].dtype}; raise them with .float()."
        )
