"""DoRA without the change of the weight: what it says and learns, what it allocates, what it follows."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gendiff.lora import dora, inject, plan
from tests.attention.models import UNET, build, said
from tests.lora.test_inject import digest, stirred
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "unbiased": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "pointwise": (lambda: nn.Conv2d(3, 5, 1, bias=False), (2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 3)), (1, 2, 3, 5, 5)),
}


def drawn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def frozen(make, dtype=torch.float64, seed=0):
    """A model of one layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(make()).to(dtype).requires_grad_(False)


def adapted(net, name="default", *, seed=0, dtype=torch.float64, algorithm="dora", lora_alpha=3, **settings):
    """The model with an adapter that matters."""
    planned = plan(net, "*", rank=2, lora_alpha=lora_alpha, algorithm=algorithm)
    handle = inject(net, planned, name, dtype=dtype, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in handle.parameters():
            one += 0.3 * torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one)
    return handle


def of_peft(net, count=1):
    """A copy of the model with peft's own DoRA of the same numbers."""
    theirs = nn.Sequential(copy.deepcopy(net[0].get_base_layer()))
    names = list(net[0].lora_A)[:count]
    for name in names:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)
        inject_adapter_in_model(config, theirs, name)
    theirs.to(net[0].get_base_layer().weight.dtype).load_state_dict(net.state_dict())
    theirs[0].set_adapter(names)
    return theirs


def applied(base, x, weight):
    """The layer with another weight."""
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight, base.bias)
    return base._conv_forward(x, weight, base.bias)


def gradients(net, x, output):
    """Of a function of the output: those of x and of the adapter."""
    inputs = {"x": x, **{key: p for key, p in net.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad((output * drawn(*output.shape).to(output)).sum(), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_those_of_peft_and_of_the_equation(kind, dtype) -> None:
    make, shape = LAYERS[kind]
    net = frozen(make, dtype)
    handle = adapted(net, dtype=dtype)
    x = drawn(*shape, dtype=dtype).requires_grad_(True)
    tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    ours = gradients(net, x, net(x))
    assert len(ours) == 4

    theirs = of_peft(net)
    torch.testing.assert_close(net(x), theirs(x), **tight)
    torch.testing.assert_close(ours, gradients(theirs, x, theirs(x)), **tight)

    layer = net[0]
    base, m = layer.get_base_layer(), layer.lora_magnitude_vector["default"].weight
    a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    directed = base.weight.flatten(1) + 1.5 * b.flatten(1) @ a.flatten(1)
    weight = (m.view(-1, 1) * directed / directed.norm(dim=1, keepdim=True).detach()).view(base.weight.shape)
    torch.testing.assert_close(net(x), applied(base, x, weight), **tight)
    torch.testing.assert_close(ours, gradients(net, x, applied(base, x, weight)), **tight)
    torch.testing.assert_close(handle.delta("0"), (weight - base.weight).detach(), **tight)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_at_first_nothing_changes_to_the_bit(kind, dtype, own) -> None:
    make, shape = LAYERS[kind]
    net, x = frozen(make, dtype), drawn(*shape, dtype=dtype)
    plain = net(x)
    with inject(net, plan(net, "*", rank=2, algorithm="dora"), dtype=own) as handle:
        assert torch.equal(net(x), plain)
        assert net(x).dtype == dtype
        assert not handle.delta("0").abs().max() > (1e-2 if own == torch.bfloat16 else 1e-6)
        if dtype == torch.float32:  # where the products are in half precision
            with torch.autocast("cpu", torch.bfloat16):
                changed = net(x)
                with handle.disabled():
                    assert torch.equal(changed, net(x))


def test_a_model_at_first_and_afterwards_is_the_same_to_the_bit() -> None:
    model = build(UNET).requires_grad_(False)
    before, plain = digest(model), said(model, UNET)
    planned = plan(model, "sd/attention+ff+conv", rank=2, algorithm="dora")
    with inject(model, planned) as handle:
        assert torch.equal(said(model, UNET), plain)
        stirred(handle)
        changed = said(model, UNET)
        assert not torch.allclose(changed, plain, atol=1e-3)
        assert torch.equal(said(copy.deepcopy(model), UNET), changed)
        with handle.disabled():
            assert torch.equal(said(model, UNET), plain)
        with handle.merged():
            torch.testing.assert_close(said(model, UNET), changed, rtol=1e-3, atol=1e-4)
    assert digest(model) == before
    assert torch.equal(said(model, UNET), plain)


# ---- several


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_add_what_each_adds_alone() -> None:
    """With another adapter before it peft's DoRA multiplies what that one has added."""
    for algorithms in (("dora", "dora"), ("lora", "dora"), ("dora", "lora")):
        net = frozen(*LAYERS["linear"][:1])
        handles = [adapted(net, f"of_{i}", seed=i, algorithm=one) for i, one in enumerate(algorithms)]
        calls = []
        base = net[0].get_base_layer()
        base.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023 -- called in this turn
        x = drawn(4, 6)
        weight = base.weight + sum(handle.delta("0") for handle in handles)
        torch.testing.assert_close(net(x), applied(base, x, weight), rtol=1e-10, atol=1e-12)
        assert len(calls) == (2 if algorithms[1] == "dora" else 1), "again only where it has to"
        with handles[0].disabled():
            del calls[:]
            expected = applied(base, x, base.weight + handles[1].delta("0"))
            torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
            assert len(calls) == 1
        if algorithms == ("dora", "dora"):
            assert (of_peft(net, 2)(x) - applied(base, x, weight)).abs().max() > 0.1


def test_a_second_one_is_exact_in_half_precision_too() -> None:
    net = frozen(LAYERS["linear"][0], torch.bfloat16)
    x = drawn(4, 6, dtype=torch.bfloat16)
    plain = net(x)
    handles = [inject(net, plan(net, "*", rank=2, algorithm="dora"), name) for name in ("style", "style2")]
    assert torch.equal(net(x), plain)
    assert handles[0].attached


# ---- what is allocated


class Sizes(TorchDispatchMode):
    """How many bytes the largest tensor has that is made within a block, of those that are no views."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage().data_ptr() for one in self.tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for one in self.tensors(found):
            if one.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return found

    def tensors(self, tree):
        return [one for one in torch.utils._pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)]


def largest(net, x):
    with Sizes() as sizes:
        net(x).float().square().mean().backward()
    return sizes.largest


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_tensor_of_the_size_of_the_weight_is_made(kind, monkeypatch) -> None:
    """Nor in half precision more than some rows in float32 at a time; with peft's there is."""
    make, shape = {
        "linear": (lambda: nn.Linear(256, 320), (2, 256)),
        "conv": (lambda: nn.Conv2d(64, 96, 3), (1, 64, 3, 3)),
    }[kind]
    net = frozen(make, torch.float32)
    adapted(net, dtype=torch.float32)
    x = drawn(*shape, dtype=torch.float32).requires_grad_(True)
    weight = net[0].get_base_layer().weight
    small = largest(net, x)
    assert small <= 2 * max(part["default"].weight.nbytes for part in (net[0].lora_A, net[0].lora_B))
    assert small < weight.nbytes / 10
    assert largest(of_peft(net), x) >= weight.nbytes

    net[0].get_base_layer().to(torch.bfloat16)
    lengths = dora.lengths(net[0], "default")
    monkeypatch.setattr(dora, "AT_ONCE", 4096)
    assert weight.numel() > 10 * 4096
    assert largest(net, x.detach().to(torch.bfloat16)) <= 4 * 4096
    torch.testing.assert_close(dora.lengths(net[0], "default"), lengths, rtol=1e-6, atol=0)


# ---- what is followed


def test_lengths_are_of_the_weight_as_it_is() -> None:
    """Written in place, loaded, moved to another precision, and by `data`, which no version counts."""
    net = frozen(LAYERS["conv2d"][0])
    handle, x = adapted(net), drawn(*LAYERS["conv2d"][1])
    base = net[0].get_base_layer()

    def check():
        expected = applied(base, x.to(base.weight), base.weight + handle.delta("0").to(base.weight))
        torch.testing.assert_close(net(x.to(base.weight)), expected, rtol=1e-5, atol=1e-6)

    check()
    base.weight.data += drawn(*base.weight.shape, seed=3)
    check()
    with torch.no_grad():
        base.weight.mul_(2)
    check()
    base.load_state_dict({"weight": drawn(*base.weight.shape, seed=4), "bias": base.bias})
    check()
    net.float()
    check()


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)], ids=str
)
def test_lengths_are_as_good_as_the_norm_of_the_sum(dtype, error) -> None:
    net = frozen(lambda: nn.Linear(300, 200), dtype)
    adapted(net, dtype=torch.float32, lora_alpha=16)
    layer = net[0]
    a, b = (getattr(layer, part)["default"].weight.double() for part in ("lora_A", "lora_B"))
    expected = (layer.get_base_layer().weight.double() + 8 * b @ a).norm(dim=1)
    found = dora.lengths(layer, "default")
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora.lengths(layer, "default"), found)


