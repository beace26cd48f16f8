"""Adapters on a model: what they add, how strongly, on which layers, and the model afterwards."""

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from gendiff import lora
from gendiff.lora import Class, inject, plan, remove
from gendiff.lora.plan import LoraPlan
from gendiff.lora.scales import Scales
from gendiff.testing import tiny_pipeline
from tests.attention.models import FLUX, SD3, UNET, WAN, build, said
from tests.lora.test_plan import encoder
from tests.zoo import QUIET, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PRESETS = {UNET: "sd/attention", SD3: "sd3/attention+ff", FLUX: "flux/attention+ff", WAN: "wan/attention+ff"}


def digest(model) -> tuple[str, list[int], list[bool]]:
    """All bits of a model, its modules by identity, and what trains."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest(), [id(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]


def stirred(handle, seed=0, size=0.3):
    """The adapter with weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return handle


@pytest.fixture(params=PRESETS)
def case(request):
    # frozen, as an adapter leaves it: torch multiplies strided inputs in another order where a weight trains
    model = build(request.param).requires_grad_(False)
    return request.param, model, plan(model, PRESETS[request.param], rank=2, lora_alpha=4)


def test_at_first_nothing_changes_and_only_the_adapter_trains(case) -> None:
    name, model, planned = case
    plain = said(model, name)
    handle = inject(model, planned)
    assert torch.equal(said(model, name), plain)
    own = {id(p) for p in handle.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert sum(p.numel() for p in handle.parameters()) == planned.parameters


def test_removed_the_model_is_the_same_to_the_bit(case) -> None:
    name, model, planned = case
    next(model.parameters()).requires_grad_(True)
    before, plain, attributes = digest(model), said(model, name), sorted(vars(model))
    with stirred(inject(model, planned)) as handle:
        assert not torch.allclose(said(model, name), plain, atol=1e-4)
        assert digest(model)[0] != before[0]
    assert digest(model) == before
    assert torch.equal(said(model, name), plain)
    assert sorted(vars(model)) == attributes
    with pytest.raises(RuntimeError, match="was removed from its model"):
        handle.delta(planned.rows[0].name)


def test_a_layer_says_what_the_equation_says() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 6, 3, padding=1)).double()
    handle = stirred(inject(net, plan(net, "*", rank=2, lora_alpha=6), dtype=torch.float64))
    linear, conv = net
    x, image = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    a, b = (getattr(linear, part)["default"].weight for part in ("lora_A", "lora_B"))
    base = linear.get_base_layer()
    torch.testing.assert_close(linear(x), base(x) + 3 * (x @ a.T @ b.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(handle.delta("0"), 3 * b @ a)
    base, weight = conv.get_base_layer(), handle.delta("1")
    expected = nn.functional.conv2d(image, base.weight + weight, base.bias, padding=1)
    torch.testing.assert_close(conv(image), expected, rtol=1e-10, atol=1e-10)
    parameters = tuple(handle.parameters())
    torch.autograd.gradcheck(lambda *_: (linear(x), conv(image)), parameters)


def test_the_same_as_peft_for_the_same_weights(case) -> None:
    name, model, planned = case
    theirs = build(name)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[row.name for row in planned.rows])
    inject_adapter_in_model(config, theirs)
    handle = stirred(inject(model, planned))
    state = theirs.state_dict()
    for key, value in model.state_dict().items():
        state[key].copy_(value)
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(said(model, name), said(theirs, name))
    for output, other in ((run(model, name), "ours"), (run(theirs, name), "theirs")):
        output.square().mean().backward()
        assert other
    gradients = dict(theirs.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[key].grad)
    assert len(handle.layers) == len(planned)


# ---- within blocks


def test_scaled_disabled_and_merged_come_back_to_the_bit(case) -> None:
    name, model, planned = case
    plain = said(model, name)
    handle = stirred(inject(model, planned))
    full, before = said(model, name), digest(model)
    trains = [p.requires_grad for p in model.parameters()]
    with handle.disabled():
        assert torch.equal(said(model, name), plain)
        assert [p.requires_grad for p in model.parameters()] == trains
    with handle.merged():
        assert not torch.equal(said(model, name), plain)
        torch.testing.assert_close(said(model, name), full, rtol=1e-3, atol=1e-4)
    with handle.scaled(0.5), handle.scaled(0.5):
        scale = planned.rows[0].scale
        assert float(handle.scales[planned.rows[0].name]) == scale / 4
        assert not torch.allclose(said(model, name), full, atol=1e-5)
    with handle.scaled(0):
        assert torch.equal(said(model, name), plain)
    assert torch.equal(said(model, name), full)
    assert digest(model) == before


def test_an_exception_within_a_block_leaves_nothing(case) -> None:
    _, model, planned = case
    handle = stirred(inject(model, planned))
    before = digest(model)

    def broken(block):
        with block:
            raise ArithmeticError("on purpose")

    for block in (handle.scaled(0.3), handle.disabled(), handle.merged()):
        with pytest.raises(ArithmeticError):
            broken(block)
    assert digest(model) == before
    assert [float(s) for s in handle.scales.values()] == [row.scale for row in planned.rows]


def test_half_and_back_is_whole() -> None:
    """In diffusers fusing at 0.5 and unfusing leaves half the strength, and a scale of 0 resets it."""
    pipe = tiny_pipeline("sd15")
    unet = pipe.unet.requires_grad_(False)
    inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, unet.config.cross_attention_dim)

    def call(**changes):
        with torch.no_grad():
            return unet(*inputs, return_dict=False, **changes)[0]

    planned = plan(unet, "sd/attention", rank=2)
    with stirred(inject(unet, planned)) as handle:
        full = call()
        for _ in range(2):
            with handle.scaled(0.5), handle.merged():
                assert not torch.allclose(call(), full, atol=1e-4)
        assert torch.equal(call(), full)
        with handle.scaled(0.7):
            weaker = call()
            with handle.scaled(0):
                call()
            assert torch.equal(call(), weaker)

    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=[row.name for row in planned.rows]), "style"
    )
    layer = unet.get_submodule(planned.rows[0].name)
    found = [layer.scaling["style"]]
    for _ in range(2):
        pipe.fuse_lora(components=["unet"], lora_scale=0.5)
        pipe.unfuse_lora(components=["unet"])
        found.append(layer.scaling["style"])
    assert found == [1.0, 0.5, 0.25]
    pipe.set_adapters("style", 0.7)
    call(cross_attention_kwargs={"scale": 0})
    assert layer.scaling["style"] == 1.0


