"""An adapter on a model: scaled, disabled and merged within a block, and taken off without a trace."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff._groups import ParamGroup
from gendiff.attention.handle import changeable
from gendiff.lora import blocks, swapping
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS, delta
from gendiff.lora.layers import MARKS, part_of, place_of, take_off
from gendiff.lora.plan import LoraPlan, Planned
from gendiff.lora.principal import Principal
from gendiff.lora.quantised import plain_weight
from gendiff.lora.records import HELD, TRAINED, forget, train_again


@final
class LoraHandle:
    """An adapter on a model; see `inject`.

    Attributes:
        model: the network.
        name: of the adapter.
        plan: what is on it: as planned, or as the adapter that was put in by `swap` says.
        slots: what there is room for, by layer, as it was injected.
        layers: the layers of peft that carry it, by name.
        metadata: words of the file that it came from.
        principal: what its beginning has taken off the weights; None where they are as they were.
        open: how many blocks of `scaled`, `disabled` and `merged` are entered.
        attached: whether it still is on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        plan: LoraPlan,
        layers: dict[str, Any],
        trained: dict[str, bool],
        principal: Principal | None = None,
    ) -> None:
        self.model, self.name, self.plan, self.layers, self.attached = model, name, plan, layers, True
        self.slots: dict[str, Planned] = {row.name: row for row in plan.rows}
        self.principal, self.open, self._trained = principal, 0, trained
        self.metadata: dict[str, str] = {}

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales by layer, which are read at each call of the model and may be written in place."""
        return {
            row.name: self.layers[row.name].scaling[self.name]
            for row in self.plan.rows
            if ALGORITHMS[row.algorithm].scaled
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
        r"""A copy of the adapter by itself, at full strength, as files, `inject` and the algebra take it.

        One that began by PiSSA or OLoRA is given as the LoRA of twice the rank for the weights as they were,
        :math:`s (BA - B_0 A_0) = s [B, B_0] [A; -A_0]`, which adds nothing where nothing was learned. `delta`
        says besides what was lost when the weights without their part were rounded to their precision.

        Raises:
            ValueError: where the weights have no such rank.
        """
        self._check()
        rows: list[Planned] = []
        tensors: dict[str, dict[str, Tensor]] = {}
        for row in self.plan.rows:
            parts = {part: one.detach().clone() for part, one in self._parts(row).items()}
            if self.principal is not None:
                row, parts = self.principal.plain(row, parts)
            rows.append(row)
            tensors[row.name] = parts
        return Adapter(replace(self.plan, rows=tuple(rows), init=True), tensors, dict(self.metadata))

    def swap(self, adapter: Adapter) -> None:
        """Put the numbers of another adapter in the place of this one's, in the tensors that are there.

        What was compiled or captured goes on with the new ones. A lower rank is filled up with zeros, which
        change nothing and learn nothing (lora, dora, loha); of lokr and oft the parts have to be of the same
        shapes. Layers that the other has not add nothing from then on (lora, loha, lokr). The plan is that of
        the other adapter afterwards, and so are the scales.

        Args:
            adapter: of the same algorithm.

        Raises:
            ValueError: for an adapter that does not fit; nothing has changed then.
            RuntimeError: within a block of `scaled`, `disabled` or `merged`.
        """
        self._check_apart()
        swapping.swap(self, adapter)
        self.metadata = dict(adapter.metadata)

    def _parts(self, row: Planned) -> dict[str, Tensor]:
        """The parts of a layer, of the shapes that the algorithm says."""
        shapes, there = ALGORITHMS[row.algorithm].shapes(row), swapping.parts_of(self, self.slots[row.name])
        return {part: swapping.cut(there[part], shape) for part, shape in shapes.items()}

    def param_groups(
        self, learning_rate: float | int, loraplus_lr_ratio: float | int = 1
    ) -> list[ParamGroup]:
        """Learning rates of the adapter's weights, for `TrainConfig(param_groups=...)`.

        Args:
            learning_rate: of the weights, and of B times the ratio, where the plan says no other.
            loraplus_lr_ratio: of lora and dora, how much faster B learns than the rest, at least 1 (Hayou et
                al. 2024, *LoRA+*, arXiv 2402.12354, who take 16 for language models).

        Raises:
            ValueError: for a ratio below 1, and for one of an algorithm that has no B.
        """
        self._check()
        if not loraplus_lr_ratio >= 1:
            raise ValueError(
                f"B learns as fast as A or faster, by a ratio of 1 or more, got {loraplus_lr_ratio}."
            )
        parts = dict.fromkeys(
            part for row in self.plan.rows for part in ALGORITHMS[row.algorithm].shapes(row)
        )
        if loraplus_lr_ratio != 1 and "lora_B" not in parts:
            raise ValueError(
                f"loraplus_lr_ratio is for B of lora and dora, and {self.plan.rows[0].algorithm} has none: "
                f"leave it at 1."
            )
        fast = [part for part in parts if part == "lora_B"]
        speeds = ((1, [part for part in parts if part not in fast]), (loraplus_lr_ratio, fast))
        rates: dict[float | int | None, list[str]] = {None: ["**"]}
        for row in self.plan.rows:
            if row.learning_rate is not None:
                rates.setdefault(row.learning_rate, []).append(f"**.{row.name}")
        return [
            ParamGroup(
                " | ".join(f"{name}.{place_of(part)}.{self.name}.**" for name in names for part in some),
                learning_rate=(learning_rate if rate is None else rate) * ratio,
            )
            for rate, names in rates.items()
            for ratio, some in speeds
            if some
        ]

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer as it is without the adapter, in float32 at least.

        Raises:
            KeyError: for a layer that is not in the plan.
        """
        self._check()
        row = self.plan[layer]
        weight = plain_weight(self.layers[row.name].get_base_layer()).detach()
        if self.principal is not None:
            weight = self.principal.original(layer, weight)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def delta(self, layer: str) -> Tensor:
        r"""What the adapter adds to the weight of a layer, :math:`\text{scale} \cdot BA`, in its shape.

        Of one that began by PiSSA or OLoRA it is what it adds to the weight as it was, :math:`W' + sBA - W`,
        where W' is what the layer multiplies by: with what rounding W' to its own precision has lost, which
        of bfloat16 is up to 1/256 of the numbers of W'.

        Raises:
            KeyError: for a layer that is not in the plan.
        """
        original = self.weight(layer)
        row, here = self.plan[layer], self.layers[layer].get_base_layer()
        with torch.no_grad():
            found = delta(row, self._parts(row), original, self.scales.get(layer))
            return found if self.principal is None else found + (here.weight - original)

    def scaled(self, weight: float | int | Tensor) -> AbstractContextManager[None]:
        """The adapter at a multiple of its strength within a block; the scales are written in place.

        A backward belongs into the block that its forward was in: torch refuses it otherwise. Of dora it is
        the change of the directions that is scaled; the lengths stay.

        Raises:
            ValueError: for oft, which has no scale.
        """
        self._check_apart()
        return blocks.scaled(self, weight)

    def disabled(self) -> AbstractContextManager[None]:
        """The model as if this adapter were not there within a block; others stay, and what trains does.

        Of one that began by PiSSA or OLoRA the weights are those of before within it.
        """
        self._check_apart()
        return blocks.disabled(self)

    def merged(self) -> AbstractContextManager[None]:
        """The adapter added into the weights within a block, in float32 at least; then the bits of before.

        Within it a layer takes as long as without an adapter. It needs the memory of a copy of the weights.

        Raises:
            ValueError: for weights of 4 or 8 bits, and beside another adapter where either is dora or oft.
        """
        self._check_apart()
        return blocks.merged(self)

    def remove(self) -> None:
        """Take the adapter off: the same modules in their places, and what trained before trains again.

        Raises:
            RuntimeError: while it is fused into the weights by peft or diffusers; within a block of its own;
                and, for one that began by PiSSA or OLoRA, within one of any adapter of the model, since the
                weights that are put back at its end would be the wrong ones.
        """
        if not self.attached:
            return
        changeable()
        self._check_apart()
        refuse_within([self] if self.principal is None else vars(self.model)[HELD].values(), "is taken off")
        self.attached = False
        _take_off(self)

    def __enter__(self) -> "LoraHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        size = f"{len(self.plan)} layers, {self.plan.parameters:,} parameters"
        return f"LoraHandle({self.name!r} at {size}{'' if self.attached else ', removed'})"

    def _check(self) -> None:
        if not self.attached:
            raise RuntimeError(f"the adapter {self.name!r} was removed from its model.")

    def _check_apart(self) -> None:
        """Raise besides where peft has added the adapter into the weights, which it alone can undo."""
        self._check()
        for name, layer in self.layers.items():
            if self.name in layer.merged_adapters:
                raise RuntimeError(
                    f"{self.name!r} is fused into the weight of {name}: call unfuse_lora() of the pipeline, "
                    f"or unmerge() of the layer, first. `merged` does the same within a block, exactly."
                )


def refuse_within(handles: Iterable[LoraHandle], what: str) -> None:
    """Raise where one of the adapters is within a block, at the end of which things are put back."""
    for handle in handles:
        if handle.open:
            raise RuntimeError(
                f"{handle.name!r} is within a block of `scaled`, `disabled` or `merged`, at the end of which "
                f"things are put back, so that nothing {what} in it: leave the block first."
            )


def _take_off(handle: LoraHandle) -> None:
    root: Any = handle.model
    name = handle.name
    for path, layer in handle.layers.items():
        if handle.principal is not None:
            handle.principal.restore(path, layer)
        take_off(root, path, name)
    forget(root, name)
    held = vars(root)[HELD]
    del held[name]
    trained = {key: value for key, value in handle._trained.items() if any(mark in key for mark in MARKS)}
    if not held:
        del vars(root)[HELD]
        trained = vars(root).pop(TRAINED)
    train_again(root, trained)
