"""Adapters by themselves or on a model, which the algebra takes alike."""

from typing import TypeAlias

from torch import nn

from gendiff.lora.adapter import Adapter
from gendiff.lora.handle import LoraHandle

Source: TypeAlias = Adapter | LoraHandle


def adapter_of(source: Source) -> Adapter:
    """The adapter by itself, at full strength."""
    return source.adapter() if isinstance(source, LoraHandle) else source


def model_of(source: Source, model: nn.Module | None) -> nn.Module | None:
    """The network that is given, or that the adapter is on."""
    return source.model if model is None and isinstance(source, LoraHandle) else model
