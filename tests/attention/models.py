"""What the tests of attention share: tiny models, their calls, and what is looked at before and after."""

from typing import Any

import torch
from torch import nn

from gendiff.attention import Middleware, sites
from tests.zoo import build, run

UNET, SD3, FLUX, WAN = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
)
FOUR = (UNET, SD3, FLUX, WAN)


def said(model: nn.Module, name: str) -> torch.Tensor:
    """What a model says to its inputs, without gradients."""
    with torch.no_grad():
        return run(model, name)


class Halved(Middleware):
    """Half the queries, and the names of the layers in the order in which they ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_qkv(self, site, context, q, k, v):
        self.seen.append(site.name)
        return q * 0.5, k, v


class Same(Middleware):
    """Every hook that leaves the fast kernel, changing nothing."""

    def on_inputs(self, site, context, hidden, other):
        return hidden, other

    def on_qkv(self, site, context, q, k, v):
        return q, k, v

    def on_heads(self, site, context, out, q, k, v):
        return out

    def on_output(self, site, context, out):
        return out


class Around(Middleware):
    """The hooks that any layer has, changing nothing."""

    def on_inputs(self, site, context, hidden, other):
        return hidden, other

    def on_output(self, site, context, out):
        return out


class Kept(Middleware):
    """The probabilities, kept and not changed."""

    def __init__(self) -> None:
        self.probs: dict[str, torch.Tensor] = {}

    def on_probs(self, site, context, probs):
        self.probs[site.name] = probs
        return probs


def state(model: nn.Module) -> list[Any]:
    """All that a stack could leave behind: objects, their classes, attributes, hooks, names of weights."""
    found: list[Any] = [list(model.state_dict())]
    for site in sites(model):
        layer = site.module
        found.append((id(layer.processor), type(layer.processor), sorted(vars(layer)), list(layer._modules)))
        found.append(sorted(vars(layer.processor)))
    found.append((len(model._forward_pre_hooks), len(model._forward_hooks), sorted(vars(model))))
    return found


__all__ = [
    "FLUX",
    "FOUR",
    "SD3",
    "UNET",
    "WAN",
    "Around",
    "Halved",
    "Kept",
    "Same",
    "build",
    "run",
    "said",
    "state",
]
