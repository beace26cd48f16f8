"""The keys and tensors of an adapter in each format."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from gendiff.lora import layers
from gendiff.lora.adapter import Adapter
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.files import fused
from gendiff.lora.files.components import BACKBONES
from gendiff.lora.files.fused import FACTORS, Part
from gendiff.lora.naming import Original, kohya_names, kohya_prefix, original_names
from gendiff.lora.plan import LoraPlan, Planned
from gendiff.lora.quantised import plain_weight
from gendiff.lora.targets import Target, targets_of

Keyed: TypeAlias = Iterator[tuple[str, Tensor]]
_LIVE = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_LIVE |= {"oft_R": "oft_R.weight"}
_KOHYA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "magnitude": "dora_scale"}
_ORIGINAL = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "dora_scale"}


@final
@dataclass(frozen=True, eq=False)
class Piece:
    """An adapter that is to be written.

    Attributes:
        component: what a pipeline calls the network.
        adapter: of it.
        model: the network.
    """

    component: str
    adapter: Adapter
    model: nn.Module


def live(adapter: Adapter, prefix: str) -> Keyed:
    """In the naming of the live network, as peft and diffusers have it."""
    for row in adapter.plan.rows:
        for part, tensor in adapter.tensors[row.name].items():
            if part == "magnitude" and len(row.shape) > 2:  # where peft's convolutions have it
                tensor = tensor.view(1, -1, *(1 for _ in row.shape[2:]))
            yield f"{prefix}{row.name}.{_LIVE.get(part, part)}", tensor


def configuration(adapter: Adapter) -> Any:
    """The configuration of peft that makes the layers of an adapter.

    Raises:
        ValueError: for an adapter of several algorithms, of which peft has one at a time.
    """
    rows = adapter.plan.rows
    kinds = {(row.algorithm, row.options) for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            f"the adapter is of {' and '.join(sorted({kind for kind, _ in kinds}))} of different settings, "
            f"and a configuration of peft is of one: save it in the kohya format."
        )
    if len({row.rslora for row in rows}) > 1:
        rows = tuple(replace(row, lora_alpha=row.scale * row.rank, rslora=False) for row in rows)
    return layers.config(LoraPlan(rows, adapter.plan.layers), True)


def kohya(piece: Piece, components: Mapping[str, nn.Module]) -> Keyed:
    """In the naming of kohya's tools; LoKr on layers that it stacks in that of LyCORIS, by live names."""
    prefix = kohya_prefix(piece.component, piece.model, components)
    named = _Named(piece, kohya_names(piece.model), f"{prefix}_", _KOHYA, "kohya", "lycoris_")
    return named.keyed()


def original(piece: Piece, components: Mapping[str, nn.Module]) -> Keyed:
    """In the naming of the original release of a denoiser."""
    if piece.component not in BACKBONES:
        raise ValueError(
            f"the original format names the layers of one denoiser, and not those of {piece.component}: save "
            f"it by itself, as 'transformer', or for text encoders in the kohya or diffusers format."
        )
    named = _Named(piece, original_names(piece.model), "diffusion_model.", _ORIGINAL, "original")
    return named.keyed()


WRITERS: Mapping[str, Callable[[Piece, Mapping[str, nn.Module]], Keyed]] = {
    "kohya": kohya,
    "original": original,
}


