"""All sites of a model, as a sequence that prints as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final, overload

from torch import nn

from gendiff._tables import as_html, as_text
from gendiff.attention.facts import fact_at
from gendiff.attention.rebinding import kernels_of, plain
from gendiff.attention.selectors import On, selected
from gendiff.attention.site import Site, family_of, heads_of, is_bridge, is_layer, kind_of, stage_of

COLUMNS = ("name", "kind", "heads", "head_dim", "stage", "depth", "text", "outputs", "grid", "processor")
MARKS = ("to_q", "to_qkv", "q_proj", "qkv", "query_projection")
MIXED = ("joint", "single")  # kinds whose keys are of both streams
TEXT = {"cross": "all", "joint": "first", "single": "first"}


@final
class Sites(Sequence[Site]):
    """The attention layers of a model, in the order in which they run.

    Args:
        sites: those that take a processor.
        others: layers that compute attention without one, and why nothing can be plugged into them.
    """

    def __init__(self, sites: Sequence[Site], others: dict[str, str]) -> None:
        self._sites, self.others = tuple(sites), others

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> "Sites": ...
    def __getitem__(self, index: int | slice) -> "Site | Sites":
        found = self._sites[index]
        return found if isinstance(found, Site) else Sites(found, self.others)

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def on(self, on: On) -> "Sites":
        """Those that a selector means.

        Raises:
            ValueError: where it means none.
        """
        return Sites(selected(self._sites, on), {})

    def _rows(self) -> list[tuple[str, ...]]:
        def shown(value: object) -> str:
            return f"{value:.2f}" if isinstance(value, float) else str(value)

        return [tuple(shown(getattr(site, column)) for column in COLUMNS) for site in self]

    def _notes(self) -> list[str]:
        return [f"{name}: {why}" for name, why in self.others.items()]

    def __repr__(self) -> str:
        return "\n".join([as_text(COLUMNS, self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return as_html(COLUMNS, self._rows(), self._notes())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile or a distributed wrapper puts round it.

    Raises:
        TypeError: for what is no module, such as a pipeline.
    """
    if not isinstance(model, nn.Module):
        parts = [
            name for name in ("unet", "transformer") if isinstance(getattr(model, name, None), nn.Module)
        ]
        hint = f"; give {' or '.join(f'pipe.{name}' for name in parts)}" if parts else ""
        raise TypeError(f"attention layers are those of a model, got {type(model).__name__}{hint}.")
    inside = getattr(model, "_orig_mod", None)
    if inside is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        inside = model.module
    return unwrapped(inside) if isinstance(inside, nn.Module) else model


def sites(model: nn.Module) -> Sites:
    """All attention layers of a UNet or transformer of diffusers, with their facts.

    Args:
        model: the network; not the pipeline.

    Returns:
        A sequence of `Site` that prints as a table, in a terminal and in a notebook.

    Raises:
        TypeError: for what is no module.
    """
    root = unwrapped(model)
    layers = {name: module for name, module in root.named_modules() if is_layer(module)}
    heads = frozenset(name.split(".")[0] for name in layers)
    over_frames = type(root).__name__.startswith("TransformerTemporal")
    found = sorted((_site(name, layer, heads, over_frames) for name, layer in layers.items()), key=_order)
    last = max(len(found) - 1, 1)
    return Sites([replace(site, depth=i / last) for i, site in enumerate(found)], _others(root, layers))


def _order(site: Site) -> int:
    """UNets list the middle behind the way up."""
    return {"down": 0, "mid": 1, "up": 2}.get(site.stage, 0)


def _site(name: str, layer: nn.Module, heads: frozenset[str], over_frames: bool) -> Site:
    processor = plain(type(layer.processor))
    fact = fact_at(layer, processor)
    stage = stage_of(name, heads)
    kind = "temporal" if over_frames else kind_of(name, layer, stage, fact.kind)
    count, dim = heads_of(layer)
    return Site(
        name=name,
        kind=kind,
        heads=count,
        head_dim=dim,
        stage=stage,
        depth=0.0,
        text="none" if is_bridge(name) else (fact.text if kind in MIXED else "") or TEXT.get(kind, "none"),
        outputs=(fact.outputs if kind in MIXED else 0) or (2 if kind == "joint" else 1),
        family=family_of(layer),
        processor=processor.__name__,
        kernels=kernels_of(processor),
        module=layer,
    )


def _others(root: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Modules that look like attention and are no layer, nor inside of one."""
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        named = "attention" in type(module).__name__.lower() or "attn" in type(module).__name__.lower()
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        if named and not inside and any(hasattr(module, mark) for mark in MARKS):
            found[name] = f"{type(module).__name__} computes its attention itself and takes no processor"
    return found
