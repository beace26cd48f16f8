"""Adapters on a GPU: what begins, trains, is captured and comes off there, and that nothing waits."""

import hashlib

import pytest
import torch
from torch import nn

from gendiff.lora import dora, inject, plan
from gendiff.lora.quantised import plain_weight
from tests.attention.models import UNET, build
from tests.gpu.test_attention_gpu import moved, nothing_waits
from tests.lora import test_dora, test_quantised
from tests.zoo import QUIET, ZOO

pytestmark = [pytest.mark.gpu, *(pytest.mark.filterwarnings(warning) for warning in QUIET)]
DEVICE = "cuda"
BOTH = pytest.mark.parametrize("algorithm", ["lora", "dora"])
LAYERS = "sd/attention+ff+conv"


def on_gpu(dtype=torch.float32):
    """A tiny frozen UNet on the device, and a call of it that waits for nothing."""
    model = build(UNET).requires_grad_(False).to(DEVICE, dtype)
    inputs = {key: moved(value, dtype) for key, value in ZOO[UNET].inputs().items()}
    return model, lambda: model(**inputs, return_dict=False)[0]


def stirred(handle, size=0.05):
    """The adapter with weights that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in handle.parameters():
            one += size * torch.randn(one.shape, generator=generator).to(one)
    return handle


def bits(model) -> str:
    """A digest of all that a model holds."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_first_and_afterwards_it_is_the_same_to_the_bit(algorithm, dtype) -> None:
    model, call = on_gpu(dtype)
    before = bits(model)
    with torch.no_grad():
        plain = call()
        with inject(model, plan(model, LAYERS, rank=2, algorithm=algorithm)) as handle:
            assert torch.equal(call(), plain)
            changed = stirred(handle) and call()
            assert (changed - plain).abs().max() > 1e-2
            with handle.disabled():
                assert torch.equal(call(), plain)
            with handle.merged():
                error = 1e-3 if dtype == torch.float32 else 0.2
                torch.testing.assert_close(call(), changed, rtol=error, atol=error)
            assert torch.equal(call(), changed)
        assert bits(model) == before
        assert torch.equal(call(), plain)


@pytest.mark.parametrize("algorithm", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_in_a_step_of_training(algorithm, dtype) -> None:
    model, call = on_gpu(dtype)
    handle = stirred(inject(model, plan(model, LAYERS, rank=2, algorithm=algorithm)))
    for waits in (True, False):  # the first call chooses how it convolves, and makes what is kept
        model.zero_grad(set_to_none=True)
        if waits:
            call().float().square().mean().backward()
        else:
            with nothing_waits():
                call().float().square().mean().backward()
                with handle.scaled(0.5), handle.disabled():
                    call()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in handle.parameters())


@BOTH
def test_a_captured_call_sees_a_scale_changed_in_place(algorithm) -> None:
    model, call = on_gpu()
    handle = stirred(inject(model, plan(model, LAYERS, rank=2, algorithm=algorithm)))
    with torch.no_grad():
        eager = [call()]
        with handle.scaled(0.5):
            eager.append(call())
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        found = []
        with nothing_waits():
            graph.replay()
            found.append(out.clone())
            with handle.scaled(0.5):
                graph.replay()
                found.append(out.clone())
            graph.replay()
            found.append(out.clone())
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-4
    torch.testing.assert_close(found[:2], eager, rtol=1e-4, atol=1e-5)


@BOTH
def test_a_model_in_bfloat16_trains_by_an_adapter_in_float32(algorithm) -> None:
    model, call = on_gpu(torch.bfloat16)
    before = bits(model)
    handle = inject(model, plan(model, LAYERS, rank=4, algorithm=algorithm))
    assert {one.dtype for one in handle.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = call().float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert float(losses[-1]) < 0.5 * float(losses[0])
    handle.remove()
    assert bits(model) == before


@pytest.mark.parametrize("kind", test_dora.LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dora_is_that_of_peft(kind, dtype) -> None:
    make, shape = test_dora.LAYERS[kind]
    net = test_dora.frozen(make, dtype).to(DEVICE)
    test_dora.adapted(net, dtype=dtype)
    theirs = test_dora.of_peft(net).to(DEVICE)
    x = test_dora.drawn(*shape, dtype=dtype).to(DEVICE).requires_grad_(True)
    # float32 is convolved in tensor float 32, of 10 bits
    error = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(net(x), theirs(x), **error)
    ours, other = (test_dora.gradients(one, x, one(x)) for one in (net, theirs))
    torch.testing.assert_close(ours, other, **error)


def test_dora_needs_no_memory_of_the_size_of_the_weight() -> None:
    def needed(net):
        x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            net(x).float().square().mean().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    net = test_dora.frozen(lambda: nn.Linear(4096, 4096), torch.bfloat16).to(DEVICE)
    weight = net[0].weight
    inject(net, plan(net, "*", rank=2, lora_alpha=3, algorithm="dora"))
    ours, theirs = needed(net), needed(test_dora.of_peft(net).to(DEVICE))
    assert ours < 6 * dora.AT_ONCE  # some rows in float32, 4 bytes each, and little else
    assert theirs > 4 * weight.numel()


@BOTH
def test_an_adapter_moves_with_its_model(algorithm) -> None:
    """Put on on the CPU, and its scales with it; then DoRA is at first what it was up to rounding."""
    wide, error = torch.float64, {"rtol": 1e-4, "atol": 2e-6}  # times are embedded in float32
    model = build(UNET).requires_grad_(False).to(wide)
    here = {
        key: value.to(wide) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in ZOO[UNET].inputs().items()
    }
    there = {key: moved(value, wide) for key, value in here.items()}

    def call(inputs):
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    handle = inject(model, plan(model, LAYERS, rank=2, algorithm=algorithm), dtype=wide)
    plain = call(here)
    model.to(DEVICE)
    assert {scale.device.type for scale in handle.scales.values()} == {DEVICE}
    torch.testing.assert_close(call(there).cpu(), plain, **error)
    stirred(handle)
    changed = call(there)
    assert (changed.cpu() - plain).abs().max() > 1e-2
    with handle.scaled(0.5):
        assert (call(there) - changed).abs().max() > 1e-3
        model.cpu()
        half = call(here)
        model.to(DEVICE)
        torch.testing.assert_close(call(there).cpu(), half, **error)
    model.cpu()
    assert {scale.device.type for scale in handle.scales.values()} == {"cpu"}
    torch.testing.assert_close(call(here), changed.cpu(), **error)


@BOTH
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_adapter_beside_4_and_8_bits(kind, algorithm) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(test_quantised.MAKERS[kind](nn.Linear(64, 128))).requires_grad_(False).to(DEVICE)
    x = torch.randn(8, 64, device=DEVICE, requires_grad=True)
    plain, layer = net(x), net[0]
    before = bits(net)
    handle = inject(net, plan(net, "*", rank=4, algorithm=algorithm))
    assert torch.equal(net(x), plain)
    stirred(handle)
    weight = plain_weight(layer)
    assert weight.device.type == DEVICE
    changed = net(x)
    # bitsandbytes rounds what goes into 8 bits too, so that what is added is compared
    expected = nn.functional.linear(x, handle.delta("0")).detach()
    torch.testing.assert_close(changed - plain, expected, rtol=0.05, atol=0.05 * float(expected.std()))
    changed.square().mean().backward()
    assert all(one.grad.any() for one in handle.parameters())
    with handle.disabled():
        assert torch.equal(net(x), plain)
    handle.remove()
    assert net[0] is layer
    assert bits(net) == before
    assert torch.equal(net(x), plain)
