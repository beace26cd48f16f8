"""Averages against closed forms: every weight in them, at any interval, and nothing without an update."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gendiff.training.ema import EMA, Averages, gamma_of
from gendiff.training.update import Update

STEPS = 40


def walk(steps: int = STEPS, size: int = 3) -> Tensor:
    return torch.randn(steps + 1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(ema: EMA, thetas: Tensor, skipped: frozenset[int] = frozenset()) -> Averages:
    """The averages after parameters that were thetas[0] at the start and thetas[t] at update t."""
    parameter = nn.Parameter(thetas[0].clone())
    averages = Averages({"w": parameter}, ema)
    applied = torch.zeros((), dtype=torch.int64)
    for t, theta in enumerate(thetas[1:], start=1):
        finite = torch.tensor(t not in skipped)
        applied += finite
        if finite:
            parameter.data.copy_(theta)
        averages.update(applied, finite)
    return averages


def profiles(ema: EMA, steps: int) -> list[Tensor]:
    """What every update counts in each average: the answer to parameters that are 1 at that update alone."""
    impulses = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
    return [shadow["w"] for shadow in run(ema, impulses).shadows]


# ---- constant decay


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_a_constant_decay_is_the_geometric_sum(decay: float) -> None:
    thetas = walk()
    ages = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    expected = decay**STEPS * thetas[0] + ((1 - decay) * decay**ages)[:, None].mul(thetas[1:]).sum(0)
    torch.testing.assert_close(run(EMA(decay), thetas).weights()["w"], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [1, 3, 7])
def test_an_interval_decays_as_much_as_its_updates(every: int, warmup: bool) -> None:
    thetas, ema = walk(), EMA(0.6, warmup=warmup, every=every)
    expected = thetas[0].tolist()
    for start in range(0, STEPS - every + 1, every):
        beta = math.prod(min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(start, start + every))
        seen = thetas[start + every].tolist()
        expected = [beta * ours + (1 - beta) * theirs for ours, theirs in zip(expected, seen, strict=True)]
    got = run(ema, thetas).weights()["w"]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_the_ramp_is_that_of_diffusers_but_for_the_first_update() -> None:
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.99)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    averages = Averages({"w": parameter}, EMA(0.99, warmup=True))
    for t in range(1, 1200):
        averages.weights()["w"].fill_(1.0)  # parameters are 0, so that what is left of 1 is the decay
        averages.update(torch.tensor(t), torch.tensor(True))
        left = averages.weights()["w"].item()
        assert left == pytest.approx(theirs.get_decay(t) if t > 1 else 0.1, rel=1e-12)
    assert left == 0.99
    assert theirs.get_decay(1) == 0  # it copies the parameters, whatever decay is asked for


def test_a_high_decay_moves_in_float32_where_bfloat16_stands_still() -> None:
    parameter = nn.Parameter(torch.ones(1))
    averages, low = Averages({"w": parameter}, EMA(0.9999)), torch.ones(1, dtype=torch.bfloat16)
    parameter.data.fill_(2.0)
    for t in range(1, 1001):
        averages.update(torch.tensor(t), torch.tensor(True))
        low.lerp_(parameter.detach().bfloat16(), 1 - 0.9999)
    assert low.item() == 1.0
    assert averages.weights()["w"].item() == pytest.approx(2 - 0.9999**1000, rel=2e-6)


# ---- power functions


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_function_counts_updates_by_the_function(width: float, every: int) -> None:
    steps, gamma = 400, gamma_of(width)
    ends = torch.arange(0, steps + 1, every, dtype=torch.float64) / steps
    expected = torch.zeros(steps, dtype=torch.float64)
    expected[every - 1 :: every] = (ends ** (gamma + 1)).diff()  # its integral since the update before
    (got,) = profiles(EMA(sigma_rel=width, every=every), steps)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)
    middle = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    density = middle**gamma
    coarse = (density / density.sum()).reshape(-1, every).sum(1)  # independent: the function at mid-points
    torch.testing.assert_close(got.reshape(-1, every).sum(1), coarse, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("every", [1, 10, 100])
def test_the_width_is_the_declared_one_at_any_interval(every: int) -> None:
    steps, widths = 1200, (0.05, 0.1)
    at = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    for counts, width in zip(profiles(EMA(sigma_rel=widths, every=every), steps), widths, strict=True):
        mean = (counts * at).sum()
        assert counts.sum().item() == pytest.approx(1, abs=1e-12)
        within = (every / (width * steps)) ** 2 / 24 + 1e-9  # 1e-5, 1e-3 and 0.1 at a width of 0.05
        assert (counts * (at - mean) ** 2).sum().sqrt().item() == pytest.approx(width, rel=within)


def test_the_first_move_of_a_power_function_is_all_the_way() -> None:
    thetas = walk()
    for every in (1, 4):
        averages = run(EMA(sigma_rel=(0.05, 0.25), every=every), thetas[: every + 1])
        for i in (0, 1):
            assert torch.equal(averages.weights(i)["w"], thetas[every])


def test_several_are_kept_at_once_and_the_first_is_the_one() -> None:
    thetas = walk()
    both = run(EMA(sigma_rel=(0.2, 0.05), every=2), thetas)
    for i, width in enumerate((0.2, 0.05)):
        alone = run(EMA(sigma_rel=width, every=2), thetas).weights()["w"]
        assert torch.equal(both.weights(i)["w"], alone)
    assert both.weights()["w"] is both.weights(0)["w"]
    with pytest.raises(ValueError, match="unknown profile 2"):
        both.weights(2)


# ---- the gate


@pytest.mark.parametrize(
    "ema", [EMA(0.9, every=3), EMA(sigma_rel=(0.1, 0.2), every=3), EMA(0.9, warmup=True)]
)
def test_updates_that_were_not_applied_move_nothing_and_count_for_nothing(ema: EMA) -> None:
    thetas, skipped = walk(), frozenset({1, 5, 6, 7, 20, STEPS})
    kept = [t for t in range(STEPS + 1) if t not in skipped]
    ours, without = run(ema, thetas, skipped), run(ema, thetas[kept])
    for one, other in zip(ours.shadows, without.shadows, strict=True):
        assert torch.equal(one["w"], other["w"])


def test_between_its_moves_an_average_stays_bit_for_bit() -> None:
    parameter = nn.Parameter(walk()[0].float())
    averages = Averages({"w": parameter}, EMA(0.5, every=4))
    before = averages.weights()["w"].clone()
    parameter.data.mul_(3.0)
    for applied, finite in [(1, True), (3, True), (4, False), (8, False)]:
        averages.update(torch.tensor(applied), torch.tensor(finite))
        assert averages.weights()["w"].numpy().tobytes() == before.numpy().tobytes()
    averages.update(torch.tensor(4), torch.tensor(True))
    assert not torch.equal(averages.weights()["w"], before)


def test_an_update_moves_them_with_the_weights_or_not_at_all() -> None:
    weight = nn.Parameter(torch.zeros(1))
    averages = Averages({"w": weight}, EMA(0.5))
    update = Update({"w": weight}, torch.optim.SGD([weight], fused=True), [[1.0]], averages=averages)
    for gradient, expected in [(-4.0, 2.0), (float("nan"), 2.0), (-4.0, 5.0)]:
        weight.grad = torch.full((1,), gradient)
        update()
        assert averages.weights()["w"].item() == expected


@pytest.mark.parametrize(
    "ema", [EMA(0.9), EMA(0.9, warmup=True, every=3), EMA(sigma_rel=(0.05, 0.1), every=2)]
)
def test_nothing_is_read_by_the_host(ema: EMA) -> None:
    parameter = nn.Parameter(torch.ones(2, device="meta"))  # a tensor without numbers cannot be read
    averages = Averages({"w": parameter}, ema)
    averages.update(torch.ones((), dtype=torch.int64, device="meta"), torch.ones((), device="meta").bool())
    assert averages.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "ema", [EMA(0.9), EMA(0.9, warmup=True, every=3), EMA(sigma_rel=(0.05, 0.1), every=2)]
)
def test_a_captured_update_does_what_an_eager_one_on_the_cpu_does(ema: EMA) -> None:
    thetas = walk().float()
    expected = run(ema, thetas, frozenset({3, 4}))
    parameter = nn.Parameter(thetas[0].cuda())
    averages = Averages({"w": parameter}, ema)
    applied = torch.zeros((), dtype=torch.int64, device="cuda")
    finite = torch.zeros((), dtype=torch.bool, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        averages.update(applied, finite)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        averages.update(applied, finite)
    for t, theta in enumerate(thetas[1:], start=1):
        finite.fill_(t not in (3, 4))
        applied += finite
        if t not in (3, 4):
            parameter.data.copy_(theta)
        graph.replay()
    for ours, theirs in zip(averages.shadows, expected.shadows, strict=True):
        torch.testing.assert_close(ours["w"].cpu(), theirs["w"], rtol=1e-5, atol=1e-6)


# ---- what is kept


def test_averages_are_copies_in_float32_or_wider() -> None:
    named = {
        "half": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "single": nn.Parameter(torch.ones(2, 3).t()),
        "double": nn.Parameter(torch.ones((), dtype=torch.float64)),
    }
    averages = Averages(named, EMA(0.5))
    kept = averages.weights()
    assert [t.dtype for t in kept.values()] == [torch.float32, torch.float32, torch.float64]
    assert not any(t.requires_grad or t.data_ptr() == named[name].data_ptr() for name, t in kept.items())
    for parameter in named.values():
        parameter.data.fill_(3.0)
    averages.update(torch.tensor(1), torch.tensor(True))
    assert all(bool((t == 2).all()) for t in kept.values())


def test_a_state_goes_into_another_order_of_parameters() -> None:
    ema = EMA(sigma_rel=(0.05, 0.1))
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
    first, second = Averages({"a": a, "b": b}, ema), Averages({"b": b, "a": a}, ema)
    a.data.fill_(5.0)
    first.update(torch.tensor(1), torch.tensor(True))
    live = second.weights(1)
    second.load_state_dict(first.state_dict())
    assert live["a"].tolist() == [5.0, 5.0]
    assert second.weights(1)["a"] is live["a"]
    assert first.weights(1)["a"] is not live["a"]

    def leaves(tree: Any) -> Iterator[Any]:
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    assert json.dumps([leaf for leaf in leaves(first.state_dict()) if not isinstance(leaf, Tensor)])


@pytest.mark.parametrize(
    ("ema", "change", "says"),
    [
        (EMA(0.9), lambda s: s["0"]["weights"].pop("b"), "no average of 1 parameters, such as 'b'"),
        (EMA(0.9), lambda s: s["0"]["weights"].update(c=torch.ones(1)), "unknown averaged parameter 'c'"),
        (EMA(0.9), lambda s: s["0"]["weights"].update(b=torch.ones(2)), r"b .*\(2,\).*\(1,\)"),
        (EMA(0.9), lambda s: s["0"]["weights"].update(b=torch.ones(1).half()), "float16"),
        (EMA(0.9), lambda s: s["0"].update(sigma_rel=0.1), "constant decay"),
        (EMA(sigma_rel=0.1), lambda s: s["0"].update(every=2), r"\(0.1, 2\)"),
        (EMA(sigma_rel=0.1), lambda s: s.update({"1": s["0"]}), r"\[\(0.1, 1\), \(0.1, 1\)\]"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(ema: EMA, change: Callable[[Any], Any], says: str) -> None:
    averages = Averages({name: nn.Parameter(torch.zeros(1)) for name in "ab"}, ema)
    state = Averages({name: nn.Parameter(torch.ones(1)) for name in "ab"}, ema).state_dict()
    change(state)
    with pytest.raises(ValueError, match=says):
        averages.load_state_dict(state)
    assert [t.item() for t in averages.weights().values()] == [0.0, 0.0]


def test_a_sharded_parameter_is_averaged_shard_by_shard() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    thetas = walk().float()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(thetas[0], DeviceMesh("cpu", [0]), [Shard(0)]))
        averages = Averages({"w": sharded}, EMA(0.9))
        for t, theta in enumerate(thetas[1:], start=1):
            sharded.to_local().detach().copy_(theta)
            averages.update(torch.tensor(t), torch.tensor(True))
        average = averages.weights()["w"]
        assert isinstance(average, DTensor)
        assert torch.equal(average.full_tensor(), run(EMA(0.9), thetas).weights()["w"])
    finally:
        distributed.destroy_process_group()


# ---- settings


def test_the_exponent_is_the_inverse_of_the_width() -> None:
    for gamma in (1e-3, 1.0, 6.0, 100.0, 1e5):
        width = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
        assert gamma_of(width) == pytest.approx(gamma, rel=1e-9)


def test_equal_settings_are_equal_and_say_so() -> None:
    ema = EMA(sigma_rel=[0.05, 0.1], every=2, snapshot_steps=10)
    assert ema == EMA(sigma_rel=(0.05, 0.1), every=2, snapshot_steps=10) == eval(repr(ema))
    assert (
        len({ema, EMA(sigma_rel=(0.05, 0.1), every=2, snapshot_steps=10), EMA(0.9), EMA(0.9, every=2)}) == 3
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EMA(), "one of the two"),
        (lambda: EMA(0.9, sigma_rel=0.1), "one of the two"),
        (lambda: EMA(1.0), r"decay lies in \[0, 1\)"),
        (lambda: EMA(float("nan")), "decay lies in"),
        (lambda: EMA(0.9, every=0), "every is a whole number"),
        (lambda: EMA(0.9, snapshot_steps=10), "snapshot_steps is for power functions"),
        (lambda: EMA(sigma_rel=0.1, warmup=True), "warmup is for a constant decay"),
        (lambda: EMA(sigma_rel=0.29), r"\(0, 0.2887\).*uniform"),
        (lambda: EMA(sigma_rel=0.0), "sigma_rel lies in"),
        (lambda: EMA(sigma_rel=()), "one width or several"),
        (lambda: EMA(sigma_rel=(0.1, 0.1)), "several different"),
        (lambda: EMA(sigma_rel=0.1, every=4, snapshot_steps=10), "8 or 12 would do"),
        (lambda: EMA(sigma_rel=0.1, every=4, snapshot_steps=2), "; 4 would do"),
        (lambda: Averages({}, EMA(0.9)), "requires_grad"),
        (
            lambda: Averages(
                {"a": nn.Parameter(torch.ones(1)), "b": nn.Parameter(torch.ones(1, device="meta"))}, EMA(0.9)
            ),
            "on cpu, meta",
        ),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
