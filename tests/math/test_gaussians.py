"""The exact oracles against brute-force quadrature, numerical ODEs, mpmath, scipy and torch.distributions.

Densities here are scipy's and integrals are trapezoidal sums over wide grids, which converge faster than any
power of the step for analytic integrands: nothing below shares a formula with the code under test.
"""

import itertools
import math
import re

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import solve_ivp

from gendiff.math.gaussians import GaussianOracle, MixtureOracle


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


LINE = GaussianOracle.isotropic(tensor([0.3]), 0.7)
PLANE = GaussianOracle(tensor([0.5, -0.25]), tensor([[1.0, 0.6], [0.6, 0.8]]))
LINES = MixtureOracle(
    tensor([0.5, 0.2, 0.3]), tensor([[-1.2], [0.1], [1.5]]), tensor([0.16, 0.09, 0.49])[:, None, None]
)
PLANES = MixtureOracle(
    tensor([0.3, 0.7]),
    tensor([[-1.0, 0.5], [0.8, -0.3]]),
    tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.4, -0.3], [-0.3, 0.6]]]),
)
LAWS = pytest.mark.parametrize("law", [LINE, PLANE, LINES, PLANES], ids=["line", "plane", "lines", "planes"])
LEVELS = pytest.mark.parametrize(
    ("alpha", "sigma"), [(0.8, 0.6), (1.0, 0.35), (0.05, 1.0), (0.0, 1.0), (1.0, 5.0)]
)
POINTS = {1: tensor([[-3.0], [-0.4], [0.2], [2.5]]), 2: tensor([[-2.0, 1.0], [0.3, 0.1], [1.5, -2.5]])}


def parts(law):
    """(weight, mean, covariance) of every component, in numpy."""
    if isinstance(law, GaussianOracle):
        return [(1.0, law.mean.numpy(), law.covariance.numpy())]
    return list(zip(law.weights.numpy(), law.means.numpy(), law.covariances.numpy(), strict=True))


def pdf(law, x, alpha=1.0, sigma=0.0):
    """The density of x_t by scipy."""
    noise = sigma**2 * np.eye(x.shape[-1])
    return sum(
        w * stats.multivariate_normal(alpha * m, alpha**2 * c + noise).pdf(x) for w, m, c in parts(law)
    )


def grid(size, reach=10.0, steps=(2001, 301)):
    """Points [N, d] of a square grid round the origin and the volume of its cells."""
    axis = np.linspace(-reach, reach, steps[size - 1])
    points = np.stack(np.meshgrid(*[axis] * size, indexing="ij"), -1).reshape(-1, size)
    return points, (axis[1] - axis[0]) ** size


def moments(points, density):
    """Mass, mean and covariance of a density on grid points."""
    mass = density.sum()
    mean = density @ points / mass
    return mass, mean, (density[:, None] * (points - mean)).T @ (points - mean) / mass


def close(actual, expected, atol=1e-12, rtol=1e-12):
    torch.testing.assert_close(tensor(actual), tensor(expected), atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------------- denoiser, density, score


@LAWS
@LEVELS
def test_posterior_is_that_of_bayes_by_quadrature(law, alpha, sigma):
    nodes, cell = grid(law.size)
    prior = pdf(law, nodes)
    x_t = POINTS[law.size]
    x0, eps, covariance = (
        law.x0(x_t, alpha, sigma),
        law.eps(x_t, alpha, sigma),
        law.covariance_of_x0(x_t, alpha, sigma),
    )
    for i, x in enumerate(x_t.numpy()):
        likelihood = np.exp(-((x - alpha * nodes) ** 2).sum(-1) / (2 * sigma**2))
        evidence, mean, spread = moments(nodes, prior * likelihood)
        close(x0[i], mean)
        close(covariance[i], spread)
        close(eps[i], (x - alpha * mean) / sigma)
        evidence *= cell / (2 * math.pi * sigma**2) ** (law.size / 2)
        close(law.log_prob(x_t[i : i + 1], alpha, sigma)[0], math.log(evidence))


@LAWS
@LEVELS
def test_density_is_scipys_and_integrates_to_one(law, alpha, sigma):
    nodes, cell = grid(law.size, reach=10 if sigma < 5 else 60)
    log_prob = law.log_prob(tensor(nodes), alpha, sigma)
    assert log_prob.exp().sum().item() * cell == pytest.approx(1, abs=1e-13)
    inner = nodes[np.abs(nodes).max(-1) < 4]
    close(law.log_prob(tensor(inner), alpha, sigma), np.log(pdf(law, inner, alpha, sigma)))


@LAWS
def test_data_law_is_the_default_level(law):
    x0 = POINTS[law.size]
    close(law.log_prob(x0), np.log(pdf(law, x0.numpy())))
    close(law.score(x0), law.score(x0, 1, 0), atol=0, rtol=0)


@LAWS
@LEVELS
def test_score_is_the_gradient_of_log_prob(law, alpha, sigma):
    x_t = POINTS[law.size].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x_t, alpha, sigma).sum(), x_t)
    close(law.score(x_t.detach(), alpha, sigma), gradient)


