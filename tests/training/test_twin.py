"""A twin computes with other weights, shares every tensor, and leaves no trace on the live modules."""

import copy
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm

from gendiff.denoiser import Denoiser
from gendiff.math.tables import ScaledLinearBeta
from gendiff.testing import tiny_pipeline
from gendiff.training.ema import EMA, Averages
from gendiff.training.names import parameters
from gendiff.training.twin import twin

peft = pytest.importorskip("peft")


class Backbone(nn.Module):
    """As a denoiser holds a model of diffusers."""

    accepts = frozenset({"text"})

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.network(x_t, timestep, cond["text"], return_dict=False)[0]


def shifted(components: Mapping[str, nn.Module], by: float = 0.05) -> dict[str, Tensor]:
    """Weights for everything that trains, other than the live ones."""
    made = torch.Generator().manual_seed(1)
    named = parameters(components)
    return {n: p.detach() + by * torch.randn(p.shape, generator=made).to(p.dtype) for n, p in named.items()}


def with_weights(components: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The oracle: real copies, into which the weights are written."""
    copies = copy.deepcopy(dict(components))
    with torch.no_grad():
        for name, parameter in parameters(copies).items():
            parameter.copy_(weights[name])
    return {name: module.eval() for name, module in copies.items()}


def traces(components: Mapping[str, nn.Module]) -> list[Any]:
    """What making a twin could have changed: identities of everything, modes, flags, hooks."""
    return [
        (path, id(one), one.training, sorted(one.__dict__), list(one._forward_hooks.items()))
        for module in components.values()
        for path, one in module.named_modules()
    ] + [
        (name, id(tensor), tensor.requires_grad)
        for module in components.values()
        for name, tensor in module.state_dict(keep_vars=True).items()
    ]


def storages(modules: Mapping[str, nn.Module]) -> set[int]:
    every = [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage().data_ptr() for t in every if t.numel()}


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_a_twin_follows_its_weights_and_shares_what_is_frozen() -> None:
    net = small().train()
    net[0].requires_grad_(False)
    components, x = {"net": net}, torch.randn(5, 3)
    net(x)  # moves the running means
    before, weights = traces(components), shifted(components)
    made = twin(components, weights)
    assert traces(components) == before
    averaged = made["net"]
    assert isinstance(averaged, nn.Sequential)
    assert not any(one.training for one in averaged.modules())
    assert averaged[0].weight is net[0].weight
    assert averaged[1].running_mean is net[1].running_mean
    for name, parameter in parameters(made, trainable=False).items():
        if name in weights:
            assert parameter.data_ptr() == weights[name].data_ptr()
            assert not parameter.requires_grad
    assert storages(made) == storages(components) - {
        p.data_ptr() for p in net.parameters() if p.requires_grad
    } | {w.data_ptr() for w in weights.values()}
    for _ in range(2):
        assert torch.equal(averaged(x), with_weights(components, weights)["net"](x))
        for weight in weights.values():
            weight.mul_(1.5)


def test_a_twin_of_averages_moves_with_every_update() -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    averages = Averages(parameters({"net": net}), EMA(0.5))
    averaged = twin({"net": net}, averages.weights())["net"]
    start = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    averages.update(torch.tensor(1), torch.tensor(True))
    expected = (start(x) + net(x)) / 2  # the layer is linear in its weights
    torch.testing.assert_close(averaged(x), expected)
    assert not averaged(x).requires_grad


# ---- ties


def test_what_is_tied_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.listed = [self.head]  # not registered, and still not the live one in the twin

    net = Tied()
    other = nn.Sequential(net.embed, nn.Linear(3, 1))
    components = {"net": net, "other": other}
    made = twin(components, shifted(components))
    averaged: Any = made["net"]
    assert averaged.head.weight is averaged.embed.weight
    assert averaged.listed[0] is averaged.head
    assert made["other"][0] is averaged.embed  # pyright: ignore[reportIndexIssue]
    assert averaged.embed is not net.embed
    assert len(parameters(made, trainable=False)) == 3


# ---- real models


def test_a_denoiser_has_a_denoiser_as_its_twin() -> None:
    pipe = tiny_pipeline("sd15")
    pipe.vae.requires_grad_(False)
    pipe.unet.enable_gradient_checkpointing()
    denoiser = Denoiser(Backbone(pipe.unet), ScaledLinearBeta(), "epsilon").train()
    components = {"model": denoiser, "text": pipe.text_encoder, "vae": pipe.vae}
    text = {"text": pipe.text_encoder(torch.ones(2, 77).long(), output_hidden_states=True).hidden_states[-2]}
    before, weights = traces(components), shifted(components)
    made = twin(components, weights)
    assert traces(components) == before
    averaged, expected = made["model"], with_weights(components, weights)
    assert type(averaged) is Denoiser
    assert averaged.schedule is denoiser.schedule
    assert averaged.prediction is denoiser.prediction
    assert type(averaged.backbone.network) is type(pipe.unet)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(averaged(x, 0.5, text).eps, expected["model"](x, 0.5, text).eps)
        hidden = [
            m["text"](torch.ones(1, 77).long(), output_hidden_states=True).hidden_states[-2]
            for m in (made, expected)
        ]
    assert torch.equal(*hidden)
    assert storages({"vae": made["vae"]}) == storages({"vae": pipe.vae})


@pytest.mark.parametrize("by_peft", [False, True])
def test_adapters_are_the_twins_own_and_their_base_is_the_live_one(by_peft: bool) -> None:
    unet: Any = tiny_pipeline("sd15").unet
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    base = unet.requires_grad_(False)
    if by_peft:
        unet = peft.get_peft_model(unet, config)
    else:
        unet.add_adapter(config)
    components = {"unet": unet}
    weights = shifted(components)
    assert weights
    assert all("lora_" in name for name in weights)
    before = traces(components)
    made = twin(components, weights)
    assert traces(components) == before
    averaged, expected = made["unet"], with_weights(components, weights)["unet"]
    inputs = torch.randn(1, 4, 8, 8), 10, torch.randn(1, 77, 16)
    with torch.no_grad():
        assert torch.equal(averaged(*inputs).sample, expected(*inputs).sample)
        assert not torch.equal(averaged(*inputs).sample, unet.eval()(*inputs).sample)
    live = {n: p for n, p in parameters(components, trainable=False).items() if n not in weights}
    theirs = parameters(made, trainable=False)
    assert len(live) > 100
    assert all(theirs[name] is parameter for name, parameter in live.items())
    layer, own = (
        next(m for m in one.modules() if isinstance(m, peft.tuners.lora.Linear)) for one in (base, averaged)
    )
    assert own.base_layer is not layer.base_layer
    assert own.base_layer.weight is layer.base_layer.weight
    (adapter,) = own.lora_A
    ours, theirs = own.lora_A[adapter].weight, layer.lora_A[adapter].weight
    assert ours.data_ptr() in {weight.data_ptr() for weight in weights.values()}
    assert ours.data_ptr() != theirs.data_ptr()


# ---- what is left out, and what is not


def test_hooks_that_somebody_attached_are_left_out_and_those_of_a_layer_are_kept() -> None:
    calls: list[Any] = []
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net.register_forward_hook(lambda *_: calls.append("forward"))
    net[0].register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    net[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[0])  # computes the weight in a hook
    parametrized_weight_norm(net[1])
    components, x = {"net": net}, torch.randn(2, 3)
    live, weights = parameters(components), shifted(components)
    kept = {name: p.detach().clone() for name, p in live.items()}
    for name, p in live.items():
        p.data.copy_(weights[name])
    expected = net(x)
    for name, p in live.items():
        p.data.copy_(kept[name])
    calls.clear()
    averaged = twin(components, weights)["net"]
    assert torch.equal(averaged(x), expected)
    assert calls == []
    net(x)
    assert calls == ["pre", "forward"]


def test_wrappers_are_left_out() -> None:
    inner = small()
    inner[3] = torch.compile(inner[3], backend="eager")  # pyright: ignore[reportArgumentType]
    components: dict[str, nn.Module] = {"net": DataParallel(inner)}
    weights = shifted(components)
    assert "net.3.weight" in weights
    averaged: Any = twin(components, weights)["net"]
    assert type(averaged) is nn.Sequential
    assert type(averaged[3]) is nn.Linear
    x = torch.randn(2, 3)
    inner[3] = inner[3]._orig_mod  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(averaged(x), with_weights({"net": inner}, weights)["net"](x))


def test_tensors_that_are_no_parameters_are_shared_wherever_they_lie() -> None:
    class Holder:
        def __init__(self, network: nn.Module) -> None:
            self.network, self.table = network, {"cache": [torch.ones(2)]}

    net: Any = nn.Linear(2, 2)
    net.computed = net.weight * 2  # deepcopy refuses what has a history
    net.holder = Holder(nn.Linear(2, 2).requires_grad_(False))
    averaged: Any = twin({"net": net}, shifted({"net": net}))["net"]
    assert averaged.computed is net.computed
    assert averaged.holder.table["cache"][0] is net.holder.table["cache"][0]
    assert averaged.holder.table is not net.holder.table
    assert averaged.holder.network is not net.holder.network
    assert averaged.holder.network.weight is net.holder.network.weight


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("net.bias"), "none for 1 of them, such as 'net.bias'"),
        (lambda w: w.update({"net.wieght": w["net.bias"]}), "did you mean 'net.weight'"),
        (lambda w: w.update({"net.bias": torch.zeros(3)}), r"net.bias are of shape \(3,\)"),
        (lambda w: w.update({"net.bias": w["net.bias"].double()}), r"torch.float64 .* they must be equal"),
        (lambda w: w.update({"net.bias": w["net.bias"].to("meta")}), "on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, says: str) -> None:
    components = {"net": nn.Linear(3, 2)}
    weights = shifted(components)
    change(weights)
    with pytest.raises(ValueError, match=says):
        twin(components, weights)


def test_modules_that_cannot_be_copied_are_refused() -> None:
    class Itself(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Itself":
            return self

    locked: Any = nn.Linear(1, 1)
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"'net' \(Linear\) cannot have a twin.*lock"):
        twin({"net": locked}, shifted({"net": locked}))
    net = nn.Sequential(Itself(1, 1)).train()
    with pytest.raises(TypeError, match=r"0 \(Itself\) gives itself"):
        twin({"net": net}, shifted({"net": net}))
    assert net[0].training
