"""Schedules that are tables: the entries against mpmath and diffusers, and what lies between entries."""

import itertools
import math
from collections.abc import Callable, Iterator

import jaxtyping
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.math.schedules import Rectified
from gendiff.math.tables import (
    CosineBeta,
    LinearBeta,
    ScaledLinearBeta,
    SigmoidBeta,
    TableSchedule,
    Tabulated,
    ZeroTerminalSNR,
)

mp = mpmath.mp.clone()  # a context of our own: the precision of mpmath's is global
mp.dps = 50
SNAP = 2.0**-22
SIZES = [10, 100, 1000, 4000]
few = settings(max_examples=40)  # with checked annotations a call takes a millisecond

Exact = list[mpmath.mpf]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def exact_linear(size: int, start: float = 1e-4, end: float = 0.02) -> Exact:
    return [mp.mpf(start) + (mp.mpf(end) - mp.mpf(start)) * i / (size - 1) for i in range(size)]


def exact_scaled_linear(size: int) -> Exact:
    return [root**2 for root in exact_linear(size, mp.sqrt(mp.mpf(0.00085)), mp.sqrt(mp.mpf(0.012)))]


def exact_sigmoid(size: int) -> Exact:
    start, end = mp.mpf(1e-4), mp.mpf(0.02)
    return [start + (end - start) / (1 + mp.exp(6 - mp.mpf(12) * i / (size - 1))) for i in range(size)]


