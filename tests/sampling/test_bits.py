"""Likelihoods in bits: the variational bound against entropies, densities of spread data against bins."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from gendiff.denoiser import Denoiser, OracleDenoiser
from gendiff.math import LinearBeta, Rectified, VarianceExploding, ddpm, grids
from gendiff.math.gaussians import GaussianOracle, MixtureOracle
from gendiff.random import Rng
from gendiff.sampling.bits import bits_per_dim, dequantise, variational_bound
from gendiff.sampling.divergence import Exact
from gendiff.sampling.likelihood import angle_grid, log_likelihood

LOG2 = math.log(2)


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


LINE = GaussianOracle.isotropic(tensor([0.3]), 0.7)
PROBABILITIES = tensor([0.5, 0.2, 0.3])
DISCRETE = MixtureOracle(PROBABILITIES, tensor([[-1.0], [0.0], [1.0]]), torch.zeros(3, 1, 1).double())
STRAIGHT, BETAS = Rectified(), LinearBeta()
SCHEDULES = pytest.mark.parametrize(
    "schedule", [BETAS, STRAIGHT, VarianceExploding()], ids=["betas", "rectified", "exploding"]
)


class Nodes:
    """A source of the same numbers at every draw: nodes of a quadrature in place of randomness."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def normal(self, name, shape, *, dtype=torch.float32, device=None):
        return self.values.reshape(shape).to(dtype)

    uniform = integers = normal

    def fold(self, name):
        return self


def mean_bound(x0, chance, eps, weight, law, schedule, steps, **options) -> float:
    """E[VLB] in bits over the product of two laws on nodes, from one call."""
    a, b = x0.repeat_interleave(len(eps))[:, None], eps.repeat(len(x0))[:, None]
    grid = grids.uniform(schedule, steps)
    bound = variational_bound(OracleDenoiser(law, schedule), a, grid, rng=Nodes(b), **options)
    return ((chance[:, None] * weight).flatten() * bound.total).sum().item()


def on_a_gaussian(schedule, steps: int, law=LINE, **options) -> float:
    """All terms are quadratic in (x0, eps): three nodes of Gauss and Hermite a side are exact."""
    nodes, weights = map(tensor, np.polynomial.hermite_e.hermegauss(3))
    weights = weights / weights.sum()
    return mean_bound(0.3 + 0.7 * nodes, weights, nodes, weights, law, schedule, steps, bins=None, **options)


def on_a_grid(schedule, steps: int, **options) -> float:
    eps = torch.linspace(-8, 8, 161, dtype=torch.float64)
    weight = (-eps.square() / 2).softmax(0)
    values = DISCRETE.means[:, 0]
    return mean_bound(values, PROBABILITIES, eps, weight, DISCRETE, schedule, steps, bins=3, **options)


# --- the bound


@SCHEDULES
def test_the_bound_on_a_gaussian_tends_to_its_entropy_from_above(schedule) -> None:
    """Like 1/steps, on any schedule; and stays off it with the variance that is wrong near the data."""
    entropy = math.log(2 * math.pi * math.e * 0.49) / 2 / LOG2
    gaps = [on_a_gaussian(schedule, steps) - entropy for steps in (20, 80, 320)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.4)
    assert gaps[1] / gaps[2] == pytest.approx(4, abs=0.15)
    assert gaps[2] < 0.0025
    assert on_a_gaussian(schedule, 80, variance="fixed_small") - entropy > 1


