"""The cost of an objective on a CPU beside the same lines written by hand, the network left out.

Run it with `python benchmarks/objective.py`; it takes about ten seconds. The times are the least of 40
turns on one thread. `draw` and `score` are timed together, first with the source of randomness that the
hand-written lines use, a `torch.Generator`, then with an `Rng` keyed per sample, whose noise does not depend
on the batch and costs more on a CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from gendiff.denoiser import Denoised
from gendiff.math import LinearBeta, Prediction, Rectified
from gendiff.math.schedules import Schedule
from gendiff.objectives import LogitNormal, MinSNR, Objective
from gendiff.random import Rng, sample_keys

SHAPES = [(128, 1, 8, 8), (16, 4, 64, 64)]
TABLE, EPSILON, FLOW = LinearBeta(), Prediction("epsilon"), Prediction("flow")
ALPHA_BAR = TABLE.log_alpha_bar.exp().float()


def ddpm_by_hand(x0: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
    timestep = torch.randint(0, 1000, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    alpha_bar = ALPHA_BAR[timestep].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    assert x_t.shape == x0.shape
    return (out - eps).square().flatten(1).mean(1).mean()


def min_snr_by_hand(x0: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
    timestep = torch.randint(0, 1000, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    alpha_bar = ALPHA_BAR[timestep]
    alpha, sigma = (v.sqrt().reshape(-1, 1, 1, 1) for v in (alpha_bar, 1 - alpha_bar))
    x_t = alpha * x0 + sigma * eps
    assert x_t.shape == x0.shape
    snr = alpha_bar / (1 - alpha_bar)
    return ((out - eps).square().flatten(1).mean(1) * snr.clamp(max=5.0) / snr).mean()


def flow_by_hand(x0: Tensor, out: Tensor, generator: torch.Generator) -> Tensor:
    t = torch.sigmoid(torch.randn(len(x0), generator=generator)).reshape(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=generator)
    x_t = (1 - t) * x0 + t * eps
    assert x_t.shape == x0.shape
    return (out - (eps - x0)).square().flatten(1).mean(1).mean()


ByHand = Callable[[Tensor, Tensor, torch.Generator], Tensor]
CASES: dict[str, tuple[Objective, Schedule, Prediction, ByHand]] = {
    "DDPM, epsilon": (Objective(), TABLE, EPSILON, ddpm_by_hand),
    "DDPM, epsilon, min-SNR": (Objective(weighting=MinSNR()), TABLE, EPSILON, min_snr_by_hand),
    "flow, logit-normal": (Objective(times=LogitNormal()), Rectified(), FLOW, flow_by_hand),
}


def milliseconds(*calls: Callable[[], object], rounds: int = 40) -> list[float]:
    """The least time of each, taken in turns, so that whatever else the machine does hits all alike."""
    timers = [Timer("call()", globals={"call": call}) for call in calls]
    repeats = [max(1, int(0.005 / timer.timeit(3).mean)) for timer in timers]
    turns = [[t.timeit(n).mean for t, n in zip(timers, repeats, strict=True)] for _ in range(rounds)]
    return [1e3 * min(times) for times in zip(*turns, strict=True)]


def measure(name: str, shape: tuple[int, ...]) -> list[float]:
    """Milliseconds by hand, by an objective with a generator, and by one with an Rng."""
    objective, schedule, prediction, by_hand = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x0, out = (torch.randn(shape, generator=generator) for _ in range(2))
    keys = sample_keys(0, range(len(x0)))
    denoised = Denoised(out, out, out, prediction)  # its pair is not looked at

    def ours(rng: torch.Generator | Rng) -> Tensor:
        return objective.score(denoised, objective.draw(schedule, x0, rng=rng)).mean()

    return milliseconds(
        lambda: by_hand(x0, out, generator), lambda: ours(generator), lambda: ours(Rng.from_keys(keys))
    )


def main() -> None:
    torch.set_num_threads(1)
    print("draw + score, ms                              by hand   objective  ratio  with Rng  ratio")
    for shape in SHAPES:
        for name in CASES:
            hand, ours, keyed = measure(name, shape)
            label = f"{'×'.join(map(str, shape))}  {name}"
            columns = f"{ours:10.3f}  {ours / hand:5.2f}  {keyed:8.3f}  {keyed / hand:5.2f}"
            print(f"{label:44}  {hand:7.3f}  {columns}")


if __name__ == "__main__":
    main()
