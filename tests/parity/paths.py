"""Paths made of the tables of diffusers' schedulers, and a plan followed by hand: what parity tests share."""

import math

import numpy as np
import torch

from gendiff.sampling import Path, Point
from gendiff.sampling.stage import combined
from tests.parity.schedulers import Fake


def sigma_path(scheduler) -> Path:
    """The path in the coordinates of k-diffusion, alpha = 1, with timesteps for times.

    Tables that hold every sigma twice, with or without a level between, are thinned to the sigmas of steps.
    """
    sigmas, timesteps = scheduler.sigmas.double(), scheduler.timesteps.double()
    if scheduler.order == 2:
        sigmas, timesteps = sigmas[[0, *range(1, len(sigmas), 2)]], timesteps[::2]
        if not hasattr(scheduler, "sigmas_interpol"):
            timesteps = scheduler.timesteps.double()[[0, *range(1, len(scheduler.timesteps), 2)]]
    sigmas = sigmas[: len(timesteps) + 1].tolist()
    times = [*timesteps.tolist(), -1.0]
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().log().numpy()

    def between(log_ratio):
        sigma = math.exp(-log_ratio)
        return Point(float(np.interp(-log_ratio, table, np.arange(len(table)))), 1.0, sigma)

    return Path(tuple(map(Point, times, [1.0] * len(times), sigmas)), between)


def sigma_network(prediction="epsilon"):
    """The pair of a network that is given x / sqrt(sigma² + 1)."""
    fake = Fake()

    def answer(x, at):
        out, root = fake(x / math.hypot(at.sigma, 1), torch.tensor(at.t)), math.hypot(at.sigma, 1)
        x0 = {"epsilon": x - at.sigma * out, "v_prediction": x / root**2 - at.sigma / root * out}[prediction]
        return x0, (x - x0) / at.sigma

    return answer


def table_path(scheduler, timesteps, end) -> Path:
    """The path over a table of ᾱ with timesteps for times, to a final ᾱ."""
    bar = scheduler.alphas_cumprod.double()
    log_ratios = (bar / (1 - bar)).log() / 2
    falling = -log_ratios.numpy()

    def point(t, alpha_bar):
        return Point(float(t), math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    def between(log_ratio):
        alpha_bar = 1 / (1 + math.exp(-2 * log_ratio))
        return point(np.interp(-log_ratio, falling, np.arange(len(falling))), alpha_bar)

    points = [point(t, bar[int(t)].item()) for t in timesteps]
    return Path((*points, point(-1, float(end))), between)


def table_network(prediction="epsilon"):
    """The pair of a network that is given x as it is."""
    fake = Fake()

    def answer(x, at):
        out = fake(x, torch.tensor(at.t))
        if prediction == "epsilon":
            return (x - at.sigma * out) / at.alpha, out
        return at.alpha * x - at.sigma * out, at.alpha * out + at.sigma * x

    return answer


def follow(solver, path, x, network, draw=None) -> list[torch.Tensor]:
    """The samples after every step of a solver's plan."""
    result, memory = [], {}
    for stages in solver.plan(path):
        for stage in stages:
            registers = {"x": x, **memory}
            if stage.noisy:
                registers["noise"] = draw(x)
            x0, eps = network(combined(stage.query, registers), stage.at)
            registers |= {"x0": x0, "eps": eps}
            x = combined(stage.x, registers)
            memory = {name: combined(kept, registers) for name, kept in stage.keep.items()}
        result.append(x)
    return result


def generator_noise(seed=1):
    """The noise that a scheduler draws from a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def sigma_steps(scheduler, steps, x, prediction="epsilon"):
    """The samples of a scheduler in k-diffusion's coordinates after every call of `step`."""
    fake, result = Fake(), []
    kwargs = {}
    if "generator" in scheduler.step.__code__.co_varnames:
        kwargs["generator"] = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        out = fake(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **kwargs).prev_sample
        result.append(x)
    return result


def close(mine, other, tolerance=1e-5) -> None:
    """Relative to the largest value."""
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)
