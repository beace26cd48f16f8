"""Another adapter in the tensors of one that is there: what the model says, and what it is made of."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn

from gendiff.lora import inject, plan
from gendiff.lora.adapter import Adapter
from gendiff.lora.plan import LoraPlan
from tests.attention.models import FLUX, build, run, said
from tests.lora.test_inject import digest, stirred
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PADDED = ("lora", "dora", "loha")


def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Conv1d(16, 15, 1), nn.Linear(4, 10)).requires_grad_(False)
        return net.double(), torch.randn(2, 4, 12, dtype=torch.float64)


def call(net, x):
    return net[2](net[1](net[0](x).mT))


def adapter_of(net, seed=0, *, targets="*", algorithm="lora", **changes):
    """An adapter with weights that matter, on no model."""
    settings = {"rank": 2, "lora_alpha": 6, **changes}
    planned = plan(net, targets, algorithm=algorithm, **settings)
    with stirred(inject(net, planned, "made", dtype=torch.float64), seed) as handle:
        return handle.adapter()


def tensors(handle):
    parameters = dict(handle.model.named_parameters())
    return {name: one.data_ptr() for name, one in parameters.items()} | {
        f"{name}.scale": scale.data_ptr() for name, scale in handle.scales.items()
    }


def same(one: Adapter, other: Adapter) -> bool:
    return one.plan.rows == other.plan.rows and all(
        torch.equal(tensor, other.tensors[name][part])
        for name, parts in one.tensors.items()
        for part, tensor in parts.items()
    )


def twin_of(twin, other, x):
    with inject(twin, other, dtype=torch.float64):
        return twin[1](twin[0](x).mT)


@pytest.mark.parametrize("algorithm", PADDED)
def test_a_lower_rank_fills_up_with_what_adds_nothing_and_learns_nothing(algorithm) -> None:
    net, x = made()
    alone, twin = copy.deepcopy(net), copy.deepcopy(net)
    rules = {"0": {"rank": 4, "lora_alpha": 2}}
    handle = stirred(
        inject(net, plan(net, "*", algorithm=algorithm, rank=3, rules=rules), "style", dtype=torch.float64)
    )
    first, full = handle.adapter(), call(net, x)
    places, keys = tensors(handle), list(net.state_dict())
    other = adapter_of(twin, 1, algorithm=algorithm, rules={"1": {"rank": 1, "lora_alpha": 3}})
    handle.swap(other)
    assert {name: tensors(handle)[name] for name in places} == places
    assert list(net.state_dict()) == keys
    assert handle.plan.rows == other.plan.rows
    assert [float(scale) for scale in handle.scales.values()] == [3, 3, 3]
    assert same(handle.adapter(), other)
    with inject(alone, other, dtype=torch.float64) as fresh:
        torch.testing.assert_close(call(net, x), call(alone, x), rtol=1e-10, atol=1e-10)
        for row in other.plan.rows:
            assert torch.equal(handle.delta(row.name), fresh.delta(row.name))

    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1, weight_decay=0.0)
    call(net, x).square().mean().backward()
    optimizer.step()
    padding = {"lora_A": net[0].lora_A["style"].weight[2:]} if algorithm != "loha" else {}
    padding |= (
        {"b": net[0].hada_w1_b["style"][2:], "a": net[0].hada_w2_a["style"][:, 2:]} if not padding else {}
    )
    assert all(part.numel() and not part.any() for part in padding.values())
    assert not same(handle.adapter(), other), "the rest has learned"

    handle.swap(first)
    assert same(handle.adapter(), first)
    assert handle.plan.rows == first.plan.rows
    assert torch.equal(call(net, x), full)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_layers_that_the_other_has_not_add_nothing(algorithm) -> None:
    net, x = made()
    twin, plain = copy.deepcopy(net), call(net, x)
    handle = stirred(inject(net, plan(net, "*", algorithm=algorithm, rank=2), "style", dtype=torch.float64))
    first, full = handle.adapter(), call(net, x)
    other = adapter_of(twin, 1, targets="1", algorithm=algorithm)
    places = tensors(handle)
    handle.swap(other)
    assert {name: place for name, place in places.items() if name not in tensors(handle)}.keys() == {
        "0.scale",
        "2.scale",
    }
    bare = net[0].get_base_layer()
    assert torch.equal(net[0](x), bare(x))
    assert [row.name for row in handle.plan.rows] == ["1"]
    assert {name.rpartition(".")[0] for name, _ in handle.named_parameters()} == {"1"}
    assert list(handle.scales) == ["1"]
    assert same(handle.adapter(), other)
    with pytest.raises(KeyError, match="unknown layer of the plan '0'"):
        handle.delta("0")
    call(net, x).square().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and not name.startswith("1."):
            assert not parameter.grad.any()
    with handle.disabled():
        assert torch.equal(call(net, x), plain)
    with handle.merged():
        torch.testing.assert_close(net[1](net[0](x).mT), twin_of(twin, other, x), rtol=1e-9, atol=1e-9)
    handle.swap(first)
    assert torch.equal(call(net, x), full)
    assert same(handle.adapter(), first)


def test_without_another_compilation() -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter, others = build(FLUX), CompileCounter(), []
    fewer = {"rank": 2, "lora_alpha": 6, "rules": {"single_transformer_blocks.**": None}}
    for seed, changes in enumerate(({"rank": 4}, fewer)):
        with stirred(inject(model, plan(model, "flux/attention", **changes), "made"), seed) as one:
            others.append((one.adapter(), said(model, FLUX)))
    handle = stirred(inject(model, plan(model, "flux/attention", rank=4), "style"), 5)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        found = run(compiled, FLUX)
        for adapter, expected in others:
            handle.swap(adapter)
            torch.testing.assert_close(run(compiled, FLUX), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, expected, atol=1e-3)
    assert counter.frame_count == 1


def test_strengths_by_the_root_of_the_rank_and_what_peft_knows() -> None:
    net, x = made()
    other = adapter_of(copy.deepcopy(net), 1, rank=2, lora_alpha=8, rslora=True)
    handle = stirred(inject(net, plan(net, "*", rank=4, lora_alpha=4), "style", dtype=torch.float64))
    handle.swap(other)
    torch.testing.assert_close(handle.delta("0"), other.delta("0"), rtol=1e-6, atol=1e-7)
    full = call(net, x)
    for layer in net:  # diffusers' `set_adapters("style", 0.5)`, and back
        layer.set_scale("style", 0.5)
    assert float(handle.scales["0"]) == pytest.approx(other.plan["0"].scale / 2)
    for layer in net:
        layer.set_scale("style", 1.0)
    torch.testing.assert_close(call(net, x), full)
    config = net.peft_config["style"]
    assert config.r == 4
    assert config.lora_alpha / config.r == pytest.approx(other.plan["0"].scale)


@pytest.mark.parametrize("algorithm", ["oft", "lokr"])
def test_the_same_shapes_and_nothing_else(algorithm) -> None:
    net, x = made()
    twin = copy.deepcopy(net)
    settings = {"lora_alpha": None, "rank": 2, "algorithm": algorithm, "targets": "0"}
    handle = stirred(inject(net, plan(net, "0", rank=2, algorithm=algorithm), "style", dtype=torch.float64))
    first, full = handle.adapter(), call(net, x)
    other = adapter_of(twin, 1, **settings)
    handle.swap(other)
    assert same(handle.adapter(), other)
    assert not torch.allclose(call(net, x), full)
    handle.swap(first)
    assert torch.equal(call(net, x), full)
    wrong = adapter_of(twin, 1, **{**settings, "rank": 3 if algorithm == "oft" else 1})
    with pytest.raises(
        ValueError, match=rf"0: {algorithm} has parts of .*, which are not .*: remove 'style'"
    ):
        handle.swap(wrong)
    assert torch.equal(call(net, x), full)


def test_adapters_that_do_not_fit_change_nothing() -> None:
    net, x = made()
    twin = copy.deepcopy(net)
    handle = stirred(inject(net, plan(net, "0 | 1", rank=2), "style", dtype=torch.float64))
    before, full = digest(net), call(net, x)
    with pytest.raises(ValueError, match=r"has a layer more: unknown layer '2'.* Remove 'style', and inject"):
        handle.swap(adapter_of(twin))
    with pytest.raises(ValueError, match=r"1: a rank of 3 is more than the 2 that is there: remove 'style'"):
        handle.swap(adapter_of(twin, targets="0 | 1", rules={"1": {"rank": 3}}))
    with pytest.raises(ValueError, match=r"0: loha of \(16, 12\) is not lora of \(16, 12\): remove 'style'"):
        handle.swap(adapter_of(twin, targets="0", algorithm="loha"))
    fine = adapter_of(twin, targets="0")
    row = replace(fine.plan.rows[0], shape=(16, 14))
    wider = {"lora_A": torch.randn(2, 14), "lora_B": torch.randn(16, 2)}
    with pytest.raises(ValueError, match=r"0: lora of \(16, 14\) is not lora of \(16, 12\)"):
        handle.swap(Adapter(LoraPlan((row,), 3), {"0": wider}))
    for block in (handle.scaled(0.5), handle.disabled(), handle.merged()):
        with block, pytest.raises(RuntimeError, match=r"'style' is within a block of `scaled`"):
            handle.swap(fine)
    assert digest(net) == before
    assert torch.equal(call(net, x), full)
    for algorithm in ("dora", "oft"):
        other, _ = made()
        held = inject(other, plan(other, "0 | 2", rank=2, algorithm=algorithm), "style", dtype=torch.float64)
        alpha = {"lora_alpha": None} if algorithm == "oft" else {}
        with pytest.raises(ValueError, match=rf"no layer '2', where {algorithm} would learn on"):
            held.swap(adapter_of(twin, targets="0", algorithm=algorithm, **alpha))


def test_names_are_whole_names() -> None:
    """peft's own swap takes the names of others for its own, where they hold it, and leaves them zeros."""
    net, _ = made()
    twin, other = copy.deepcopy(net), adapter_of(copy.deepcopy(net), 2)
    handles = [
        stirred(inject(net, plan(net, "*", rank=2, lora_alpha=6), name, dtype=torch.float64), seed)
        for seed, name in enumerate(("style", "style2"))
    ]
    first, second = (handle.adapter() for handle in handles)
    handles[0].swap(other)
    assert same(handles[1].adapter(), second)
    assert same(handles[0].adapter(), other)

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"])
    for name, adapter in (("style", first), ("style2", second)):
        inject(twin, adapter, name, dtype=torch.float64)
    state = {
        f"{layer}.{part}.style.weight": tensor
        for layer, parts in other.tensors.items()
        for part, tensor in parts.items()
    }
    hotswap_adapter_from_state_dict(twin, state, "style", config)
    theirs = [parameter for name, parameter in twin.named_parameters() if ".style2." in name]
    assert len(theirs) == 6
    assert not any(parameter.any() for parameter in theirs)


def test_in_the_precision_that_is_there() -> None:
    net, _ = made()
    other = adapter_of(copy.deepcopy(net), 1)
    handle = inject(net, plan(net, "*", rank=2), "style")
    handle.swap(other)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    assert torch.equal(handle.adapter().tensors["0"]["lora_A"], other.tensors["0"]["lora_A"].float())