@SCHEDULES
def test_the_bound_on_discrete_data_tends_to_their_entropy_from_above(schedule) -> None:
    entropy = -(PROBABILITIES * PROBABILITIES.log2()).sum().item()
    gaps = [on_a_grid(schedule, steps) - entropy for steps in (30, 90, 270)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[0] / gaps[1] > 2.5
    assert gaps[1] / gaps[2] > 2.5
    assert gaps[2] < 0.07
    assert on_a_grid(schedule, 90, variance="fixed_large") - entropy > 0.5


def test_another_denoiser_has_a_higher_bound() -> None:
    """By no less than the divergence from its law, whose own NLL the bound is a bound of."""
    other = GaussianOracle.isotropic(tensor([-0.1]), 0.9)
    for steps in (20, 80):
        worse = on_a_gaussian(STRAIGHT, steps, law=other) - on_a_gaussian(STRAIGHT, steps)
        assert worse == pytest.approx(LINE.kl(other).item() / LOG2, rel=0.05)


def test_the_terms_are_those_of_ddpm() -> None:
    """One by one over a table, as a loop of one's own over `gendiff.math.ddpm` makes them."""
    schedule, rng = LinearBeta(size=10), Rng(5, ids=range(4))
    x = torch.rand(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoise = Denoiser(lambda x_t, timestep, cond: 0.3 * x_t + 0.1, schedule, "v")
    got = variational_bound(denoise, x, grids.trailing(schedule, 10), rng=rng)
    tables = ddpm.Tables.from_schedule(schedule)
    rng.rewind()
    for i in reversed(range(10)):
        bars = tables.log_alpha_bar[i], tables.log_alpha_bar[i - 1] if i else tensor(0.0)
        noise = rng.normal("bound", x.shape, dtype=torch.float64)
        x_t = ddpm.q_sample(x, noise, bars[0], log=True)
        done = ddpm.step(0.3 * x_t + 0.1, x_t, *bars, noise=noise, prediction="v", log=True)
        log_variance = tables.posterior_log_variance_clipped[i]
        term = ddpm.vlb_term(x, x_t, done.mean, log_variance, *bars, log=True)
        torch.testing.assert_close(got.steps[:, 9 - i] if i else got.decoder, term, rtol=1e-9, atol=1e-12)
    prior = ddpm.prior_term(x, tables.log_alpha_bar[-1], log=True)
    torch.testing.assert_close(got.prior, prior, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.total, got.prior + got.steps.sum(1) + got.decoder)


def test_a_learned_variance_is_read() -> None:
    def net(x, timestep, cond):
        return torch.cat([0 * x, torch.ones_like(x)], 1)

    x, grid = torch.zeros(2, 3, 4), grids.uniform(BETAS, 8)
    learned = Denoiser(net, BETAS, "epsilon", learned_variance=True)
    plain = Denoiser(lambda x, timestep, cond: 0 * x, BETAS, "epsilon")
    got = variational_bound(learned, x, grid, variance="learned_range", rng=0)
    large = variational_bound(plain, x, grid, variance="fixed_large", rng=0)  # what raw = 1 means
    torch.testing.assert_close(got.total, large.total, rtol=1e-5, atol=0)
    scale = torch.ones((), requires_grad=True)
    weighted = Denoiser(lambda x, timestep, cond: scale * x, BETAS, "epsilon")
    assert not variational_bound(weighted, x, grid, rng=0).total.requires_grad
    with pytest.raises(ValueError, match="needs variance channels"):
        variational_bound(plain, x, grid, variance="learned_range", rng=0)


def test_any_rank_dtype_and_split_of_the_batch() -> None:
    law = GaussianOracle.isotropic(tensor([0.1, -0.2, 0.0, 0.3]), 0.3)
    x = law.draw(6, torch.Generator().manual_seed(0)).clamp(-1, 1)
    ask = partial(variational_bound, OracleDenoiser(law, STRAIGHT), grid=grids.uniform(STRAIGHT, 6))
    rng = partial(Rng, 0, ids=range(6))
    for bins in (256, None):
        whole = ask(x=x, rng=rng(), bins=bins).total
        parts = [ask(x=x[at], rng=rng()[at], bins=bins).total for at in (slice(0, 1), slice(1, 6))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
        square = ask(x=x.reshape(6, 1, 2, 2), rng=rng(), bins=bins)
        torch.testing.assert_close(square.total, whole, rtol=0, atol=1e-12)
        single = ask(x=x.float(), rng=rng(), bins=bins)
        torch.testing.assert_close(single.total, whole, rtol=0, atol=1e-4)
        assert single.total.dtype == torch.float64
    flat, column = (
        variational_bound(
            OracleDenoiser(LINE, STRAIGHT), shape, grids.uniform(STRAIGHT, 4), bins=None, rng=Rng(0, ids=[7])
        )
        for shape in (tensor([0.2]), tensor([[0.2]]))
    )
    assert torch.equal(flat.total, column.total)


def test_what_a_bound_refuses() -> None:
    denoise, x, grid = OracleDenoiser(LINE, STRAIGHT), tensor([[0.5]]), grids.uniform(STRAIGHT, 4)
    with pytest.raises(ValueError, match="rng is None"):
        variational_bound(denoise, x, grid)
    with pytest.raises(ValueError, match=r"grid ends at 0, got 0\.1"):
        variational_bound(denoise, x, grids.uniform(STRAIGHT, 4, end=0.1), rng=0)
    with pytest.raises(ValueError, match=r"grid is on LinearBeta.*made for Rectified"):
        variational_bound(denoise, x, grids.uniform(BETAS, 4), rng=0)
    with pytest.raises(ValueError, match="at least two steps"):
        variational_bound(denoise, x, grids.uniform(STRAIGHT, 1), rng=0)
    with pytest.raises(ValueError, match=r"data in \[-1, 1\].*bins=None"):
        variational_bound(denoise, 3 * x, grid, rng=0)
    with pytest.raises(ValueError, match="at least 2 bins, got 0"):
        variational_bound(denoise, x, grid, bins=0, rng=0)
    with pytest.raises(ValueError, match="at least one sample"):
        variational_bound(denoise, x[:0], grid, rng=0)
    one = variational_bound(denoise, x, grids.uniform(STRAIGHT, 1), bins=None, rng=0)
    assert one.steps.shape == (1, 0)


# --- densities as bits


@pytest.mark.parametrize("span", [(-1, 1), (0, 1), (0, 255)])
def test_a_uniform_law_of_8_bits_has_8_bits(span) -> None:
    width = (span[1] - span[0]) / 255
    density = torch.full((2,), -5 * math.log(256 * width), dtype=torch.float64)
    torch.testing.assert_close(
        bits_per_dim(density, 5, span=span), torch.full_like(density, 8.0), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(bits_per_dim(density, 5, bins=None), -density / 5 / LOG2)


def test_bits_of_spread_data_are_a_bound_on_the_bits_of_their_bins() -> None:
    """E over u of -log N(x + u) is that of x plus w²/(24·s²): closed form; Jensen's side is right."""
    s, bins = 0.2, 16
    width = 2 / (bins - 1)
    values = torch.linspace(-1, 1, bins, dtype=torch.float64)[3:-3]
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5
    law = torch.distributions.Normal(0.1, s)
    spread = law.log_prob(values[:, None] + width * u).mean(1)
    closed = law.log_prob(values) - width**2 / (24 * s**2)
    torch.testing.assert_close(spread, closed, rtol=0, atol=1e-6)
    bits = bits_per_dim(spread, 1, bins=bins)
    mass = ddpm.discretised_nll(
        values[:, None], torch.full_like(values, 0.1)[:, None], tensor([[2 * math.log(s)]]), bins
    )
    exact = mass[:, 0] / LOG2
    assert (bits > exact).all()
    jensen = (width * (values - 0.1) / s**2).square() / 24  # half the variance of log p over a bin
    torch.testing.assert_close(bits - exact, jensen / LOG2, rtol=0.08, atol=2e-3)
    assert (bits_per_dim(spread, 1, bins=None) < exact - 2).all()  # what leaving the offset out would do


def test_spread_data_fill_their_bins() -> None:
    rng = Rng(1, ids=range(4))
    x = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None].expand(4, 20000)
    spread = dequantise(x, rng, bins=4, span=(0, 1))
    off = (spread - x) * 3
    assert off.abs().max() < 0.5
    assert off.mean().abs() < 0.005
    assert off.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(dequantise(x[1:3], Rng(1, ids=range(4))[1:3], bins=4, span=(0, 1)), spread[1:3])
    assert dequantise(x.half(), 0).dtype == torch.float32


def test_the_bits_of_a_discrete_law_by_the_ode() -> None:
    """A Gaussian seen on 64 values: the ODE's bits of spread data are the entropy of the values, nearly."""
    s, bins = 0.15, 64
    law, values = GaussianOracle.isotropic(tensor([0.0]), s), torch.linspace(-1, 1, bins).double()
    mass = (
        -ddpm.discretised_nll(values[:, None], 0 * values[:, None], tensor([[2 * math.log(s)]]), bins)[:, 0]
    ).exp()
    entropy = -(mass * mass.clamp(min=1e-300).log2()).sum()
    u = (torch.arange(8, dtype=torch.float64) + 0.5) / 8 - 0.5
    x = (values[:, None] + 2 / (bins - 1) * u).reshape(-1, 1)
    got = log_likelihood(OracleDenoiser(law, STRAIGHT), x, angle_grid(STRAIGHT, 32, 1e-3), divergence=Exact())
    bits = bits_per_dim(got.log_prob, 1, bins=bins).reshape(bins, 8).mean(1)
    assert 0 < (mass * bits).sum() - entropy < 0.01


def test_what_bits_refuse() -> None:
    with pytest.raises(ValueError, match="at least one value, got 0"):
        bits_per_dim(torch.zeros(1), 0)
    with pytest.raises(ValueError, match=r"at least 2 bins .* got 1"):
        bits_per_dim(torch.zeros(1), 1, bins=1)
    with pytest.raises(ValueError, match=r"that rises, .*\(1, 1\)"):
        dequantise(torch.zeros(1, 1), 0, span=(1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("bins", [256, None])
def test_cuda_gives_what_the_cpu_gives(bins) -> None:
    x, grid = tensor([[0.2], [-0.4], [1.0]]), grids.uniform(STRAIGHT, 6)
    cpu, cuda = (
        variational_bound(
            OracleDenoiser(LINE, STRAIGHT), x.to(device), grid, bins=bins, rng=Rng(0, ids=range(3))
        )
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(cuda.total.cpu(), cpu.total, rtol=0, atol=1e-9)
