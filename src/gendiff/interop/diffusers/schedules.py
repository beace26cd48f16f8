"""What a scheduler of diffusers says of its network: schedule, prediction type, bound of x0."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Float64
from torch import Tensor

from gendiff._checks import unknown
from gendiff.math.bounds import Bound, Clip, DynamicThreshold
from gendiff.math.predictions import Name, Prediction
from gendiff.math.schedules import Rectified, Schedule, VarianceExploding
from gendiff.math.tables import (
    COSINE_MAX_BETA,
    CosineBeta,
    LinearBeta,
    ScaledLinearBeta,
    SigmoidBeta,
    TableSchedule,
    Tabulated,
    ZeroTerminalSNR,
)

REPLACES, SOLVER = "_replaces", "_solver"  # keys of the config of a GendiffScheduler
PREDICTIONS: dict[str, Name] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}

_SDE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "noise_sampler_seed": None,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}


@final
@dataclass(frozen=True, eq=False)
class Settings:
    """The class of a scheduler and the value of every argument of its constructor.

    Attributes:
        name: the class, such as "EulerDiscreteScheduler".
        values: what its config says, and its defaults for what that leaves out.
        config: the whole config, with keys that the class does not know.
    """

    name: str
    values: Mapping[str, Any]
    config: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def flow(self) -> bool:
        """Whether the network was trained on the straight path."""
        return self.name.startswith("FlowMatch") or bool(self["use_flow_sigmas"])

    @property
    def edm(self) -> bool:
        """Whether the network is preconditioned as by Karras et al. 2022."""
        return self.name.startswith("EDM")

    @property
    def continuous(self) -> bool:
        """Whether the network is given log(sigma)/4 in place of timesteps, as EDM's."""
        v = self["prediction_type"] == "v_prediction"
        return self.edm or (self["timestep_type"] == "continuous" and v)


def settings_of(scheduler: Any) -> Settings:
    """The settings of a scheduler, of its config, or of a pipeline's scheduler."""
    if isinstance(scheduler, Settings):
        return scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"give a scheduler of diffusers, its config, or a pipeline that has one, got "
            f"{type(scheduler).__name__}."
        )
    named = type(scheduler).__name__ if not isinstance(scheduler, Mapping) else config.get("_class_name")
    name = config.get(REPLACES) or named or _guessed(config)
    known = _defaults(name)
    also = config.get("_also") or ()
    values = {**known} | {key: value for key, value in config.items() if key in known or key in also}
    return Settings(name, values, dict(config))


def _guessed(config: Mapping[str, Any]) -> str:
    """The class whose settings a config has, which names its class only once it was saved.

    A config has every setting of its class, and perhaps some of another that it was made from: it is of the
    class that has the settings of all the others that fit.
    """
    from gendiff.interop.diffusers.tables import ROWS

    settings = {name: set(_defaults(name)) for name in ROWS}
    fitting = {name: keys for name, keys in settings.items() if keys <= set(config)}
    most = [name for name, keys in fitting.items() if all(keys >= other for other in fitting.values())]
    if len(most) != 1:
        raise ValueError(
            f"the config does not say which class it is of (it has no '_class_name'), and its keys are those "
            f"of {' and '.join(most or fitting) or 'none that gendiff replaces'}; give the scheduler itself."
        )
    return most[0]


