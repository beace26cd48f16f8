"""The likelihood by the probability-flow ODE: against exact laws, exact flows, the integral of a density."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import CosineBeta, LinearBeta, Rectified, VarianceExploding, ZeroTerminalSNR, grids
from gendiff.math.gaussians import GaussianOracle, MixtureOracle
from gendiff.random import Rng
from gendiff.sampling.divergence import Exact, Hutchinson
from gendiff.sampling.likelihood import angle_grid, log_likelihood


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


LINE = GaussianOracle.isotropic(tensor([0.3]), 0.7)
PLANE = GaussianOracle(tensor([0.5, -0.25]), tensor([[1.0, 0.6], [0.6, 0.8]]))
MIXTURE = MixtureOracle(
    tensor([0.5, 0.2, 0.3]), tensor([[-1.2], [0.1], [1.5]]), tensor([0.16, 0.09, 0.49])[:, None, None]
)
LAWS = pytest.mark.parametrize("law", [LINE, PLANE, MIXTURE], ids=["line", "plane", "mixture"])
STRAIGHT, BETAS = Rectified(), LinearBeta()
SCHEDULES = pytest.mark.parametrize(
    ("schedule", "start"),
    [(BETAS, 1e-3), (ZeroTerminalSNR(BETAS), 1e-3), (STRAIGHT, 1e-3), (VarianceExploding(), 1e-3)],
    ids=["betas", "zero-terminal", "rectified", "exploding"],
)


def points(law, count: int = 8) -> torch.Tensor:
    return law.draw(count, torch.Generator().manual_seed(0))


def ratio(schedule, t: float) -> float:
    alpha, sigma = schedule.level(t)
    return float(sigma / alpha)


def misfit_of_the_prior(law, x, schedule, start: float) -> torch.Tensor:
    """What the unit Gaussian at t = 1 is off from the law there, at the ends of the exact trajectories."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = schedule.level(start), schedule.level(1.0)
    ends = law.flow(alpha_0 * x, alpha_0, sigma_0, alpha_1, sigma_1)
    prior = torch.distributions.Normal(0.0, sigma_1).log_prob(ends).sum(1)
    return prior - law.log_prob(ends, alpha_1, sigma_1)


# --- against exact laws


@LAWS
@SCHEDULES
def test_the_likelihood_is_that_of_the_law_at_the_start(law, schedule, start) -> None:
    """Up to the prior, which is exact where alpha(1) is 0, and the steps, which here leave 1e-4."""
    x = points(law)
    got = log_likelihood(
        OracleDenoiser(law, schedule), x, angle_grid(schedule, 16, start), divergence=Exact()
    )
    at_start = law.log_prob(x, 1.0, ratio(schedule, start))
    prior = misfit_of_the_prior(law, x, schedule, start)
    torch.testing.assert_close(got.log_prob, at_start + prior, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        got.log_prob, at_start, rtol=0, atol=0.02 if prior.abs().max() > 1e-9 else 1e-4
    )
    assert (at_start - law.log_prob(x)).abs().max() < 4e-3
    (alpha_0, sigma_0), (alpha_1, sigma_1) = schedule.level(start), schedule.level(1.0)
    ends = law.flow(alpha_0 * x, alpha_0, sigma_0, alpha_1, sigma_1)
    torch.testing.assert_close(got.noise / sigma_1, ends / sigma_1, rtol=0, atol=1e-4)


def test_the_law_at_the_end_has_the_spread_that_sampling_starts_from() -> None:
    """Which shows on a schedule that ends short of pure noise: sigma(1) is 2, and 0.7 on the other."""
    for schedule in (VarianceExploding(0.01, 2.0), LinearBeta(0.02, 0.05, size=20)):
        start, x = 2 * schedule.t_min, points(LINE)
        got = log_likelihood(
            OracleDenoiser(LINE, schedule), x, angle_grid(schedule, 16, start), divergence=Exact()
        )
        expected = LINE.log_prob(x, 1.0, ratio(schedule, start))
        prior = misfit_of_the_prior(LINE, x, schedule, start)
        torch.testing.assert_close(got.log_prob, expected + prior, rtol=0, atol=1e-5)
        assert prior.abs().max() > 0.05


@LAWS
@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("make", ["angle", "uniform"])
def test_the_order_of_the_methods(law, method, order, make) -> None:
    """Also on a table, whose level has a kink at every entry: the angle does not see it."""
    schedule = STRAIGHT if make == "angle" else CosineBeta(size=20)
    x, start, errors = points(law), 0.05, []
    exact = law.log_prob(x, 1.0, ratio(schedule, start)) + misfit_of_the_prior(law, x, schedule, start)
    for steps in (16, 32):
        equal = grids.uniform(schedule, steps, end=start)
        grid = angle_grid(schedule, steps, start) if make == "angle" else equal
        got = log_likelihood(OracleDenoiser(law, schedule), x, grid, divergence=Exact(), method=method)
        errors.append((got.log_prob - exact).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) > order - 0.15


