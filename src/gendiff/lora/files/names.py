"""What files may call each layer of the live networks: a table from names to rows of their weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import final

from torch import nn

from gendiff.lora.files.components import BACKBONES
from gendiff.lora.files.keys import spellings
from gendiff.lora.naming import (
    Original,
    Rows,
    diffusers_names,
    kohya_names,
    kohya_prefix,
    original_names,
)
from gendiff.lora.targets import Target, targets_of

COMFY = {"lora_te": "clip_l", "lora_te1": "clip_l", "lora_te2": "clip_g", "lora_te3": "t5xxl"}
FIRST = ("lora_te", "lora_te1")  # of the first text encoder, whether it has a number or not
LONGEST = 200  # of a name that is compared with others
Named = Iterable[tuple[str, Original]]


@final
@dataclass(frozen=True)
class Place:
    """Where a name leads to.

    Attributes:
        component: the network.
        original: the rows of its layers.
        format: whose name it is.
    """

    component: str
    original: Original
    format: str


@final
class Names:
    """The table of names of some networks.

    Args:
        components: networks by name.

    Attributes:
        targets: of each component, the layers that can carry an adapter, by name.
        unnamed: why a component has no names of an original release.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self.targets: dict[str, dict[str, Target]] = {
            name: {target.name: target for target in targets_of(one)} for name, one in components.items()
        }
        self.unnamed: dict[str, str] = {}
        self._sure: dict[str, Place] = {}
        self._loose: dict[str, list[Place]] = {}
        tables = [self._of(name, one, components) for name, one in components.items()]
        for table in tables:
            for name, place, sure in table:
                if sure:
                    self._sure.setdefault(name, place)
                else:
                    self._loose.setdefault(name, []).append(place)

    def find(self, stem: str) -> Place | None:
        """Where a name leads to, or None.

        Raises:
            ValueError: for one that two networks have.
        """
        for name in spellings(stem):
            if name in self._sure:
                return self._sure[name]
            found = self._loose.get(name, [])
            if len({place.component for place in found}) > 1:
                raise ValueError(
                    f"{name!r} may be of {' or '.join(repr(place.component) for place in found)}: give only "
                    f"the one that the file is for, as {{{found[0].component!r}: model}}."
                )
            if found:
                return found[0]
        return None

    def nearest(self, stem: str) -> str:
        """The name among the usual ones that is nearest to one that leads nowhere."""
        if len(stem) > LONGEST:
            return ""
        dotted = "." in stem
        usual = [name for name in self._sure if ("." in name) == dotted]
        return next(iter(get_close_matches(stem, usual, n=1, cutoff=0.3)), "")

    def _of(
        self, component: str, model: nn.Module, components: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Place, bool]]:
        """Names, where they lead, and whether they can be of no other network."""
        live = {
            target.name: Original(target.name, (Rows(target.name, 0, target.shape[0]),))
            for target in self.targets[component].values()
        }
        backbone, prefix = component in BACKBONES, "lora_unet" if component in BACKBONES else ""
        lines: list[tuple[str, Original]] = []
        original: dict[str, Original] = {}
        kohya: dict[str, Original] = {}
        try:
            lines = [(name, live[path]) for name, path in diffusers_names(model).items()]
            original, kohya = original_names(model), kohya_names(model)
            prefix = kohya_prefix(component, model, components)
        except ValueError as error:  # of a network without such names: the error for a key tells of it
            self.unnamed[component] = str(error)
        flat = [*kohya.items(), *((name.replace(".", "_"), one) for name, one in original.items()), *lines]

        def under(before: str, named: Named, kind: str, sure: bool) -> Iterator[tuple[str, Place, bool]]:
            for name, one in named:
                yield before + name, Place(component, one, kind), sure

        yield from under(f"{component}.", live.items(), "diffusers", True)
        yield from under(f"{component}.base_model.model.", live.items(), "peft", True)
        if prefix:
            yield from under(f"{prefix}_", flat, "kohya", True)
        yield from under("base_model.model.", live.items(), "peft", False)
        yield from under("", live.items(), "diffusers", False)
        if backbone:
            for other in BACKBONES:
                yield from under(f"{other}.", live.items(), "diffusers", False)
            yield from under("lora_transformer_", lines, "kohya", True)
            for before in ("diffusion_model.", "model.diffusion_model.", ""):
                yield from under(before, original.items(), "original", bool(before))
                yield from under(before, live.items(), "original", bool(before))
        elif prefix:
            text = [
                *original.items(),
                *((name.removeprefix("text_model."), one) for name, one in original.items()),
            ]
            yield from under(f"{component}.", text, "diffusers", True)
            yield from under(
                f"text_encoders.{COMFY[prefix]}.transformer.", original.items(), "original", True
            )
            for other in FIRST if prefix in FIRST else ():
                yield from under(f"{other}_", flat, "kohya", False)
        yield from under("lycoris_", [*lines, *flat], "kohya", False)