def test_a_scale_changed_in_place_is_seen_by_a_compiled_model() -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = build(FLUX), CompileCounter()
    handle = stirred(inject(model, plan(model, "flux/attention", rank=2)))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        found = [run(compiled, FLUX)]
        with handle.scaled(0.5):
            found.append(run(compiled, FLUX))
        found.append(run(compiled, FLUX))
    assert counter.frame_count == 1
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-4)


# ---- several


def test_names_are_whole_names() -> None:
    """`style` and `style2` do not touch each other, in any order of removal."""
    for order in (("style", "style2"), ("style2", "style")):
        model = build(UNET).requires_grad_(False)
        before, plain = digest(model), said(model, UNET)
        planned = plan(model, "sd/attention", rank=2)
        alone = {}
        for seed, name in enumerate(("style", "style2")):
            with stirred(inject(model, planned, name), seed):
                alone[name] = said(model, UNET)
        handles = {n: stirred(inject(model, planned, n), s) for s, n in enumerate(("style", "style2"))}
        both = said(model, UNET)
        own = {id(p) for p in handles["style2"].parameters()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == own, "the one that came last trains"
        with handles["style"].disabled():
            assert torch.equal(said(model, UNET), alone["style2"])
        with handles["style2"].scaled(0):
            assert torch.equal(said(model, UNET), alone["style"])
        assert torch.equal(said(model, UNET), both)
        remove(model, order[0])
        assert torch.equal(said(model, UNET), alone[order[1]])
        left = {id(p) for p in handles[order[1]].parameters()}
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        assert trains == left, "the one that is left trains, and nothing else"
        remove(model, order[1])
        assert torch.equal(said(model, UNET), plain)
        assert digest(model) == before


def test_one_that_was_switched_off_stays_so_when_another_is_taken_off() -> None:
    net, x = nn.Sequential(nn.Linear(8, 6)).requires_grad_(False), torch.randn(2, 8)
    plain = net(x)
    handles = [stirred(inject(net, plan(net, "*", rank=2), name)) for name in ("one", "two")]
    net[0].set_adapter("one")
    handles[0].remove()
    assert net[0].active_adapters == []
    assert torch.equal(net(x), plain)


def test_ranks_and_strengths_of_their_own_and_whole_names_of_layers() -> None:
    """Block 1 takes nothing from block 10, nor from a block whose name ends alike."""

    def blocks(count):
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(count))})

    model = nn.ModuleDict({**blocks(12), "inner": blocks(2)})
    rules = {"blocks.1": {"rank": 3, "lora_alpha": 12}, "inner.**": {"rank": 1, "lora_alpha": 5}}
    for inner in ("inner.blocks.0", "inner.blocks.1"):
        with inject(model, plan(model, f"blocks.* | {inner}", rank=2, lora_alpha=2, rules=rules)) as handle:
            found = {
                name: (layer.r["default"], float(layer.scaling["default"]))
                for name, layer in handle.layers.items()
            }
        expected = {f"blocks.{i}": (2, 1.0) for i in range(12)}
        assert found == {**expected, "blocks.1": (3, 4.0), inner: (1, 5.0)}


