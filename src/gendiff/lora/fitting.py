"""Whether a layer can carry what is planned for it."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from gendiff._checks import unknown
from gendiff.lora.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from gendiff.lora.plan import Planned

PRINCIPAL = re.compile(r"pissa(_niter_[1-9][0-9]*)?|olora")  # these take what A and B begin at off the weight
BEGINNINGS: Mapping[str, tuple[str | bool, ...]] = {
    "lora": (True, "gaussian", "pissa", "pissa_niter_4", "olora"),
    "dora": (True, "gaussian"),
    "loha": (True,),
    "lokr": (True, "lycoris"),
    "oft": (True,),
}


def check(row: "Planned", layer: nn.Module) -> None:
    """Raise a ValueError unless a layer can carry what is planned for it, and does what the equation says.

    Args:
        row: what is planned.
        layer: the layer, without adapters.
    """
    if row.algorithm not in ALGORITHMS:
        raise ValueError(unknown(f"algorithm for {row.name}", row.algorithm, ALGORITHMS))
    algorithm = ALGORITHMS[row.algorithm]
    if not isinstance(layer, algorithm.kinds):
        kinds = ", ".join(kind.__name__ for kind in algorithm.kinds)
        raise ValueError(
            f"{row.name} is a {type(layer).__name__}, which carries no {row.algorithm}; {kinds} do: leave it "
            f"out, or take another algorithm."
        )
    if not _whole(row.rank) or row.rank < 1:
        raise ValueError(f"ranks are whole numbers from 1, got {row.rank!r} for {row.name}.")
    if not math.isfinite(row.lora_alpha) or row.lora_alpha <= 0:
        raise ValueError(f"lora_alpha is a number above 0, got {row.lora_alpha:g} for {row.name}.")
    rate = row.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"a learning rate is a number of 0 or more, got {rate!r} for {row.name}.")
    if row.algorithm == "oft":
        _check_blocks(row)
    if not isinstance(layer, nn.Linear):
        _check_convolution(row, layer)


def check_options(algorithm: str, options: dict[str, Any]) -> None:
    """Raise a ValueError for settings that an algorithm has not, or that are out of range."""
    known = ALGORITHMS[algorithm].options
    for name, value in options.items():
        if name not in known:
            raise ValueError(unknown(f"option of {algorithm}", name, known))
        if name == "decompose_factor" and not (_whole(value) and (value == -1 or value >= 1)):
            raise ValueError(
                f"decompose_factor is a whole number from 1, or -1 for the most even one, got {value!r}."
            )
        if name == "decompose_both" and not isinstance(value, bool):
            raise ValueError(f"decompose_both is True or False, got {value!r}.")


def check_init(algorithm: str, init: str | bool) -> None:
    """Raise a ValueError for a beginning that an algorithm has not."""
    if init not in BEGINNINGS[algorithm] and not (algorithm == "lora" and is_principal(init)):
        raise ValueError(unknown(f"initialisation of {algorithm}", init, BEGINNINGS[algorithm]))


def is_principal(init: str | bool) -> bool:
    """Whether an adapter begins as a part of the weight, which is taken off it."""
    return isinstance(init, str) and PRINCIPAL.fullmatch(init) is not None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_blocks(row: "Planned") -> None:
    width = row.shape[1]
    if row.rank == 1 or width % row.rank:
        sizes = [one for one in range(2, width + 1) if width % one == 0]
        raise ValueError(
            f"oft turns blocks of rank channels: at {row.name}, of {width}, the rank is one of "
            f"{', '.join(map(str, sizes))}, got {row.rank}."
        )


def _check_convolution(row: "Planned", layer: Any) -> None:
    """What peft's layers leave out: they would add something else than the equation says."""
    reason = ""
    if layer.padding_mode != "zeros":
        reason = f"pads by {layer.padding_mode!r}, and adapters of convolutions pad with zeros"
    elif row.algorithm in ("lora", "dora") and any(one != 1 for one in layer.dilation):
        reason = f"is dilated by {tuple(layer.dilation)}, and A of {row.algorithm} is not"
    elif isinstance(layer, nn.Conv1d) and "lokr_w2" in ALGORITHMS[row.algorithm].shapes(row):
        reason = "is of one dimension, where lokr needs a rank below half the width of its second factor"
    if reason:
        raise ValueError(f"{row.name} {reason}: leave it out, or take another algorithm or rank.")
