"""Adapters beside weights of 4 and 8 bits: planned by true shapes, in float32, and taken off exactly."""

import hashlib
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from gendiff.lora import Class, inject, plan
from gendiff.lora.quantised import is_quantised, plain_weight
from tests.attention.models import UNET, build, said
from tests.lora.test_dora import drawn
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
IN, OUT = 64, 128


def four(layer, quant_type="nf4"):
    """A layer of bitsandbytes in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type=quant_type,
        compute_dtype=layer.weight.dtype,
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def eight(layer):
    """The same in 8 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    bias = layer.bias is not None
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def of_torchao(layer):
    """A layer whose weight is of torchao's, in 8 bits."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer


class Params4bit(nn.Parameter):
    """Two numbers of 4 bits in each byte, in one column, as those of bitsandbytes, which goes by the name."""

    quant_state: tuple[torch.Tensor, torch.Size]

    def __deepcopy__(self, memo):
        made = Params4bit(self.data.clone(), requires_grad=False)
        made.quant_state = self.quant_state
        return made


def unpacked(packed, state):
    """The weight of a stand-in."""
    steps, shape = state
    return (torch.stack((packed >> 4, packed & 15), -1).view(shape).float() - 8) * steps


class Linear4bit(nn.Linear):
    """A stand-in for the layer of bitsandbytes where that is not installed."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        steps = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (layer.weight.detach() / steps).round().add(8).to(torch.uint8).view(-1, 2)
        self.weight = Params4bit(levels[:, :1] << 4 | levels[:, 1:], requires_grad=False)
        self.weight.quant_state = (steps, layer.weight.shape)
        self.bias = layer.bias

    def forward(self, x):
        weight = unpacked(self.weight.data, self.weight.quant_state)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def stand_in(layer, monkeypatch):
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    if is_bnb_available() or is_bnb_4bit_available():  # which peft remembers
        pytest.skip("bitsandbytes itself is there")
    module = types.ModuleType("bitsandbytes")
    module.functional = types.SimpleNamespace(dequantize_4bit=unpacked)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", module.functional)
    return Linear4bit(layer)


MAKERS = {"nf4": four, "fp4": lambda layer: four(layer, "fp4"), "int8": eight, "torchao": of_torchao}


@pytest.fixture(params=[*MAKERS, "stand-in"])
def net(request, monkeypatch):
    """A model of one layer in few bits."""
    makers = {**MAKERS, "stand-in": lambda layer: stand_in(layer, monkeypatch)}
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # torch's, of how torchao registers its classes
        return nn.Sequential(makers[request.param](nn.Linear(IN, OUT))).requires_grad_(False)


def bits(model) -> tuple[str, list[int]]:
    """All bits of a model, of what torchao packs too, and its tensors by identity."""
    found = hashlib.sha256()

    def add(name, value):
        inside = getattr(value, "tensor_data_names", ()) if is_quantised_tensor(value) else ()
        for part in inside:
            add(f"{name}.{part}", getattr(value, part))
        if not inside and isinstance(value, torch.Tensor):
            found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())

    for name, value in model.state_dict().items():
        add(name, value)
    return found.hexdigest(), [id(one) for one in (*model.modules(), *model.parameters())]


def is_quantised_tensor(value) -> bool:
    return type(value).__module__.startswith("torchao.")


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("loaded", [False, True], ids=["of layers", "as loaded"])
def test_an_adapter_beside_few_bits(net, algorithm, called, loaded) -> None:
    """Whether the model was called before, and whether peft is told that it is quantised, by a mark."""
    if loaded:
        net.is_loaded_in_4bit = net.is_loaded_in_8bit = True
    x = drawn(3, IN, dtype=torch.float32).requires_grad_(True)
    plain = net(x) if called else None
    layer, before = net[0], bits(net)
    planned = plan(net, "*", rank=4, lora_alpha=8, algorithm=algorithm)
    assert planned.rows[0].shape == (OUT, IN)
    assert planned.rows[0].kind == type(layer).__name__
    handle = inject(net, planned)
    if not called:
        with handle.disabled():
            plain = net(x)
    assert torch.equal(net(x), plain)
    assert {one.dtype for one in handle.parameters()} == {torch.float32}
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}

    with torch.no_grad():
        for one in handle.parameters():
            one += 0.1 * drawn(*one.shape, dtype=torch.float32)
    weight = plain_weight(layer)
    assert weight.shape == (OUT, IN)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(plain, nn.functional.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)
    changed = net(x)
    expected = nn.functional.linear(x, weight + handle.delta("0"), layer.bias)
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
    changed.square().mean().backward()
    assert all(one.grad.any() for one in handle.parameters())
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(expected.square().mean(), x)[0], rtol=1e-4, atol=1e-5
    )
    with handle.scaled(0.5):
        half = nn.functional.linear(x, weight + handle.delta("0"), layer.bias)
        torch.testing.assert_close(net(x), half, rtol=1e-5, atol=1e-5)
    with handle.disabled():
        assert torch.equal(net(x), plain)
    assert torch.equal(net(x), changed)
    with pytest.raises(ValueError, match=r"0 is quantised .*: merging would round"), handle.merged():
        pass
    assert torch.equal(net(x), changed)
    handle.remove()
    assert net[0] is layer
    assert bits(net) == before
    assert torch.equal(net(x), plain)


def test_several_on_a_layer_whose_bias_follows_its_input(net) -> None:
    """Layers of bitsandbytes cast their bias to what they are given, which an adapter has widened."""
    x = drawn(3, IN, dtype=torch.bfloat16)
    net.to(torch.bfloat16)
    if hasattr(net[0], "compute_dtype"):
        net[0].compute_dtype = torch.bfloat16
    plain = net(x)
    handles = [inject(net, plan(net, "*", rank=4, algorithm="dora"), name) for name in ("style", "style2")]
    assert torch.equal(net(x), plain)
    assert handles[0].layers["0"].get_base_layer().bias.dtype == torch.bfloat16


def test_what_needs_the_weight_in_floating_point_is_refused(net) -> None:
    before = bits(net)
    for algorithm in ("loha", "lokr", "oft"):
        with pytest.raises(ValueError, match=rf"0 is quantised .* carries lora and dora, and no {algorithm}"):
            inject(net, plan(net, "*", rank=4, algorithm=algorithm))
    for init in ("pissa", "olora"):
        with pytest.raises(
            ValueError, match=rf"{init} takes weights of float32, .* and that of 0 holds \w+\."
        ):
            inject(net, plan(net, "*", rank=4), init=init)
    assert bits(net) == before


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
def test_a_network_in_4_bits(algorithm) -> None:
    """What is not quantised carries adapters too."""
    pytest.importorskip("bitsandbytes")
    model = build(UNET).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, four(module))
    plain, before = said(model, UNET), bits(model)
    handle = inject(model, plan(model, "sd/attention", rank=2, algorithm=algorithm))
    kinds = {row.kind for row in handle.plan.rows}
    assert kinds == {"Linear", "Linear4bit"}
    assert len(plan(model, Class("Linear4bit"), rank=2)) == 3 * sum(
        row.name.endswith("to_q") for row in handle.plan.rows
    )
    assert torch.equal(said(model, UNET), plain)
    with torch.no_grad():
        for one in handle.parameters():
            one += 0.1
    assert not torch.allclose(said(model, UNET), plain, atol=1e-4)
    assert not any(
        is_quantised(layer.get_base_layer()) for name, layer in handle.layers.items() if "to_out" in name
    )
    handle.remove()
    assert bits(model) == before
    assert torch.equal(said(model, UNET), plain)
