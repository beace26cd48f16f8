"""Each algorithm on each layer that carries it: what it adds, its gradients, and the layer afterwards."""

import warnings

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from torch import nn
from torch.nn import functional as F

from gendiff._groups import group
from gendiff.lora import inject, plan
from gendiff.lora.algorithms import ALGORITHMS, factors
from tests.attention.models import FLUX, UNET, build, run, said
from tests.lora.test_inject import digest, stirred
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
LAYERS = {  # a layer, and a batch of what it takes
    "Linear": (lambda: nn.Linear(18, 16), (3, 18)),
    "Conv1d": (lambda: nn.Conv1d(6, 20, 3, stride=2, padding=1), (2, 6, 7)),
    "Conv2d": (lambda: nn.Conv2d(6, 16, (3, 2), stride=2, padding=1), (2, 6, 5, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2, padding=1, bias=False), (1, 4, 3, 3, 2)),
}
CASES = [
    *[("lora", kind) for kind in LAYERS],
    *[(algorithm, kind) for algorithm in ("loha", "lokr") for kind in LAYERS if kind != "Conv3d"],
    ("oft", "Linear"),
]
OTHERS = ("loha", "lokr", "oft")
ADDED = {"Linear": F.linear, "Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}


def made(kind):
    build_layer, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(build_layer()).double().requires_grad_(False)
        return net, torch.randn(shape, dtype=torch.float64)


def strength(algorithm):
    return {"rank": 3} if algorithm == "oft" else {"rank": 2, "lora_alpha": 6}


def put_on(net, algorithm, **changes):
    planned = plan(net, "*", algorithm=algorithm, **{**strength(algorithm), **changes})
    return inject(net, planned, "style", dtype=torch.float64)


def added(layer, x, weight):
    """What a weight beside that of a layer adds to its output."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return ADDED[type(layer).__name__](x, weight, None, layer.stride, layer.padding, layer.dilation)


def peft_config(algorithm):
    return {
        "lora": lambda: LoraConfig(r=2, lora_alpha=6, target_modules=["0"]),
        "loha": lambda: LoHaConfig(r=2, alpha=6, target_modules=["0"]),
        "lokr": lambda: LoKrConfig(r=2, alpha=6, target_modules=["0"]),
        "oft": lambda: OFTConfig(oft_block_size=3, target_modules=["0"], use_cayley_neumann=False),
    }[algorithm]()


@pytest.mark.parametrize(("algorithm", "kind"), CASES)
def test_nothing_at_first_then_what_the_equation_says_and_nothing_afterwards(algorithm, kind) -> None:
    net, x = made(kind)
    before, plain, bare = digest(net), net(x), net[0]
    handle = put_on(net, algorithm)
    own = {id(p) for p in handle.parameters()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == own
    assert torch.equal(net(x), plain)
    assert not handle.delta("0").any()
    stirred(handle)
    change = handle.delta("0")
    assert change.shape == bare.weight.shape
    torch.testing.assert_close(net(x) - plain, added(bare, x, change), rtol=1e-9, atol=1e-9)
    assert change.abs().max() > 0.1
    torch.testing.assert_close(handle.adapter().delta("0", bare.weight), change)
    with handle.merged():
        torch.testing.assert_close(net(x), plain + added(bare, x, change), rtol=1e-9, atol=1e-9)
    with handle.disabled():
        assert torch.equal(net(x), plain)
    handle.remove()
    assert digest(net) == before
    assert net[0] is bare
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize(("algorithm", "kind"), CASES)
def test_outputs_and_gradients_are_those_of_peft_alone(algorithm, kind) -> None:
    net, x = made(kind)
    theirs, _ = made(kind)
    inject_adapter_in_model(peft_config(algorithm), theirs, "style")
    theirs.double()
    handle = stirred(put_on(net, algorithm))
    assert theirs.state_dict().keys() == net.state_dict().keys()
    theirs.load_state_dict(net.state_dict())
    assert torch.equal(net(x), theirs(x))
    for model in (net, theirs):
        model(x).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name].grad)
    assert sum(p.requires_grad for p in gradients.values()) == len(list(handle.parameters()))


@pytest.mark.parametrize(("algorithm", "kind"), CASES)
def test_gradients_are_those_of_differences(algorithm, kind) -> None:
    net, x = made(kind)
    parameters = tuple(stirred(put_on(net, algorithm)).parameters())
    torch.autograd.gradcheck(lambda *_: net(x), parameters, fast_mode=True)


@pytest.mark.parametrize("algorithm", ["lora", *OTHERS])
def test_ranks_and_strengths_of_each_layer(algorithm) -> None:
    """A layer with a rank of its own among others of other widths."""
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 20), nn.Linear(20, 8)).double()
    own = {"rank": 8} if algorithm == "oft" else {"rank": 6, "lora_alpha": 3}
    usual = {"rank": 4} if algorithm == "oft" else {"rank": 1, "lora_alpha": 5}
    handle = put_on(net, algorithm, rules={"1": own}, **{"lora_alpha": None, **usual})
    assert [row.rank for row in handle.plan.rows] == [usual["rank"], own["rank"], usual["rank"]]
    for row, inward in zip(stirred(handle).plan.rows, (12, 16, 20), strict=True):
        shapes = {part: tuple(one.shape) for part, one in handle.adapter().tensors[row.name].items()}
        assert shapes == ALGORITHMS[algorithm].shapes(row)
        layer, x = net[int(row.name)], torch.randn(5, inward, dtype=torch.float64)
        change = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(change, x @ handle.delta(row.name).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rslora", [False, True])
def test_strengths_by_the_root_of_the_rank(rslora) -> None:
    net, x = made("Linear")
    handle = stirred(put_on(net, "lora", rank=4, lora_alpha=8, rslora=rslora))
    a, b = handle.parameters()
    expected = (4 if rslora else 2) * x @ a.T @ b.T
    torch.testing.assert_close(net(x) - net[0].get_base_layer()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"decompose_factor": 3}, {"decompose_factor": 9, "decompose_both": True}]
)
@pytest.mark.parametrize("rank", [1, 7])
def test_factors_of_lokr(options, rank) -> None:
    """Of other widths, and with one or both of the factors of low rank, as peft has them."""
    net = nn.Sequential(nn.Linear(18, 36)).double().requires_grad_(False)
    handle = stirred(put_on(net, "lokr", rank=rank, lora_alpha=rank * 2, options=options))
    theirs = nn.Sequential(nn.Linear(18, 36)).double()
    config = LoKrConfig(r=rank, alpha=rank * 2, target_modules=["0"], **options)
    inject_adapter_in_model(config, theirs, "style")
    theirs.double().load_state_dict(net.state_dict())
    torch.testing.assert_close(theirs[0].get_delta_weight("style"), handle.delta("0"), rtol=1e-12, atol=0)


def test_factors_are_those_of_peft() -> None:
    for width in (*range(1, 130), 320, 640, 768, 1280, 3072):
        for factor in (-1, *range(1, 40), 64, 320, 1000):
            assert factors(width, factor) == factorization(width, factor), (width, factor)


# ---- strengths


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_a_scale_is_a_tensor_that_is_written_in_place(algorithm) -> None:
    net, x = made("Linear")
    plain = net(x)
    handle = stirred(put_on(net, algorithm))
    full, scale = net(x) - plain, handle.scales["0"]
    with handle.scaled(0.5), handle.scaled(torch.tensor(0.5)):
        torch.testing.assert_close(net(x) - plain, full / 4)
        torch.testing.assert_close(added(net[0].get_base_layer(), x, handle.delta("0")), full / 4)
        assert handle.scales["0"] is scale
    with handle.scaled(0), warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's own loha makes a number of the tensor, of which torch warns
        assert torch.equal(net(x), plain)
    assert torch.equal(net(x) - plain, full)
    net[0].set_scale("style", 0.5)  # what `set_adapters` of diffusers calls
    assert handle.scales["0"] is scale
    torch.testing.assert_close(net(x) - plain, full / 2)
    net[0].scale_layer(4)
    net[0].unscale_layer(2)
    torch.testing.assert_close(net(x) - plain, full)


def test_a_backward_belongs_into_the_block() -> None:
    """Else it would be that of another strength, which torch tells by the version of the scale."""
    net, x = made("Linear")
    handle = stirred(put_on(net, "lora"))
    loss = net(x).sum()
    with handle.scaled(0.5), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = net(x).sum()
    with handle.disabled():
        loss.backward()
    assert all(p.grad is not None for p in handle.parameters())


def test_oft_has_no_scale() -> None:
    net, x = made("Linear")
    handle = stirred(put_on(net, "oft"))
    full = net(x)
    with (
        pytest.raises(ValueError, match=r"oft has no scale: .* `disabled` leaves it out"),
        handle.scaled(0.5),
    ):
        pass
    assert torch.equal(net(x), full)
    assert handle.scales == {}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of loha
@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_a_compiled_model_sees_the_scale(algorithm) -> None:
    from torch._dynamo.testing import CompileCounter

    net, x = made("Linear")
    handle, counter = stirred(put_on(net.eval(), algorithm)), CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        full = compiled(x)
        with handle.scaled(0.5):
            half = compiled(x)
            assert torch.equal(half, net(x))
        assert torch.equal(compiled(x), full)
    assert not torch.allclose(full, half)
    assert counter.frame_count == 1


@pytest.mark.parametrize("algorithm", OTHERS)
def test_an_exception_within_a_block_leaves_nothing(algorithm) -> None:
    net, x = made("Linear")
    handle = stirred(put_on(net, algorithm))
    before, full = digest(net), net(x)
    blocks = [handle.disabled, handle.merged] + [lambda: handle.scaled(2)] * (algorithm != "oft")
    for block in blocks:
        with pytest.raises(ArithmeticError), block():
            raise ArithmeticError("on purpose")
        assert digest(net) == before
        assert torch.equal(net(x), full)
    assert handle.open == 0


# ---- of a model, and several on it


@pytest.mark.parametrize("algorithm", OTHERS)
@pytest.mark.parametrize("name", [UNET, FLUX])
def test_on_a_model(name, algorithm) -> None:
    model = build(name).requires_grad_(False)
    before, plain = digest(model), said(model, name)
    targets = ("sd" if name == UNET else "flux") + "/attention+ff"
    with inject(model, plan(model, targets, rank=2, algorithm=algorithm)) as handle:
        assert torch.equal(said(model, name), plain)
        run(model, name).square().mean().backward()
        assert all(p.grad is not None for p in handle.parameters())
        full = said(stirred(handle).model, name)
        assert not torch.allclose(full, plain, atol=1e-4)
        with handle.merged():
            torch.testing.assert_close(said(model, name), full, rtol=1e-3, atol=1e-4)
        assert torch.equal(said(model, name), full)
    model.zero_grad()
    assert digest(model) == before
    assert torch.equal(said(model, name), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_families_on_different_layers_come_off_in_any_order(order) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
    net[0].weight.requires_grad_(True)
    before, x = digest(net), torch.randn(2, 6)
    handles = [
        stirred(inject(net, plan(net, str(i), rank=2, algorithm=algorithm), algorithm), i)
        for i, algorithm in enumerate(("lora", "loha", "oft"))
    ]
    states = [net(x)]
    for handle in handles:
        with handle.disabled():
            states.append(net(x))
    assert all(not torch.allclose(a, b) for i, a in enumerate(states) for b in states[:i])
    expected = net(x)
    for place, which in enumerate(order):
        left = [handles[i] for i in order[place + 1 :]]
        with handles[which].disabled():
            expected = net(x)
        handles[which].remove()
        assert torch.equal(net(x), expected)
        trains = {id(p) for p in net.parameters() if p.requires_grad}
        assert not left or trains <= {id(p) for one in left for p in one.parameters()}
    assert digest(net) == before
    assert not hasattr(net, "peft_config")


def test_one_layer_has_one_family() -> None:
    net, x = made("Linear")
    handle = stirred(put_on(net, "loha"))
    full, before = net(x), digest(net)
    with pytest.raises(ValueError, match=r"0 carries a loha adapter, on which no lora can be put"):
        inject(net, plan(net, "*", rank=2), "other")
    assert digest(net) == before
    second = inject(net, plan(net, "*", rank=1, algorithm="loha"), "other", dtype=torch.float64)
    assert torch.equal(net(x), full)
    stirred(second)
    torch.testing.assert_close(net(x) - full, x @ second.delta("0").T)
    handle.remove()
    second.remove()
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_an_adapter_of_peft_on_the_same_layer_stays_as_it_is(algorithm) -> None:
    net, x = made("Linear")
    inject_adapter_in_model(peft_config(algorithm), net, "theirs")
    net.double()
    for name, parameter in net.named_parameters():
        if ".theirs" in name:
            nn.init.normal_(parameter)
    kind, expected, before = type(net[0]), net(x), digest(net)
    names = [name for name, _ in net.named_modules()]
    with stirred(put_on(net, algorithm)):
        assert not torch.allclose(net(x), expected)
    assert torch.equal(net(x), expected)
    assert digest(net) == before
    assert [name for name, _ in net.named_modules()] == names
    assert type(net[0]) is kind
    assert type(net[0].scaling) is dict
    assert net[0].active_adapters == ["theirs"]


def test_merging_beside_another_whose_part_depends_on_the_weight() -> None:
    net, _ = made("Linear")
    first, second = (inject(net, plan(net, "*", rank=3, algorithm="oft"), name) for name in ("a", "b"))
    before = digest(net)
    with (
        pytest.raises(ValueError, match=r"carries 'b' beside 'a', and what oft adds depends"),
        first.merged(),
    ):
        pass
    assert digest(net) == before
    with second.disabled(), first.merged():
        assert net[0].active_adapters == []
    assert net[0].active_adapters == ["a", "b"]


# ---- learning rates


@pytest.mark.parametrize("algorithm", OTHERS)
def test_learning_rates(algorithm) -> None:
    model = build(UNET)
    rules = {"mid_block.**": {"learning_rate": 1e-5}}
    handle = inject(model, plan(model, "sd/attention", rank=2, algorithm=algorithm, rules=rules), "style")
    named = {f"unet.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for one in group(named, handle.param_groups(1e-4)):
        found |= dict.fromkeys(one["names"], one["lr"])
    assert len(found) == len(list(handle.parameters()))
    assert {"mid_block" in name: rate for name, rate in found.items()} == {True: 1e-5, False: 1e-4}
    with pytest.raises(ValueError, match=rf"is for B of lora and dora, and {algorithm} has none"):
        handle.param_groups(1e-4, loraplus_lr_ratio=4)


# ---- what is refused


def test_layers_that_would_add_something_else() -> None:
    """What peft's layers leave out of a convolution, next to what they would say."""
    dilated = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", dilation=2, bias=False))
    with pytest.raises(ValueError, match=r"0 is dilated by \(2, 2\), and A of lora is not"):
        plan(dilated, "*", rank=2)
    x, layer = torch.randn(1, 4, 6, 6), dilated[0]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), dilated)
    with torch.no_grad():
        theirs = dilated(x) - layer(x)
        ours = F.conv2d(x, dilated[0].get_delta_weight("default"), padding="same", dilation=2)
    assert float((theirs - ours).norm() / ours.norm()) > 0.5
    for mode in ("circular", "reflect"):
        net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
        with pytest.raises(
            ValueError, match=rf"pads by '{mode}', and adapters of convolutions pad with zeros"
        ):
            plan(net, "*", rank=2)
    with pytest.raises(ValueError, match=r"0 is of one dimension, where lokr needs a rank below half"):
        plan(nn.Sequential(nn.Conv1d(8, 8, 3)), "*", rank=4, algorithm="lokr")
    with pytest.raises(ValueError, match=r"is a Conv3d, which carries no loha; Linear, Conv1d, Conv2d do"):
        plan(nn.Sequential(nn.Conv3d(4, 4, 1)), "*", rank=2, algorithm="loha")
    with pytest.raises(ValueError, match=r"is a Conv2d, which carries no oft; Linear do"):
        plan(nn.Sequential(nn.Conv2d(4, 4, 1)), "*", rank=2, algorithm="oft")


