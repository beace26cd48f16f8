"""A fake network, and the loop over a scheduler of diffusers: what the tests of this folder share."""

import torch

from gendiff.math import grids

SPACINGS = {"leading": grids.leading, "trailing": grids.trailing, "linspace": grids.linspace}


class Fake:
    """A network that is a fixed function of x and the timestep; where learned, with channels in [-1, 1]."""

    accepts: frozenset[str] = frozenset()

    def __init__(self, learned: bool = False) -> None:
        self.learned = learned

    def __call__(self, x, timestep, cond=None):
        phase = torch.as_tensor(timestep).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 300
        out = torch.sin(1.3 * x + phase) + 0.3 * x.roll(1, -1)
        return torch.cat([out, torch.cos(x - phase)], 1) if self.learned else out


def converted(scheduler, schedule):
    """The scheduler with its float32 table replaced by ours of float64."""
    at_end = scheduler.final_alpha_cumprod if hasattr(scheduler, "final_alpha_cumprod") else None
    scheduler.alphas_cumprod = schedule.log_alpha_bar.exp()
    if at_end is not None and at_end != 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def theirs(scheduler, steps, network, x, **settings):
    """The samples after every step; the noise is that of a generator with seed 1."""
    scheduler.set_timesteps(steps)
    generator, result = torch.Generator().manual_seed(1), []
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, generator=generator, **settings).prev_sample
        result.append(x)
    return result
