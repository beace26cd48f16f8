"""The keys of files brought together by the layer that they are for; none is left over unsaid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from gendiff import _patterns
from gendiff.lora.files.components import BACKBONES
from gendiff.lora.files.keys import foreign, parsed
from gendiff.lora.files.names import Names, Place
from gendiff.lora.files.opening import Opened, Source, short
from gendiff.lora.files.plain import Form, form_of
from gendiff.lora.files.settings import Settings, settings_in

SHOWN = 5


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor that was not read yet."""

    key: str
    file: Opened

    def read(self) -> Tensor:
        """Its numbers."""
        return self.file.read(self.key)


@final
@dataclass(frozen=True, eq=False)
class Group:
    """The tensors of one layer of a file.

    Attributes:
        place: the layer.
        settings: what a configuration says.
        entries: the tensors by part.
    """

    place: Place
    settings: Settings | None
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """One of its keys, for errors."""
        return short(next(iter(self.entries.values())).key)

    def form(self, weight: tuple[int, ...]) -> Form:
        """What its shapes say; see `form_of`."""
        parts = {part: entry for part, entry in self.entries.items() if part != "alpha"}
        keys = {part: entry.key for part, entry in parts.items()} or {"alpha": self.entries["alpha"].key}
        return form_of({part: one.file.shapes[one.key] for part, one in parts.items()}, weight, keys)

    def read(self) -> dict[str, Tensor]:
        """The numbers of all its parts but alpha."""
        return {part: entry.read() for part, entry in self.entries.items() if part != "alpha"}


@final
class Grouped:
    """The tensors of files by layer.

    Args:
        components: the networks by name.
        ignore: patterns of keys that may stay unmatched, and names of fields of a configuration.

    Attributes:
        groups: by component and rows of its layers.
        names: the tables of names, the last one used.
        unmatched: keys that are for no layer.
    """

    def __init__(self, components: Mapping[str, nn.Module], ignore: Sequence[str]) -> None:
        self.components, self.ignore = components, tuple(ignore)
        self.groups: dict[tuple[str, object], Group] = {}
        self.names = Names(components)
        self.unmatched: list[str] = []
        self._refused: list[str] = []
        self._keys = 0

    def add(self, source: Source, file: Opened) -> None:
        """The keys of a file."""
        names, before = self.names, ""
        if source.component is not None:
            before = f"{source.component}."
            own = self.components.get(source.component)
            names = Names({} if own is None else {source.component: own})
        settings: dict[str, Settings | None] = {}
        for key in file.shapes:
            self._keys += 1
            found = parsed(key)
            place = None if found is None else names.find(found.stem)
            if found is None or place is None:
                self._leave(before + key, names, found.stem if found else key)
                continue
            if place.component not in settings:
                settings[place.component] = self._settings(source, file, place.component)
            group = self.groups.setdefault(
                (place.component, place.original.rows), Group(place, settings[place.component])
            )
            entry = Entry(key, file)
            if found.part in group.entries:
                raise ValueError(
                    f"{short(group.entries[found.part].key)} and {short(key)} are both {found.part} of "
                    f"{place.original.name}: a layer has one; take one of them out of the file."
                )
            group.entries[found.part] = entry

    def check(self) -> None:
        """Raise a ValueError for keys that are for no layer, and layers that two names lead to."""
        if self._refused:
            reasons = dict.fromkeys(self.names.unnamed.values())
            more = len(self._refused) - SHOWN
            raise ValueError(
                f"{len(self._refused)} of {self._keys} keys are for no layer of "
                f"{', '.join(self.components)}: {'; '.join(self._refused[:SHOWN])}"
                f"{f'; and {more} more' if more > 0 else ''}. Give the network that they are for, as "
                f"{{'text_encoder': encoder}}, or a pattern of keys to go without, as "
                f"ignore='text_encoder.**'. {' '.join(reasons)}".rstrip()
            )
        if not self.groups:
            raise ValueError("no key in it is for a layer of the model.")
        taken: dict[tuple[str, str], Group] = {}
        for group in self.groups.values():
            for rows in group.place.original.rows:
                other = taken.setdefault((group.place.component, rows.layer), group)
                if other is not group:
                    raise ValueError(
                        f"{other.key} and {group.key} are both for {rows.layer}: a layer has one adapter in "
                        f"a file; take one of them out."
                    )

    def _leave(self, key: str, names: Names, stem: str) -> None:
        if any(_patterns.match(pattern, key) for pattern in self.ignore):
            self.unmatched.append(key)
            return
        near = names.nearest(stem) if len(self._refused) < SHOWN else ""
        self._refused.append(short(key) + (foreign(key) or (f" (nearest is {near!r})" if near else "")))

    def _settings(self, source: Source, file: Opened, component: str) -> Settings | None:
        if source.config is not None:
            return Settings(source.config, "config", self.ignore)
        others = tuple(name for name in BACKBONES if component in BACKBONES and name != component)
        found = settings_in(file.metadata, component, others)
        return None if found is None else Settings(found, "metadata", self.ignore)
