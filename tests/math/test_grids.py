"""Grids against diffusers' schedulers, closed forms and scipy; what they refuse."""

import math
from collections.abc import Callable, Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gendiff.math import grids
from gendiff.math.grids import Grid
from gendiff.math.schedules import Rectified, Schedule, VarianceExploding
from gendiff.math.tables import CosineBeta, LinearBeta, ScaledLinearBeta, ZeroTerminalSNR

few = settings(max_examples=40)  # with checked annotations a call takes a millisecond
LATENT = ScaledLinearBeta()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def timesteps(grid: Grid) -> list[float]:
    """What the network is given, which is at every time but the last."""
    return grid.schedule.timestep(grid.t[:-1]).tolist()


def ratios(grid: Grid) -> Tensor:
    """sigma/alpha where the network is evaluated; beside an entry of a table that of the entry."""
    return (grid.levels.sigma / grid.levels.alpha)[:-1]


def times_of(schedule: Schedule, ratios: list[float]) -> list[float]:
    return schedule.time(-2 * torch.tensor(ratios, dtype=torch.float64).log()).tolist()


# --- the grid


def test_a_grid_is_its_times_and_their_schedule() -> None:
    grid = Grid(LATENT, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert grid == Grid(LATENT, [1, 0.5, 0]) == Grid(ScaledLinearBeta(), (1.0, 0.5, 0.0))
    assert hash(grid) == hash(Grid(LATENT, [1, 0.5, 0]))
    assert grid != Grid(LinearBeta(), [1, 0.5, 0])
    assert grid.times == (1.0, 0.5, 0.0)
    assert grid.steps == 2
    assert grid.t.equal(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    for i, t in enumerate(grid.times):
        assert grid.level(i).alpha == LATENT.alpha(t) == grid.levels.alpha[i]
        assert grid.level(i).sigma == LATENT.sigma(t) == grid.levels.sigma[i]


@pytest.mark.parametrize(
    "times", [[0.5, 1.0], [1.0, 1.0, 0.0], [1.1, 0.5], [0.5, -0.1], [1.0, math.nan], [1.0, 0.0, 0.0]]
)
def test_times_fall_strictly_within_their_range(times: list[float]) -> None:
    with pytest.raises(
        ValueError, match=r"fall strictly within \[0, 1\].*grids\.from_timesteps.*grids\.from_sigmas"
    ):
        Grid(Rectified(), times)


@pytest.mark.usefixtures("unchecked")
def test_a_grid_is_a_list_of_two_or_more_times() -> None:
    for times, shape in [([1.0], r"\(1,\)"), ([], r"\(0,\)"), (torch.ones(2, 2), r"\(2, 2\)")]:
        with pytest.raises(ValueError, match=f"at least two times, got shape {shape}"):
            Grid(Rectified(), times)
    assert grids._shortened(torch.arange(9.0).double()) == "0, 1, 2, 3, …, 6, 7, 8"
    assert grids._shortened(torch.arange(3.0).double()) == "0, 1, 2"


# --- shifts


@few
@given(st.floats(0.01, 100), st.floats(0, 1))
def test_a_shift_multiplies_the_noise_ratio(shift: float, t: float) -> None:
    moved = grids.shift_times(torch.tensor(t, dtype=torch.float64), shift).item()
    assert moved * (1 - t) == pytest.approx(shift * t * (1 - moved), rel=1e-12, abs=1e-15 * (1 + shift))
    back = grids.shift_times(torch.tensor(moved, dtype=torch.float64), 1 / shift).item()
    assert back == pytest.approx(t, rel=1e-12, abs=1e-14 * (1 + shift + 1 / shift))


@few
@given(st.floats(1e-3, 1e3), st.integers(1, 50))
def test_a_shifted_grid_keeps_its_ends(shift: float, steps: int) -> None:
    """Whatever the rounding: 1 + (0.1 - 1) is not 0.1."""
    grid = grids.uniform(Rectified(), steps).shifted(shift)
    assert (grid.times[0], grid.times[-1]) == (1.0, 0.0)
    assert grid.steps == steps
    assert grids.uniform(Rectified(), steps).shifted(1).times == grids.uniform(Rectified(), steps).times


@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_static_shift_is_that_of_diffusers(shift: float, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    grid = grids.uniform(Rectified(), steps).shifted(shift)
    torch.testing.assert_close(grid.t, scheduler.sigmas.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        grid.schedule.timestep(grid.t[:-1]), scheduler.timesteps.double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 8704])
def test_dynamic_shift_is_that_of_flux(tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    rule = scheduler.config
    points = (rule.base_image_seq_len, rule.max_image_seq_len), (rule.base_shift, rule.max_shift)
    mu = np.polynomial.Polynomial.fit(*points, 1)(tokens)
    assert grids.resolution_shift(tokens) == pytest.approx(math.exp(mu), rel=1e-12)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist(), mu=mu)
    grid = grids.uniform(Rectified(), 20).shifted(tokens=tokens)
    torch.testing.assert_close(grid.t, scheduler.sigmas.double(), rtol=1e-6, atol=0)


def test_another_resolution_rule() -> None:
    assert grids.resolution_shift(100, (100, 0.0), (300, 2.0)) == 1
    assert grids.resolution_shift(200, (100, 0.0), (300, 2.0)) == pytest.approx(math.e)


def test_shifts_are_refused() -> None:
    grid = grids.uniform(Rectified(), 4)
    with pytest.raises(ValueError, match=r"give a shift or the number of tokens .* got None and None"):
        grid.shifted()
    with pytest.raises(ValueError, match=r"give a shift or the number of tokens .* got 2\.0 and 256"):
        grid.shifted(2.0, tokens=256)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"a shift is a positive number .* got {shift}"):
            grid.shifted(shift)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        grid.shifted(tokens=0)


# --- spacings of timesteps

SPACINGS: dict[str, Callable[..., Grid]] = {
    "leading": grids.leading,
    "trailing": grids.trailing,
    "linspace": grids.linspace,
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("size", [10, 100, 1000, 4000])
def test_timesteps_are_those_of_diffusers(spacing: str, size: int) -> None:
    """Ties included; not where numpy.arange gives diffusers one timestep too many, which is -1."""
    from diffusers import DDIMScheduler

    schedule = LinearBeta(size=size)
    scheduler = DDIMScheduler(num_train_timesteps=size, timestep_spacing=spacing)
    compared = 0
    for steps in (s for s in range(2, size + 1) if s < 70 or s % 97 == 0 or s == size):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) == steps:
            assert timesteps(SPACINGS[spacing](schedule, steps)) == theirs
            compared += 1
        else:
            assert (spacing, theirs[-1]) == ("trailing", -1)
    assert compared > 0.8 * min(size - 1, 70)


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("steps", [1, 3, 20, 50, 600])
def test_leading_timesteps_with_an_offset(offset: int, steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    scheduler.set_timesteps(steps)
    assert timesteps(grids.leading(LATENT, steps, offset)) == scheduler.timesteps.tolist()


def test_one_step_is_taken_from_pure_noise() -> None:
    assert timesteps(grids.trailing(LATENT, 1)) == timesteps(grids.linspace(LATENT, 1)) == [999]
    assert timesteps(grids.leading(LATENT, 1)) == [0]  # which is why nobody takes it so


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_end_where_they_are_told(spacing: str) -> None:
    make = SPACINGS[spacing]
    assert make(LATENT, 5).times[-1] == 0
    if spacing == "trailing":
        assert make(LATENT, 5, end=LATENT.t_min).times[-1] == 0.001
        assert make(LATENT, 5, end=LATENT.t_min).times[:-1] == make(LATENT, 5).times[:-1]
    for schedule, steps in ((LATENT, 0), (LATENT, 1001), (Rectified(), 5)):
        with pytest.raises(
            ValueError, match=f"needs a table of N betas and 1 to N steps, got .* and {steps} steps"
        ):
            make(schedule, steps)


def test_timesteps_become_times_and_back() -> None:
    assert grids.from_timesteps(LinearBeta(size=4), [3, 1, 0]).times == (1.0, 0.5, 0.25, 0.0)
    assert grids.from_timesteps(LATENT, torch.tensor([999, 499]), end=0.001).times == (1.0, 0.5, 0.001)
    assert grids.from_timesteps(LATENT, torch.tensor([998.5])).times == (0.9995, 0.0)
    assert grids.from_timesteps(Rectified(), [1000.0, 250.0]).times == (1.0, 0.25, 0.0)


@pytest.mark.parametrize(
    ("schedule", "given"),
    [
        (LATENT, [1000.0, 1.0]),
        (LATENT, [5.0, -0.5]),
        (Rectified(), [1001.0]),
        (VarianceExploding(), [1.09, 0.0]),
    ],
    ids=repr,
)
def test_what_are_no_timesteps_are_refused(schedule: Schedule, given: list[float]) -> None:
    with pytest.raises(
        ValueError, match=rf"{given[0]:g}.* are not timesteps of .* runs from .* grids\.from_sigmas"
    ):
        grids.from_timesteps(schedule, given)


# --- spacings of ratios


@few
@given(st.sampled_from([LATENT, CosineBeta(), VarianceExploding()]), st.integers(2, 30), st.floats(1, 10))
def test_karras_is_equation_5(schedule: Schedule, steps: int, rho: float) -> None:
    ends = torch.tensor([1.0, schedule.t_min], dtype=torch.float64)
    high, low = (-schedule.log_snr(ends) / 2).exp().tolist()
    grid = grids.karras(schedule, steps, rho=rho)
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    assert grid.times[:-1] == pytest.approx(times_of(schedule, expected), rel=0, abs=1e-11)
    assert grid.times[-1] == 0
    assert grid.times[0] == pytest.approx(1, abs=1e-12)


@few
@given(st.integers(2, 30), st.floats(0.05, 0.5), st.floats(1, 14))
def test_exponential_is_a_geometric_series(steps: int, low: float, high: float) -> None:
    grid = grids.exponential(LATENT, steps, high, low, end=LATENT.t_min)
    expected = [high * (low / high) ** (i / (steps - 1)) for i in range(steps)]
    assert grid.times == pytest.approx([*times_of(LATENT, expected), 0.001], rel=1e-9)
    flow = grids.exponential(Rectified(), steps, high, low)
    assert ratios(flow).tolist() == pytest.approx(expected, rel=1e-12)
    first, last = 1 / (1 + 1 / high), 1 / (1 + 1 / low)
    assert grids.uniform_log_snr(Rectified(), steps, first, last).times == pytest.approx(
        flow.times, rel=1e-12
    )


def test_uniform_log_snr_is_uniform_from_end_to_end() -> None:
    grid = grids.uniform_log_snr(LATENT, 9, end=1e-4)
    log_snr = LATENT.log_snr(grid.t[:-1])
    steps = log_snr.diff()
    torch.testing.assert_close(steps, steps.mean().expand(8), rtol=1e-4, atol=0)
    assert (log_snr[0], log_snr[-1]) == (LATENT.log_snr(1.0), LATENT.log_snr(0.001))
    assert grid.times[-1] == 1e-4


@settings(max_examples=12)  # a quantile is a bisection in Python
@given(st.integers(1, 12), st.floats(0.3, 4), st.floats(0.3, 4))
def test_beta_spacing_lies_on_the_quantiles_of_scipy(steps: int, a: float, b: float) -> None:
    quantiles = torch.from_numpy(stats.beta.ppf(1 - np.linspace(0, 1, steps), a, b))
    times = grids.beta(LATENT, steps, a, b, "time")
    torch.testing.assert_close(times.t[:-1], 0.001 + 0.999 * quantiles, rtol=1e-7, atol=0)
    schedule = VarianceExploding()
    sigmas = grids.beta(schedule, steps, a, b)
    torch.testing.assert_close(ratios(sigmas), 0.002 + (80 - 0.002) * quantiles, rtol=1e-7, atol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and new numpy
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [2, 5, 20, 50])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_ratios_are_the_sigmas_of_diffusers(name: str, steps: int, beta_schedule: str) -> None:
    """Up to their float32: 1 - ᾱ of their first entry is off by 1.7e-4 for the linear betas."""
    from diffusers import EulerDiscreteScheduler

    ends = {"beta_start": 0.00085, "beta_end": 0.012} if beta_schedule == "scaled_linear" else {}
    schedule = LATENT if ends else LinearBeta()
    flags = {f"use_{name}_sigmas": True}
    scheduler = EulerDiscreteScheduler(beta_schedule=beta_schedule, **ends, **flags)
    scheduler.set_timesteps(steps)
    grid = getattr(grids, name)(schedule, steps)
    torch.testing.assert_close(ratios(grid), scheduler.sigmas[:-1].double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        torch.tensor(timesteps(grid)), scheduler.timesteps.double(), rtol=0, atol=0.01, check_dtype=False
    )
    # their formula in float64, between our ends
    series = getattr(scheduler, f"_convert_to_{name}")(ratios(grid).numpy(), steps)
    torch.testing.assert_close(ratios(grid), torch.as_tensor(series).double(), rtol=1e-5, atol=0)


def test_spacings_of_ratios_end_where_they_are_told() -> None:
    for make in (grids.karras, grids.exponential, grids.beta):
        assert make(LATENT, 5, end=0.0005).times[-1] == 0.0005
    assert grids.beta(LATENT, 5, space="time", end=0.0005).times[-1] == 0.0005


def test_uniform_is_uniform() -> None:
    assert grids.uniform(Rectified(), 4).times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert grids.uniform(LATENT, 2, start=0.6, end=0.2).times == pytest.approx((0.6, 0.4, 0.2))


def test_sigmas_become_times() -> None:
    assert grids.from_sigmas(Rectified(), [3, 1, 0]).times == (0.75, 0.5, 0.0)
    grid = grids.from_sigmas(LATENT, torch.tensor([14.0, 1.0, 0.1]))
    assert grid.steps == 2
    assert (grid.levels.sigma / grid.levels.alpha).tolist() == pytest.approx([14, 1, 0.1], rel=1e-5)


def test_ratios_out_of_reach_are_refused_and_rounding_is_not() -> None:
    highest = (-LATENT.log_snr(1.0) / 2).exp().item()
    assert grids.from_sigmas(LATENT, [highest * 1.0005, 1.0]).times[0] == 1
    with pytest.raises(
        ValueError, match=r"reaches the ratio sigma/alpha 14\.6146 at t = 1, got 80, 1; give ratios"
    ):
        grids.from_sigmas(LATENT, [80.0, 1.0])
    with pytest.raises(ValueError, match="reaches the ratio"):
        grids.karras(LATENT, 5, sigma_max=80)
    assert grids.from_sigmas(ZeroTerminalSNR(LATENT), [1e9, 1.0]).times[0] < 1


@pytest.mark.parametrize("make", [grids.karras, grids.exponential])
@pytest.mark.parametrize(("high", "low"), [(None, None), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0), (math.inf, 1.0)])
def test_ratios_need_finite_ends(make: Callable[..., Grid], high: float | None, low: float | None) -> None:
    with pytest.raises(
        ValueError, match=r"from a finite first to a positive last .* Rectified\(\) reaches from inf to 0"
    ):
        make(Rectified(), 5, high, low)


@pytest.mark.usefixtures("unchecked")
def test_spacings_say_what_they_need() -> None:
    for make in (grids.uniform, grids.karras, grids.exponential, grids.uniform_log_snr, grids.beta):
        with pytest.raises(ValueError, match="a grid needs at least one step, got 0"):
            make(LATENT, 0)
    with pytest.raises(ValueError, match=r"rho must be positive, got -7\.0"):
        grids.karras(LATENT, 5, rho=-7.0)
    with pytest.raises(ValueError, match="unknown space 'times'; did you mean 'time'"):
        grids.beta(LATENT, 5, space="times")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="positive a and b"):
        grids.beta(LATENT, 5, a=0)
