"""The update against a plain loop of torch, and that a skipped one moves nothing but the scaler."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gendiff.training.ema import EMA, Averages
from gendiff.training.update import LossScaler, Update

RATES = [1e-2, 2e-2, 3e-2, 4e-2]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda given: torch.optim.AdamW(given, fused=True),
    "fused SGD with momentum": lambda given: torch.optim.SGD(given, momentum=0.9, fused=True),
    "AdamW without a fused form": lambda given: torch.optim.AdamW(given, foreach=True),
    "RMSprop": lambda given: torch.optim.RMSprop(given),
}


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=generator) for p in net().parameters()]


def made(kind: str, **options: Any) -> tuple[nn.Module, Update]:
    module = net()
    parameters = dict(module.named_parameters())
    averages = Averages(parameters, EMA(0.9)) if options.pop("ema", False) else None
    update = Update(parameters, OPTIMIZERS[kind](module.parameters()), [RATES], averages=averages, **options)
    return module, update


def give(module: nn.Module, values: list[torch.Tensor], scale: float = 1.0) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.grad = scale * value


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_are_those_of_a_plain_loop(kind: str) -> None:
    """Clipped by torch, with the learning rate set by hand; the last rate stays."""
    module, update = made(kind, max_norm=1.0)
    plain = net()
    optimizer = OPTIMIZERS[kind](plain.parameters())
    for number in range(6):
        give(module, gradients(number))
        update()
        give(plain, gradients(number))
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATES[min(number, 3)]
        optimizer.step()
        assert update.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert update.applied.item() == 6
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def everything(module: nn.Module, update: Update) -> Any:
    state = update.state_dict()
    state["scaler"] = None  # what may move
    return copy.deepcopy([*(p.detach() for p in module.parameters()), update.learning_rates, state])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_update_that_is_not_finite_moves_nothing_but_the_scaler(kind: str, bad: float) -> None:
    """Also with fused AdamW, where accelerate does not see that a step was skipped."""
    scaler = LossScaler("cpu", scale=8.0, interval=2)
    module, update = made(kind, max_norm=1.0, scaler=scaler, ema=True)
    give(module, gradients(0), scale=8.0)
    update()
    before = everything(module, update)
    values = gradients(1)
    values[2][0, 0] = bad
    give(module, values, scale=8.0)
    update()
    after = everything(module, update)
    assert same(before, after)
    assert not update.finite
    assert scaler.scale == 4.0
    assert all(parameter.grad is None for parameter in module.parameters())
    give(module, gradients(2), scale=4.0)
    update()
    assert not same(before, everything(module, update))
    assert update.applied.item() == 2


def test_a_skipped_update_leaves_no_trace_in_the_run_that_goes_on() -> None:
    paths = []
    for skips in (False, True):
        module, update = made("fused AdamW", max_norm=1.0, scaler=LossScaler("cpu", 4.0), ema=True)
        for number in range(4):
            if skips and number == 2:
                give(module, [torch.full_like(p, float("inf")) for p in module.parameters()])
                update()
            give(module, gradients(number), scale=float(update.scaler.scale))  # pyright: ignore
            update()
        paths.append(everything(module, update))
    assert same(*paths)


def test_the_loss_scale_falls_by_half_and_doubles_after_an_interval() -> None:
    scaler = LossScaler("cpu", scale=16.0, interval=3)
    trace = []
    for good in (True, True, False, True, True, True, True):
        scaler.update(torch.tensor(good))
        trace.append(scaler.scale.item())
    assert trace == [16, 16, 8, 8, 8, 16, 16]


def test_every_group_has_its_own_rate() -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=1.0, fused=True)
    update = Update({"a": weights[0], "b": weights[1]}, optimizer, [[0.5, 0.25], [0.0, 0.125]])
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(1)
        update()
    assert [w.item() for w in weights] == [0.25, 0.875]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_goes_on_bit_for_bit(kind: str) -> None:
    options: dict[str, Any] = {"max_norm": 1.0, "ema": True}
    module, update = made(kind, **options)
    for number in range(2):
        give(module, gradients(number))
        update()
    kept = copy.deepcopy((module.state_dict(), update.state_dict()))
    other, resumed = made(kind, **options)
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    for number in (2, 3):
        for one, change in ((module, update), (other, resumed)):
            give(one, gradients(number))
            change()
    assert same(everything(module, update), everything(other, resumed))


def test_what_is_wrong_is_named() -> None:
    half = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"w in torch\.bfloat16"):
        Update({"w": half}, torch.optim.SGD([half]), [[1.0]])
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="2 rows for 1 groups"):
        Update({"w": weight}, torch.optim.SGD([weight]), [[1.0], [1.0]])
    with pytest.raises(ValueError, match="scale is positive"):
        LossScaler("cpu", scale=0.0)
    _, with_ema = made("RMSprop", ema=True)
    _, without = made("RMSprop")
    with pytest.raises(ValueError, match="averages is absent here but present"):
        without.load_state_dict(with_ema.state_dict())
    _, other = made("fused AdamW")
    with pytest.raises(ValueError, match="the state is of AdamW and the optimizer is RMSprop"):
        without.load_state_dict(other.state_dict())
