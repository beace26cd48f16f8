"""The objective: its two halves, its targets, and what it refuses."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gendiff.denoiser import Denoised, Denoiser
from gendiff.math import (
    CosineBeta,
    LinearBeta,
    Prediction,
    Rectified,
    VarianceExploding,
)
from gendiff.objectives import (
    MSE,
    EDMWeighting,
    Huber,
    LogitNormal,
    LogNormal,
    MinSNR,
    Objective,
    OffsetNoise,
    OnGrid,
    Uniform,
)
from gendiff.random import GeneratorRng, Rng
from tests.objectives.nets import NAMES, At, Net, f64, images, textbook

SPACES = pytest.mark.parametrize("space", NAMES)


# --------------------------------------------------------------------------------------------- the two halves


@pytest.mark.parametrize(
    ("objective", "schedule", "prediction"),
    [
        (Objective(), LinearBeta(), "epsilon"),
        (Objective(weighting=MinSNR(), corruption=[OffsetNoise()], error=Huber(0.1)), CosineBeta(), "v"),
        (Objective(times=LogitNormal(), space="x0"), Rectified(), "flow"),
        (Objective(times=LogNormal(), weighting=EDMWeighting()), VarianceExploding(), "edm"),
    ],
    ids=["ddpm", "v", "flow", "edm"],
)
def test_the_call_is_draw_then_denoise_then_score(randn64, objective, schedule, prediction):
    denoiser, x0 = Denoiser(Net(), schedule, prediction), images(randn64)
    whole = objective(denoiser, x0, rng=Rng(0, ids=range(4)))
    draw = objective.draw(schedule, x0, rng=Rng(0, ids=range(4)))
    parts = objective.score(denoiser(draw.x_t, draw.t), draw)
    for terms in (whole, parts):
        assert_close(terms.log_snr, schedule.log_snr(draw.t), rtol=0, atol=0)
    for name in ("loss", "weight", "t"):
        mine, theirs = getattr(whole, name), getattr(parts, name)
        assert (mine is theirs is None) or torch.equal(mine, theirs)
    expected = whole.loss if whole.weight is None else whole.loss * whole.weight
    assert_close(whole.mean(), expected.sum() / 4)


def test_randomness_is_an_rng_a_generator_or_a_seed(randn64, generator):
    x0 = images(randn64)
    seeded = Objective().draw(LinearBeta(), x0, rng=3)
    assert torch.equal(seeded.x_t, Objective().draw(LinearBeta(), x0, rng=Rng(3)).x_t)
    wrapped, plain = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = Objective().draw(LinearBeta(), x0, rng=wrapped)
    assert torch.equal(drawn.x_t, Objective().draw(LinearBeta(), x0, rng=GeneratorRng(plain)).x_t)


def test_the_default_times_are_those_of_the_schedule(randn64):
    x0 = images(randn64)
    on_grid, uniform = Objective(times=OnGrid()), Objective(times=Uniform())
    assert torch.equal(Objective().draw(LinearBeta(), x0, rng=0).t, on_grid.draw(LinearBeta(), x0, rng=0).t)
    assert torch.equal(Objective().draw(Rectified(), x0, rng=0).t, uniform.draw(Rectified(), x0, rng=0).t)


def test_the_condition_reaches_the_network(randn64):
    def net(x, timestep, cond):
        return x * 0 + cond["label"][:, None, None, None]

    net.accepts = frozenset({"label"})
    x0, label = images(randn64), f64([0.0, 1.0, 2.0, 3.0])
    terms = Objective(times=At(0.5))(Denoiser(net, Rectified(), "x0"), x0, {"label": label}, rng=0)
    assert_close(terms.loss, (label[:, None, None, None] - x0).square().flatten(1).mean(1), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- targets


@SPACES
@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified(), VarianceExploding()], ids=repr)
def test_the_target_is_the_textbooks(randn64, space, schedule):
    x0 = images(randn64)
    draw = Objective(times=Uniform(0.1, 0.9)).draw(schedule, x0, rng=0)
    alpha, sigma = (value[:, None, None, None] for value in draw.level)
    target = textbook(space, draw.x0, draw.eps, alpha, sigma)
    prediction = Prediction(space)
    for out in (target, randn64(*target.shape)):
        denoised = Denoised(*prediction.solve(out, draw.x_t, draw.level), out, prediction)
        loss = Objective().score(denoised, draw).loss
        assert_close(loss, (out - target).square().flatten(1).mean(1), rtol=1e-10, atol=1e-20)


def test_a_network_of_the_other_sign_is_compared_with_the_other_target(randn64):
    draw = Objective().draw(Rectified(), images(randn64), rng=0)
    prediction = Prediction("flow", sign=-1)
    out = draw.x0 - draw.eps
    denoised = Denoised(*prediction.solve(out, draw.x_t, draw.level), out, prediction)
    assert (Objective().score(denoised, draw).loss == 0).all()
    assert_close(denoised.x0, draw.x0)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_refused(randn64, bad):
    x0 = images(randn64)
    x0[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"x0 holds 1 value.* 288.*; clean the batch"):
        Objective().draw(LinearBeta(), x0, rng=0)


@pytest.mark.parametrize("shape", [(0, 3), ()])
def test_an_empty_batch_is_refused(shape):
    with pytest.raises((ValueError, TypeError), match=r"x0"):
        Objective().draw(LinearBeta(), torch.zeros(shape), rng=0)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"times": LogitNormal}, "times of an Objective is a TimeLaw, got <class"),
        ({"weighting": "min-snr"}, "weighting of an Objective is a Weighting, got 'min-snr'"),
        ({"weighting": None}, "weighting of an Objective is a Weighting, got None"),
        ({"coupling": 3}, "coupling of an Objective is a Coupling, got 3"),
        ({"error": MSE}, "error of an Objective is a Error, got <class"),
        ({"error": nn.MSELoss()}, r"error of an Objective is a Error, got MSELoss\(\)"),
        (
            {"corruption": OffsetNoise()},
            r"corruption of an Objective is a sequence of Corruptions, got OffsetNoise\(",
        ),
        (
            {"corruption": [OffsetNoise]},
            r"corruption of an Objective is a sequence of Corruptions, got \[<class",
        ),
        ({"corruption": None}, "corruption of an Objective is a sequence of Corruptions, got None"),
    ],
    ids=str,
)
def test_parts_of_a_wrong_kind_are_refused(arguments, text):
    with pytest.raises(TypeError, match=text):
        Objective(**arguments)


@pytest.mark.usefixtures("as_users_run")
def test_wrong_arguments_say_what_to_do(randn64):
    x0 = images(randn64)
    with pytest.raises(ValueError, match="unknown prediction 'epsylon'; did you mean 'epsilon'"):
        Objective(space="epsylon")
    with pytest.raises(
        TypeError, match=r"got Net; wrap the network: Denoiser\(network, schedule, prediction\)"
    ):
        Objective()(Net(), x0, rng=0)
    with pytest.raises(TypeError, match=r"x0 is torch\.uint8; noise is added to floating-point data"):
        Objective().draw(LinearBeta(), torch.zeros(2, 3, dtype=torch.uint8), rng=0)
    with pytest.raises(ValueError, match="there is no hidden generator"):
        Objective().draw(LinearBeta(), x0, rng=None)
    with pytest.raises(ValueError, match="the first dimension must be 3, the samples of this Rng"):
        Objective().draw(LinearBeta(), x0, rng=Rng(0, ids=range(3)))
    draw = Objective().draw(Rectified(), x0, rng=0)
    denoised = Denoiser(Net(), Rectified(), "flow")(draw.x_t, draw.t)
    short = draw.replace(x0=draw.x0[:3], eps=draw.eps[:3], t=draw.t[:3])
    with pytest.raises(ValueError, match=r"target has shape \(3, 2, 6, 6\) but prediction has shape \(4, 2"):
        Objective().score(denoised, short)
    with pytest.raises(ValueError, match="must broadcast over"):
        Objective().score(denoised, draw, where=torch.ones(6, 6))
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise'"):
        draw.replace(noise=draw.eps)


def test_an_objective_is_its_own_configuration():
    one, other = (
        Objective(times=LogitNormal(), corruption=c) for c in ([OffsetNoise()], (OffsetNoise(0.1),))
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one != Objective(times=LogitNormal())
    assert Objective(space="v") == Objective(space=Prediction("v"))