angles = st.floats(0.02, math.pi / 2)


@LAWS
@given(angle=angles, data=st.data())
@settings(max_examples=15, deadline=None)
def test_tweedie(law, angle, data):
    alpha, sigma = math.cos(angle), math.sin(angle)
    x_t = tensor([data.draw(st.lists(st.floats(-4, 4), min_size=law.size, max_size=law.size))])
    eps = law.eps(x_t, alpha, sigma)
    close((x_t - alpha * law.x0(x_t, alpha, sigma)) / sigma, eps, atol=1e-11)
    close(-sigma * law.score(x_t, alpha, sigma), eps)


@LAWS
def test_covariance_is_the_jacobian_of_the_denoiser(law):
    alpha, sigma = 0.7, 0.4
    for x in POINTS[law.size]:
        jacobian = torch.autograd.functional.jacobian(lambda x_t: law.x0(x_t[None], alpha, sigma)[0], x)
        close(law.covariance_of_x0(x[None], alpha, sigma)[0], sigma**2 / alpha * jacobian)


@LAWS
def test_limits_are_those_of_pure_noise_and_pure_data(law):
    x = POINTS[law.size]
    mean = sum(w * m for w, m, _ in parts(law))
    close(law.x0(x, 0, 2), tensor(mean).expand_as(x))
    close(law.eps(x, 0, 2), x / 2)
    close(law.x0(x, 0.5, 0), 2 * x)
    close(law.eps(x, 0.5, 0), torch.zeros_like(x))
    close(law.covariance_of_x0(x, 0.5, 0), torch.zeros(len(x), law.size, law.size))


def test_denoiser_of_a_finite_data_set_is_the_softmax_average():
    """Karras et al. 2022, eq. 57, written out."""
    data, x_t, alpha, sigma = np.random.default_rng(0).normal(size=(7, 3)), np.ones((2, 3)), 0.6, 0.3
    law = MixtureOracle(tensor(np.ones(7) / 7), tensor(data), torch.zeros(7, 3, 3, dtype=torch.float64))
    weights = np.exp(-((x_t[:, None] - alpha * data) ** 2).sum(-1) / (2 * sigma**2))
    close(law.x0(tensor(x_t), alpha, sigma), weights @ data / weights.sum(1, keepdims=True))


def test_singular_covariance_is_exact_where_there_is_noise():
    """Data on the line x1 = 2·x0: along it a one-dimensional posterior, across it nothing but noise."""
    law = GaussianOracle(tensor([0.0, 0.0]), tensor([[1.0, 2.0], [2.0, 4.0]]))
    x_t, sigma = tensor([[1.0, -0.5]]), 0.3
    latent = (x_t @ tensor([1.0, 2.0])) / (5 + sigma**2)
    close(law.x0(x_t, 1, sigma), latent * tensor([[1.0, 2.0]]))
    close(law.mmse(1.0, sigma), 5 * sigma**2 / (5 + sigma**2))
    with pytest.raises(ValueError, match="no density at sigma = 0"):
        law.x0(x_t, 1, 0)


