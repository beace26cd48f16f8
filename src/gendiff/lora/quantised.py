"""The weights of layers that hold them in 4 or 8 bits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer holds its weight in the numbers of bitsandbytes or torchao."""
    return _kind(layer) != ""


def shape_of(layer: Any) -> tuple[int, ...]:
    """The shape of the weight of a layer, of which one in 4 bits is kept packed in another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def plain_weight(layer: Any) -> Tensor:
    """The weight that a layer multiplies by: its own, or what the bits stand for, in a tensor that is new."""
    weight, kind = layer.weight, _kind(layer)
    if kind == "Params4bit":
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports] -- where such layers are

        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        highest = weight.SCB if layer.state.SCB is None else layer.state.SCB  # of each row; the call moves it
        return weight.data * (highest[:, None] / 127)
    return weight.dequantize() if kind else weight


def refuse_algorithm(name: str, layer: nn.Module, algorithm: str) -> None:
    """Raise a ValueError for a quantised layer and an algorithm of which peft reads the weight unpacked."""
    if is_quantised(layer) and algorithm not in ("lora", "dora"):
        raise ValueError(
            f"{name} is quantised ({_kind(layer)}), which carries lora and dora, and no {algorithm}: take "
            f"one of those, or a model in floating point."
        )


def refuse_merging(name: str, layer: nn.Module) -> None:
    """Raise a ValueError for a layer whose weight would have to be rounded to a few bits again."""
    if is_quantised(layer):
        raise ValueError(
            f"{name} is quantised ({_kind(layer)}): merging would round its weight to those bits anew, and "
            f"most of an adapter is less than such a step. Leave the adapter beside the weight, or merge it "
            f"into the model in floating point."
        )


@contextmanager
def kept(layers: Iterable[Any]) -> Iterator[None]:
    """What quantised layers hold is theirs again after a block: on a CPU peft puts copies in its place.

    Those of 8 bits lack their scales where the layer has been called before.
    """
    before = [(layer, layer.weight) for layer in layers if is_quantised(layer)]
    try:
        yield
    finally:
        for layer, weight in before:
            layer.weight = weight


def _kind(layer: Any) -> str:
    """The class of the numbers of a quantised weight, or nothing."""
    kind = type(layer.weight)
    if kind is nn.Parameter or kind is Tensor:
        return ""  # asked first: what compiles knows it
    quantised = kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")
    return kind.__name__ if quantised else ""
