"""Probes of the divergence: unbiased, with the scatter that theory gives them, and each sample's own."""

from functools import partial

import jaxtyping
import pytest
import torch

from gendiff.denoiser import OracleDenoiser
from gendiff.math import Rectified
from gendiff.math.gaussians import GaussianOracle
from gendiff.random import Rng
from gendiff.sampling.divergence import Exact, Hutchinson
from gendiff.sampling.likelihood import angle_grid, log_likelihood

STRAIGHT = Rectified()


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


PLANE = GaussianOracle(tensor([0.5, -0.25]), tensor([[1.0, 0.6], [0.6, 0.8]]))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def integral_of_the_jacobian(law, schedule, start: float) -> torch.Tensor:
    """The matrix whose trace the probes estimate, in closed form: Jacobians along a Gaussian commute."""
    angles = torch.stack([torch.atan2(*reversed(schedule.level(t))) for t in (start, 1.0)])
    spread = angles.cos().square()[:, None] * law.components.eigenvalues + angles.sin().square()[:, None]
    axes = law.components.axes[0]
    return axes * (spread[1] / spread[0]).log() / 2 @ axes.T


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_the_estimate_is_unbiased_and_scatters_as_it_must(law) -> None:
    """Mean and variance over 4000 independent probes of one point, within four standard errors."""
    count, grid = 4000, angle_grid(STRAIGHT, 6, 0.05)
    x = PLANE.draw(1, seeded())
    denoise = OracleDenoiser(PLANE, STRAIGHT)
    exact = log_likelihood(denoise, x, grid, divergence=Exact())
    many = log_likelihood(
        denoise,
        x.expand(count, 2),
        grid,
        divergence=Hutchinson(2, law),
        rng=Rng(3, ids=range(count)),
    )
    off = many.log_prob - exact.log_prob
    matrix = integral_of_the_jacobian(PLANE, STRAIGHT, 0.05)
    square = matrix.square()
    variance = 2 * (square.sum() - (law == "rademacher") * square.diagonal().sum()) / 2  # two probes
    assert abs(off.mean()) < 4 * (variance / count).sqrt()
    assert off.var().item() == pytest.approx(variance.item(), rel=0.15)
    assert off.std() > 0.05
    assert many.standard_error is not None
    assert many.standard_error.square().mean().item() == pytest.approx(variance.item(), rel=0.15)


def test_signs_are_exact_where_the_jacobian_is_diagonal() -> None:
    law = GaussianOracle.diagonal(tensor([0.5, 0.0, -1.0]), tensor([0.3, 1.0, 2.0]))
    denoise, x, grid = OracleDenoiser(law, STRAIGHT), law.draw(8, seeded()), angle_grid(STRAIGHT, 8, 0.05)
    exact = log_likelihood(denoise, x, grid, divergence=Exact())
    signs, normals = (
        log_likelihood(denoise, x, grid, divergence=Hutchinson(2, law), rng=0)
        for law in ("rademacher", "gaussian")
    )
    torch.testing.assert_close(signs.log_prob, exact.log_prob, rtol=0, atol=1e-12)
    assert (normals.log_prob - exact.log_prob).abs().max() > 0.1
    assert exact.standard_error is not None
    assert signs.standard_error is not None
    assert exact.standard_error.eq(0).all()
    assert signs.standard_error.max() < 1e-12
    one = log_likelihood(denoise, x, grid, rng=0)
    assert one.standard_error is None
    torch.testing.assert_close(one.log_prob, exact.log_prob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_a_sample_has_its_own_probes_however_the_batch_is_split(law) -> None:
    denoise, x, grid = OracleDenoiser(PLANE, STRAIGHT), PLANE.draw(6, seeded()), angle_grid(STRAIGHT, 4, 0.05)
    ask = partial(log_likelihood, denoise, grid=grid, divergence=Hutchinson(3, law))
    rng = Rng(0, ids=range(6))
    parts = [ask(x=x[at], rng=rng[at]).log_prob for at in (slice(0, 1), slice(1, 4), slice(4, 6))]
    whole = ask(x=x, rng=rng).log_prob
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-12)
    assert not torch.equal(whole, ask(x=x, rng=rng).log_prob)  # drawn anew at every call
    a, b = (ask(x=x, rng=torch.Generator().manual_seed(1)).log_prob for _ in range(2))
    assert torch.equal(a, b)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 probe, got 0"):
        Hutchinson(0)
    jaxtyping.config.update("jaxtyping_disable", True)  # as users have it: annotations are not checked
    try:
        with pytest.raises(ValueError, match="unknown law of probes 'gausian'; did you mean 'gaussian'"):
            Hutchinson(law="gausian")
        with pytest.raises(ValueError, match="unknown method 'rk45'; did you mean 'rk4'"):
            log_likelihood(
                OracleDenoiser(PLANE, STRAIGHT),
                tensor([[0.0, 0.0]]),
                angle_grid(STRAIGHT, 2, 0.1),
                method="rk45",
            )
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