def test_rank_is_recognised_through_rounding():
    root = tensor(np.random.default_rng(0).normal(size=(8, 3)))
    for scale in (1e-6, 1.0, 1e6):
        law = GaussianOracle(torch.zeros(8), scale * root @ root.T)
        assert int((law.components.eigenvalues == 0).sum()) == 5
        with pytest.raises(ValueError, match="no density at sigma = 0"):
            law.log_prob(torch.zeros(1, 8))


@pytest.mark.parametrize("law", [LINE, PLANE], ids=["line", "plane"])
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 0.1), (0.3, 2.0), (0.0, 1.0)])
def test_mmse_is_the_loss_of_the_denoiser_by_gauss_hermite(law, alpha, sigma):
    """The squared error of a linear denoiser is quadratic, so three nodes a dimension are exact."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z = tensor(list(itertools.product(nodes, repeat=2 * law.size)))
    w = tensor(list(itertools.product(weights, repeat=2 * law.size))).prod(-1)
    x0 = law.mean + z[:, : law.size] @ torch.linalg.cholesky(law.covariance).T
    error = law.x0(alpha * x0 + sigma * z[:, law.size :], alpha, sigma) - x0
    loss = (w * error.square().sum(-1)).sum() / w.sum()
    close(law.mmse(alpha, sigma), loss)
    close(law.covariance_of_x0(x0[:1], alpha, sigma)[0].trace(), loss)


def test_mmse_keeps_the_shape_of_the_levels():
    levels = torch.rand(3, 2, dtype=torch.float64) + 0.1
    expected = [[PLANE.mmse(float(a), 0.5).item() for a in row] for row in levels]
    close(PLANE.mmse(levels, 0.5), expected)
    close(PLANE.mmse(0.5, levels)[1, 1], PLANE.mmse(0.5, levels[1, 1]))


def test_loss_of_a_mixture_is_its_mean_posterior_variance():
    """E‖x0 - E[x0|x_t]‖² = E‖x0‖² - E‖E[x0|x_t]‖², the right side from the data's own second moment."""
    nodes, cell = grid(1)
    alpha, sigma = 0.7, 0.5
    density = tensor(pdf(LINES, nodes, alpha, sigma)) * cell
    loss = (density * LINES.covariance_of_x0(tensor(nodes), alpha, sigma)[:, 0, 0]).sum()
    second = sum(w * (m[0] ** 2 + c[0, 0]) for w, m, c in parts(LINES))
    close(loss, second - (density * LINES.x0(tensor(nodes), alpha, sigma)[:, 0] ** 2).sum())


# ------------------------------------------------------------------------------------------- probability flow


def line_velocity(law, t, x, path):
    """dx/dt = alpha'·E[x0|x] + sigma'·E[eps|x] of a one-dimensional law, from scipy's densities."""
    (alpha, sigma), (d_alpha, d_sigma) = path(t)
    joint, x0 = [], []
    for w, m, c in parts(law):
        variance = alpha**2 * c[0, 0] + sigma**2
        joint.append(w * np.exp(-((x - alpha * m[0]) ** 2) / (2 * variance)) / np.sqrt(variance))
        x0.append(m[0] + alpha * c[0, 0] / variance * (x - alpha * m[0]))
    mean = np.sum(np.array(joint) * np.array(x0), 0) / np.sum(joint, 0)
    return d_alpha * mean + d_sigma * (x - alpha * mean) / sigma


def circle(t):
    return (math.cos(t), math.sin(t)), (-math.sin(t), math.cos(t))


def straight(t):
    return (1 - t, t), (-1.0, 1.0)


@pytest.mark.parametrize("law", [LINE, LINES], ids=["line", "lines"])
@pytest.mark.parametrize(
    ("path", "start", "end"), [(circle, 1.5, 0.05), (straight, 0.99, 0.02), (circle, 0.2, 1.4)]
)
def test_flow_solves_the_probability_flow_ode(law, path, start, end):
    x = np.linspace(-3, 3, 9)
    ode = solve_ivp(
        lambda t, y: line_velocity(law, t, y, path), (start, end), x, method="DOP853", rtol=1e-13, atol=1e-13
    )
    close(law.flow(tensor(x), *path(start)[0], *path(end)[0]), ode.y[:, -1], atol=1e-10, rtol=1e-10)