def test_the_start_says_how_much_noise_is_on_the_data() -> None:
    """At a ratio rho the density is off by rho²/2·Δp/p, which for a Gaussian is known."""
    x, s = tensor([[-0.5], [0.3], [1.4]]), 0.7
    for start in (0.1, 0.05):
        rho = ratio(STRAIGHT, start)
        got = log_likelihood(
            OracleDenoiser(LINE, STRAIGHT), x, angle_grid(STRAIGHT, 32, start), divergence=Exact()
        )
        laplacian = (((x - 0.3) / s**2).square() - 1 / s**2)[:, 0]
        off = got.log_prob - LINE.log_prob(x)
        torch.testing.assert_close(off, rho**2 / 2 * laplacian, rtol=0, atol=5 * rho**4)
        assert off.abs().max() > 20 * rho**4


def test_the_likelihood_under_another_law_is_lower_by_the_divergence() -> None:
    """E[log p - log q] over p is KL(p‖q), here over nodes that integrate a quadratic exactly."""
    other = GaussianOracle.isotropic(tensor([-0.1]), 0.9)
    x = tensor([[0.3 - 0.7 * math.sqrt(3)], [0.3], [0.3 + 0.7 * math.sqrt(3)]])
    weights = tensor([1 / 6, 2 / 3, 1 / 6])
    grid = angle_grid(STRAIGHT, 16, 1e-3)
    right, wrong = (
        log_likelihood(OracleDenoiser(law, STRAIGHT), x, grid, divergence=Exact()).log_prob
        for law in (LINE, other)
    )
    lost = (weights * (right - wrong)).sum()
    torch.testing.assert_close(lost, LINE.kl(other), rtol=0, atol=1e-4)
    assert lost > 0.05


class Small(nn.Module):
    """A network with random weights: its law is no law of any data, but a law it is."""

    accepts = frozenset({"shift"})

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)

    def forward(self, x, timestep, cond):
        time = (timestep.to(x.dtype) / 1000)[:, None].expand(len(x), 1)
        shift = cond["shift"].to(x.dtype)[:, None] if "shift" in cond else 0 * x
        return self.net(torch.cat([x, time, shift], 1))


def test_the_density_of_any_network_integrates_to_one() -> None:
    x = torch.linspace(-9, 9, 601, dtype=torch.float64)[:, None]
    denoise, grid = Denoiser(Small(), STRAIGHT, "flow"), angle_grid(STRAIGHT, 16, 0.01)
    conditions = [{"shift": torch.full((601,), shift)} for shift in (0.0, 2.0)]
    densities = [
        log_likelihood(denoise, x, grid, divergence=Exact(), cond=cond).log_prob.exp() for cond in conditions
    ]
    for density in densities:
        assert density.sum().item() * 18 / 600 == pytest.approx(1, abs=1e-4)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 0]).exp()
    assert all((density - normal).abs().max() > 0.05 for density in densities)
    assert (densities[0] - densities[1]).abs().max() > 0.05


def test_the_likelihood_of_a_guider_is_that_of_what_it_guides_to() -> None:
    """Gaussians of one spread: guidance at scale 3 moves the mean to uncond + 3·(cond - uncond)."""

    def net(x, timestep, cond):
        t = (timestep.double() / 1000)[:, None]
        mean = cond["mean"].double()[:, None]
        return mean + (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2) * (x - (1 - t) * mean)

    net.accepts = frozenset({"mean"})
    branches = {"cond": {"mean": torch.tensor([0.5])}, "uncond": {"mean": torch.tensor([0.25])}}
    guider = Guider(Denoiser(net, STRAIGHT, "x0"), branches, combine=partial(cfg, scale=3.0))
    x = tensor([[0.0], [1.0], [2.0]])
    got = log_likelihood(guider, x, angle_grid(STRAIGHT, 16, 1e-3), divergence=Exact())
    law = GaussianOracle.isotropic(tensor([1.0]), 0.5)
    torch.testing.assert_close(got.log_prob, law.log_prob(x, 1.0, ratio(STRAIGHT, 1e-3)), rtol=0, atol=1e-4)


# --- shapes, dtypes, modes


