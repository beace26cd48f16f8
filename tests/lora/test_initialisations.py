"""Adapters that begin as a part of the weight: what they add to it as it was, and the weight afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from gendiff.lora import inject, plan, remove
from tests.attention.models import UNET, build, run, said
from tests.lora.test_inject import digest, stirred
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PRINCIPAL = ("pissa", "pissa_niter_4", "olora")


def made(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20, bias=False)).requires_grad_(False)
        return net.to(dtype), torch.randn(5, 24, dtype=dtype)


def planned(net, **changes):
    return plan(net, "*", **{"rank": 2, "lora_alpha": 6, "rules": {"1": {"rank": 3}}, **changes})


@pytest.mark.parametrize("init", PRINCIPAL)
def test_what_is_taken_off_is_what_a_and_b_begin_at(init) -> None:
    net, x = made()
    weights, plain = [layer.weight.clone() for layer in net], net(x)
    handle = inject(net, planned(net), init=init)
    torch.testing.assert_close(net(x), plain, rtol=1e-5, atol=1e-5)
    for row, weight in zip(handle.plan.rows, weights, strict=True):
        layer = handle.layers[row.name]
        a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        here, part = layer.get_base_layer().weight, row.scale * b @ a
        assert part.norm() > 0.2 * weight.norm(), "a part of the weight, and not a small one"
        torch.testing.assert_close(here + part, weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(handle.weight(row.name), weight)
        assert handle.delta(row.name).abs().max() < 1e-6
    values = torch.linalg.svdvals(weights[0])
    if init.startswith("pissa"):
        left = torch.linalg.svdvals(net[0].get_base_layer().weight)
        torch.testing.assert_close(left[: len(values) - 2], values[2:], rtol=0.05, atol=1e-4)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_same_as_peft_alone(init) -> None:
    net, x = made()
    theirs, _ = made()
    config = LoraConfig(r=2, lora_alpha=6, rank_pattern={"1": 3}, target_modules=["0", "1"])
    config.init_lora_weights = init
    inject_adapter_in_model(config, theirs)
    inject(net, planned(net), init=init)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(x), theirs(x))


@pytest.mark.parametrize("init", PRINCIPAL)
def test_what_was_learned_is_added_to_the_weight_as_it_was(init) -> None:
    net, x = made()
    twin, before, plain = copy.deepcopy(net), digest(net), net(x)
    handle = stirred(inject(net, planned(net), init=init))
    full, began = net(x), digest(net)
    hidden = x
    for row, layer in zip(handle.plan.rows, twin, strict=True):
        hidden = layer(hidden) + hidden @ handle.delta(row.name).T
    torch.testing.assert_close(full, hidden, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, plain, atol=0.1)
    with handle.disabled():
        assert torch.equal(net(x), plain)
        with handle.disabled():
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), plain)
    with handle.merged():
        torch.testing.assert_close(net(x), full, rtol=1e-4, atol=1e-4)
        assert net[0].active_adapters == []
    assert digest(net) == began
    assert torch.equal(net(x), full)
    with handle.scaled(0):
        assert torch.equal(net(x), plain)
    deltas = {row.name: handle.delta(row.name) for row in handle.plan.rows}
    with handle.scaled(0.5), handle.scaled(torch.tensor(0.5)):
        for name, delta in deltas.items():
            torch.testing.assert_close(handle.delta(name), delta / 4, rtol=1e-4, atol=1e-6)
    with handle.scaled(1):
        assert torch.equal(net(x), full)
    assert digest(net) == began
    handle.remove()
    assert digest(net) == before
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", PRINCIPAL)
def test_by_itself_it_is_a_lora_of_twice_the_rank(init, rslora) -> None:
    net, x = made()
    twin = copy.deepcopy(net)
    handle = stirred(inject(net, planned(net, rslora=rslora), init=init))
    adapter = handle.adapter()
    for row, own in zip(adapter.plan.rows, handle.plan.rows, strict=True):
        assert row.rank == 2 * own.rank
        assert row.scale == pytest.approx(own.scale)
        torch.testing.assert_close(adapter.delta(row.name), handle.delta(row.name), rtol=1e-4, atol=1e-5)
    assert adapter.plan.init is True
    inject(twin, adapter)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-4, atol=1e-4)


def test_both_factors_learn_and_the_model_comes_back() -> None:
    model = build(UNET).requires_grad_(False)
    before, plain = digest(model), said(model, UNET)
    handle = inject(model, plan(model, "sd/attention", rank=2), init="pissa")
    torch.testing.assert_close(said(model, UNET), plain, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    run(model, UNET).square().mean().backward()
    assert all(bool(p.grad.any()) for p in handle.parameters())
    optimizer.step()
    with handle.disabled():
        assert torch.equal(said(model, UNET), plain)
    assert not torch.equal(said(model, UNET), plain)
    remove(model, "default")
    model.zero_grad()
    assert digest(model) == before
    assert torch.equal(said(model, UNET), plain)


@pytest.mark.parametrize("init", PRINCIPAL)
def test_in_half_precision_the_rounding_is_told(init) -> None:
    """A and B begin in float32; W' is rounded to the weight's precision, and delta says what is lost."""
    net, x = made(torch.bfloat16)
    before, plain = digest(net), net(x)
    weight = net[0].weight.float()
    handle = inject(net, planned(net), init=init)
    here, lost = net[0].get_base_layer().weight, handle.delta("0")
    assert here.dtype == torch.bfloat16
    assert lost.abs().max() > 0
    assert bool((lost.abs() <= here.float().abs() / 256 + 1e-6).all()), "at most half a step"
    a, b = (getattr(net[0], part)["default"].weight for part in ("lora_A", "lora_B"))
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(lost, here.float() + 3 * b @ a - weight, rtol=1e-5, atol=1e-6)
    assert handle.adapter().delta("0").abs().max() < 1e-6, "nothing was learned"
    with handle.disabled():
        assert torch.equal(net(x), plain)
    handle.remove()
    assert digest(net) == before

    theirs, _ = made(torch.bfloat16)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], rank_pattern={})
    config.init_lora_weights = init
    inject_adapter_in_model(config, theirs)
    off = theirs[0].get_base_layer().weight.float() + theirs[0].get_delta_weight("default").float() - weight
    assert off.norm() > 1.2 * lost.norm(), "peft rounds A and B too"


def test_moved_it_comes_back_in_the_precision_of_the_model() -> None:
    net, _ = made()
    weight = net[0].weight.clone()
    handle = stirred(inject(net, planned(net), init="pissa"))
    net.to(torch.float64)
    with handle.disabled():
        assert torch.equal(net[0].get_base_layer().weight, weight.double())
    handle.remove()
    assert torch.equal(net[0].weight, weight.double())


def test_a_copy_has_its_own() -> None:
    net, x = made()
    before, plain = digest(net)[0], net(x)
    handle = stirred(inject(net, planned(net), "style", init="pissa"))
    twin, full = copy.deepcopy(net), net(x)
    handle.remove()
    assert torch.equal(twin(x), full)
    remove(twin, "style")
    assert digest(twin)[0] == digest(net)[0] == before
    assert torch.equal(twin(x), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_beside_other_adapters_it_comes_off_in_any_order(order) -> None:
    net, x = made()
    before, plain = digest(net), net(x)
    handles = [
        stirred(inject(net, planned(net), "first"), 1),
        stirred(inject(net, planned(net), "principal", init="pissa"), 2),
        stirred(inject(net, planned(net, rank=1), "last"), 3),
    ]
    with handles[0].merged(), handles[1].disabled(), handles[2].scaled(0):
        pass
    for place, which in enumerate(order):
        handles[which].remove()
        twin, _ = made()
        for one in (handles[i] for i in order[place + 1 :]):
            again = inject(twin, one.plan, one.name, init="pissa" if one is handles[1] else True)
            for mine, theirs in zip(again.parameters(), one.parameters(), strict=True):
                mine.data.copy_(theirs)
        torch.testing.assert_close(net(x), twin(x), rtol=1e-5, atol=1e-5)
    assert digest(net) == before
    assert torch.equal(net(x), plain)


def test_peft_leaves_the_weight_changed() -> None:
    """Off, or taken off, the model of peft says something else than it did: by 80 % here."""
    net, x = made()
    plain = net(x)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], init_lora_weights="pissa")
    inject_adapter_in_model(config, net)
    layers = [net[0], net[1]]
    for layer in layers:
        layer.enable_adapters(False)
    off = net(x)
    for layer in layers:
        layer.delete_adapter("default")
    for said_now in (off, net(x)):
        assert float((said_now - plain).norm() / plain.norm()) == pytest.approx(0.804, abs=1e-3)

    net, _ = made()
    handle = inject(net, planned(net, rules={}), init="pissa")
    with handle.disabled():
        assert torch.equal(net(x), plain)
    handle.remove()
    assert torch.equal(net(x), plain)


def test_numbers_are_drawn_by_the_seed_and_no_generator_moves() -> None:
    def begun(seed):
        net, _ = made()
        return next(inject(net, planned(net), init="pissa_niter_1", seed=seed).parameters()).detach()

    before = torch.get_rng_state()
    assert torch.equal(begun(1), begun(1))
    assert not torch.equal(begun(1), begun(2))
    assert torch.equal(torch.get_rng_state(), before)


# ---- what is refused, and leaves the model as it was


def test_layers_and_weights_that_cannot_be_taken_apart() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    with pytest.raises(
        ValueError, match=r"pissa takes the weight of a linear layer apart, and 0 is a Conv2d"
    ):
        inject(conv, plan(conv, "*", rank=2), init="pissa")
    net, _ = made()
    with pytest.raises(
        ValueError, match=r"olora takes weights of float32.* and that of 0 holds torch.float64"
    ):
        inject(net.double(), planned(net), init="olora")
    with pytest.raises(ValueError, match=r"and that of 0 has no numbers yet"):
        inject(net.to("meta"), planned(net), init="olora")
    for init in ("pissa_niter_", "pissa_niter_0", "PISSA", "eva", False):
        with pytest.raises(
            ValueError, match=r"unknown initialisation of lora .*Accepted: 'True', 'gaussian'"
        ):
            inject(net, planned(net), init=init)
    oft = plan(net, "*", rank=2, algorithm="oft")
    with pytest.raises(ValueError, match=r"unknown initialisation of oft 'pissa'.* Accepted: 'True'"):
        inject(net, oft, init="pissa")


def test_the_weight_is_changed_by_one_only() -> None:
    net, _ = made()
    inject(net, plan(net, "1", rank=2), "first", init="olora")
    before = digest(net)
    with pytest.raises(
        ValueError,
        match=r"pissa would change the weight of 1, which olora of the adapter 'first' has changed",
    ):
        inject(net, planned(net), "second", init="pissa")
    with pytest.raises(
        ValueError,
        match=r"olora changes the weight of 1, and what dora adds depends on it: 'first' and the new",
    ):
        inject(net, plan(net, "*", rank=2, algorithm="dora"), "second")
    assert digest(net) == before
    inject(net, plan(net, "0", rank=2), "second", init="pissa")
    net, _ = made()
    inject(net, plan(net, "1", rank=2, algorithm="dora"), "first")
    with pytest.raises(ValueError, match=r"pissa changes the weight of 1, and what dora adds depends on it"):
        inject(net, planned(net), "second", init="pissa")


def test_a_rank_that_twice_is_more_than_the_weight_has() -> None:
    net, _ = made()
    handle = inject(net, plan(net, "*", rank=9), init="pissa")
    with pytest.raises(
        ValueError, match=r"is of rank 18, and the weight of 0, of shape \(16, 24\), has 16.*svd"
    ):
        handle.adapter()
    assert handle.delta("0").shape == (16, 24)


def test_another_adapter_is_not_put_into_changed_weights() -> None:
    net, _ = made()
    plain = inject(net, planned(net), "plain").adapter()
    handle = inject(net, planned(net), "principal", init="pissa")
    before = digest(net)
    with pytest.raises(
        ValueError, match=r"'principal' began by pissa, on weights that it has changed: remove"
    ):
        handle.swap(plain)
    assert digest(net) == before


def test_nothing_is_put_on_or_taken_off_within_a_block_that_puts_weights_back() -> None:
    net, x = made()
    before, plain = digest(net), net(x)
    first = stirred(inject(net, planned(net), "first"))
    with (
        first.merged(),
        pytest.raises(RuntimeError, match=r"'first' is within a block of .* nothing is put on"),
    ):
        inject(net, planned(net), "principal", init="pissa")
    principal = stirred(inject(net, planned(net), "principal", init="pissa"))
    with (
        first.merged(),
        pytest.raises(RuntimeError, match=r"'first' is within a block of .* nothing is taken off"),
    ):
        principal.remove()
    with principal.scaled(0.5), pytest.raises(RuntimeError, match=r"'principal' is within a block of"):
        principal.remove()
    principal.remove()
    first.remove()
    assert digest(net) == before
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_failure_halfway_leaves_the_model_as_it_was(init, monkeypatch) -> None:
    """The second layer cannot be taken apart; the first was."""
    net, x = made()
    other = stirred(inject(net, planned(net), "other"))
    full, before = net(x), digest(net)
    name = "svd" if init == "pissa" else "qr"
    right, calls = getattr(torch.linalg, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("on purpose")
        return right(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, name, broken)
    with pytest.raises(torch.linalg.LinAlgError, match="on purpose"):
        inject(net, planned(net), "principal", init=init)
    assert len(calls) == 2
    assert digest(net) == before
    assert torch.equal(net(x), full)
    assert list(net.peft_config) == ["other"]
    assert net[0].active_adapters == ["other"]
    other.remove()

    calls.clear()
    before = digest(net.requires_grad_(True))
    with pytest.raises(torch.linalg.LinAlgError, match="on purpose"):
        inject(net, planned(net), "principal", init=init)
    assert digest(net) == before, "what trained before trains again"
    assert not hasattr(net, "peft_config")