def test_flow_of_a_full_covariance_solves_the_ode():
    def velocity(t, y):
        (alpha, sigma), (d_alpha, d_sigma) = circle(t)
        gain = alpha * np.linalg.solve(alpha**2 * cov + sigma**2 * np.eye(2), cov)
        x0 = mean + (y.reshape(-1, 2) - alpha * mean) @ gain
        return (d_alpha * x0 + d_sigma * (y.reshape(-1, 2) - alpha * x0) / sigma).ravel()

    mean, cov, x = PLANE.mean.numpy(), PLANE.covariance.numpy(), POINTS[2]
    ode = solve_ivp(velocity, (1.4, 0.1), x.numpy().ravel(), method="DOP853", rtol=1e-13, atol=1e-13)
    end = PLANE.flow(x, math.cos(1.4), math.sin(1.4), math.cos(0.1), math.sin(0.1))
    close(end, ode.y[:, -1].reshape(-1, 2), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("law", [LINE, PLANE, LINES], ids=["line", "plane", "lines"])
@given(t=angles, s=angles, r=angles, data=st.data())
@settings(max_examples=15, deadline=None)
def test_flow_composes_and_stands_still(law, t, s, r, data):
    levels = {name: (math.cos(angle), math.sin(angle)) for name, angle in (("t", t), ("s", s), ("r", r))}
    x = tensor([data.draw(st.lists(st.floats(-4, 4), min_size=law.size, max_size=law.size))])
    close(law.flow(x, *levels["t"], *levels["t"]), x)
    direct = law.flow(x, *levels["t"], *levels["r"])
    detour = law.flow(law.flow(x, *levels["t"], *levels["s"]), *levels["s"], *levels["r"])
    close(detour, direct, atol=1e-11, rtol=1e-11)


def test_flow_carries_the_density_along():
    """p_s(y)·dy/dx = p_t(x), the derivative by central differences."""
    x, step = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64), 1e-5
    level_t, level_s = (0.3, 0.9), (1.0, 0.0)
    y, up, down = (LINES.flow(x + shift, *level_t, *level_s) for shift in (0, step, -step))
    ratio = (LINES.log_prob(x, *level_t) - LINES.log_prob(y, *level_s)).exp()
    close((up - down) / (2 * step), ratio, rtol=1e-7, atol=1e-7)
    assert bool((y.diff() > 0).all())


@pytest.mark.parametrize("z", [-8.0, -5.0, -0.3, 0.9, 5.0, 8.0])
@pytest.mark.parametrize(
    ("source", "target"), [((0.0, 1.0), (1.0, 0.0)), ((1.0, 0.0), (0.0, 1.0)), ((0.6, 0.8), (0.9, 0.1))]
)
def test_flow_is_accurate_to_rounding_far_into_the_tails(z, source, target):
    def tail(y, alpha, sigma):
        """F below 0 and 1 - F above, in 40 digits."""
        scaled = [(w, (y - alpha * m) / mpmath.sqrt(alpha**2 * c + sigma**2)) for w, m, c in exact]
        return mpmath.fsum(w * mpmath.erfc(math.copysign(1, z) * u / mpmath.sqrt(2)) / 2 for w, u in scaled)

    with mpmath.workdps(40):
        exact = [tuple(mpmath.mpf(float(np.squeeze(value))) for value in part) for part in parts(LINES)]
        level_t, level_s = (tuple(map(mpmath.mpf, level)) for level in (source, target))
        y = LINES.flow(tensor([z]), *source, *target).item()
        wanted = tail(mpmath.mpf(z), *level_t)
        root = mpmath.findroot(lambda u: mpmath.log(tail(u, *level_s) / wanted), (y - 0.01, y + 0.01))
        assert abs(y - root) < 1e-13 * max(1, abs(y))


