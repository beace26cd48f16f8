"""The exact least loss, and one loss in every space."""

import math

import pytest
import torch
from torch.testing import assert_close

from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import (
    CosineBeta,
    GaussianOracle,
    LinearBeta,
    Prediction,
    Rectified,
    VarianceExploding,
)
from gendiff.objectives import (
    Draw,
    EDMWeighting,
    MinSNR,
    Objective,
)
from tests.objectives.nets import NAMES, At, Net, images, textbook

SPACES = pytest.mark.parametrize("space", NAMES)
LAW = GaussianOracle(
    torch.tensor([0.5, -0.25, 1.0]), torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, 0.1], [0.0, 0.1, 0.3]])
)


# --------------------------------------------------------------------------------------- the exact least loss


class Exact:
    """Points (x0, eps) with the first and second moments of a Gaussian law and unit noise.

    The square of anything affine in (x0, eps) averages over these 4d points to its mean under the law.
    """

    def __init__(self, law: GaussianOracle):
        size = law.size
        points = (2 * size) ** 0.5 * torch.cat([torch.eye(2 * size), -torch.eye(2 * size)]).double()
        self.x0 = law.mean + points[:, :size] @ torch.linalg.cholesky(law.covariance).T
        self.eps = points[:, size:]


LEVELS = [
    (LinearBeta(), 0.05),
    (LinearBeta(), 0.6),
    (CosineBeta(), 0.9),
    (Rectified(), 0.3),
    (VarianceExploding(), 0.7),
]


@SPACES
@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=lambda v: str(v))
def test_the_exact_denoiser_has_the_least_loss(space, schedule, t):
    exact, denoise = Exact(LAW), OracleDenoiser(LAW, schedule)
    draw = Draw.of(schedule, exact.x0, exact.eps, t)
    alpha, sigma = schedule.level(t)
    least = Objective(space=space).score(denoise(draw.x_t, draw.t), draw).loss.mean()
    in_x0 = LAW.mmse(alpha, sigma) / LAW.size
    assert_close(
        least, in_x0 * (Prediction(space).determinant(schedule.level(t)) / sigma) ** 2, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=lambda v: str(v))
def test_any_other_denoiser_is_worse_by_exactly_its_difference(schedule, t, randn64):
    exact, denoise = Exact(LAW), OracleDenoiser(LAW, schedule)
    draw = Draw.of(schedule, exact.x0, exact.eps, t)
    alpha, sigma = schedule.level(t)
    right = denoise(draw.x_t, draw.t)
    for _ in range(10):
        slope, offset = 0.1 * randn64(3, 3), 0.1 * randn64(3)
        wrong = right.replace(x0=right.x0 + draw.x_t @ slope.T + offset)
        loss = Objective(space="x0").score(wrong, draw).loss.mean()
        law = LAW.marginal(alpha, sigma)  # E|A·x_t + b|² under it
        surplus = (slope @ law.covariance @ slope.T).trace() + (slope @ law.mean + offset).square().sum()
        assert_close(loss, (LAW.mmse(alpha, sigma) + surplus) / 3, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("schedule", "t"), [(LinearBeta(), 0.4), (Rectified(), 0.7)], ids=lambda v: str(v))
def test_random_draws_have_the_exact_least_loss(schedule, t, generator):
    x0 = LAW.draw(40_000, generator)
    terms = Objective(times=At(t), space="x0")(OracleDenoiser(LAW, schedule), x0, rng=generator)
    error = terms.loss.std() / math.sqrt(len(x0))
    least = LAW.mmse(*schedule.level(t)) / LAW.size
    assert error < 0.01 * least
    assert abs(terms.loss.mean() - least) < 3 * error


# ----------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("weighting", [MinSNR(2.0), EDMWeighting(0.7)], ids=repr)
def test_a_weighted_loss_is_the_same_in_every_space_for_every_network(randn64, prediction, weighting):
    draw = Objective().draw(LinearBeta(), images(randn64), rng=0)
    denoised = Denoiser(Net(), LinearBeta(), prediction)(draw.x_t, draw.t)
    own = Objective(weighting=weighting).score(denoised, draw)
    for space in NAMES:
        other = Objective(weighting=weighting, space=space).score(denoised, draw)
        assert_close(own.weight * own.loss, other.weight * other.loss, rtol=1e-9, atol=0)


@SPACES
def test_space_compares_the_pair_converted(randn64, space):
    denoiser, x0 = Denoiser(Net(), Rectified(), "v"), images(randn64)
    draw = Objective().draw(Rectified(), x0, rng=0)
    denoised = denoiser(draw.x_t, draw.t)
    alpha, sigma = (value[:, None, None, None] for value in draw.level)
    said = textbook(space, denoised.x0, denoised.eps, alpha, sigma)
    target = textbook(space, draw.x0, draw.eps, alpha, sigma)
    loss = Objective(space=space).score(denoised, draw).loss
    assert_close(loss, (said - target).square().flatten(1).mean(1), rtol=1e-9, atol=0)


def test_a_pair_without_a_network_is_compared_where_one_says(randn64):
    denoiser, x0 = Denoiser(Net(), Rectified(), "x0"), images(randn64)
    draw = Objective().draw(Rectified(), x0, rng=0)
    bounded = denoiser(draw.x_t, draw.t)
    bounded = bounded.replace(x0=bounded.x0.clamp(-0.1, 0.1))
    for denoised in (bounded, Denoised(bounded.x0, bounded.eps)):
        loss = Objective(space="x0").score(denoised, draw).loss
        assert_close(loss, (bounded.x0 - x0).square().flatten(1).mean(1), rtol=1e-12, atol=0)
        with pytest.raises(
            ValueError, match=r"no network output to compare; say in which space .*space='x0'"
        ):
            Objective().score(denoised, draw)


def test_a_guided_denoiser_is_trained_like_any_other(randn64):
    denoiser, x0 = Denoiser(Net(), Rectified(), "flow"), images(randn64)
    guided = Guider(
        denoiser, branches={"cond": None, "uncond": None}, combine=lambda cond, uncond: cfg(cond, uncond, 1.0)
    )
    own, through = (Objective(space="x0")(denoise, x0, rng=0) for denoise in (denoiser, guided))
    assert_close(through.loss, own.loss, rtol=1e-6, atol=0)