def exact_cosine(size: int) -> Exact:
    def f(i: int) -> mpmath.mpf:
        return mp.cos((mp.mpf(i) / size + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2

    return [min(1 - f(i + 1) / f(i), mp.mpf("0.999")) for i in range(size)]


KINDS: dict[str, tuple[type[TableSchedule], Callable[[int], Exact]]] = {
    "linear": (LinearBeta, exact_linear),
    "scaled_linear": (ScaledLinearBeta, exact_scaled_linear),
    "sigmoid": (SigmoidBeta, exact_sigmoid),
    "squaredcos_cap_v2": (CosineBeta, exact_cosine),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def worst(values: Tensor, exact: Exact) -> float:
    """The largest relative error."""
    return max(
        float(abs(mp.mpf(a) / b - 1)) if b != 0 else abs(a)
        for a, b in zip(values.tolist(), exact, strict=True)
    )


# --- entries


@pytest.mark.parametrize(
    ("kind", "size"), [*itertools.product(KINDS, (10, 1000)), ("squaredcos_cap_v2", 4000)]
)
def test_entries_are_exact(kind: str, size: int) -> None:
    cls, exact_betas = KINDS[kind]
    schedule, betas = cls(size=size), exact_betas(size)
    assert worst(-schedule.log_alphas.expm1(), betas) < 1e-12
    log_alphas = [mp.log1p(-beta) for beta in betas]
    assert worst(schedule.log_alphas, log_alphas) < 1e-12
    assert worst(schedule.log_alpha_bar, list(np.cumsum(log_alphas))) < 1e-12


@every_kind
def test_betas_are_those_of_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler

    ends = {"beta_start": 0.00085, "beta_end": 0.012} if kind == "scaled_linear" else {}
    theirs = DDPMScheduler(beta_schedule=kind, **ends).betas
    ours = -KINDS[kind][0]().log_alphas.expm1()
    torch.testing.assert_close(theirs.double(), ours, rtol=3e-7, atol=0)  # theirs are float32


def test_cosine_betas_are_capped() -> None:
    betas = -CosineBeta(size=1000).log_alphas.expm1()
    assert betas[-1].item() == pytest.approx(0.999, rel=1e-13)
    assert (
        betas > 0.5
    ).sum() == 3  # 1 - ((j - 1)/j)² for j steps from the end, of which only the last is capped
    assert CosineBeta(size=1).log_alphas.exp().item() == pytest.approx(0.001)


def test_zero_terminal_snr_is_exact() -> None:
    """Algorithm 1 of Lin et al. as it is printed, with 50 digits."""
    betas = exact_scaled_linear(1000)
    roots, product = [], mp.mpf(1)
    for beta in betas:
        product *= 1 - beta
        roots.append(mp.sqrt(product))
    first, last = roots[0], roots[-1]
    rescaled = [((root - last) * first / (first - last)) ** 2 for root in roots]
    schedule = ZeroTerminalSNR(ScaledLinearBeta())
    assert worst(schedule.log_alpha_bar[:-1], [mp.log(bar) for bar in rescaled[:-1]]) < 1e-12
    assert schedule.log_alpha_bar[-1] == -math.inf
    assert schedule.level(1.0).alpha == 0
    assert schedule.level(1.0).sigma == 1
    assert schedule.log_alphas[0] == ScaledLinearBeta().log_alphas[0]


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    plain = ScaledLinearBeta()
    ours = -ZeroTerminalSNR(plain).log_alphas.expm1()
    betas = -plain.log_alphas.expm1()
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), ours, rtol=1e-10, atol=0)
    # as they run it, in float32, betas lose their last digits in 1 - alpha
    torch.testing.assert_close(rescale_zero_terminal_snr(betas.float()).double(), ours, rtol=0, atol=1e-5)


# --- times of entries


@pytest.mark.parametrize("size", SIZES)
def test_every_rounding_of_a_grid_time_is_that_entry(size: int) -> None:
    schedule = LinearBeta(size=size)
    i = torch.arange(size)
    log_bar = schedule.log_alpha_bar
    log_snr = log_bar - torch.log(-torch.expm1(log_bar))
    doubles = (i + 1).double() / size
    one = torch.tensor(1.0)
    for t in (
        doubles,
        (i + 1).double() * (1 / size),
        doubles.float(),
        (i + 1).float() * (one / size),
        1 - (size - 1 - i).float() / size,
        torch.linspace(1 / size, 1, size),
        torch.nextafter(doubles.float(), one),
        torch.nextafter(doubles.float(), -one),
    ):
        t = t.clamp(max=1)
        assert schedule.timestep(t).equal(i.double())
        torch.testing.assert_close(schedule.log_snr(t), log_snr, rtol=1e-14, atol=1e-14)
        assert schedule.log_snr(t).equal(schedule.log_snr(doubles))
        assert schedule.alpha(t).equal(schedule.alpha(doubles))


def test_only_rounding_is_rounded() -> None:
    schedule = LinearBeta()
    for t in (0.5 + 1.5 * SNAP, 0.5 - 1.5 * SNAP):
        assert schedule.timestep(t).item() == pytest.approx(1000 * t - 1, abs=1e-9)
        assert schedule.log_snr(t) != schedule.log_snr(0.5)
    assert schedule.timestep(0.5 + 0.5 * SNAP) == 499


@few
@given(st.sampled_from(SIZES), st.floats(0, 1))
def test_timestep_is_n_t_minus_one_and_not_negative(size: int, t: float) -> None:
    timestep = LinearBeta(size=size).timestep(t).item()
    assert timestep == pytest.approx(max(size * t - 1, 0), abs=size * SNAP)
    assert timestep >= 0


@pytest.mark.parametrize("size", SIZES)
def test_t_min_is_the_first_entry(size: int) -> None:
    for schedule in (LinearBeta(size=size), Tabulated([0.1] * size), ZeroTerminalSNR(CosineBeta(size=size))):
        assert schedule.size == size
        assert schedule.t_min == 1 / size
        assert schedule.timestep(schedule.t_min) == 0
        alpha_bar = schedule.alpha(schedule.t_min) ** 2
        torch.testing.assert_close(alpha_bar, schedule.log_alphas[0].exp(), rtol=1e-14, atol=0)


# --- times between entries

TABLES = [LinearBeta(), ScaledLinearBeta(), CosineBeta(), SigmoidBeta(size=10), ZeroTerminalSNR(LinearBeta())]
INSIDE = st.floats(0.001, 0.999)


def exact_log_snr(schedule: TableSchedule, i: int) -> mpmath.mpf:
    """At entry i, from its own betas."""
    bar = mp.exp(mp.fsum(mp.mpf(x) for x in schedule.log_alphas[: i + 1].tolist()))
    return mp.log(bar / (1 - bar))


@few
@given(st.sampled_from(TABLES), st.floats(0, 1), INSIDE)
def test_log_snr_is_linear_between_entries(schedule: TableSchedule, where: float, w: float) -> None:
    i = round(where * (schedule.size - 3))  # the last segment of a table may be open
    left, right = exact_log_snr(schedule, i), exact_log_snr(schedule, i + 1)
    expected = float((1 - mp.mpf(w)) * left + mp.mpf(w) * right)
    assert schedule.log_snr((i + 1 + w) / schedule.size).item() == pytest.approx(
        expected, rel=1e-11, abs=1e-11
    )


@few
@given(st.sampled_from(TABLES), INSIDE)
def test_the_angle_is_linear_below_t_min(schedule: TableSchedule, w: float) -> None:
    first = mp.mpf(schedule.log_alphas[0].item())
    angle = mp.atan2(mp.sqrt(-mp.expm1(first)), mp.exp(first / 2))
    alpha, sigma = schedule.level(w / schedule.size)
    assert alpha.item() == pytest.approx(float(mp.cos(w * angle)), rel=1e-12)
    assert sigma.item() == pytest.approx(float(mp.sin(w * angle)), rel=1e-10)


@few
@given(st.sampled_from([ScaledLinearBeta(), CosineBeta(), LinearBeta(size=10)]), INSIDE)
def test_the_angle_is_linear_in_a_last_segment_of_zero_snr(plain: TableSchedule, w: float) -> None:
    schedule = ZeroTerminalSNR(plain)
    last = exact_log_snr(schedule, schedule.size - 2)
    before = mp.atan(mp.exp(-last / 2))
    angle = before + w * (mp.pi / 2 - before)
    alpha, sigma = schedule.level((schedule.size - 1 + w) / schedule.size)
    assert alpha.item() == pytest.approx(float(mp.cos(angle)), rel=1e-9)
    assert sigma.item() == pytest.approx(float(mp.sin(angle)), rel=1e-12)


def test_times_of_ratios_are_those_of_diffusers(generator: torch.Generator) -> None:
    """Their interpolation of log sigma is ours of log-SNR, in the float64 that we give it."""
    from diffusers import EulerDiscreteScheduler

    schedule = ScaledLinearBeta()
    ratios = (-schedule.log_snr(torch.arange(1, 1001, dtype=torch.float64) / 1000) / 2).exp()
    low, high = ratios.log()[[0, -1]]
    sigmas = (low + (high - low) * torch.rand(200, generator=generator, dtype=torch.float64)).exp()
    scheduler = EulerDiscreteScheduler()
    theirs = [scheduler._sigma_to_t(sigma, ratios.log().numpy()).item() for sigma in sigmas.numpy()]
    ours = schedule.timestep(schedule.time(-2 * sigmas.log()))
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-3)
    snapped = (ours - ours.round()).abs() == 0  # theirs know no rounding
    torch.testing.assert_close(
        ours[~snapped], torch.tensor(theirs, dtype=torch.float64)[~snapped], rtol=0, atol=1e-9
    )
    assert snapped.sum() < 3