# ---- precision


def test_fp32_adapters_on_a_bf16_model_learn_small_steps() -> None:
    """Of bf16 weights a step of 1e-6 moves few; of fp32 ones all that have a gradient."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
        handle = stirred(inject(net, plan(net, "*", rank=8), dtype=dtype), size=0.1)
        assert {p.dtype for p in handle.parameters()} == {dtype}
        before = [p.detach().clone() for p in handle.parameters()]
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-6, weight_decay=0.0)
        net(torch.randn(32, 64, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        moved = [(p != b).float().mean() for p, b in zip(handle.parameters(), before, strict=True)]
        shares[dtype] = float(torch.stack(moved).mean())
    assert shares[torch.float32] >= 0.99
    assert shares[torch.bfloat16] < 0.1


# ---- what is refused


def test_names_and_plans_that_do_not_fit() -> None:
    model = build(UNET)
    planned = plan(model, "sd/attention", rank=2)
    before = digest(model)
    with pytest.raises(ValueError, match=r"has letters, digits, - and _, got '../x'"):
        inject(model, planned, "../x")
    with pytest.raises(
        ValueError, match=r"the plan is for a layer 'transformer_blocks.* has not: plan for this"
    ):
        inject(model, plan(build(FLUX), "flux/attention", rank=2))
    with pytest.raises(
        ValueError, match=r"unknown initialisation of lora 'gausian'; did you mean 'gaussian'"
    ):
        inject(model, planned, init="gausian")
    with pytest.raises(ValueError, match=r"unknown adapter 'style'"):
        remove(model, "style")
    assert digest(model) == before
    inject(model, planned, "style")
    with pytest.raises(ValueError, match=r"the model has an adapter 'style' already, beside \['style'\]"):
        inject(model, planned, "style")


def test_plans_that_no_model_can_follow() -> None:
    net = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(6, 8), "words": nn.Embedding(8, 6)})
    planned, before = plan(net, "*", rank=2), digest(net)
    first, second = planned.rows
    wrong = {
        r"a plan has each layer once, got none": (),
        r"a plan has each layer once, got \['a'\] twice": (first, first),
        r"is of one algorithm, with the same options, got loha, lora: put one on after": (
            first,
            replace(second, algorithm="loha"),
        ),
        r"got lora, lora with rslora": (first, replace(second, rslora=True)),
        r"unknown algorithm for a 'lorra'; did you mean 'lora'": (replace(first, algorithm="lorra"),),
        r"ranks are whole numbers from 1, got 0 for a": (replace(first, rank=0),),
        r"ranks are whole numbers from 1, got True for a": (replace(first, rank=True),),
        r"lora_alpha is a number above 0, got nan for b": (first, replace(second, lora_alpha=float("nan"))),
        r"a learning rate is a number of 0 or more, got -1.0 for a": (replace(first, learning_rate=-1.0),),
        r"the plan is for a of shape \(6, 9\), which has \(6, 8\) here": (replace(first, shape=(6, 9)),),
        r"words is a Embedding, which carries no lora": (replace(first, name="words", shape=(8, 6)),),
        r"the plan is for a layer 'c', which ModuleDict has not": (replace(first, name="c"),),
    }
    for text, rows in wrong.items():
        with pytest.raises(ValueError, match=text):
            inject(net, LoraPlan(rows, 2))
    assert digest(net) == before


def test_fused_adapters_are_refused() -> None:
    """Beside what is fused into the weights peft's layers leave out what is not."""
    net = nn.Sequential(nn.Linear(8, 6))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net, "fused")
    net[0].merge()
    with pytest.raises(
        ValueError, match=r"adapters are fused into the weight of 0, beside which no other has"
    ):
        inject(net, plan(net, "*", rank=2))


