"""Masks, weights, splits of a batch and precision: what must not change the gradient, and what must."""

import math

import pytest
import torch
from torch.testing import assert_close

from gendiff.denoiser import Denoiser
from gendiff.math import (
    CosineBeta,
    LinearBeta,
    Rectified,
    ScaledLinearBeta,
    ZeroTerminalSNR,
)
from gendiff.objectives import (
    MSE,
    Huber,
    InputPerturbation,
    LogitNormal,
    LossTerms,
    MinSNR,
    Objective,
    OffsetNoise,
    Stratified,
    Uniform,
    Unweighted,
)
from gendiff.random import Rng
from tests.objectives.nets import NAMES, At, Net, images

# ------------------------------------------------------------------------------------------ masks and weights


def test_where_reaches_the_error(randn64):
    denoiser, x0 = Denoiser(Net(), Rectified(), "flow"), images(randn64)
    mask = (randn64(4, 1, 6, 6) > 0).double()
    draw = Objective().draw(Rectified(), x0, rng=0)
    denoised = denoiser(draw.x_t, draw.t)
    terms = Objective().score(denoised, draw, where=mask)
    assert_close(terms.loss, MSE()(denoised.out, draw.eps - draw.x0, mask), rtol=1e-12, atol=0)


def test_a_mask_of_zeros_trains_nothing_and_spoils_nothing(randn64):
    net = Net()
    draw = Objective().draw(Rectified(), images(randn64), rng=0)
    denoised = Denoiser(net, Rectified(), "flow")(draw.x_t, draw.t)
    terms = Objective(weighting=MinSNR()).score(denoised, draw, where=torch.zeros(4, 1, 1, 1))
    terms.mean().backward()
    assert terms.mean() == 0
    assert all((p.grad == 0).all() for p in net.parameters())


