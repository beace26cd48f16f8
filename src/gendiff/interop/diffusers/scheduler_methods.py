"""Which solver of ours a scheduler class of diffusers is, solvers by name, and as data of a config."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import gendiff.sampling as sampling
from gendiff._checks import unknown
from gendiff.interop.diffusers.schedules import Settings
from gendiff.math.numeric import Number
from gendiff.sampling.deis import DEIS
from gendiff.sampling.dpm import DPM, DPMpp
from gendiff.sampling.exponential import Exponential
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.singlestep import SinglestepDPM, SinglestepDPMpp
from gendiff.sampling.unipc import UniPC

METHODS: dict[str, type[LinearSolver]] = {
    kind.__name__: kind
    for kind in (
        *(value for value in vars(sampling).values() if isinstance(value, type)),
        *(DEIS, DPM, DPMpp, Exponential, SinglestepDPM, SinglestepDPMpp, UniPC),
    )
    if issubclass(kind, LinearSolver) and is_dataclass(kind)
}
NAMES: dict[str, Callable[[], LinearSolver]] = {
    "ddim": sampling.DDIM,
    "ddpm": sampling.DDPM,
    "euler": sampling.Euler,
    "euler-ancestral": sampling.EulerAncestral,
    "heun": sampling.Heun,
    "dpm2": sampling.DPM2,
    "dpm2-ancestral": sampling.DPM2Ancestral,
    "lcm": sampling.LCM,
    "tcd": sampling.TCD,
    "pndm": lambda: sampling.PNDM("runge_kutta"),
    "plms": sampling.PNDM,
}
ORDERED: dict[str, Callable[[int], LinearSolver]] = {
    "dpmpp": lambda order: DPMpp(order),
    "dpmpp-sde": lambda order: DPMpp(order, sde=True),
    "dpmpp-single": lambda order: SinglestepDPMpp(order),
    "dpmpp-single-sde": lambda order: SinglestepDPMpp(order, sde=True),
    "dpm": lambda order: DPM(order),
    "dpm-single": lambda order: SinglestepDPM(order),
    "unipc": lambda order: UniPC(order),
    "deis": lambda order: DEIS(order),
    "exponential": lambda order: Exponential(order),
    "lms": lambda order: sampling.LMS(order),
}
SHORT = 15  # steps below which `lower_order_final` applies
OF_DIFFUSERS = {
    "midpoint": "midpoint",
    "heun": "heun",
    "logrho": "midpoint",
    "bh1": "midpoint",
    "bh2": "midpoint",
}


def named(name: str) -> LinearSolver:
    """The solver of a name such as "euler" or "dpmpp-2".

    >>> named("dpmpp-3").order, named("heun")
    (3, Heun())
    """
    if name in NAMES:
        return NAMES[name]()
    match = re.fullmatch(r"(.+)-(\d)", name)
    if match and match[1] in ORDERED:
        return ORDERED[match[1]](int(match[2]))
    raise ValueError(unknown("solver", name, [*NAMES, *(f"{base}-2" for base in ORDERED)]))


def encoded(solver: "LinearSolver | str | Mapping[str, Any] | None") -> Any:
    """A solver as what a config can hold: its class and its fields; a class of the user's as it is."""
    if solver is None:
        return None
    if isinstance(solver, str):
        return encoded(named(solver))
    if isinstance(solver, Mapping):
        return encoded(decoded(solver))
    if not isinstance(solver, LinearSolver):
        raise TypeError(
            f"a scheduler is fed the outputs of the network one by one, which a LinearSolver can be; got "
            f"{solver!r}. Accepted are also names such as 'euler' and 'dpmpp-2'."
        )
    if METHODS.get(type(solver).__name__) is not type(solver):
        return solver
    return {"method": type(solver).__name__, **asdict(solver)}  # pyright: ignore[reportArgumentType]


def decoded(data: Any) -> LinearSolver:
    """The solver that `encoded` made data of; only solvers of gendiff are made."""
    if isinstance(data, LinearSolver):
        return data
    if isinstance(data, str):
        return named(data)
    values = dict(data)
    name = values.pop("method", None)
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    kind = METHODS[name]
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    for key, value in values.items():
        if key not in known:
            raise ValueError(unknown(f"field of {name}", key, known))
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def method_of(settings: Settings) -> LinearSolver:
    """The solver of ours that a class of diffusers is, with its settings."""
    return METHOD[settings.name](settings)


def begun_later(solver: LinearSolver, steps: int) -> LinearSolver:
    """The solver of the rest of a run that has so many steps in all, which begins without a memory.

    Whether a run is short enough for lower orders at its end is a matter of the whole, and PNDM begins with
    one evaluation a step.
    """
    if isinstance(solver, DPM | DPMpp | DEIS) and steps >= SHORT:
        return replace(solver, lower_order_final=False)
    return sampling.PNDM("euler") if isinstance(solver, sampling.PNDM) else solver


