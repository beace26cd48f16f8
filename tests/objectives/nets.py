"""What the tests of objectives share: a small network, data, and a law of one time."""

from dataclasses import dataclass

import torch
from torch import nn

from gendiff.objectives import TimeLaw

NAMES = ["x0", "epsilon", "v", "flow", "edm"]


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class At(TimeLaw):
    """Always the same time."""

    t: float

    def quantile(self, u, schedule):
        return torch.full_like(u, self.t)


class Net(nn.Module):
    """A small network in x_t and the timestep, smooth in both."""

    def __init__(self, dtype=torch.float64, channels=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.outer = (
                nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype) for _ in range(2)
            )

    def forward(self, x, timestep, cond):
        phase = torch.sin(timestep.to(x.dtype))[:, None, None, None]
        return self.outer(torch.tanh(self.inner(x) + phase))


def images(randn64, batch=4, dtype=torch.float64):
    return randn64(batch, 2, 6, 6).to(dtype)


def textbook(space, x0, eps, alpha, sigma, sigma_data=0.5):
    """What a network of that kind is to say, as the papers have it."""
    if space == "edm":  # Karras et al. 2022, eq. 8: (y - c_skip·(y + n))/c_out, at noise sigma/alpha
        noise = sigma / alpha
        c_skip = sigma_data**2 / (noise**2 + sigma_data**2)
        c_out = noise * sigma_data / (noise**2 + sigma_data**2) ** 0.5
        return (x0 - c_skip * (x0 + noise * eps)) / c_out
    return {"x0": x0, "epsilon": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[space]