def test_what_takes_the_weight_away_leaves_numbers() -> None:
    """The squares of lengths that are near zero are sums that may come out below it."""
    a, b = drawn(16, 32, dtype=torch.float32), drawn(64, 16, dtype=torch.float32, seed=2)
    found = dora.row_lengths(b @ a, a, -b, torch.tensor(1.0))
    assert found.isfinite().all()
    assert (found > 0).all()
    assert (found < 2e-3 * (b @ a).norm(dim=1)).all()


def test_a_scale_changed_in_place_is_seen_by_a_compiled_layer() -> None:
    from torch._dynamo.testing import CompileCounter

    for kind in ("linear", "conv2d"):
        make, shape = LAYERS[kind]
        net, x, counter = frozen(make, torch.bfloat16), drawn(*shape, dtype=torch.bfloat16), CompileCounter()
        handle = adapted(net, dtype=torch.float32)
        compiled = torch.compile(net, fullgraph=True, backend=counter)
        found = [compiled(x), net(x)]
        with handle.scaled(0.5):
            found += [compiled(x), net(x)]
        assert counter.frame_count == 1
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])
        assert not torch.equal(found[0], found[2])
        compiled(x).float().square().sum().backward()
        assert all(one.grad is not None and one.grad.any() for one in handle.parameters())
        adapted(net, "style2", dtype=torch.float32, seed=2)
        assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))


def test_peft_can_still_merge_it() -> None:
    for kind in ("linear", "conv2d"):
        make, shape = LAYERS[kind]
        net, x = frozen(make), drawn(*shape)
        adapted(net)
        before = net(x)
        net[0].merge()
        torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-7)
        net[0].unmerge()
        torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-7)


def test_rows_of_zeros_are_refused() -> None:
    """They have no direction: with peft such a layer says nothing but nan."""
    net = frozen(LAYERS["linear"][0])
    net[0].weight[1] = 0
    before = digest(net)
    theirs = copy.deepcopy(net)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=True), theirs)
    assert theirs(drawn(2, 6)).isnan().any()
    with pytest.raises(ValueError, match=r"1 of 5 rows of the weight of 0 are zero, .* leave that layer out"):
        inject(net, plan(net, "*", rank=2, algorithm="dora"))
    assert digest(net) == before
    inject(net, plan(net, "*", rank=2))
