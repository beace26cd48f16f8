"""An adapter on a model: scaled, disabled and merged within a block, and taken off without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff._groups import ParamGroup
from gendiff.attention.handle import changeable
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS, delta
from gendiff.lora.layers import MARKS, is_bare, part_of
from gendiff.lora.plan import LoraPlan, Planned

HELD = "_gendiff_adapters"  # the handles of a model, by name
TRAINED = "_gendiff_trained"  # what required grad before the first of them
TOLD = "_hf_peft_config_loaded"


@final
class LoraHandle:
    """An adapter on a model; see `inject`.

    Attributes:
        model: the network.
        name: of the adapter.
        plan: what was planned.
        layers: the layers of peft that carry it, by name.
        attached: whether it still is on the model.
    """

    def __init__(
        self, model: nn.Module, name: str, plan: LoraPlan, layers: dict[str, Any], trained: dict[str, bool]
    ) -> None:
        self.model, self.name, self.plan, self.layers, self.attached = model, name, plan, layers, True
        self._trained = trained
        self.scales: dict[str, Tensor] = {
            row.name: layers[row.name].scaling[name] for row in plan.rows if ALGORITHMS[row.algorithm].scaled
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's weights."""
        yield from (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's weights by layer and part, as `...to_q.lora_A`."""
        self._check()
        for row in self.plan.rows:
            for part in ALGORITHMS[row.algorithm].shapes(row):
                yield f"{row.name}.{part}", part_of(self.layers[row.name], part, self.name)

    def adapter(self) -> Adapter:
        """A copy of the adapter by itself, at full strength, as files, `inject` and the algebra take it."""
        self._check()
        return Adapter(
            self.plan,
            {
                row.name: {part: one.detach().clone() for part, one in self._parts(row).items()}
                for row in self.plan.rows
            },
        )

    def swap(self, adapter: Adapter) -> None:
        """Put the numbers of another adapter in the place of this one's.

        Raises:
            ValueError: for an adapter of other layers, algorithms or ranks; nothing has changed then.
        """
        self._check()
        if adapter.plan.rows != self.plan.rows:
            raise ValueError("the adapter is of another plan.")
        with torch.no_grad():
            for row in self.plan.rows:
                for part, one in self._parts(row).items():
                    one.copy_(adapter.tensors[row.name][part])

    def _parts(self, row: Planned) -> dict[str, Tensor]:
        """The parts of a layer, of the shapes that the algorithm says."""
        layer = self.layers[row.name]
        return {
            part: part_of(layer, part, self.name).view(shape)
            for part, shape in ALGORITHMS[row.algorithm].shapes(row).items()
        }

    def param_groups(
        self, learning_rate: float | int, loraplus_lr_ratio: float | int = 1
    ) -> list[ParamGroup]:
        """Learning rates of the adapter's weights, for `TrainConfig(param_groups=...)`.

        Args:
            learning_rate: of A, and of B times the ratio, where the plan says no other.
            loraplus_lr_ratio: how much faster B learns than A, at least 1 (Hayou et al. 2024, *LoRA+*, arXiv
                2402.12354, who take 16 for language models).

        Raises:
            ValueError: for a ratio below 1.
        """
        self._check()
        if not loraplus_lr_ratio >= 1:
            raise ValueError(
                f"B learns as fast as A or faster, by a ratio of 1 or more, got {loraplus_lr_ratio}."
            )
        rates: dict[float | int | None, list[str]] = {None: ["**"]}
        for row in self.plan.rows:
            if row.learning_rate is not None:
                rates.setdefault(row.learning_rate, []).append(f"**.{row.name}")
        return [
            ParamGroup(
                " | ".join(f"{name}.{part}.{self.name}.**" for name in names),
                learning_rate=(learning_rate if rate is None else rate) * ratio,
            )
            for rate, names in rates.items()
            for part, ratio in (("lora_A", 1), ("lora_B", loraplus_lr_ratio))
        ]

    def delta(self, layer: str) -> Tensor:
        r"""What the adapter adds to the weight of a layer, :math:`\text{scale} \cdot BA`, in its shape.

        Raises:
            KeyError: for a layer that is not in the plan.
        """
        self._check()
        if layer not in self.layers:
            raise KeyError(unknown("layer of the adapter", layer, self.layers))
        row = self.plan[layer]
        with torch.no_grad():
            weight = self.layers[layer].get_base_layer().weight
            return delta(row, self._parts(row), weight, self.scales.get(layer))

    @contextmanager
    def scaled(self, weight: float | int | Tensor) -> Iterator[None]:
        """The adapter at a multiple of its strength within a block; the scales are written in place."""
        self._check()
        before = {name: scale.clone() for name, scale in self.scales.items()}
        try:
            for scale in self.scales.values():
                scale.mul_(weight)
            yield
        finally:
            for name, scale in self.scales.items():
                scale.copy_(before[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as if this adapter were not there within a block; others stay, and what trains does."""
        self._check()
        before = {name: layer._active_adapter for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer._active_adapter = [one for one in layer.active_adapters if one != self.name]
            yield
        finally:
            for name, layer in self.layers.items():
                layer._active_adapter = before[name]

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The adapter added into the weights within a block, in float32 at least; then the bits of before.

        Within it a layer takes as long as without an adapter. It needs the memory of a copy of the weights.
        """
        self._check()
        saved: dict[str, Tensor] = {}
        with self.disabled():
            try:
                for name, layer in self.layers.items():
                    weight = layer.get_base_layer().weight
                    saved[name] = weight.detach().clone()
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    with torch.no_grad():
                        weight.copy_((weight.to(wide) + self.delta(name).to(wide)).to(weight.dtype))
                yield
            finally:
                with torch.no_grad():
                    for name, value in saved.items():
                        self.layers[name].get_base_layer().weight.copy_(value)

    def remove(self) -> None:
        """Take the adapter off: the same modules in their places, and what trained before trains again."""
        if self.attached:
            changeable()
            self.attached = False
            _take_off(self)

    def __enter__(self) -> "LoraHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers, {self.plan.parameters:,} parameters"
        return f"LoraHandle({self.name!r} at {size}{'' if self.attached else ', removed'})"

    def _check(self) -> None:
        if not self.attached:
            raise RuntimeError(f"the adapter {self.name!r} was removed from its model.")


def _take_off(handle: LoraHandle) -> None:
    root: Any = handle.model
    name = handle.name
    for path, layer in handle.layers.items():
        layer._active_adapter = [one for one in layer.active_adapters if one != name]
        layer.delete_adapter(name)
        if is_bare(layer):
            parent, _, last = path.rpartition(".")
            root.get_submodule(parent)._modules[last] = layer.get_base_layer()
    root.peft_config.pop(name, None)
    if not root.peft_config:
        del root.peft_config
        tell(root, False)
    held = vars(root)[HELD]
    del held[name]
    trained = {key: value for key, value in handle._trained.items() if any(mark in key for mark in MARKS)}
    if not held:
        del vars(root)[HELD]
        trained = vars(root).pop(TRAINED)
    for key, parameter in root.named_parameters():
        if key in trained:
            parameter.requires_grad_(trained[key])


def tell(root: Any, adapted: bool) -> None:
    """Tell a model of diffusers that it has adapters, which it asks before it looks at them, or no more."""
    if adapted and hasattr(root, TOLD):
        setattr(root, TOLD, True)
    elif not adapted:
        vars(root).pop(TOLD, None)  # the class says False