@final
@dataclass(frozen=True, eq=False)
class _Named:
    """An adapter in a naming that may stack layers.

    Attributes:
        piece: the adapter.
        table: what the naming calls the layers.
        prefix: of every key.
        endings: of the parts.
        format: its name.
        beside: prefix of the live names with underscores, where the naming allows them too.
    """

    piece: Piece
    table: Mapping[str, Original]
    prefix: str
    endings: Mapping[str, str]
    format: str
    beside: str | None = None

    def keyed(self) -> Keyed:
        plan, targets = self.piece.adapter.plan, {one.name: one for one in targets_of(self.piece.model)}
        rows = {row.name: row for row in plan.rows}
        self._check(rows, targets)
        for stem, one in self.table.items():
            own = {layer: rows[layer] for layer in fused.layers_of(one) if layer in rows}
            if own:
                yield from self._layer(self.prefix + stem, one, own, targets)

    def _check(self, rows: Mapping[str, Planned], targets: Mapping[str, Target]) -> None:
        named = {layer for one in self.table.values() for layer in fused.layers_of(one)}
        for name, row in rows.items():
            if name not in targets or targets[name].shape != row.shape:
                raise ValueError(
                    f"the adapter is for a layer {name!r} of shape {row.shape}, which the model has not: "
                    f"give the model that it is for."
                )
            if name not in named:
                raise ValueError(
                    f"{name!r} has no name in the {self.format} naming of a "
                    f"{type(self.piece.model).__name__}: save in the diffusers or peft format, or leave "
                    f"the layer out."
                )
            if row.algorithm == "oft":
                raise ValueError(
                    f"{name!r} carries oft, which turns inputs here and outputs in the {self.format} naming: "
                    f"save in the diffusers or peft format."
                )

    def _layer(
        self, stem: str, one: Original, rows: Mapping[str, Planned], targets: Mapping[str, Target]
    ) -> Keyed:
        kinds = {row.algorithm for row in rows.values()}
        parts = {name: Part(row.scale, self.piece.adapter.tensors[name]) for name, row in rows.items()}
        if fused.is_whole(one, targets[one.rows[0].layer].shape[0]):
            (name,) = rows
            yield from self._parts(stem, rows[name], parts[name])
        elif kinds <= set(FACTORS):
            if len(kinds) > 1:
                raise ValueError(
                    f"{', '.join(rows)} are one layer in the {self.format} naming and are of "
                    f"{' and '.join(sorted(kinds))}: save in the diffusers or peft format."
                )
            algorithm = kinds.pop()
            bare = [name for name in fused.layers_of(one) if algorithm == "dora" and name not in rows]
            weights = {name: plain_weight(targets[name].module) for name in bare}
            joined = fused.join(one, algorithm, parts, weights)
            first = next(iter(rows.values()))
            yield from self._written(stem, joined.tensors, joined.scale * joined.rank, len(first.shape))
        elif self.beside is not None:
            for name, row in rows.items():
                yield from self._parts(self.beside + name.replace(".", "_"), row, parts[name])
        else:
            raise ValueError(
                f"{', '.join(rows)} carry {' and '.join(sorted(kinds))} and are parts of one layer in the "
                f"{self.format} naming, of which a Kronecker product cannot be a part: save in the kohya, "
                f"diffusers or peft format."
            )

    def _parts(self, stem: str, row: Planned, part: Part) -> Keyed:
        tensors, alpha = dict(part.tensors), row.scale * row.rank
        if {"lokr_w1", "lokr_w2"} <= tensors.keys() and row.scale != 1:
            # other tools take a scale of 1 where no factor has a rank
            tensors["lokr_w1"], alpha = tensors["lokr_w1"] * row.scale, float(row.rank)
        yield from self._written(stem, tensors, alpha, len(row.shape))

    def _written(self, stem: str, tensors: Mapping[str, Tensor], alpha: float, axes: int) -> Keyed:
        for part, tensor in tensors.items():
            if part == "magnitude":
                tensor = tensor.view(-1, *(1 for _ in range(axes - 1)))
            yield f"{stem}.{self.endings.get(part, part)}", tensor
        yield f"{stem}.alpha", torch.tensor(alpha, dtype=torch.float32)


def check_same_blocks(adapter: Adapter) -> None:
    """Raise a ValueError for OFT with blocks of several sizes, of which peft reads one for all layers."""
    sizes = {row.rank for row in adapter.plan.rows if not ALGORITHMS[row.algorithm].scaled}
    if len(sizes) > 1:
        raise ValueError(
            f"oft has blocks of {', '.join(map(str, sorted(sizes)))} channels, and a configuration of peft "
            f"says one size for all layers: save in the diffusers format."
        )
