"""What every schedule keeps: levels, inverse, monotony, shapes; the two continuous ones in closed form."""

import copy
import math
import pickle
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.math.schedules import Level, Rectified, Schedule, VarianceExploding, VariancePreserving, times
from gendiff.math.tables import (
    CosineBeta,
    LinearBeta,
    ScaledLinearBeta,
    SigmoidBeta,
    TableSchedule,
    Tabulated,
    ZeroTerminalSNR,
)

CONTINUOUS = [Rectified(), VarianceExploding(), VarianceExploding(0.01, 100)]
TABLES = [
    LinearBeta(),
    LinearBeta(size=10),
    ScaledLinearBeta(),
    CosineBeta(),
    CosineBeta(size=4000),
    SigmoidBeta(size=100),
    ZeroTerminalSNR(ScaledLinearBeta()),
    ZeroTerminalSNR(CosineBeta(size=50)),
    Tabulated([0.1, 0.5, 1]),
]
ALL = [*CONTINUOUS, *TABLES]
every = pytest.mark.parametrize("schedule", ALL, ids=repr)
SNAP = 2.0**-22  # a table takes times this close to a grid time for that grid time

few = settings(max_examples=30)  # with checked annotations a call takes a millisecond


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def snapped(schedule: Schedule, t: float) -> float:
    """t, or the grid time of a table that it is taken for."""
    if schedule.size is None:
        return t
    nearest = round(t * schedule.size) / schedule.size
    return nearest if abs(t - nearest) <= SNAP else t


@few
@given(st.sampled_from(ALL), st.floats(1e-6, 1))
def test_time_is_the_inverse_of_log_snr(schedule: Schedule, t: float) -> None:
    assert schedule.time(schedule.log_snr(t)).item() == pytest.approx(
        snapped(schedule, t), rel=1e-12, abs=1e-13
    )


@few
@given(st.sampled_from(ALL), st.floats(-20, 40))
def test_log_snr_is_the_inverse_of_time(schedule: Schedule, log_snr: float) -> None:
    t = schedule.time(log_snr).item()
    noisiest = schedule.log_snr(1.0).item()
    if log_snr <= noisiest:
        assert t == 1
    elif snapped(schedule, t) == t:
        slack = 1e-11 / min(t, 1 - t + 1e-3)  # of the two, rounding of t is the larger
        assert schedule.log_snr(t).item() == pytest.approx(log_snr, abs=slack)


@every
def test_both_ends_of_time(schedule: Schedule) -> None:
    assert schedule.log_snr(0.0).item() == math.inf
    assert (schedule.alpha(0.0).item(), schedule.sigma(0.0).item()) == (1.0, 0.0)
    assert schedule.time(math.inf).item() == 0
    assert schedule.time(-math.inf).item() == 1
    assert schedule.time(schedule.log_snr(1.0)).item() == 1


@every
def test_log_snr_is_that_of_the_level_and_falls_strictly(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 3002, dtype=torch.float64)[1:]
    log_snr, (alpha, sigma) = schedule.log_snr(t), schedule.level(t)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(2 * (alpha / sigma).log(), log_snr, rtol=1e-12, atol=1e-12)
    assert alpha.equal(schedule.alpha(t))
    assert sigma.equal(schedule.sigma(t))


@pytest.mark.parametrize("schedule", TABLES, ids=repr)
def test_tables_preserve_variance(schedule: TableSchedule) -> None:
    assert isinstance(schedule, VariancePreserving)
    alpha, sigma = schedule.level(torch.linspace(0, 1, 777))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-15, atol=1e-15)


@every
def test_maps_keep_the_shape_and_return_float64(schedule: Schedule) -> None:
    maps = (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.timestep, schedule.time)
    for shape in ((), (1,), (3,), (2, 3), (0,)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for value in (f(torch.full(shape, 0.5, dtype=dtype)) for f in maps):
                assert (value.shape, value.dtype) == (shape, torch.float64)
    for f in maps:
        assert f(1).equal(f(1.0))
        assert f(torch.tensor([0.25, 0.75])).equal(torch.stack([f(0.25), f(0.75)]))


@every
def test_a_schedule_is_its_content(schedule: Schedule) -> None:
    twin = eval(repr(schedule))  # the object is its own configuration
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    schedule.log_snr(0.5)  # what this caches is no content
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == twin
        assert other.log_snr(0.3).equal(schedule.log_snr(0.3))
    assert sum(schedule == each for each in ALL) == 1
    with pytest.raises(AttributeError):
        schedule.size = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, 999.0, math.nan, torch.tensor([0.5, 2.0])])
