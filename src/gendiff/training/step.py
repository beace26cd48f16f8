"""One micro-step and the update that closes a window, on tensors alone: what an engine runs or captures."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from gendiff._philox import hash64
from gendiff.training.meters import Meters
from gendiff.training.update import Update


@final
class Step:
    r"""Forward, backward, clip, optimizer, averages and meters, with no decision of the host in between.

    .. math:: g = \frac1N \sum_i w_i \nabla \ell_i

    over the N real samples of a window on all processes. With the batch, its keys and N in static buffers, a
    call of `micro` and one of `close` can be captured in a CUDA graph and replayed with new ones.

    Args:
        losses: `(batch, keys) -> (Σ w·l, what the meters are shown)`: a `LossModule`, or its wrapper.
        update: what applies the gradient.
        meters: what is shown the losses.
        processes: whose gradients a wrapper averages; 1 without one.
    """

    def __init__(self, losses: nn.Module, update: Update, meters: Meters, processes: int = 1) -> None:
        self.losses, self.update, self.meters, self.processes = losses, update, meters, processes

    def micro(
        self, batch: Mapping[str, Any], keys: Int64[Tensor, "B"], samples: int | Tensor, rows: int
    ) -> None:
        """Add the gradient of a micro-batch.

        Args:
            batch: on the device, with `weight` [B], 0 for padding.
            keys: of the samples, on the device.
            samples: N, the real samples of the window on all processes.
            rows: the real samples of this batch, which come first.
        """
        total, seen = self.losses(batch, keys)
        scale = 1.0 if self.update.scaler is None else self.update.scaler.scale
        (total * (scale * self.processes / samples)).backward()
        self.meters.add(seen, rows)

    def close(self) -> None:
        """Apply the gradient of the window, if it is finite."""
        self.update()
        self.meters.add_update(self.update.norm, self.update.finite)


def reseed(device: torch.device, *where: int) -> None:
    """Seed torch's own generators, which dropout draws from, by a number that is a function of the place.

    The generators are those of the host and of this device. After a resume, dropout is then what it would
    have been.
    """
    seed = hash64("dropout " + " ".join(map(str, where)))
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
