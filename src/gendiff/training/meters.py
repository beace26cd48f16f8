"""Meters: what a run is told of its losses, summed on the device and read when a line is logged."""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EDGES = tuple(range(-10, 11))  # of log-SNR; with the two open ends these are 22 levels
Reduce = Callable[[Tensor], Tensor]


@final
class Meters:
    """Sums over the samples and updates since the last reading; nothing of it synchronises but `read`.

    Args:
        device: where the sums lie.

    >>> meters = Meters("cpu")
    >>> meters.add({"loss": torch.tensor([1.0, 3.0]), "weight": torch.tensor([1.0, 0.5])}, rows=2)
    >>> meters.read(samples=2, updates=0)["loss"]
    1.25
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.edges = torch.tensor(EDGES, dtype=torch.float64, device=self.device)
        self.levels = torch.arange(len(EDGES) + 1, device=self.device)
        self.sums: dict[str, Tensor] = {}

    def add(self, seen: Mapping[str, Tensor], rows: int) -> None:
        """Add the first `rows` samples of what `LossModule` has seen; with none, every sum is there still."""
        seen = {name: value.detach()[:rows].double() for name, value in seen.items()}
        self._sum("loss", torch.where(seen["weight"] == 0, 0.0, seen["weight"] * seen["loss"]).sum())
        for name, value in seen.items():
            if name.startswith("metrics."):
                self._sum(name, value.sum())
        if "log_snr" in seen:
            # A product with a table of ones: summing by index would depend on the order of threads.
            level = torch.bucketize(seen["log_snr"], self.edges, right=True)
            member = (level[:, None] == self.levels).double()
            self._sum("levels.count", member.sum(0))
            self._sum("levels.loss", torch.where(member > 0, seen["loss"][:, None], 0.0).sum(0))

    def add_update(self, norm: Float[Tensor, ""], finite: Bool[Tensor, ""]) -> None:
        """Add the norm of an update's gradient, if it was finite and so applied."""
        self._sum("norm", torch.where(finite, norm.double(), 0.0))

    def read(self, samples: int, updates: int, reduce: Reduce | None = None) -> dict[str, Any]:
        """The means since the last reading, as numbers of the host; the sums begin anew.

        Args:
            samples: real samples on all processes since then.
            updates: updates applied since then.
            reduce: sums a tensor over the processes; the norm is the same on all of them.

        Returns:
            `loss`, the mean of weight·loss; `grad_norm`, the mean norm before clipping; `metrics`; and
            `levels`, the sum of the unweighted losses and the number of samples by log-SNR.
        """
        sums = {name: self._reduced(name, reduce).to("cpu", copy=True) for name in sorted(self.sums)}
        self.clear()
        row: dict[str, Any] = {}
        if "loss" in sums and samples:
            row["loss"] = float(sums["loss"]) / samples
        if "norm" in sums and updates:
            row["grad_norm"] = float(sums["norm"]) / updates
        metrics = {n.removeprefix("metrics."): float(v) for n, v in sums.items() if n.startswith("metrics.")}
        if metrics and samples:
            row["metrics"] = {name: value / samples for name, value in metrics.items()}
        if "levels.count" in sums:
            row["levels"] = {
                "loss": sums["levels.loss"].tolist(),
                "count": [int(n) for n in sums["levels.count"].tolist()],
            }
        return row

    def clear(self) -> None:
        """Begin anew."""
        for value in self.sums.values():  # in place: a captured step goes on writing to the same memory
            value.zero_()

    def gather(self, reduce: Reduce, keep: bool) -> None:
        """Bring the sums of all processes to the one that is to keep them; the others begin anew."""
        sums = {name: self._reduced(name, reduce) for name in sorted(self.sums)}
        self.clear()
        for name, value in sums.items() if keep else ():
            self.sums[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.clear()
        for name, value in state.items():
            self._sum(name, value.to(self.device))

    def _reduced(self, name: str, reduce: Reduce | None) -> Tensor:
        """A sum over the processes; the norm of a gradient is the same on all of them."""
        return self.sums[name] if reduce is None or name == "norm" else reduce(self.sums[name])

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value.clone()