def test_any_rank_and_both_dtypes() -> None:
    law = GaussianOracle(tensor([0.5, -0.25, 0.0, 1.0]), torch.eye(4, dtype=torch.float64) / 2 + 0.1)
    grid, x = angle_grid(STRAIGHT, 8, 0.05), points(law)
    for shape in ((8, 4), (8, 2, 2), (8, 1, 2, 1, 2)):
        got = log_likelihood(OracleDenoiser(law, STRAIGHT), x.reshape(shape), grid, divergence=Exact())
        assert got.noise.shape == shape
        torch.testing.assert_close(got.log_prob, law.log_prob(x, 1.0, 0.05 / 0.95), rtol=0, atol=2e-3)
        single = log_likelihood(
            OracleDenoiser(law, STRAIGHT), x.reshape(shape).float(), grid, divergence=Exact()
        )
        torch.testing.assert_close(single.log_prob, got.log_prob, rtol=0, atol=1e-5)
        assert (single.noise.dtype, single.log_prob.dtype) == (torch.float32, torch.float64)
    flat = log_likelihood(OracleDenoiser(LINE, STRAIGHT), points(LINE)[:, 0], grid, divergence=Exact())
    column = log_likelihood(OracleDenoiser(LINE, STRAIGHT), points(LINE), grid, divergence=Exact())
    assert torch.equal(flat.log_prob, column.log_prob)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_mode_is_needed_or_changed_and_no_gradient_left(mode) -> None:
    net = Small(torch.float32).eval()
    denoise, grid = Denoiser(net, STRAIGHT, "flow"), angle_grid(STRAIGHT, 4, 0.05)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x = torch.linspace(-1, 1, 5)[:, None]
        got = log_likelihood(denoise, x, grid, rng=0)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert not got.log_prob.requires_grad
    assert not got.noise.requires_grad
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    again = log_likelihood(denoise, torch.linspace(-1, 1, 5)[:, None], grid, divergence=Exact())
    torch.testing.assert_close(got.log_prob, again.log_prob, rtol=0, atol=1e-6)


def test_heun_asks_at_times_of_the_grid_only() -> None:
    asked: list[float] = []

    def net(x, timestep, cond):
        asked.append(timestep[0].item())
        return 0.1 * x

    grid = grids.trailing(BETAS, 5, end=1e-3)
    log_likelihood(Denoiser(net, BETAS, "v"), torch.zeros(1, 2), grid, method="heun", rng=0)
    assert asked == [0, 199, 199, 399, 399, 599, 599, 799, 799, 999]


# --- what is refused


def test_what_is_refused() -> None:
    denoise, x, grid = OracleDenoiser(LINE, STRAIGHT), points(LINE), angle_grid(STRAIGHT, 4, 0.05)
    with pytest.raises(ValueError, match=r"draws probes, so it needs rng.*Exact\(\) needs none"):
        log_likelihood(denoise, x, grid)
    with pytest.raises(ValueError, match=r"times from 1, .*above 0, got 1 to 0"):
        log_likelihood(denoise, x, grids.uniform(STRAIGHT, 4), rng=0)
    with pytest.raises(ValueError, match=r"got 0.9 to 0.1"):
        log_likelihood(denoise, x, grids.uniform(STRAIGHT, 4, start=0.9, end=0.1), rng=0)
    with pytest.raises(ValueError, match=r"grid is on LinearBeta.*made for Rectified"):
        log_likelihood(denoise, x, grids.uniform(BETAS, 4, end=0.1), rng=0)
    with pytest.raises(ValueError, match="at least one sample"):
        log_likelihood(denoise, x[:0], grid, rng=0)
    with pytest.raises(ValueError, match="1 value"):
        log_likelihood(denoise, torch.full((1, 1), math.nan), grid, rng=0)
    with pytest.raises(ValueError, match="first dimension must be 3"):
        log_likelihood(denoise, x, grid, rng=Rng(0, ids=range(3)))
    with pytest.raises(ValueError, match="at least one step"):
        angle_grid(STRAIGHT, 0, 0.1)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        angle_grid(STRAIGHT, 4, 0.0)


def test_a_denoiser_that_is_cut_off_from_its_input_is_refused() -> None:
    class Cut:
        schedule = STRAIGHT

        def __call__(self, x_t, t, cond=None, carry=None):
            with torch.no_grad():
                return OracleDenoiser(LINE, STRAIGHT)(x_t, t)

    with pytest.raises(ValueError, match="carries no gradient with respect to x_t"):
        log_likelihood(Cut(), points(LINE), angle_grid(STRAIGHT, 4, 0.05), rng=0)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(2)], ids=["exact", "probes"])
def test_cuda_gives_what_the_cpu_gives(divergence) -> None:
    net, x, grid = Small().eval(), torch.linspace(-1, 1, 5).double()[:, None], angle_grid(STRAIGHT, 4, 0.05)
    got = [
        log_likelihood(
            Denoiser(net.to(device), STRAIGHT, "flow"),
            x.to(device),
            grid,
            divergence=divergence,
            rng=Rng(0, ids=range(5)),
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(got[1].log_prob.cpu(), got[0].log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(got[1].noise.cpu(), got[0].noise, rtol=0, atol=1e-6)