@lru_cache(maxsize=64)
def _defaults(name: str) -> Mapping[str, Any]:
    """The arguments of a class of diffusers with their defaults; none for a class it does not have."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if name == "DPMSolverSDEScheduler":  # a placeholder where torchsde, which gendiff does without, is not
        return _SDE
    if not isinstance(kind, type):
        near = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        raise ValueError(unknown("scheduler of diffusers", name, near))
    parameters = inspect.signature(kind.__init__).parameters
    return {
        key: None if value.default is inspect.Parameter.empty else value.default
        for key, value in parameters.items()
        if key not in ("self", "kwargs")
    }


def schedule_of(scheduler: Any) -> Schedule:
    """The noise schedule that the network of a scheduler was trained on.

    Betas become the class of ours that has exactly their formula, in float64, and `Tabulated` where there is
    none; flow schedulers become `Rectified`, EDM's `VarianceExploding`. Spacing, sigma schedules and shifts
    are no part of it: they are a grid (`grid_of`).

    Args:
        scheduler: a scheduler of diffusers, its config, or a pipeline.

    Raises:
        ValueError: for a scheduler without betas, sigmas or flow, or betas of an unknown name.

    >>> from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
    >>> schedule_of(EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    ScaledLinearBeta(beta_start=0.00085, beta_end=0.012, size=1000)
    >>> schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    Rectified()
    """
    settings = settings_of(scheduler)
    if settings.continuous and not settings.edm:
        return VarianceExploding(*_ends(settings))
    return schedule_in(settings)


def _ends(settings: Settings) -> list[float]:
    """The smallest and the largest sigma/alpha of a table whose network is given log(sigma)/4."""
    schedule = schedule_in(settings)
    ends = torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)
    table = (-schedule.log_snr(ends) / 2).exp().tolist()
    given = (settings["sigma_min"], settings["sigma_max"])
    return [own if value is None else value for value, own in zip(given, table, strict=True)]


def schedule_in(settings: Settings) -> Schedule:
    """The schedule that settings say."""
    if settings.flow:
        return Rectified()
    if settings.edm:
        return VarianceExploding(settings["sigma_min"], settings["sigma_max"])
    if "beta_schedule" not in settings.values:
        raise ValueError(
            f"{settings.name} has neither betas nor sigmas of a kind that gendiff knows; accepted are the "
            f"schedulers with a 'beta_schedule', FlowMatch… and EDM…."
        )
    table = table_in(settings)
    return ZeroTerminalSNR(table) if settings["rescale_betas_zero_snr"] else table


def table_in(settings: Settings) -> TableSchedule:
    """The table of betas that settings say, before it is rescaled."""
    size, ends = settings["num_train_timesteps"], (settings["beta_start"], settings["beta_end"])
    if settings["trained_betas"] is not None:
        return Tabulated(torch.as_tensor(settings["trained_betas"], dtype=torch.float64))
    kinds = {
        "linear": lambda: LinearBeta(*ends, size),
        "scaled_linear": lambda: ScaledLinearBeta(*ends, size),
        "squaredcos_cap_v2": lambda: CosineBeta(size),
        "sigmoid": lambda: SigmoidBeta(*ends, size),
        "laplace": lambda: Tabulated(_betas_of(_laplace, size)),
        "exp": lambda: Tabulated(_betas_of(lambda u: math.exp(-12 * u), size)),
    }
    if settings["beta_schedule"] not in kinds:
        raise ValueError(unknown("beta_schedule", settings["beta_schedule"], kinds))
    return kinds[settings["beta_schedule"]]()


def _betas_of(alpha_bar: Any, size: int) -> Float64[Tensor, "N"]:
    """Betas of a continuous alpha-bar (Nichol & Dhariwal 2021, eq. 17, with another function in it)."""
    levels = [alpha_bar(i / size) for i in range(size + 1)]
    betas = [min(1 - after / before, COSINE_MAX_BETA) for before, after in pairwise(levels)]
    return torch.tensor(betas, dtype=torch.float64)


def _laplace(u: float) -> float:
    """`laplace` of diffusers: the log-SNR is a quantile of Laplace's law, of which the root is taken."""
    half = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-half)))


def prediction_of(scheduler: Any) -> Prediction:
    """What the network of a scheduler predicts.

    Args:
        scheduler: a scheduler of diffusers, its config, or a pipeline.

    >>> from diffusers import DDIMScheduler, EDMEulerScheduler
    >>> prediction_of(DDIMScheduler(prediction_type="v_prediction")).name
    'v'
    >>> prediction_of(EDMEulerScheduler(sigma_data=1.0))
    Prediction(name='edm', sign=1, sigma_data=1.0)
    """
    settings = settings_of(scheduler)
    if settings.continuous and not settings.edm:  # v of a level scaled to alpha = 1, in other words
        return Prediction("edm", -1, 1.0)
    return prediction_in(settings)


def prediction_in(settings: Settings) -> Prediction:
    """The prediction that settings say."""
    if settings.name.startswith("FlowMatch"):
        return Prediction("flow", -1 if settings["invert_sigmas"] else 1)
    given = settings["prediction_type"]
    if settings.edm:
        if given not in ("epsilon", "v_prediction"):
            raise ValueError(unknown("prediction_type of EDM", given, ["epsilon", "v_prediction"]))
        return Prediction("edm", 1 if given == "epsilon" else -1, settings["sigma_data"])
    if given not in PREDICTIONS:
        raise ValueError(unknown("prediction_type", given, PREDICTIONS))
    return Prediction(PREDICTIONS[given])


def bound_in(settings: Settings) -> Bound | None:
    """What keeps x0 in the range of the data, where something does."""
    if settings["thresholding"]:
        return DynamicThreshold(settings["dynamic_thresholding_ratio"], settings["sample_max_value"])
    if settings["clip_sample"]:
        limit = settings["clip_sample_range"]
        return Clip(1.0 if limit is None else limit)
    return None


def all_settings() -> frozenset[str]:
    """Every setting that some class has which gendiff replaces."""
    from gendiff.interop.diffusers.tables import ROWS

    return frozenset().union(*map(_defaults, ROWS))