def test_flow_of_one_component_is_the_gaussians_forty_deviations_out():
    one = MixtureOracle(tensor([1.0]), LINE.mean[None], LINE.covariance[None])
    x = torch.linspace(-40, 40, 33, dtype=torch.float64)
    close(one.flow(x, 0.0, 1.0, 1.0, 0.0), LINE.flow(x, 0.0, 1.0, 1.0, 0.0), rtol=1e-13, atol=1e-13)


def test_flow_crosses_a_gap_without_density():
    """Modes ten thousand deviations apart: the median stays in the middle, the rest lands on the modes."""
    law = MixtureOracle(
        tensor([0.5, 0.5]), tensor([[-1.0], [1.0]]), 1e-8 * torch.ones(2, 1, 1, dtype=torch.float64)
    )
    x = tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
    y = law.flow(x, 0.0, 1.0, 1.0, 0.0)
    quantile = stats.norm.ppf(2 * stats.norm.sf(np.array([0.1, 2.0])))
    right = 1 - 1e-4 * quantile
    close(y, [-right[1], -right[0], 0, right[0], right[1]])


def test_flow_of_a_mixture_in_the_plane_is_refused():
    with pytest.raises(ValueError, match=r"exact in d = 1 only, and here d = 2; integrate the ODE"):
        PLANES.flow(POINTS[2], 0.0, 1.0, 1.0, 0.0)


# --------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(("law", "uncond"), [(PLANE, PLANES), (LINES, LINE)], ids=["plane", "line"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -1.5])
def test_guided_score_is_the_gradient_of_the_guided_density(law, uncond, scale):
    x_t = POINTS[law.size].clone().requires_grad_()
    log_prob = law.guided_log_prob(uncond, x_t, 0.8, 0.6, scale)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x_t)
    close(law.guided_score(uncond, x_t.detach(), 0.8, 0.6, scale), gradient)
    x = x_t.detach().numpy()
    close(log_prob.detach(), np.log(pdf(uncond, x, 0.8, 0.6) ** (1 - scale) * pdf(law, x, 0.8, 0.6) ** scale))


def test_guidance_takes_a_scale_per_sample():
    x_t, scales = POINTS[2], tensor([0.0, 1.0, 4.0])
    for i, scale in enumerate(scales.tolist()):
        alone = PLANE.guided_score(PLANES, x_t[i : i + 1], 0.8, 0.6, scale)
        close(PLANE.guided_score(PLANES, x_t, 0.8, 0.6, scales)[i : i + 1], alone)


UNCOND = GaussianOracle(tensor([0.0, 0.2]), tensor([[1.5, -0.2], [-0.2, 1.2]]))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5, -0.1])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.6, 0.8)])
def test_guided_marginal_is_the_product_of_powers_normalised(alpha, sigma, scale):
    nodes, cell = grid(2, reach=12)
    density = pdf(UNCOND, nodes, alpha, sigma) ** (1 - scale) * pdf(PLANE, nodes, alpha, sigma) ** scale
    mass, mean, covariance = moments(nodes, np.nan_to_num(density, posinf=0))
    law = PLANE.guided_marginal(UNCOND, alpha, sigma, scale)
    close(law.mean, mean, atol=1e-10)
    close(law.covariance, covariance, atol=1e-10)
    x = POINTS[2]
    unnormalised = PLANE.guided_log_prob(UNCOND, x, alpha, sigma, scale)
    close(unnormalised - math.log(mass * cell), law.log_prob(x), atol=1e-10)


def test_guided_density_that_cannot_be_normalised_is_refused_with_its_bounds():
    narrow, wide = GaussianOracle.isotropic(tensor([0.0]), 1.0), GaussianOracle.isotropic(tensor([0.0]), 2.0)
    with pytest.raises(ValueError, match="not positive definite") as refused:
        wide.guided_marginal(narrow, 1.0, 0.0, 2.0)
    bound = float(re.search(r"-inf and ([\d.]+)\.", str(refused.value))[1])
    assert bound == pytest.approx(4 / 3, rel=1e-5)  # precision (1 - scale) + scale/4 = 0
    assert wide.guided_marginal(narrow, 1.0, 0.0, 1.333).covariance.item() > 1000
    with pytest.raises(ValueError, match=r"between -0\.333333 and inf"):
        narrow.guided_marginal(wide, 1.0, 0.0, -0.334)


