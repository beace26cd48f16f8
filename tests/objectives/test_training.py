"""Training with an objective ends where the oracle says that it ends."""

import pytest
import torch
from torch import nn

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.math import CosineBeta, GaussianOracle, Rectified
from gendiff.objectives import LogitNormal, MinSNR, Objective, Uniform
from gendiff.random import Rng

LAW = GaussianOracle(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.7], [0.7, 0.6]]))


class MLP(nn.Module):
    """x_t and a few waves of the time, given the steps of the network's own clock, to two numbers."""

    def __init__(self, clock: float):
        super().__init__()
        self.clock = clock
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
            )

    def forward(self, x, timestep, cond):
        angle = (timestep / self.clock)[:, None] * torch.tensor([1.5, 3.0, 6.0])
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))


@pytest.mark.usefixtures("as_users_run")  # 200 steps, ten times as fast
@pytest.mark.parametrize(
    ("schedule", "prediction", "objective"),
    [
        (CosineBeta(), "epsilon", Objective()),
        (CosineBeta(), "v", Objective(weighting=MinSNR())),
        (Rectified(), "flow", Objective(times=LogitNormal())),
    ],
    ids=["epsilon", "v with min-SNR", "flow"],
)
def test_a_trained_network_comes_near_the_least_loss(schedule, prediction, objective):
    net, generator = MLP(clock=1000.0), torch.Generator().manual_seed(0)
    denoiser = Denoiser(net, schedule, prediction)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    x0 = LAW.draw(4000, generator).float()
    test = Objective(times=Uniform(0.1, 0.9)).draw(schedule, x0, rng=Rng(1))
    oracle = OracleDenoiser(LAW, schedule)(test.x_t, test.t)
    least = (oracle.x0 - test.x0).square().mean()

    def surplus() -> float:
        """The loss of x0 above the least one, relative to it: the squared distance from the oracle."""
        with torch.no_grad():
            return ((denoiser(test.x_t, test.t).x0 - oracle.x0).square().mean() / least).item()

    before = surplus()
    for _ in range(200):
        terms = objective(denoiser, LAW.draw(256, generator).float(), rng=generator)
        optimizer.zero_grad()
        terms.mean().backward()
        optimizer.step()
        decay.step()
    assert before > 0.3
    assert surplus() < 0.05
    with torch.no_grad():  # the loss itself, on noise of its own
        terms = Objective(times=Uniform(0.1, 0.9), space="x0")(denoiser, x0, rng=Rng(2))
        exact = LAW.mmse(*schedule.level(terms.t)).mean() / 2
    assert 0.9 < terms.mean() / exact < 1.15