def test_times_outside_are_refused(t: float | Tensor) -> None:
    for schedule in ALL:
        for f in (schedule.level, schedule.log_snr, schedule.timestep):
            with pytest.raises(
                ValueError, match=r"times lie in \[0, 1\] .* a network's timestep is not a time"
            ):
                f(t)


def test_the_error_of_times_names_their_range() -> None:
    with pytest.raises(ValueError, match=r"got 0\.25 … 999; .*schedule\.timestep\(t\)"):
        times(torch.tensor([0.25, 999.0]))


def test_times_are_float64() -> None:
    assert times(1).equal(torch.tensor(1.0, dtype=torch.float64))
    assert times(torch.tensor([0.1])).equal(torch.tensor([0.1]).double())


@every
def test_mix_is_the_definition(schedule: Schedule, generator: torch.Generator) -> None:
    x0, eps = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    rows = [schedule.alpha(u) * a + schedule.sigma(u) * n for u, a, n in zip(t, x0, eps, strict=True)]
    assert schedule.mix(x0, eps, t).equal(torch.stack(rows))
    assert schedule.mix(x0, eps, 0.5)[1].equal(rows[1])
    assert schedule.mix(x0, eps, 0).equal(x0)


def test_mix_is_at_least_float32() -> None:
    for x0, eps, expected in [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ]:
        mixed = Rectified().mix(torch.ones(2, 3, dtype=x0), torch.ones(2, 3, dtype=eps), 0.1)
        assert mixed.dtype == expected
        assert mixed.eq(1).all()  # 0.9 + 0.1 with coefficients of that precision


@pytest.mark.usefixtures("unchecked")
def test_mix_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"eps has shape \(2, 4\) but x0 has shape \(2, 3\)"):
        Rectified().mix(torch.ones(2, 3), torch.ones(2, 4), 0.5)
    with pytest.raises(
        ValueError, match=r"a coefficient of shape \(3,\) does not fit samples of shape \(2, 3\)"
    ):
        Rectified().mix(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.1, 0.2, 0.3]))


def test_level_is_shaped_like_samples() -> None:
    level = Level(
        torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    )
    alpha, sigma = level.like(torch.ones(2, 3, 4), torch.float32)
    assert alpha.tolist() == [[[1.0]], [[2.0]]]
    assert sigma.tolist() == [[[3.0]], [[4.0]]]
    assert alpha.dtype == sigma.dtype == torch.float32


def test_rectified_is_the_straight_path() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    schedule = Rectified()
    assert schedule.alpha(t).equal(1 - t)
    assert schedule.sigma(t).equal(t)
    assert schedule.timestep(t).equal(1000 * t)
    assert (schedule.size, schedule.t_min) == (None, 0.0)
    assert schedule.log_snr(1.0).item() == -math.inf
    assert schedule.time(torch.tensor(0.0)).item() == 0.5


@few
@given(st.floats(1e-300, 1e-3))
def test_rectified_keeps_its_digits_beside_the_data(t: float) -> None:
    schedule = Rectified()
    assert schedule.log_snr(t).item() == pytest.approx(2 * (math.log1p(-t) - math.log(t)), rel=1e-15)
    assert schedule.time(schedule.log_snr(t)).item() == pytest.approx(t, rel=1e-12)


@few
@given(st.floats(0.001, 0.1), st.floats(1, 1000), st.floats(0, 1))
def test_variance_exploding_is_geometric_above_t_min_and_an_angle_below(
    low: float, high: float, u: float
) -> None:
    schedule = VarianceExploding(low, high)
    assert schedule.t_min == 1e-3
    above = 1e-3 + u * (1 - 1e-3)
    assert schedule.sigma(above).item() == pytest.approx(low ** (1 - u) * high**u, rel=1e-11)
    assert schedule.sigma(u * 1e-3).item() == pytest.approx(
        math.tan(u * math.atan(low)), rel=1e-12, abs=1e-300
    )
    assert schedule.alpha(above).item() == 1
    assert schedule.timestep(above).item() == pytest.approx(schedule.sigma(above).log().item() / 4, abs=1e-14)


def test_variance_exploding_ends_where_it_says() -> None:
    schedule = VarianceExploding(0.002, 80)
    assert schedule.sigma(1.0).item() == pytest.approx(80, rel=1e-14)
    assert schedule.sigma(1e-3).item() == pytest.approx(0.002, rel=1e-14)
    assert schedule.time(-2 * math.log(500)).item() == 1  # noisier than t = 1


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)]
)
def test_variance_exploding_needs_a_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"needs 0 < sigma_min < sigma_max < inf, got {low} and {high}"):
        VarianceExploding(low, high)


def test_a_schedule_is_abstract() -> None:
    for cls in (Schedule, VariancePreserving, TableSchedule):
        with pytest.raises(TypeError, match="abstract"):
            cls()  # pyright: ignore[reportAbstractUsage]