# ----------------------------------------------------------------------------------------------- measurements

OPERATORS = [
    (tensor([[2.0]]), tensor([0.7]), 0.5),
    (tensor([[1.0], [-0.5]]), tensor([0.7, 0.3]), 0.4),
    (tensor([[1.0, -0.5]]), tensor([0.7]), 0.4),
    (tensor([[1.0, 0.0], [0.3, 1.0]]), tensor([-0.4, 0.8]), 0.5),
    (tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), tensor([0.2, -1.0, 0.5]), 0.7),
    (tensor([[0.0, 0.0]]), tensor([1.0]), 1.0),
]
MEASUREMENTS = [
    (law, *op) for law in (LINE, LINES, PLANE, PLANES) for op in OPERATORS if op[0].shape[1] == law.size
]


@pytest.mark.parametrize(("law", "A", "y", "noise_std"), MEASUREMENTS)
def test_measured_law_is_that_of_bayes_by_quadrature(law, A, y, noise_std):
    nodes, cell = grid(law.size)
    prior = pdf(law, nodes)
    likelihood = stats.norm(nodes @ A.T.numpy(), noise_std).pdf(y.numpy()).prod(-1)
    evidence, mean, covariance = moments(nodes, prior * likelihood)
    posterior = law.given(y, A, noise_std)
    assert type(posterior) is type(law)
    inner = np.abs(nodes).max(-1) < 2
    expected = np.log(prior[inner] * likelihood[inner] / (evidence * cell))
    close(posterior.log_prob(tensor(nodes[inner])), expected, atol=1e-11)
    close(posterior.x0(tensor(np.zeros((1, law.size))), 0.0, 1.0)[0], mean)  # the mean of the posterior
    close(posterior.covariance_of_x0(tensor(np.zeros((1, law.size))), 0.0, 1.0)[0], covariance)


def test_measurement_without_noise_slices_the_law():
    (m0, m1), ((c00, c01), (_, c11)) = PLANE.mean.tolist(), PLANE.covariance.tolist()
    posterior = PLANE.given(tensor([1.3]), tensor([[1.0, 0.0]]), 0)
    close(posterior.mean, [1.3, m1 + c01 / c00 * (1.3 - m0)])
    close(posterior.covariance, [[0, 0], [0, c11 - c01**2 / c00]])
    heights = [w * stats.norm(m[0], math.sqrt(c[0, 0])).pdf(1.3) for w, m, c in parts(PLANES)]
    close(PLANES.given(tensor([1.3]), tensor([[1.0, 0.0]]), 0).weights, np.array(heights) / sum(heights))


def test_measurement_that_excludes_a_component_leaves_a_law():
    far = MixtureOracle(tensor([0.5, 0.5]), tensor([[0.0], [1e3]]), torch.ones(2, 1, 1, dtype=torch.float64))
    posterior = far.given(tensor([0.0]), tensor([[1.0]]), 0.1)
    close(posterior.x0(tensor([0.5]), 1.0, 0.0), [0.5])
    close(posterior.weights, [1.0, 0.0])


# ------------------------------------------------------------------------------------ the rest of the surface


def test_kl_is_torchs():
    def normal(law):
        return torch.distributions.MultivariateNormal(law.mean, law.covariance)

    close(PLANE.kl(UNCOND), torch.distributions.kl_divergence(normal(PLANE), normal(UNCOND)))
    close(UNCOND.kl(PLANE), torch.distributions.kl_divergence(normal(UNCOND), normal(PLANE)))
    close(PLANE.kl(PLANE), 0.0)
    noised = PLANE.marginal(0.6, 0.8).kl(UNCOND.marginal(0.6, 0.8))
    nodes, cell = grid(2)
    p, q = (pdf(law, nodes, 0.6, 0.8) for law in (PLANE, UNCOND))
    close(noised, (p * np.log(p / q)).sum() * cell)
    flat = GaussianOracle.diagonal(tensor([0.0, 0.0]), tensor([1.0, 0.0]))
    assert flat.kl(PLANE).item() == math.inf