def with_eta(solver: LinearSolver, eta: Number | None) -> LinearSolver:
    """The solver with the eta of a pipeline: DDIM's, or TCD's gamma; others have none and take 0.

    Raises:
        ValueError: for an eta that the method has no use for.
    """
    if eta is None:
        return solver
    if isinstance(solver, sampling.DDIM):
        return replace(solver, eta=float(eta))
    if isinstance(solver, sampling.TCD):
        return replace(solver, gamma=float(eta))
    if eta:
        raise ValueError(
            f"eta={eta} says how much noise DDIM and TCD add, and {solver!r} is neither; leave it out or at "
            f"0, or choose solver='ddim'."
        )
    return solver


def _dpm(settings: Settings) -> LinearSolver:
    algorithm = settings["algorithm_type"] or "dpmsolver++"
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    kinds = {"dpmsolver++": DPMpp, "sde-dpmsolver++": DPMpp, "dpmsolver": DPM, "sde-dpmsolver": DPM}
    if algorithm not in kinds:
        raise ValueError(unknown("algorithm_type", algorithm, kinds))
    return kinds[algorithm](
        settings["solver_order"],
        _type(settings),
        lower_order_final=bool(settings["lower_order_final"]),
        euler_at_final=bool(settings["euler_at_final"]),
        sde=algorithm.startswith("sde"),
    )


def _singlestep(settings: Settings) -> LinearSolver:
    algorithm = settings["algorithm_type"]
    kinds = {
        "dpmsolver++": SinglestepDPMpp,
        "sde-dpmsolver++": SinglestepDPMpp,
        "dpmsolver": SinglestepDPM,
        "deis": SinglestepDPMpp,
    }
    if algorithm not in kinds:
        raise ValueError(unknown("algorithm_type", algorithm, kinds))
    return kinds[algorithm](
        settings["solver_order"],
        _type(settings),
        blocks=True,
        lower_order_final=bool(settings["lower_order_final"]),
        sde=algorithm.startswith("sde"),
    )


def _type(settings: Settings) -> Any:
    given = settings["solver_type"]
    if given not in OF_DIFFUSERS:
        raise ValueError(unknown("solver_type", given, OF_DIFFUSERS))
    return OF_DIFFUSERS[given]


def _unipc(settings: Settings) -> LinearSolver:
    if settings["solver_p"] is not None:
        raise ValueError(
            "solver_p, a scheduler inside a scheduler, has no counterpart; choose a solver instead."
        )
    return UniPC(
        settings["solver_order"],
        variant="bh1" if settings["solver_type"] == "bh1" else "bh2",
        predict="x0" if settings["predict_x0"] else "eps",
        disable_corrector=tuple(settings["disable_corrector"] or ()),
        lower_order_final=bool(settings["lower_order_final"]),
    )


def _flow(settings: Settings) -> LinearSolver:
    return sampling.LCM(scale=float("inf")) if settings["stochastic_sampling"] else sampling.Euler()


METHOD: dict[str, Callable[[Settings], LinearSolver]] = {
    "DDPMScheduler": lambda settings: sampling.DDPM(settings["variance_type"]),
    "DDIMScheduler": lambda settings: sampling.DDIM(),
    "DDIMInverseScheduler": lambda settings: sampling.Euler(),
    "PNDMScheduler": lambda settings: sampling.PNDM(
        "improved_euler" if settings["skip_prk_steps"] else "runge_kutta"
    ),
    "EulerDiscreteScheduler": lambda settings: sampling.Euler(),
    "EulerAncestralDiscreteScheduler": lambda settings: sampling.EulerAncestral(),
    "HeunDiscreteScheduler": lambda settings: sampling.Heun(),
    "KDPM2DiscreteScheduler": lambda settings: sampling.DPM2(),
    "KDPM2AncestralDiscreteScheduler": lambda settings: sampling.DPM2Ancestral(),
    "LMSDiscreteScheduler": lambda settings: sampling.LMS(),
    "DPMSolverSDEScheduler": lambda settings: SinglestepDPMpp(2, sde=True),
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": lambda settings: DEIS(
        settings["solver_order"], lower_order_final=bool(settings["lower_order_final"])
    ),
    "EDMEulerScheduler": lambda settings: sampling.Euler(),
    "EDMDPMSolverMultistepScheduler": _dpm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": lambda settings: sampling.Heun(),
    "LCMScheduler": lambda settings: sampling.LCM(
        scale=float(settings["timestep_scaling"]) * settings["num_train_timesteps"],
        start=1 / settings["num_train_timesteps"],
    ),
    "TCDScheduler": lambda settings: sampling.TCD(
        start=1 / settings["num_train_timesteps"], grain=1 / settings["num_train_timesteps"]
    ),
}
