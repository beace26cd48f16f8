"""Adapters that begin as a part of the weight, which is taken off it: the weight as it was, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.fitting import is_principal
from gendiff.lora.layers import part_of
from gendiff.lora.plan import LoraPlan, Planned
from gendiff.lora.quantised import is_quantised

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@final
class Principal:
    r"""What an initialisation has taken off the weights of a model, :math:`W - s B_0 A_0`, to be put back.

    Args:
        init: "pissa", "pissa_niter_4" (Meng et al. 2024, arXiv 2404.02948) or "olora" (Büyükakyüz 2024, arXiv
            2406.01775).

    Attributes:
        init: the same.
        originals: copies of the weights, on the CPU, by layer.
        begun: what A and B began at, on the CPU, by layer.
    """

    def __init__(self, init: str) -> None:
        self.init = init
        self.originals: dict[str, Tensor] = {}
        self.begun: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, name: str, layer: Any, adapter_name: str) -> None:
        """Begin an adapter by what is taken off the weight of its layer, in float32, through peft."""
        weight = layer.get_base_layer().weight
        held = weight.data
        self.originals[name] = held.to("cpu", copy=True)
        with torch.no_grad():
            if self.init == "olora":
                layer.olora_init(adapter_name)
            else:
                layer.pissa_init(adapter_name, self.init)
            held.copy_(weight.data)  # peft has put another tensor in its place
        weight.data = held

    def note(self, name: str, layer: Any, adapter_name: str) -> None:
        """Keep what A and B begin at, in the precision that they have."""
        a, b = (part_of(layer, part, adapter_name).detach() for part in ("lora_A", "lora_B"))
        self.begun[name] = (a.to("cpu", copy=True), b.to("cpu", copy=True))

    def original(self, name: str, like: Tensor) -> Tensor:
        """The weight of a layer as it was, on the device and in the precision of another tensor."""
        return self.originals[name].to(like)

    def restore(self, name: str, layer: Any) -> None:
        """Put the weight of a layer back as it was."""
        if name in self.originals:
            with torch.no_grad():
                layer.get_base_layer().weight.copy_(self.originals[name])

    def plain(self, row: Planned, parts: Mapping[str, Tensor]) -> tuple[Planned, dict[str, Tensor]]:
        r"""The LoRA of twice the rank for the weight as it was, :math:`s (BA - B_0 A_0)`.

        Raises:
            ValueError: for a rank above half of that of the weight.
        """
        rank, highest = 2 * row.rank, ALGORITHMS["lora"].limit(row.shape[0], math.prod(row.shape[1:]))
        if rank > highest:
            raise ValueError(
                f"what {self.init} of rank {row.rank} has learned is of rank {rank}, and the weight of "
                f"{row.name}, of shape {row.shape}, has {highest}: take it from the weights by `extract`, by "
                f"svd, or plan for a rank of {highest // 2} or less."
            )
        a, b = parts["lora_A"], parts["lora_B"]
        first_a, first_b = (one.to(a) for one in self.begun[row.name])
        alpha = row.scale * (math.sqrt(rank) if row.rslora else rank)
        doubled = {"lora_A": torch.cat([a, -first_a]), "lora_B": torch.cat([b, first_b], dim=1)}
        return replace(row, rank=rank, lora_alpha=alpha), doubled


def check_principal(root: nn.Module, plan: LoraPlan, init: str | bool, held: Mapping[str, Any]) -> None:
    """Raise unless an initialisation can take its part off the weights, and nothing else relies on them.

    Args:
        root: the network.
        plan: what is to be put on.
        init: how it is to begin.
        held: the handles of the adapters that are on, by name.
    """
    for row in plan.rows:
        others = {name: one for name, one in held.items() if row.name in one.layers}
        for name, handle in others.items():
            theirs = handle.slots[row.name].algorithm
            changed = handle.principal.init if handle.principal is not None else None
            relies = next((one for one in (row.algorithm, theirs) if ALGORITHMS[one].needs_weight), None)
            if is_principal(init) and changed:
                raise ValueError(
                    f"{init} would change the weight of {row.name}, which {changed} of the adapter {name!r} "
                    f"has changed: remove that one first, or leave the layer out."
                )
            if relies and (is_principal(init) or changed):
                raise ValueError(
                    f"{changed or init} changes the weight of {row.name}, and what {relies} adds depends on "
                    f"it: {name!r} and the new adapter cannot both be there."
                )
        if is_principal(init):
            _check_weight(root.get_submodule(row.name), row, str(init))


def _check_weight(layer: Any, row: Planned, init: str) -> None:
    base = getattr(layer, "base_layer", layer)
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"{init} takes the weight of a linear layer apart, and {row.name} is a {type(base).__name__}: "
            f"leave it out, or begin with True."
        )
    if base.weight.is_meta or is_quantised(base) or base.weight.dtype not in DTYPES:
        holds = type(base.weight).__name__ if is_quantised(base) else base.weight.dtype
        what = "has no numbers yet" if base.weight.is_meta else f"holds {holds}"
        raise ValueError(
            f"{init} takes weights of float32, bfloat16 or float16 apart, and that of {row.name} {what}."
        )
    if row.rank > min(row.shape):
        raise ValueError(
            f"{init} gives {row.name}, of shape {row.shape}, at most a rank of {min(row.shape)}, got "
            f"{row.rank}."
        )
