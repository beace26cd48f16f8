"""What a model knows of its adapters, beside their layers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

HELD = "_gendiff_adapters"  # the handles of a model, by name
TRAINED = "_gendiff_trained"  # what required grad before the first of them
TOLD = "_hf_peft_config_loaded"


def forget(root: Any, name: str) -> None:
    """Take an adapter out of peft's list of a model."""
    configs = getattr(root, "peft_config", {})
    configs.pop(name, None)
    if not configs:
        vars(root).pop("peft_config", None)
        tell(root, False)


def train_again(root: nn.Module, trained: Mapping[str, bool]) -> None:
    """Have train what trained before."""
    for key, parameter in root.named_parameters():
        if key in trained:
            parameter.requires_grad_(trained[key])


def tell(root: Any, adapted: bool) -> None:
    """Tell a model of diffusers that it has adapters, which it asks before it looks at them, or no more."""
    if adapted and hasattr(root, TOLD):
        setattr(root, TOLD, True)
    elif not adapted:
        vars(root).pop(TOLD, None)  # the class says False