def test_the_gradient_is_the_weighted_mean_of_the_gradients_of_the_samples(randn64):
    net, x0 = Net(), images(randn64)
    objective = Objective(weighting=MinSNR(1.0))
    terms = objective(Denoiser(net, LinearBeta(), "v"), x0, rng=Rng(0, ids=range(4)))
    assert terms.weight.max() / terms.weight.min() > 2
    assert not terms.weight.requires_grad
    parameters = list(net.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for weight, loss in zip(terms.weight.tolist(), terms.loss, strict=True):
        for total, part in zip(
            expected, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
        ):
            total += weight * part / 4
    assert_close(torch.autograd.grad(terms.mean(), parameters), tuple(expected), rtol=1e-10, atol=1e-14)


def test_a_weight_may_be_learned(randn64):
    draw = Objective().draw(Rectified(), images(randn64), rng=0)
    terms = Objective().score(Denoiser(Net(), Rectified(), "flow")(draw.x_t, draw.t), draw)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    LossTerms(terms.loss, weight=weight).mean().backward()
    assert_close(weight.grad, terms.loss / 4)


def test_unweighted_has_no_weight_and_its_mean_is_the_mean(randn64):
    terms = Objective(weighting=Unweighted())(
        Denoiser(Net(), LinearBeta(), "epsilon"), images(randn64), rng=0
    )
    assert terms.weight is None
    assert torch.equal(terms.mean(), terms.loss.mean())


# --------------------------------------------------------------------------------------- splits and precision

SPLIT = Objective(
    times=LogitNormal(0.3),
    weighting=MinSNR(2.0),
    corruption=[OffsetNoise(0.2), InputPerturbation(0.1)],
    error=Huber(0.1),
)


def gradient(objective, net, schedule, x0, ids, sizes):
    """Losses and the gradient of the mean over the batch, gathered in micro-batches of these sizes."""
    net.zero_grad()
    losses, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        terms = objective(Denoiser(net, schedule, "v"), x0[part], rng=Rng(11, ids=ids[part]))
        (terms.mean() * size / len(x0)).backward()
        losses.append(terms.weight.detach() * terms.loss.detach())
        first += size
    return torch.cat(losses), [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [(CosineBeta(), (1, 1, 1, 1, 1)), (CosineBeta(), (2, 3)), (Rectified(), (4, 1))],
    ids=str,
)
def test_micro_batches_have_the_draws_and_the_gradient_of_the_big_batch(randn64, schedule, sizes):
    net, x0, ids = Net(torch.float32), images(randn64, 5, torch.float32), [9, 4, 7, 1, 100]
    draw = SPLIT.draw(schedule, x0, rng=Rng(11, ids=ids))
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        mine = SPLIT.draw(schedule, x0[part], rng=Rng(11, ids=ids[part]))
        for name in ("t", "eps", "perturbation", "x_t"):
            assert torch.equal(getattr(mine, name), getattr(draw, name)[part]), name  # the same bits
        first += size
    losses, gradients = gradient(SPLIT, net, schedule, x0, ids, [5])
    parts, summed = gradient(SPLIT, net, schedule, x0, ids, sizes)
    assert_close(parts, losses, rtol=1e-5, atol=1e-8)
    for ours, whole in zip(summed, gradients, strict=True):
        assert_close(ours, whole, rtol=1e-5, atol=1e-6 * whole.abs().max().item())


def test_the_order_of_a_batch_does_not_matter(randn64):
    x0, ids = images(randn64, 5), torch.tensor([3, 1, 4, 15, 9])
    forth, back = (
        SPLIT.draw(Rectified(), x.clone(), rng=Rng(0, ids=i))
        for x, i in ((x0, ids), (x0.flip(0), ids.flip(0)))
    )
    assert torch.equal(forth.x_t, back.x_t.flip(0))


def test_stratified_times_are_the_exception(randn64):
    x0, objective = images(randn64), Objective(times=Stratified())
    whole = objective.draw(Rectified(), x0, rng=Rng(0, ids=range(4)))
    part = objective.draw(Rectified(), x0[2:], rng=Rng(0, ids=[2, 3]))
    assert torch.equal(whole.eps[2:], part.eps)
    assert not torch.equal(whole.t[2:], part.t)


@pytest.mark.parametrize(
    ("schedule", "space"), [(LinearBeta(), s) for s in NAMES] + [(Rectified(), "flow")], ids=str
)
def test_data_in_bfloat16_loses_nothing_more(randn64, schedule, space):
    x0 = images(randn64, dtype=torch.bfloat16)
    objective = Objective(times=Uniform(0.05, 0.95), weighting=MinSNR(2.0))
    low, high = objective.draw(schedule, x0, rng=0), objective.draw(schedule, x0.double(), rng=0)
    assert low.eps.dtype == low.x_t.dtype == torch.float32
    assert torch.equal(low.t, high.t)
    assert_close(low.x_t.double(), high.x_t, rtol=1e-5, atol=1e-5)

    def zero(x, timestep, cond):
        return torch.zeros_like(x, dtype=torch.bfloat16)

    terms, exact = (objective.score(Denoiser(zero, schedule, space)(d.x_t, d.t), d) for d in (low, high))
    assert terms.loss.dtype == terms.weight.dtype == torch.float32
    assert terms.t.dtype == terms.log_snr.dtype == torch.float64
    assert_close(terms.loss.double(), exact.loss.double(), rtol=1e-5, atol=0)
    assert_close(terms.weight.double(), exact.weight.double(), rtol=1e-6, atol=0)


def test_float64_stays_float64(randn64):
    terms = SPLIT(Denoiser(Net(), CosineBeta(), "v"), images(randn64), rng=0)
    assert terms.loss.dtype == terms.weight.dtype == torch.float64


def test_samples_may_be_single_numbers(randn64):
    x0 = randn64(6)
    terms = Objective(corruption=[OffsetNoise()])(
        Denoiser(lambda x, t, c: 0 * x, Rectified(), "x0"), x0, rng=0
    )
    assert_close(terms.loss, x0.square(), rtol=1e-6, atol=0)


def test_zero_terminal_snr_is_trained_at_pure_noise_with_v(randn64):
    schedule = ZeroTerminalSNR(ScaledLinearBeta())
    x0 = images(randn64)
    terms = Objective(times=At(1.0), weighting=MinSNR())(Denoiser(Net(), schedule, "v"), x0, rng=0)
    assert torch.isfinite(terms.loss).all()
    assert (terms.weight == 0).all()
    assert (terms.log_snr == -math.inf).all()
    draw = Objective(times=At(1.0)).draw(schedule, x0, rng=0)
    assert torch.equal(draw.x_t, draw.eps)
