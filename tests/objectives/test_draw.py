"""Draws, couplings and corruptions: what follows when a part is replaced, and the moments of every noise."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from gendiff.denoiser import Denoised
from gendiff.math import CosineBeta, LinearBeta, Prediction, Rectified, VarianceExploding
from gendiff.objectives import Corruption, Draw, Independent, InputPerturbation, Objective, OffsetNoise
from gendiff.random import Rng

SCHEDULES = pytest.mark.parametrize(
    "schedule", [LinearBeta(), CosineBeta(), Rectified(), VarianceExploding()], ids=repr
)


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def noised(schedule, x0, noise, t):
    """x_t sample by sample, in plain Python numbers for the level."""
    rows = []
    for i, time in enumerate(t.tolist()):
        alpha, sigma = (value.item() for value in schedule.level(time))
        rows.append(alpha * x0[i] + sigma * noise[i])
    return torch.stack(rows)


@pytest.fixture
def parts(randn64):
    """(x0, eps, t) of four samples."""
    return randn64(4, 3, 2, 2), randn64(4, 3, 2, 2), f64([0.001, 0.25, 0.5, 1.0])


# ------------------------------------------------------------------------------------------- Draw and its kin


@SCHEDULES
def test_x_t_is_the_mixture_at_the_level_of_every_sample(schedule, parts):
    x0, eps, t = parts
    draw = Draw.of(schedule, x0, eps, t)
    assert_close(draw.x_t, noised(schedule, x0, eps, t), rtol=1e-12, atol=1e-12)
    assert_close(draw.level, schedule.level(t))
    scalar = Draw.of(schedule, x0, eps, 0.5)
    assert scalar.t.tolist() == [0.5] * 4
    assert torch.equal(scalar.x_t, Draw.of(schedule, x0, eps, t.new_full((4,), 0.5)).x_t)


def test_a_perturbation_enters_x_t_in_units_of_eps(parts, randn64):
    x0, eps, t = parts
    surplus = randn64(*eps.shape)
    draw = Draw.of(Rectified(), x0, eps, t, surplus)
    assert_close(draw.x_t, noised(Rectified(), x0, eps + surplus, t), rtol=1e-12, atol=1e-12)
    assert draw.eps is eps


@pytest.mark.parametrize("perturbed", [False, True])
def test_x_t_follows_whatever_is_replaced(parts, randn64, perturbed):
    x0, eps, t = parts
    surplus = randn64(*eps.shape) if perturbed else None
    noise = eps + surplus if perturbed else eps
    draw = Draw.of(LinearBeta(), x0, eps, t, surplus)
    lose, other, flipped = randn64(*x0.shape), randn64(*x0.shape), t.flip(0)
    assert_close(draw.replace(x0=lose).x_t, noised(LinearBeta(), lose, noise, t), rtol=1e-12, atol=1e-12)
    assert_close(
        draw.replace(t=flipped).x_t, noised(LinearBeta(), x0, noise, flipped), rtol=1e-12, atol=1e-12
    )
    assert_close(draw.replace(eps=other).x_t, draw.replace(x0=x0, eps=other).x_t, rtol=0, atol=0)
    assert_close(
        draw.replace(perturbation=None).x_t, noised(LinearBeta(), x0, eps, t), rtol=1e-12, atol=1e-12
    )
    assert_close(
        draw.replace(schedule=Rectified()).x_t, noised(Rectified(), x0, noise, t), rtol=1e-12, atol=1e-12
    )
    given = draw.replace(x_t=lose, eps=other)
    assert given.x_t is lose
    assert given.eps is other
    assert given.t is draw.t
    assert draw.x0 is x0


def test_a_pair_of_preferences_shares_noise_and_times(randn64):
    """Diffusion-DPO: the winner and the loser at the same noise, scored in one batch."""
    objective = Objective(corruption=[InputPerturbation(0.2), OffsetNoise(0.3)])
    win, lose = randn64(3, 2, 4, 4), randn64(3, 2, 4, 4)
    won = objective.draw(LinearBeta(), win, rng=Rng(0, ids=range(3)))
    lost = won.replace(x0=lose)
    both = won.cat(lost)
    assert torch.equal(both.eps[:3], both.eps[3:])
    assert torch.equal(both.t[:3], both.t[3:])
    assert torch.equal(both.x0, torch.cat([win, lose]))
    alpha = LinearBeta().level(won.t).alpha[:, None, None, None]
    assert_close(both.x_t[:3] - both.x_t[3:], alpha * (win - lose), rtol=1e-10, atol=1e-10)
    assert torch.equal(both.x_t, torch.cat([won.x_t, lost.x_t]))
    assert torch.equal(both.replace(t=both.t).x_t, both.x_t)  # the perturbation has come along


@pytest.mark.parametrize("first", [True, False])
def test_cat_of_a_perturbed_and_a_plain_draw_keeps_each_as_it_was(parts, randn64, first):
    x0, eps, t = parts
    plain, perturbed = Draw.of(Rectified(), x0, eps, t), Draw.of(Rectified(), x0, eps, t, randn64(*eps.shape))
    pair = (perturbed, plain) if first else (plain, perturbed)
    both = pair[0].cat(pair[1])
    assert torch.equal(both.x_t, torch.cat([d.x_t for d in pair]))
    assert torch.equal(both.replace(x0=both.x0).x_t, both.x_t)
    assert plain.cat(plain).perturbation is None


def test_draws_of_two_schedules_do_not_share_a_batch(parts):
    with pytest.raises(ValueError, match=r"draws on Rectified\(\) and LinearBeta\(.*\) do not share a batch"):
        Draw.of(Rectified(), *parts).cat(Draw.of(LinearBeta(), *parts))


@pytest.mark.parametrize("t", [torch.tensor([0.5, 0.5]), torch.full((4, 1), 0.5), torch.tensor([0.5])])
def test_times_are_a_scalar_or_one_per_sample(parts, t):
    with pytest.raises(
        ValueError, match=r"t is a scalar or has one value per sample, got \(.*\) for 4 samples"
    ):
        Draw.of(Rectified(), *parts[:2], t)


def test_a_timestep_is_no_time(parts):
    with pytest.raises(ValueError, match="a network's timestep is not a time"):
        Draw.of(LinearBeta(), *parts[:2], 999.0)


@pytest.mark.usefixtures("as_users_run")
def test_data_and_noise_have_one_shape(parts):
    x0, eps, t = parts
    with pytest.raises(ValueError, match=r"eps has shape \(4, 1, 2, 2\) but x0 has shape \(4, 3, 2, 2\)"):
        Draw.of(Rectified(), x0, eps[:, :1], t)


# --------------------------------------------------------------------------------------------------- coupling


def test_independent_noise_is_that_of_its_stream(randn64):
    x0 = randn64(5, 2, 3)
    rng = Rng(7, ids=range(5))
    eps = Independent()(x0, Rng(7, ids=range(5)))
    assert torch.equal(eps, rng.normal("noise", (5, 2, 3), dtype=torch.float64))
    for dtype, noise in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]:
        assert Independent()(x0.to(dtype), Rng(0)).dtype == noise  # noise in half precision would be coarse


# ------------------------------------------------------------------------------------------------ corruptions


def pure(shape, seed=0, **settings):
    """A draw of zeros in float64."""
    return Objective(**settings).draw(LinearBeta(), torch.zeros(shape, dtype=torch.float64), rng=Rng(seed))


def test_offset_noise_is_one_number_per_sample_and_channel(randn64):
    shape, strength = (3, 4, 5, 6), 0.7
    draw, before = pure(shape, corruption=[OffsetNoise(strength)]), pure(shape)
    offset = strength * Rng(0).normal("offset", (3, 4, 1, 1), dtype=torch.float64)
    assert_close(draw.eps - before.eps, offset.expand(shape), rtol=1e-12, atol=1e-12)
    assert torch.equal(draw.t, before.t)  # of its own stream
    assert draw.perturbation is None
    assert_close(draw.x_t, noised(LinearBeta(), draw.x0, draw.eps, draw.t), rtol=1e-12, atol=1e-12)
    terms = Objective().score(_says(draw, draw.eps), draw)
    assert torch.equal(terms.loss, torch.zeros(3, dtype=torch.float64))  # the target is the changed noise


def test_offset_noise_has_its_variance_and_its_correlation_over_pixels():
    count, strength = 20_000, 0.5
    eps = pure((count, 2, 3), corruption=[OffsetNoise(strength)]).eps
    covariance = torch.cov(eps.flatten(1).T)
    exact = torch.eye(6, dtype=torch.float64)
    exact += strength**2 * torch.block_diag(*[torch.ones(3, 3, dtype=torch.float64)] * 2)
    # a covariance estimated from n normals has a variance of (c_ij² + c_ii·c_jj)/n
    error = ((exact**2 + (1 + strength**2) ** 2) / count).sqrt()
    assert ((covariance - exact).abs() < 4 * error).all()
    assert (exact[0, 1] - 0) > 20 * error[0, 1]  # what is absent would be seen


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_offset_noise_of_data_without_pixels(shape):
    draw, before = pure(shape, corruption=[OffsetNoise(0.3)]), pure(shape)
    assert_close(draw.eps - before.eps, 0.3 * Rng(0).normal("offset", shape, dtype=torch.float64))


def test_input_perturbation_changes_x_t_and_nothing_else():
    shape, strength = (4, 2, 3, 3), 0.1
    draw, before = pure(shape, corruption=[InputPerturbation(strength)]), pure(shape)
    for name in ("x0", "eps", "t"):
        assert torch.equal(getattr(draw, name), getattr(before, name))
    xi = Rng(0).normal("perturbation", shape, dtype=torch.float64)
    assert_close(
        draw.x_t, noised(LinearBeta(), draw.x0, draw.eps + strength * xi, draw.t), rtol=1e-12, atol=1e-12
    )
    terms = Objective().score(_says(draw, before.eps), draw)
    assert torch.equal(terms.loss, torch.zeros(4, dtype=torch.float64))  # the target is the noise itself


def test_input_perturbation_has_its_variance():
    count = 20_000
    draw = pure((count, 1), corruption=[InputPerturbation(0.5)])
    inner = draw.x_t / draw.level.sigma[:, None]
    assert inner.var().item() == pytest.approx(1.25, abs=4 * 1.25 * math.sqrt(2 / count))
    assert draw.eps.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    surplus = (inner - draw.eps)[:, 0]
    assert torch.corrcoef(torch.stack([surplus, draw.eps[:, 0]]))[0, 1].abs() < 4 / math.sqrt(count)


@dataclass(frozen=True)
class Affine(Corruption):
    factor: float
    summand: float

    def __call__(self, draw, rng):
        return draw.replace(eps=self.factor * draw.eps + self.summand)


def test_corruptions_are_applied_in_turn():
    plain, double, add = pure((3, 2)), Affine(2.0, 0.0), Affine(1.0, 1.0)
    assert torch.equal(pure((3, 2), corruption=[double, add]).eps, 2 * plain.eps + 1)
    assert torch.equal(pure((3, 2), corruption=(add, double)).eps, 2 * (plain.eps + 1))
    draw = pure((3, 2), corruption=[InputPerturbation(0.1), double])
    assert_close(draw.x_t, noised(LinearBeta(), draw.x0, draw.eps + draw.perturbation, draw.t))


def test_a_corruption_given_twice_draws_twice():
    shape = (3, 2, 4)
    twice = pure(shape, corruption=[OffsetNoise(0.3), OffsetNoise(0.4)])
    rng = Rng(0)
    first, second = (rng.normal("offset", (3, 2, 1), dtype=torch.float64) for _ in range(2))
    assert_close(
        twice.eps - pure(shape).eps, (0.3 * first + 0.4 * second).expand(shape), rtol=1e-12, atol=1e-12
    )
    twice = pure(shape, corruption=[InputPerturbation(0.3), InputPerturbation(0.4)])
    first, second = (rng.normal("perturbation", shape, dtype=torch.float64) for _ in range(2))
    assert_close(twice.perturbation, 0.3 * first + 0.4 * second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [OffsetNoise, InputPerturbation])
def test_strength_zero_changes_nothing_and_a_negative_one_is_refused(kind):
    assert torch.equal(pure((3, 2), corruption=[kind(0.0)]).x_t, pure((3, 2)).x_t)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"strength must not be negative, got {bad}"):
            kind(bad)


def _says(draw, out):
    """The Denoised of a network that predicts noise and said `out`."""
    prediction = Prediction("epsilon")
    return Denoised(*prediction.solve(out, draw.x_t, draw.level), out, prediction)
