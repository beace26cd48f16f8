"""The objective: targets, the exact least loss, spaces, splits of a batch, precision, and what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import (
    CosineBeta,
    GaussianOracle,
    LinearBeta,
    Prediction,
    Rectified,
    ScaledLinearBeta,
    VarianceExploding,
    ZeroTerminalSNR,
)
from gendiff.objectives import (
    MSE,
    Draw,
    EDMWeighting,
    Huber,
    InputPerturbation,
    LogitNormal,
    LogNormal,
    LossTerms,
    MinSNR,
    Objective,
    OffsetNoise,
    OnGrid,
    Stratified,
    TimeLaw,
    Uniform,
    Unweighted,
)
from gendiff.random import GeneratorRng, Rng

NAMES = ["x0", "epsilon", "v", "flow", "edm"]
SPACES = pytest.mark.parametrize("space", NAMES)
LAW = GaussianOracle(
    torch.tensor([0.5, -0.25, 1.0]), torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, 0.1], [0.0, 0.1, 0.3]])
)


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class At(TimeLaw):
    """Always the same time."""

    t: float

    def quantile(self, u, schedule):
        return torch.full_like(u, self.t)


class Net(nn.Module):
    """A small network in x_t and the timestep, smooth in both."""

    def __init__(self, dtype=torch.float64, channels=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.outer = (nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype) for _ in range(2))

    def forward(self, x, timestep, cond):
        phase = torch.sin(timestep.to(x.dtype))[:, None, None, None]
        return self.outer(torch.tanh(self.inner(x) + phase))


def images(randn64, batch=4, dtype=torch.float64):
    return randn64(batch, 2, 6, 6).to(dtype)


# -------------------------------------------------------------------------------------------------------- the two halves


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


# -------------------------------------------------------------------------------------------------------------- targets


def textbook(space, x0, eps, alpha, sigma, sigma_data=0.5):
    if space == "edm":  # Karras et al. 2022, eq. 8: (y - c_skip·(y + n))/c_out, at x = x_t/alpha and sigma/alpha
        noise = sigma / alpha
        c_skip = sigma_data**2 / (noise**2 + sigma_data**2)
        c_out = noise * sigma_data / (noise**2 + sigma_data**2) ** 0.5
        return (x0 - c_skip * (x0 + noise * eps)) / c_out
    return {"x0": x0, "epsilon": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[space]


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


# ------------------------------------------------------------------------------------------------- the exact least loss


class Exact:
    """Points (x0, eps) with the first and second moments of a Gaussian law and unit noise.

    A squared error of anything linear in (x0, eps) has the mean over these 4d points that it has over the law.
    """

    def __init__(self, law: GaussianOracle):
        size = law.size
        points = (2 * size) ** 0.5 * torch.cat([torch.eye(2 * size), -torch.eye(2 * size)]).double()
        self.x0 = law.mean + points[:, :size] @ torch.linalg.cholesky(law.covariance).T
        self.eps = points[:, size:]


LEVELS = [(LinearBeta(), 0.05), (LinearBeta(), 0.6), (CosineBeta(), 0.9), (Rectified(), 0.3), (VarianceExploding(), 0.7)]


@SPACES
@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=lambda v: str(v))
def test_the_exact_denoiser_has_the_least_loss(space, schedule, t):
    exact, denoise = Exact(LAW), OracleDenoiser(LAW, schedule)
    draw = Draw.of(schedule, exact.x0, exact.eps, t)
    alpha, sigma = schedule.level(t)
    least = Objective(space=space).score(denoise(draw.x_t, draw.t), draw).loss.mean()
    in_x0 = LAW.mmse(alpha, sigma) / LAW.size
    assert_close(least, in_x0 * (Prediction(space).determinant(schedule.level(t)) / sigma) ** 2, rtol=1e-9, atol=0)


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


# --------------------------------------------------------------------------------------------------------------- spaces


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
        with pytest.raises(ValueError, match=r"no network output to compare; say in which space .*space='x0'"):
            Objective().score(denoised, draw)


def test_a_guided_denoiser_is_trained_like_any_other(randn64):
    denoiser, x0 = Denoiser(Net(), Rectified(), "flow"), images(randn64)
    guided = Guider(denoiser, branches={"cond": None, "uncond": None}, combine=lambda cond, uncond: cfg(cond, uncond, 1.0))
    own, through = (Objective(space="x0")(denoise, x0, rng=0) for denoise in (denoiser, guided))
    assert_close(through.loss, own.loss, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- masks and weights


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
        for total, part in zip(expected, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            total += weight * part / 4
    assert_close(torch.autograd.grad(terms.mean(), parameters), tuple(expected), rtol=1e-10, atol=1e-14)


def test_a_weight_may_be_learned(randn64):
    draw = Objective().draw(Rectified(), images(randn64), rng=0)
    terms = Objective().score(Denoiser(Net(), Rectified(), "flow")(draw.x_t, draw.t), draw)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    LossTerms(terms.loss, weight=weight).mean().backward()
    assert_close(weight.grad, terms.loss / 4)


def test_unweighted_has_no_weight_and_its_mean_is_the_mean(randn64):
    terms = Objective(weighting=Unweighted())(Denoiser(Net(), LinearBeta(), "epsilon"), images(randn64), rng=0)
    assert terms.weight is None
    assert torch.equal(terms.mean(), terms.loss.mean())


# ---------------------------------------------------------------------------------------------- splits and precision

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
    ("schedule", "sizes"), [(CosineBeta(), (1, 1, 1, 1, 1)), (CosineBeta(), (2, 3)), (Rectified(), (4, 1))], ids=str
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
    forth, back = (SPLIT.draw(Rectified(), x.clone(), rng=Rng(0, ids=i)) for x, i in ((x0, ids), (x0.flip(0), ids.flip(0))))
    assert torch.equal(forth.x_t, back.x_t.flip(0))


def test_stratified_times_are_the_exception(randn64):
    x0, objective = images(randn64), Objective(times=Stratified())
    whole = objective.draw(Rectified(), x0, rng=Rng(0, ids=range(4)))
    part = objective.draw(Rectified(), x0[2:], rng=Rng(0, ids=[2, 3]))
    assert torch.equal(whole.eps[2:], part.eps)
    assert not torch.equal(whole.t[2:], part.t)


@pytest.mark.parametrize(("schedule", "space"), [(LinearBeta(), s) for s in NAMES] + [(Rectified(), "flow")], ids=str)
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
    terms = Objective(corruption=[OffsetNoise()])(Denoiser(lambda x, t, c: 0 * x, Rectified(), "x0"), x0, rng=0)
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


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_refused(randn64, bad):
    x0 = images(randn64)
    x0[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"x0 holds 1 value\(s\) that are NaN or infinite out of 288; clean the batch"):
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
        ({"corruption": OffsetNoise()}, r"corruption of an Objective is a sequence of Corruptions, got OffsetNoise\("),
        ({"corruption": [OffsetNoise]}, r"corruption of an Objective is a sequence of Corruptions, got \[<class"),
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
    with pytest.raises(TypeError, match=r"got Net; wrap the network: Denoiser\(network, schedule, prediction\)"):
        Objective()(Net(), x0, rng=0)
    with pytest.raises(TypeError, match="x0 is torch.uint8; noise is added to floating-point data"):
        Objective().draw(LinearBeta(), torch.zeros(2, 3, dtype=torch.uint8), rng=0)
    with pytest.raises(ValueError, match="there is no hidden generator"):
        Objective().draw(LinearBeta(), x0, rng=None)
    with pytest.raises(ValueError, match="the first dimension must be 3, the samples of this Rng"):
        Objective().draw(LinearBeta(), x0, rng=Rng(0, ids=range(3)))
    draw = Objective().draw(Rectified(), x0, rng=0)
    denoised = Denoiser(Net(), Rectified(), "flow")(draw.x_t, draw.t)
    with pytest.raises(ValueError, match=r"target has shape \(3, 2, 6, 6\) but prediction has shape \(4, 2, 6, 6\)"):
        short = draw.replace(x0=draw.x0[:3], eps=draw.eps[:3], t=draw.t[:3])
        Objective().score(denoised, short)
    with pytest.raises(ValueError, match="must broadcast over"):
        Objective().score(denoised, draw, where=torch.ones(6, 6))
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise'"):
        draw.replace(noise=draw.eps)


def test_an_objective_is_its_own_configuration():
    one, other = (Objective(times=LogitNormal(), corruption=c) for c in ([OffsetNoise()], (OffsetNoise(0.1),)))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Objective(times=LogitNormal())
    assert Objective(space="v") == Objective(space=Prediction("v"))
