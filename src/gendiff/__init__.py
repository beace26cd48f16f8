"""Typed, tested parts for diffusion models: mathematics, sampling, guidance, objectives, training.

`import gendiff` itself loads nothing; the first use of a name loads the module that holds it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and for grep; at run time the table below says the same, lazily
    from gendiff import attention as attention
    from gendiff import data as data
    from gendiff import guidance as guidance
    from gendiff import interop as interop
    from gendiff import lora as lora
    from gendiff import math as math
    from gendiff import objectives as objectives
    from gendiff import plot as plot
    from gendiff import random as random
    from gendiff import sampling as sampling
    from gendiff import testing as testing
    from gendiff import training as training
    from gendiff.codec import Codec as Codec
    from gendiff.denoiser import Condition as Condition
    from gendiff.denoiser import Denoised as Denoised
    from gendiff.denoiser import Denoiser as Denoiser
    from gendiff.guidance import Guider as Guider
    from gendiff.guidance import cfg as cfg
    from gendiff.objectives import Draw as Draw
    from gendiff.objectives import LossTerms as LossTerms
    from gendiff.objectives import Objective as Objective
    from gendiff.random import Rng as Rng
    from gendiff.sampling import iterate as iterate
    from gendiff.sampling import sample as sample
    from gendiff.training import EMA as EMA
    from gendiff.training import ParamGroup as ParamGroup
    from gendiff.training import TrainConfig as TrainConfig
    from gendiff.training import Trainer as Trainer
    from gendiff.training import WarmupCosine as WarmupCosine

    __version__: str

_HOME = {  # public name -> the module that holds it, or that it is
    "Codec": "gendiff.codec",
    "Condition": "gendiff.denoiser",
    "Denoised": "gendiff.denoiser",
    "Denoiser": "gendiff.denoiser",
    "Draw": "gendiff.objectives",
    "EMA": "gendiff.training",
    "Guider": "gendiff.guidance",
    "LossTerms": "gendiff.objectives",
    "Objective": "gendiff.objectives",
    "ParamGroup": "gendiff.training",
    "Rng": "gendiff.random",
    "TrainConfig": "gendiff.training",
    "Trainer": "gendiff.training",
    "WarmupCosine": "gendiff.training",
    "cfg": "gendiff.guidance",
    "iterate": "gendiff.sampling",
    "sample": "gendiff.sampling",
    "attention": "gendiff.attention",
    "data": "gendiff.data",
    "guidance": "gendiff.guidance",
    "interop": "gendiff.interop",
    "lora": "gendiff.lora",
    "math": "gendiff.math",
    "objectives": "gendiff.objectives",
    "plot": "gendiff.plot",
    "random": "gendiff.random",
    "sampling": "gendiff.sampling",
    "testing": "gendiff.testing",
    "training": "gendiff.training",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  (the block above tells it)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("gendiff")
    if name not in _HOME:
        from gendiff._checks import unknown

        raise AttributeError(unknown("attribute of gendiff", name, __all__))
    module = import_module(_HOME[name])
    return module if module.__name__ == f"gendiff.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
