"""What the tests of saving and loading share: components to train, other weights, and what must not move."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gendiff.denoiser import Denoiser
from gendiff.math.tables import ScaledLinearBeta


class Backbone(nn.Module):
    """As a denoiser holds a model of diffusers."""

    accepts = frozenset({"text"})

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.network(x_t, timestep, cond["text"], return_dict=False)[0]


class Codec(nn.Module):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.vae, self.text_encoder = pipe.vae, pipe.text_encoder


def components(pipe: Any, *train: str) -> dict[str, nn.Module]:
    """A pipeline's models as a trainer has them, of which some train."""
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            model.requires_grad_(name in train)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return {"model": Denoiser(Backbone(network), ScaledLinearBeta(), "epsilon"), "codec": Codec(pipe)}


def network() -> nn.Sequential:
    """A plain network with buffers, a weight that does not lie in rows, and a frozen layer."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 3))
    net[2].weight = nn.Parameter(net[0].weight.detach().T)
    net[3].requires_grad_(False)
    return net


def moved(trained: Mapping[str, Tensor], by: float = 0.05) -> dict[str, Tensor]:
    """Weights as an average may have them: near the trained ones."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: p.detach() + by * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in trained.items()
    }


def put(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into trained parameters of the same names."""
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(values[name])


def images(pipe: Any) -> Tensor:
    size = {"height": 64, "width": 64} if "flux" in type(pipe).__name__.lower() else {}
    generator = torch.Generator().manual_seed(1)
    return pipe("a red fox", num_inference_steps=2, generator=generator, output_type="pt", **size).images


def aligned(pipe: Any) -> Any:
    """Tensors mapped from a file may lie unaligned, where the kernels of a CPU round otherwise, by 2e-6."""
    for model in pipe.components.values():
        for p in model.parameters() if isinstance(model, nn.Module) else ():
            p.data = p.data.clone()
    return pipe


def snapshot(components: Mapping[str, nn.Module], pipe: Any = None) -> list[Any]:
    """Everything that saving could have moved: tensors, their identity, configurations, attributes."""
    taken: list[Any] = []
    for module in components.values():
        for name, one in module.named_modules():
            own = [*one._parameters.items(), *one._buffers.items()]
            taken.append((name, id(one), [(key, id(t), t is not None and t.clone()) for key, t in own]))
            taken.append(sorted(one.__dict__))
            config = getattr(one, "config", None)
            taken.append(None if config is None else copy.deepcopy(dict(getattr(config, "__dict__", config))))
    if pipe is not None:
        taken.append({name: id(one) for name, one in pipe.components.items()})
        taken += [copy.deepcopy(dict(pipe.config)), sorted(pipe.__dict__)]
        taken.append(copy.deepcopy(pipe.text_encoder.config.to_dict()))
    return taken


def same(a: Any, b: Any) -> bool:
    """Equality, bit for bit where there are tensors."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
