"""The weights of a model that an adapter is for."""

from collections.abc import Mapping

from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.plan import Planned
from gendiff.lora.targets import targets_of


def weights_of(model: nn.Module | None) -> dict[str, Tensor]:
    """The weights of all layers that can carry an adapter, by name; of no model none."""
    found: dict[str, Tensor] = {}
    for target in targets_of(model) if model is not None else ():
        weight = target.module.weight
        assert isinstance(weight, Tensor)
        found[target.name] = weight
    return found


def weight_of(row: Planned, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of a layer; None where none are given and the algorithm needs none.

    Raises:
        ValueError: where the algorithm needs it, and for a layer that the model has not, or that is of
            another shape there or holds no numbers.
    """
    if not weights:
        if ALGORITHMS[row.algorithm].needs_weight:
            raise ValueError(
                f"what {row.algorithm} adds to {row.name} depends on the weight of the layer: pass model=, "
                f"the network that the adapter is for."
            )
        return None
    if row.name not in weights:
        raise ValueError(f"the adapter is for another model: {unknown('layer', row.name, weights)}")
    return checked(row.name, weights[row.name], row.shape)


def checked(name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight, if it has that shape and numbers."""
    if weight.is_meta or not weight.is_floating_point():
        kind = "has no numbers, being on the meta device" if weight.is_meta else f"holds {weight.dtype}"
        raise ValueError(f"the weight of {name} {kind}: load the model with weights in floating point.")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{name} is of shape {shape}, and has {tuple(weight.shape)} in this model: both have to be of "
            f"the same architecture."
        )
    return weight
