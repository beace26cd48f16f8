"""Learning rates against the schedulers of diffusers and torch, and what a run must not get."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gendiff.training.rates import (
    Constant,
    FromTorch,
    Linear,
    OneCycle,
    Polynomial,
    Rates,
    WarmupCosine,
    rates_of,
)

PEAK = 3e-4


def stepped(
    factory: Callable[[Any], Any], total: int, peaks: tuple[float, ...] = (PEAK,)
) -> list[list[float]]:
    """The rates of a real optimizer with a real scheduler, one list a group."""
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": peak} for peak in peaks], lr=peaks[0])
    scheduler = factory(optimizer)
    rows = []
    for step in range(total):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return [list(column) for column in zip(*rows, strict=True)]


def of_diffusers(name: str, warmup: int, total: int, **settings: Any) -> Callable[[Any], Any]:
    from diffusers.optimization import get_scheduler

    return lambda optimizer: get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, **settings
    )


CASES = [
    ("constant", lambda warmup: Constant()),
    ("constant_with_warmup", lambda warmup: Constant(warmup)),
    ("linear", lambda warmup: Linear(warmup)),
    ("cosine", lambda warmup: WarmupCosine(warmup)),
    ("polynomial", lambda warmup: Polynomial(warmup)),
]


@pytest.mark.parametrize("warmup", [0, 1, 7, 39])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_every_update_has_the_rate_of_diffusers(name: str, make: Callable[[int], Rates], warmup: int) -> None:
    expected = stepped(of_diffusers(name, warmup, 40), 40)[0]
    assert make(warmup).table(PEAK, 40) == pytest.approx(expected, rel=1e-12, abs=1e-12 * PEAK)
    assert FromTorch(of_diffusers(name, warmup, 40)).table(PEAK, 40) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("power", [0.5, 2.0, 3])
def test_powers_are_those_of_diffusers(power: float) -> None:
    expected = stepped(of_diffusers("polynomial", 3, 20, power=power), 20)[0]
    assert Polynomial(3, power=power).table(PEAK, 20) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("share", "total"), [(0.3, 40), (0.5, 7), (0.1, 100), (0.3, 11)])
def test_one_cycle_is_that_of_torch(share: float, total: int) -> None:
    def factory(optimizer: Any) -> Any:
        return lr_scheduler.OneCycleLR(
            optimizer, PEAK, total_steps=total, pct_start=share, div_factor=10, cycle_momentum=False
        )

    expected = stepped(factory, total)[0]
    ours = OneCycle(pct_start=share, div_factor=10).table(PEAK, total)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12 * PEAK)


def test_a_cosine_with_a_floor_is_torchs_annealing() -> None:
    factory = lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=1e-5)  # noqa: E731
    expected = stepped(factory, 30)[0]  # torch computes it by recursion, hence the tolerance
    assert WarmupCosine(min_lr=1e-5).table(PEAK, 30) == pytest.approx(expected, rel=1e-10)


def test_several_groups_are_tabulated_by_their_own_rates() -> None:
    factory = lambda optimizer: lr_scheduler.LambdaLR(  # noqa: E731
        optimizer, [lambda step: 0.5**step, lambda step: 1 / (1 + step)]
    )
    peaks = (1e-3, 1e-5)
    assert FromTorch(factory).tables(peaks, 6) == stepped(factory, 6, peaks)
    assert Linear().tables(peaks, 4) == [Linear().table(peak, 4) for peak in peaks]


@pytest.mark.parametrize(
    "rates",
    [WarmupCosine(2, total=10, min_lr=1e-5), Linear(2, total=10), Polynomial(total=10), OneCycle(total=10)],
)
def test_after_its_total_a_schedule_stays_where_it_ended(rates: Rates) -> None:
    table = rates.table(PEAK, 25)
    assert table[:10] == rates.table(PEAK, 10)
    assert len(set(table[10:])) == 1
    assert table[10] == rates.rate(PEAK, 10**9, 25) <= table[9]
    lowest = {"min_lr": getattr(rates, "min_lr", PEAK / 25 / 1e4)}
    assert table[-1] == pytest.approx(lowest["min_lr"], rel=1e-12, abs=1e-20)


def test_a_share_of_the_total_is_a_number_of_updates() -> None:
    assert WarmupCosine(0.1).table(PEAK, 50) == WarmupCosine(5).table(PEAK, 50)
    assert Linear(0.1, total=20).table(PEAK, 50) == Linear(2, total=20).table(PEAK, 50)
    assert Constant(0.0).table(PEAK, 3) == [PEAK] * 3


@pytest.mark.parametrize(
    "rates", [WarmupCosine(2), Polynomial(), Linear(min_lr=1e-6), Constant(1), OneCycle()]
)
def test_a_rate_of_zero_stays_zero(rates: Rates) -> None:
    assert rates.table(0.0, 5) == [0.0] * 5


@pytest.mark.parametrize("warmup", [-1, 1.0, 1.5, -0.1, True, float("nan")])
def test_a_warmup_out_of_range_is_refused(warmup: float) -> None:
    for make in (WarmupCosine, Linear, Polynomial, Constant):
        with pytest.raises(ValueError, match="warmup"):
            make(warmup)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Linear(total=0), "total"),
        (lambda: WarmupCosine(min_lr=-1.0), "min_lr"),
        (lambda: WarmupCosine(min_lr=float("nan")), "min_lr"),
        (lambda: Polynomial(power=0.0), "power"),
        (lambda: OneCycle(pct_start=1.0), "pct_start"),
        (lambda: OneCycle(div_factor=0.5), "div_factor"),
        (lambda: OneCycle(final_div_factor=float("inf")), "final_div_factor"),
        (lambda: Linear().table(-1.0, 3), "learning rate"),
        (lambda: Linear().table(float("nan"), 3), "learning rate"),
        (lambda: Linear().table(PEAK, 0), "total"),
        (lambda: Linear().rate(PEAK, -1, 3), "step=-1"),
        (lambda: Linear(min_lr=1.0).table(PEAK, 3), "min_lr=1.0 .* above"),
        (lambda: WarmupCosine(500).table(PEAK, 100), "warm-up of 500 .* within 100"),
        (lambda: rates_of("cosin"), "did you mean 'cosine'.*'constant', 'linear', 'cosine', 'polynomial'"),
        (lambda: rates_of("cosine_with_restarts"), "FromTorch"),
    ],
)
def test_what_is_out_of_range_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_by_name_as_it_is_or_from_a_factory() -> None:
    factory = lambda optimizer: lr_scheduler.StepLR(optimizer, 2)  # noqa: E731
    assert rates_of("linear", warmup=3) == Linear(3)
    assert rates_of("one_cycle") == OneCycle()
    assert rates_of(Constant(4)) == Constant(4)
    assert rates_of(factory) == FromTorch(factory)
    with pytest.raises(TypeError, match="warmup"):
        rates_of(Constant(4), warmup=3)


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def momentum(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=9)


def short(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=5, cycle_momentum=False)


def foreign(optimizer: Any) -> Any:
    return lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 2)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (plateau, "waits for a metric"),
        (momentum, "changes momentum .*cycle_momentum=False"),
        (short, "does not go beyond update 5 of 9"),
        (foreign, "of its own"),
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: -1.0), "rate -"),
    ],
)
def test_schedulers_that_are_no_table_are_refused(factory: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FromTorch(factory).table(PEAK, 9)


def test_a_scheduler_or_an_optimizer_is_no_factory() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(TypeError, match=r"function of an optimizer|Type-check"):
        FromTorch(lr_scheduler.StepLR(optimizer, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="LRScheduler"):
        FromTorch(lambda optimizer: optimizer).table(PEAK, 3)
