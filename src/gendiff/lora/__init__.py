"""Low-rank adapters: planned and checked before anything is changed, put on, and taken off exactly."""

from importlib import import_module
from typing import TYPE_CHECKING

from gendiff.lora.adapter import Adapter as Adapter
from gendiff.lora.handle import LoraHandle as LoraHandle
from gendiff.lora.inject import inject as inject
from gendiff.lora.inject import remove as remove
from gendiff.lora.plan import LoraPlan as LoraPlan
from gendiff.lora.plan import Planned as Planned
from gendiff.lora.plan import plan as plan
from gendiff.lora.presets import preset as preset
from gendiff.lora.targets import Class as Class
from gendiff.lora.targets import Target as Target
from gendiff.lora.targets import Width as Width

if TYPE_CHECKING:  # loaded at their first use, since most who put an adapter on use few of them
    from gendiff.lora.approximation import Approximation as Approximation
    from gendiff.lora.approximation import Errors as Errors
    from gendiff.lora.combining import combine as combine
    from gendiff.lora.diagnostics import measure as measure
    from gendiff.lora.extracting import extract as extract
    from gendiff.lora.extracting import resize as resize
    from gendiff.lora.files import AdapterFile as AdapterFile
    from gendiff.lora.files import LoadReport as LoadReport
    from gendiff.lora.files import load as load
    from gendiff.lora.files import read as read
    from gendiff.lora.files import save as save
    from gendiff.lora.measures import Measures as Measures
    from gendiff.lora.merging import Merged as Merged
    from gendiff.lora.merging import merge as merge
    from gendiff.lora.new_words import TokensHandle as TokensHandle
    from gendiff.lora.new_words import tokens as tokens

_LATER = {
    "AdapterFile": "files",
    "Approximation": "approximation",
    "Errors": "approximation",
    "LoadReport": "files",
    "Measures": "measures",
    "Merged": "merging",
    "TokensHandle": "new_words",
    "combine": "combining",
    "extract": "extracting",
    "load": "files",
    "measure": "diagnostics",
    "merge": "merging",
    "read": "files",
    "resize": "extracting",
    "save": "files",
    "tokens": "new_words",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'gendiff.lora' has no attribute {name!r}")
    return getattr(import_module(f"gendiff.lora.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