def test_what_peft_has_fused_is_not_taken_off() -> None:
    net = nn.Sequential(nn.Linear(8, 6)).requires_grad_(False)
    handle = stirred(inject(net, plan(net, "*", rank=2), "style"))
    net[0].merge()
    before = digest(net)
    for call in (handle.remove, handle.disabled, handle.merged, lambda: handle.scaled(0.5)):
        with pytest.raises(RuntimeError, match=r"'style' is fused into the weight of 0: call unfuse_lora"):
            call()
    assert digest(net) == before
    net[0].unmerge()
    handle.remove()
    assert type(net[0]) is nn.Linear


def test_a_failure_halfway_leaves_the_model_as_it_was(monkeypatch) -> None:
    from peft.tuners.lora.layer import LoraLayer

    model = build(UNET)
    handle = stirred(inject(model, plan(model, "**.attn1.to_q", rank=2), "other"))
    before, full, attributes = digest(model), said(model, UNET), sorted(vars(model))
    right, calls = LoraLayer.reset_lora_parameters, []

    def broken(layer, *args):
        calls.append(layer)
        if len(calls) == 9:
            raise MemoryError("on purpose")
        return right(layer, *args)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", broken)
    with pytest.raises(MemoryError, match="on purpose"):
        inject(model, plan(model, "sd/attention", rank=2), "style")
    assert digest(model) == before
    assert torch.equal(said(model, UNET), full)
    assert sorted(vars(model)) == attributes
    assert list(model.peft_config) == ["other"]
    handle.remove()
    calls.clear()
    inject(model, plan(model, "**.attn1.to_q", rank=2), "style")


def test_fused_projections_are_refused() -> None:
    model = build(FLUX)
    planned = plan(model, "flux/attention", rank=2)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"are fused, and an adapter in their parts has no effect"):
        inject(model, planned)


def test_diffusers_and_peft_see_the_adapter() -> None:
    model = build(UNET)
    handle = inject(model, plan(model, Class("Linear"), rank=1), "style")
    assert model.active_adapters() == ["style"]
    assert list(model.peft_config) == ["style"]
    twin = copy.deepcopy(model)
    assert torch.equal(said(twin, UNET), said(model, UNET))
    assert repr(handle).startswith("LoraHandle('style' at ")
    assert lora.inject is inject


