"""The module whose forward is `compute_loss`: the one thing that a distributed wrapper goes round."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gendiff.objectives import LossTerms
from gendiff.random import Rng

Loss = LossTerms | Tensor
Seen = dict[str, Tensor]


@final
class LossModule(nn.Module):
    """Samples and their keys to the sum of their weighted losses.

    A model that lies in several places, such as in a denoiser, a pipeline and here, is one set of live
    weights: nothing but this module is ever wrapped.

    Args:
        components: the trained modules by name.
        compute_loss: `(batch, rng) -> LossTerms | [B] | scalar`.
        autocast: makes the context that the forward pass runs in.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        compute_loss: Callable[[Mapping[str, Any], Rng], Loss],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.components = nn.ModuleDict(components)
        self.compute_loss, self.autocast = compute_loss, autocast

    def forward(self, batch: Mapping[str, Any], keys: Int64[Tensor, "B"]) -> tuple[Tensor, Seen]:
        """(Σ weight·loss, what the meters are shown) of a batch; the sum is float32 or wider."""
        with self.autocast():
            loss = self.compute_loss(batch, Rng.from_keys(keys))
        return weighted(loss, batch)


def weighted(loss: Loss, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], Seen]:
    """The sum over the samples of weight·loss, and detached facts for the meters.

    A sample's weight is that of the loss times that of the dataset. A scalar stands for the mean over the
    batch and counts once a sample.

    >>> batch = {"id": [0, 1], "weight": torch.tensor([1.0, 3.0])}
    >>> total, seen = weighted(torch.tensor([1.0, 2.0], requires_grad=True), batch)
    >>> total.item()
    7.0
    """
    own = batch["weight"]
    if isinstance(loss, LossTerms):
        values, weight, t, log_snr, metrics = loss.loss, loss.weight, loss.t, loss.log_snr, loss.metrics
    elif isinstance(loss, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  (users' own)
        values, weight, t, log_snr, metrics = loss, None, None, None, {}
    else:
        raise TypeError(
            f"compute_loss returns LossTerms, a tensor of one loss a sample, or a scalar tensor; got "
            f"{type(loss).__name__}."
        )
    if values.ndim == 0:
        values = values.expand(len(own))
    if values.shape != own.shape:
        raise ValueError(
            f"compute_loss returned losses of shape {tuple(values.shape)} for {len(own)} samples; give one "
            f"a sample, [{len(own)}], such as error.flatten(1).mean(1), or a scalar that is their mean."
        )
    if not values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the loss does not depend on any trained parameter: it has no gradient; was it computed under "
            "torch.no_grad(), or detached?"
        )
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    weight = own.to(values.dtype) if weight is None else own.to(values.dtype) * weight
    # Not weight·loss where the weight is 0: a padded sample with a NaN must count for nothing.
    counted = torch.where(weight == 0, torch.zeros_like(values), weight * values)
    seen = {"loss": values.detach(), "weight": weight.detach()}
    if log_snr is not None:
        seen["log_snr"] = log_snr.detach()
    elif t is not None:
        seen["t"] = t.detach()
    seen |= {f"metrics.{name}": value.detach() for name, value in metrics.items()}
    return counted.sum(), seen


def trimmed(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of every value of a batch."""
    return {k: trimmed(v, rows) if isinstance(v, Mapping) else v[:rows] for k, v in batch.items()}


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device, without blocking the host."""

    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: move(v) for k, v in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return move(batch)
