"""Time laws against scipy, exact counts, and what stratification promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch.testing import assert_close

from gendiff.math import (
    CosineBeta,
    LinearBeta,
    Rectified,
    ScaledLinearBeta,
    Tabulated,
    VarianceExploding,
    ZeroTerminalSNR,
)
from gendiff.math.grids import shift_times
from gendiff.objectives import LogitNormal, LogNormal, OnGrid, Stratified, TimeLaw, Uniform
from gendiff.random import Rng, as_rng

LAWS = [
    Uniform(),
    Uniform(0.2, 0.7),
    LogitNormal(),
    LogitNormal(0.5, 1.4, shift=3.0),
    LogNormal(),
    LogNormal(0.4, 0.9),
]
SCHEDULES = [LinearBeta(), ZeroTerminalSNR(ScaledLinearBeta(size=40)), Rectified(), VarianceExploding()]
OPEN = 2.0**-33  # the smallest number of Rng's uniform in float64; the largest is 1 - OPEN


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def midpoints(count) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def log_ratio(schedule, t) -> torch.Tensor:
    """log(sigma/alpha)."""
    alpha, sigma = schedule.level(t)
    return (sigma / alpha).log()


# ------------------------------------------------------------------------------ quantiles and draws, by scipy


def uniform(low, high, schedule):
    return stats.uniform(low, high - low), lambda t: t


def logit_normal(mean, std, schedule):
    return stats.norm(mean, std), torch.logit


def log_normal(mean, std, schedule):
    return stats.norm(mean, std), lambda t: log_ratio(schedule, t)


# law, schedule, (the law of scipy, the map of t that has it); no clamp is reached
SCIPY = [
    (Uniform(), Rectified(), uniform(0, 1, Rectified())),
    (Uniform(), LinearBeta(size=10), uniform(0.1, 1, None)),
    (Uniform(0.3, 0.6), VarianceExploding(), uniform(0.3, 0.6, None)),
    (LogitNormal(), Rectified(), logit_normal(0, 1, None)),
    (LogitNormal(0.7, 0.6), Rectified(), logit_normal(0.7, 0.6, None)),
    (LogitNormal(-0.2, 1.3, shift=3.0), Rectified(), logit_normal(-0.2 + math.log(3), 1.3, None)),
    (LogNormal(), VarianceExploding(1e-6, 1e4), log_normal(-1.2, 1.2, VarianceExploding(1e-6, 1e4))),
    (LogNormal(-0.4, 1.0), Rectified(), log_normal(-0.4, 1.0, Rectified())),
    (LogNormal(-0.4, 0.3), LinearBeta(), log_normal(-0.4, 0.3, LinearBeta())),
]
AGAINST_SCIPY = pytest.mark.parametrize(
    ("law", "schedule", "peer"), SCIPY, ids=[f"{a}-{b}" for a, b, _ in SCIPY]
)


@AGAINST_SCIPY
def test_quantiles_are_scipys(law, schedule, peer):
    theirs, seen = peer
    u = midpoints(999)
    # a table takes times within 2^-22 of its own for its own; log(sigma/alpha) is less steep than 20 here
    atol = 1e-9 if schedule.size is None else 20 * 2.0**-22
    assert_close(seen(law.quantile(u, schedule)), f64(theirs.ppf(u.numpy())), rtol=1e-9, atol=atol)


@AGAINST_SCIPY
def test_draws_pass_the_test_of_kolmogorov_and_smirnov(law, schedule, peer):
    theirs, seen = peer
    t = law.draw(schedule, 5000, Rng(0, ids=range(5000)))
    assert stats.kstest(seen(t).numpy(), theirs.cdf).pvalue > 0.01
    # the test can tell: a fifth of a standard deviation is seen
    assert stats.kstest(seen(t).numpy() + theirs.std() / 5, theirs.cdf).pvalue < 1e-4


def test_defaults_of_log_normal_are_edms_training_noise():
    schedule, z = VarianceExploding(), torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = LogNormal().quantile(f64(special.ndtr(z.numpy())), schedule)
    assert_close(schedule.sigma(t), (-1.2 + 1.2 * z).exp(), rtol=1e-10, atol=0)


def test_log_normal_stops_at_the_ends_of_the_schedule():
    t = LogNormal(std=3.0).quantile(f64([OPEN, 1 - OPEN]), VarianceExploding())
    assert_close(VarianceExploding().sigma(t), f64([0.002, 80.0]), rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------- OnGrid


@pytest.mark.parametrize("size", [1, 3, 7, 10, 50, 999, 1000, 4001])
def test_on_grid_hits_every_time_equally_often_and_exactly(size):
    schedule = Tabulated([1e-3] * size)
    t = OnGrid().quantile(midpoints(4 * size), schedule)
    times = [(i + 1) / size for i in range(size) for _ in range(4)]
    assert t.tolist() == times  # the very floats, rising, each four times
    assert schedule.timestep(t).tolist() == [i for i in range(size) for _ in range(4)]


@pytest.mark.parametrize("size", [3, 1000, 4001])
def test_on_grid_stays_on_the_grid_at_the_ends_of_u(size):
    ends = [0.0, OPEN, 1 - OPEN, math.nextafter(1, 0), 1.0]
    t = OnGrid().quantile(f64(ends), Tabulated([1e-3] * size))
    assert t.tolist() == [1 / size, 1 / size, 1.0, 1.0, 1.0]


def test_on_grid_draws_pass_the_chi_squared_test():
    schedule, count = LinearBeta(size=50), 10_000
    timesteps = schedule.timestep(OnGrid().draw(schedule, count, Rng(0, ids=range(count))))
    assert torch.equal(timesteps, timesteps.round())
    counts = torch.bincount(timesteps.long(), minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    lopsided = counts.clone()
    lopsided[0] += 120  # of 200
    lopsided[1] -= 120
    assert stats.chisquare(lopsided.numpy()).pvalue < 1e-9


@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding()], ids=repr)
def test_on_grid_refuses_a_schedule_without_one(schedule):
    with pytest.raises(
        ValueError, match=r"OnGrid needs a table of betas, got .*; use Uniform\(\) or LogitNormal\(\)"
    ):
        OnGrid().draw(schedule, 2, Rng(0))


# ----------------------------------------------------------------------------------------- what all laws keep


@settings(max_examples=40)
@given(
    law=st.sampled_from([*LAWS, *map(Stratified, LAWS)]),
    schedule=st.sampled_from(SCHEDULES),
    u=st.lists(st.floats(OPEN, 1 - OPEN), min_size=1, max_size=8),
)
def test_times_can_be_given_to_a_network_and_rise_with_u(law, schedule, u):
    t = law.quantile(f64(sorted(u)), schedule)
    low = law.low if isinstance(law, Uniform) and law.low else schedule.t_min
    assert (t > 0).all()
    assert (t >= low).all()
    assert (t <= 1).all()
    assert (t.diff() >= 0).all()


@pytest.mark.parametrize("law", [LogitNormal(), LogitNormal(0.3, 2.0)], ids=repr)
def test_a_higher_mean_is_noisier_and_mean_zero_is_symmetric(law):
    u = midpoints(101)
    noisier = LogitNormal(law.mean + 0.5, law.std)
    assert (noisier.quantile(u, Rectified()) > law.quantile(u, Rectified())).all()
    assert noisier.quantile(f64([0.5]), Rectified()).item() > law.quantile(f64([0.5]), Rectified()).item()
    centred = LogitNormal(0.0, law.std).quantile(u, Rectified())
    assert_close(centred + centred.flip(0), torch.ones_like(u), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_a_shift_is_a_map_of_times_and_adds_its_logarithm_to_the_mean(shift):
    u = midpoints(101)
    shifted = LogitNormal(0.4, 0.8, shift=shift).quantile(u, Rectified())
    assert_close(
        shifted, shift_times(LogitNormal(0.4, 0.8).quantile(u, Rectified()), shift), rtol=1e-12, atol=0
    )
    moved = LogitNormal(0.4 + math.log(shift), 0.8).quantile(u, Rectified())
    assert_close(shifted, moved, rtol=1e-12, atol=0)
    assert_close(
        shifted / (1 - shifted),
        f64(special.expit(0.4 + 0.8 * special.ndtri(u.numpy()))).logit().exp() * shift,
    )


# ------------------------------------------------------------------------------------------------- Stratified


@pytest.mark.parametrize("law", [Uniform(), LogitNormal(0.5, 1.4, shift=3.0), LogNormal(-0.4, 0.9)], ids=repr)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_stratified_has_one_time_in_every_share_of_its_law(law, batch):
    edges = law.quantile((torch.arange(1, batch, dtype=torch.float64)) / batch, Rectified())
    for seed in range(5):
        t = Stratified(law).draw(Rectified(), batch, Rng(seed))
        assert torch.equal(torch.searchsorted(edges, t), torch.arange(batch))


def test_stratified_on_a_grid_of_as_many_times_visits_each_once():
    t = Stratified(OnGrid()).draw(LinearBeta(size=64), 64, Rng(3))
    assert LinearBeta(size=64).timestep(t).tolist() == list(range(64))


def test_stratified_over_batches_has_the_law_itself(generator):
    rng = as_rng(generator)
    t = torch.cat([Stratified(LogitNormal()).draw(Rectified(), 16, rng) for _ in range(300)])
    assert stats.kstest(t.logit().numpy(), stats.norm.cdf).pvalue > 0.01


def test_stratified_is_unbiased_and_has_less_variance(generator):
    batch, batches, rng = 16, 400, as_rng(generator)

    def means(law: TimeLaw) -> torch.Tensor:
        """The mean of t² over each of many batches."""
        return torch.stack([law.draw(Rectified(), batch, rng).square().mean() for _ in range(batches)])

    plain, spread = means(Uniform()), means(Stratified(Uniform()))
    assert plain.var().item() == pytest.approx((1 / 5 - 1 / 9) / batch, rel=0.3)  # Var t² of U(0, 1)
    # Var t² within each stratum, from its second and fourth moment
    edges = torch.arange(batch + 1, dtype=torch.float64) / batch
    fourth, second = (edges.pow(p).diff() * batch / p for p in (5, 3))
    exact = (fourth - second.square()).mean() / batch
    assert spread.var().item() == pytest.approx(exact.item(), rel=0.3)
    assert spread.var() < plain.var() / 100
    for sample in (plain, spread):
        assert abs(sample.mean().item() - 1 / 3) < 4 * (sample.var() / batches).sqrt().item()


def test_stratified_is_the_one_law_that_a_split_of_the_batch_changes():
    whole, half = Rng(0, ids=range(4)), Rng(0, ids=[2, 3])
    for law in LAWS:
        assert torch.equal(law.draw(Rectified(), 4, whole)[2:], law.draw(Rectified(), 2, half))
        whole.rewind()
        half.rewind()
    assert not torch.equal(
        Stratified().draw(Rectified(), 4, whole)[2:], Stratified().draw(Rectified(), 2, half)
    )


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2), (math.nan, 1.0)])
def test_uniform_needs_an_interval_of_times(low, high):
    with pytest.raises(ValueError, match="Uniform needs 0 <= low < high <= 1"):
        Uniform(low, high)


def test_uniform_below_the_smallest_time_of_a_table_is_refused():
    with pytest.raises(ValueError, match=r"Uniform\(high=0.05\) lies below the smallest time 0.1"):
        Uniform(high=0.05).draw(CosineBeta(size=10), 2, Rng(0))
    assert (Uniform(0.01, 0.05).draw(CosineBeta(size=10), 8, Rng(0)) <= 0.05).all()


@pytest.mark.parametrize("arguments", [{"std": 0.0}, {"std": -1.0}, {"mean": math.nan}, {"std": math.inf}])
@pytest.mark.parametrize("law", [LogitNormal, LogNormal])
def test_normal_laws_need_a_finite_mean_and_a_positive_std(law, arguments):
    with pytest.raises(ValueError, match=f"{law.__name__} needs a finite mean and a positive std"):
        law(**arguments)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_a_shift_is_positive(shift):
    with pytest.raises(ValueError, match="positive std and shift"):
        LogitNormal(shift=shift)


@pytest.mark.usefixtures("as_users_run")
def test_stratified_spreads_a_law_and_not_its_class():
    with pytest.raises(
        TypeError, match=r"Stratified spreads a TimeLaw, such as Stratified\(LogitNormal\(\)\), got"
    ):
        Stratified(LogitNormal)


def test_laws_are_compared_by_content():
    assert Stratified(LogNormal()) == Stratified(LogNormal(-1.2, 1.2)) != Stratified(LogitNormal())
    assert len({OnGrid(), OnGrid(), Uniform(), Uniform(None, 1.0)}) == 2