def test_settings_out_of_range() -> None:
    net = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(ValueError, match=r"of 12, the rank is one of 2, 3, 4, 6, 12, got 5"):
        plan(net, "*", rank=5, algorithm="oft")
    with pytest.raises(ValueError, match=r"oft has no scale, so that lora_alpha says nothing"):
        plan(net, "*", rank=4, lora_alpha=2, algorithm="oft")
    with pytest.raises(ValueError, match=r"unknown setting of the rule for \* 'lora_alpha'"):
        plan(net, "*", rank=4, algorithm="oft", rules={"*": {"lora_alpha": 2}})
    for factor in (0, -2, 2.5, True):
        with pytest.raises(ValueError, match=r"decompose_factor is a whole number from 1, or -1"):
            plan(net, "*", algorithm="lokr", rank=2, options={"decompose_factor": factor})
    with pytest.raises(ValueError, match=r"decompose_both is True or False, got 1"):
        plan(net, "*", algorithm="lokr", rank=2, options={"decompose_both": 1})
    with pytest.raises(ValueError, match=r"unknown option of loha 'decompose_both'"):
        plan(net, "*", algorithm="loha", rank=2, options={"decompose_both": True})
    with pytest.raises(ValueError, match=r"rslora is a scale of lora and dora, and loha has none such"):
        plan(net, "*", algorithm="loha", rank=2, rslora=True)
    with pytest.raises(ValueError, match=r"unknown algorithm 'lohra'; did you mean 'lora'"):
        plan(net, "*", algorithm="lohra", rank=2)