@pytest.mark.parametrize("family", ["clip", "t5"])
def test_text_encoders(family) -> None:
    model = encoder(family).eval().requires_grad_(False)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before, plain = digest(model), model(ids)[0]
    with inject(model, plan(model, f"{family}/attention", rank=2, lora_alpha=4)) as handle:
        assert torch.equal(model(ids)[0], plain)
        assert not torch.allclose(stirred(handle).model(ids)[0], plain, atol=1e-4)
    assert digest(model) == before
    assert torch.equal(model(ids)[0], plain)


def test_what_is_put_on_is_in_the_mode_of_the_model() -> None:
    """peft's new layers train, of which those of loha and lokr draw numbers at each call."""
    net, x = nn.Sequential(nn.Linear(8, 6)).eval(), torch.randn(2, 8)
    with inject(net, plan(net, "*", rank=2, algorithm="lokr")):
        assert not any(one.training for one in net.modules())
        before = torch.get_rng_state()
        net(x)
        assert torch.equal(torch.get_rng_state(), before)
    with inject(net.train(), plan(net, "*", rank=2)):
        assert all(one.training for one in net.modules())


# ---- copied and moved


def test_a_copy_has_an_adapter_of_its_own() -> None:
    model = build(UNET).requires_grad_(False)
    before, plain = digest(model)[0], said(model, UNET)
    handle = stirred(inject(model, plan(model, "sd/attention", rank=2), "style"))
    full, twin = said(model, UNET), copy.deepcopy(model)
    with handle.scaled(0):
        assert torch.equal(said(twin, UNET), full)
        assert torch.equal(said(model, UNET), plain)
    remove(twin, "style")
    assert digest(twin)[0] == before
    assert torch.equal(said(twin, UNET), plain)
    assert torch.equal(said(model, UNET), full)
    assert handle.attached
    handle.remove()
    assert digest(model)[0] == before


def test_scales_go_with_the_model_and_stay_in_float32(monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    handle = stirred(inject(net, plan(net, "*", rank=2, lora_alpha=2**0.5)))
    scales = handle.scales
    for dtype in (torch.bfloat16, torch.float64):
        net.to(dtype)
        assert {scale.dtype for scale in handle.scales.values()} == {torch.float32}
        assert all(handle.scales[name] is scale for name, scale in scales.items())
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = net[0].get_base_layer()(x) + x @ handle.delta("0").T
    torch.testing.assert_close(net[0](x), expected, rtol=1e-12, atol=1e-12)
    moved: list[torch.device] = []
    monkeypatch.setattr(Scales, "move", lambda self, device: moved.append(device))
    copy.deepcopy(net).to("meta")
    assert moved == [torch.device("meta")] * 2


def test_scales_keep_their_value_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 6))
    handle = inject(net, plan(net, "*", rank=2, lora_alpha=3))
    net.to_empty(device="cpu")
    stirred(handle)
    nn.init.zeros_(net[0].get_base_layer().weight)
    nn.init.zeros_(net[0].get_base_layer().bias)
    x = torch.randn(3, 8)
    a, b = handle.parameters()
    torch.testing.assert_close(net(x), 1.5 * x @ a.T @ b.T)
    net.to("meta")
    assert float(handle.scales["0"]) == 1.5


def test_a_begins_by_its_seed_and_no_generator_moves() -> None:
    def begun(seed, init=True):
        model = build(UNET)
        handle = inject(model, plan(model, "sd/attention", rank=4), seed=seed, init=init)
        return torch.cat([p.detach().flatten() for n, p in handle.named_parameters() if n.endswith("lora_A")])

    before = torch.get_rng_state()
    assert torch.equal(begun(1), begun(1))
    assert not torch.equal(begun(1), begun(2))
    assert float(begun(1, "gaussian").std()) == pytest.approx(1 / 4, rel=0.05)
    assert torch.equal(torch.get_rng_state(), before)