@LAWS
def test_marginal_is_the_law_of_x_t(law):
    x_t = POINTS[law.size]
    close(law.marginal(0.6, 0.8).log_prob(x_t), np.log(pdf(law, x_t.numpy(), 0.6, 0.8)))


def test_draws_follow_the_law():
    draws = LINES.draw(20_000, torch.Generator().manual_seed(0))
    cdf = sum(w * stats.norm(m[0], math.sqrt(c[0, 0])).cdf(draws.numpy()[:, 0]) for w, m, c in parts(LINES))
    assert stats.kstest(cdf, "uniform").pvalue > 1e-3
    again = LINES.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert not torch.equal(draws, LINES.draw(20_000, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("law", [PLANE, PLANES], ids=["plane", "planes"])
def test_draws_have_the_covariance_of_the_law(law):
    count = 100_000
    draws = law.draw(count, torch.Generator().manual_seed(0))
    mean = sum(w * m for w, m, _ in parts(law))
    covariance = sum(w * (c + np.outer(m - mean, m - mean)) for w, m, c in parts(law))
    close(draws.mean(0), mean, atol=5 * math.sqrt(covariance.max() / count), rtol=0)
    close(draws.T.cov(), covariance, atol=5 * 2 * covariance.max() / math.sqrt(count), rtol=0)


@pytest.mark.parametrize("method", ["x0", "eps", "score", "log_prob", "covariance_of_x0"])
@pytest.mark.parametrize("law", [PLANE, PLANES], ids=["plane", "planes"])
def test_levels_per_sample_and_any_trailing_shape(law, method):
    x_t, alpha, sigma = POINTS[2], tensor([0.9, 0.5, 0.0]), tensor([0.1, 0.5, 1.0])
    together = getattr(law, method)(x_t.reshape(3, 1, 2, 1), alpha, sigma)
    alone = torch.cat([getattr(law, method)(x_t[i : i + 1], alpha[i].item(), sigma[i]) for i in range(3)])
    close(together.reshape(alone.shape), alone)
    assert together.shape == ((3, 1, 2, 1) if method in ("x0", "eps", "score") else alone.shape)
    assert getattr(law, method)(x_t.float(), 1, 1).dtype == torch.float64


@pytest.mark.parametrize(("law", "shape"), [(PLANE, (3, 1, 2)), (LINES, (4, 1, 1))], ids=["plane", "lines"])
def test_flow_takes_levels_per_sample_and_keeps_the_shape(law, shape):
    x = POINTS[law.size].reshape(shape)
    alpha, sigma = (
        torch.linspace(0, 1, len(x), dtype=torch.float64),
        torch.linspace(1, 0.1, len(x), dtype=torch.float64),
    )
    there = law.flow(x, 0.0, 1.0, alpha, sigma)
    assert there.shape == shape
    close(law.flow(there, alpha, sigma, 0.0, 1.0), x)
    close(there[1:2], law.flow(x[1:2], 0.0, 1.0, alpha[1].item(), sigma[1].item()))


@pytest.mark.gpu
@LAWS
def test_results_are_on_the_device_of_the_points(law):
    x_t, level = POINTS[law.size].cuda(), (tensor(0.8), 0.6)
    for method in ("x0", "eps", "score", "log_prob", "covariance_of_x0"):
        result = getattr(law, method)(x_t, *level)
        assert result.is_cuda
        close(result.cpu(), getattr(law, method)(x_t.cpu(), *level))
    if law is not PLANES:
        close(law.flow(x_t, *level, 1.0, 0.0).cpu(), law.flow(x_t.cpu(), *level, 1.0, 0.0))
    assert law.draw(3, torch.Generator("cuda").manual_seed(0)).is_cuda


def test_laws_are_equal_by_content_and_cannot_be_changed_from_outside():
    mean = tensor([0.5, -0.25])
    law = GaussianOracle(mean, PLANE.covariance)
    mean.zero_()
    assert law == PLANE
    assert hash(law) == hash(PLANE)
    assert law != UNCOND
    assert law != PLANES
    assert MixtureOracle(PLANES.weights, PLANES.means, PLANES.covariances) == PLANES


def test_helpers_build_the_covariance():
    close(GaussianOracle.diagonal(tensor([1.0, 2.0]), tensor([3.0, 0.5])).covariance, [[9, 0], [0, 0.25]])
    assert GaussianOracle.isotropic(tensor([1.0, 2.0]), 3) == GaussianOracle.diagonal(
        tensor([1.0, 2.0]), tensor([3.0, 3.0])
    )
    tiny = GaussianOracle.diagonal(
        tensor([0.0, 0.0]), tensor([1e-9, 1.0])
    )  # small is not zero where nothing rounded
    close(tiny.eps(tensor([[1e-9, 0.0]]), 1.0, 1e-9), [[0.5, 0.0]])


EYE, ONES = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: GaussianOracle(ONES, torch.eye(3)), r"covariance of shape \(2, 2\).*got \(3, 3\)"),
        (lambda: GaussianOracle(ONES, tensor([[1.0, 0.5], [0.0, 1.0]])), "C - Cᵀ reaches 0.5"),
        (lambda: GaussianOracle(ONES, tensor([[1.0, 2.0], [2.0, 1.0]])), "smallest eigenvalue is -1"),
        (lambda: GaussianOracle(ONES, -EYE), "smallest eigenvalue is -1"),
        (lambda: GaussianOracle(ONES, EYE * math.nan), "NaN or infinity"),
        (lambda: GaussianOracle.diagonal(ONES, -ONES), "not negative, got -1"),
        (lambda: MixtureOracle(ONES, ONES[:, None], torch.ones(2, 1, 1)), r"sum 2\.0"),
        (lambda: MixtureOracle(tensor([1.0, 0.0]), ONES[:, None], torch.ones(2, 1, 1)), "smallest is 0"),
        (lambda: MixtureOracle(ONES[:1], ONES[:, None], torch.ones(2, 1, 1)), r"shapes \(1,\) and \(2, 1\)"),
        (lambda: MixtureOracle(ONES / 2, ONES[:, None], torch.ones(2, 2, 2)), r"got \(2, 2, 2\)"),
        (
            lambda: MixtureOracle(ONES / 2, ONES[:, None], tensor([1.0, -1.0])[:, None, None]),
            "eigenvalue is -1",
        ),
        (lambda: PLANE.x0(POINTS[2], 0, 0.0), "both 0"),
        (lambda: PLANE.x0(POINTS[2], 0.5, -0.5), "not negative"),
        (lambda: PLANE.x0(POINTS[2], math.nan, 0.5), "finite and not negative"),
        (lambda: PLANE.x0(POINTS[1], 0.5, 0.5), r"have 1 values, but the law has d = 2"),
        (lambda: PLANE.x0(torch.empty(0, 2), 0.5, 0.5), "at least one sample"),
        (lambda: PLANE.x0(POINTS[2], tensor([0.5, 0.5]), 0.5), "one value per sample"),
        (lambda: PLANE.flow(POINTS[2], 1.0, 0.0, 0.0, 0.0), "both 0"),
        (lambda: LINES.flow(tensor([math.nan]), 1.0, 0.0, 0.0, 1.0), "NaN or infinite"),
        (lambda: PLANE.given(ONES, EYE[:1], 1.0), r"y of shape \(2,\) and A of shape \(1, 2\)"),
        (lambda: PLANE.given(ONES, EYE, -1.0), "noise_std is a finite"),
        (lambda: PLANE.given(ONES, torch.ones(2, 2), 0.0), "drop redundant rows"),
        (lambda: PLANE.given(torch.ones(3), torch.rand(3, 2), 0), "drop redundant rows"),
        (lambda: PLANE.kl(LINE), "d = 2 and d = 1"),
        (lambda: PLANE.guided_marginal(LINE, 1.0, 1.0, 2.0), "d = 2 and d = 1"),
        (
            lambda: PLANE.kl(GaussianOracle.diagonal(ONES, tensor([1.0, 0.0]))),
            "singular covariance has no inverse",
        ),
        (lambda: PLANE.draw(0, torch.Generator()), "count of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(build, text):
    with pytest.raises(ValueError, match=text):
        build()
