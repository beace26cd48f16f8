"""To and from the objects of other libraries; `gendiff.interop.diffusers` is the bridge to pipelines.

Importing this package loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gendiff.interop import diffusers as diffusers

__all__ = ["diffusers"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        from gendiff._checks import unknown

        raise AttributeError(unknown("attribute of gendiff.interop", name, __all__))
    return import_module(f"gendiff.interop.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