def test_time_searches_a_tensor_of_any_shape_and_stride() -> None:
    schedule = LinearBeta(size=10)
    values = schedule.log_snr(torch.linspace(0.05, 1, 6, dtype=torch.float64)).reshape(2, 3).mT
    expected = torch.linspace(0.05, 1, 6, dtype=torch.float64).reshape(2, 3).mT
    torch.testing.assert_close(schedule.time(values), expected, rtol=1e-12, atol=1e-12)


# --- the objects


def test_a_table_of_betas_is_content() -> None:
    betas = [0.1, 0.2, 1.0]
    tensor = torch.tensor(betas, dtype=torch.float64)
    assert Tabulated(betas) == Tabulated(tensor) == Tabulated(tuple(betas))
    assert Tabulated(betas).betas == (0.1, 0.2, 1.0)
    assert hash(Tabulated(betas)) == hash(Tabulated(tensor))
    assert repr(Tabulated(betas)) == "Tabulated(betas=(0.1, 0.2, 1.0))"
    assert LinearBeta() == LinearBeta(1e-4, 0.02, 1000)
    assert LinearBeta() != LinearBeta(size=999)
    assert LinearBeta() != SigmoidBeta()  # of the same fields
    assert ZeroTerminalSNR(LinearBeta()) == ZeroTerminalSNR(LinearBeta())
    assert repr(CosineBeta()) == "CosineBeta(size=1000)"


def test_a_table_of_anothers_betas_is_that_schedule() -> None:
    linear = LinearBeta(size=50)
    table = Tabulated(torch.linspace(1e-4, 0.02, 50, dtype=torch.float64))
    t = torch.linspace(0, 1, 77)
    assert table.log_snr(t).equal(linear.log_snr(t))
    assert Tabulated([0.1, 1]).alpha(1.0) == 0


@pytest.mark.parametrize("cls", [LinearBeta, ScaledLinearBeta, SigmoidBeta])
@pytest.mark.parametrize(
    ("start", "end", "size"),
    [(0.0, 0.1, 10), (0.1, 1.0, 10), (-0.1, 0.1, 10), (0.1, 0.2, 0), (math.nan, 0.1, 10)],
)
def test_betas_out_of_range_are_refused(cls: type[LinearBeta], start: float, end: float, size: int) -> None:
    with pytest.raises(
        ValueError, match=f"{cls.__name__} needs betas strictly between 0 and 1.*got beta_start={start}, "
    ):
        cls(start, end, size)


def test_cosine_needs_an_entry() -> None:
    with pytest.raises(ValueError, match="CosineBeta needs a size of at least 1, got 0"):
        CosineBeta(0)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0, 0.1], [0.1, 1.1], [0.1, math.nan], [0.1, -0.1]])
def test_a_list_that_is_no_table_is_refused(betas: list[float]) -> None:
    with pytest.raises(
        ValueError, match=r"non-empty list of betas in \(0, 1\), the last one in \(0, 1\], got"
    ):
        Tabulated(betas)


@pytest.mark.usefixtures("unchecked")
def test_a_matrix_of_betas_and_a_schedule_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 2\) values from 0\.1.* to 0\.2"):
        Tabulated(torch.tensor([[0.1, 0.2]]))
    with pytest.raises(
        TypeError, match=r"ZeroTerminalSNR rescales a table, such as LinearBeta\(\), got Rectified\(\)"
    ):
        ZeroTerminalSNR(Rectified())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "schedule", [ZeroTerminalSNR(LinearBeta(size=3)), LinearBeta(size=1), Tabulated([0.1, 1.0])]
)
def test_zero_snr_is_made_once_and_of_two_entries(schedule: TableSchedule) -> None:
    with pytest.raises(ValueError, match="at least two entries whose terminal SNR is not zero yet, got"):
        ZeroTerminalSNR(schedule)
