"""The cells of the parity table: settings of every class, and which of them differ for a reason."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("", "karras", "exponential", "beta")
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


@dataclass(frozen=True)
class Cell:
    """One run of one class."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 10
    call: dict[str, Any] = field(default_factory=dict)  # of step
    begin: dict[str, Any] = field(default_factory=dict)  # of set_timesteps
    first: int = 0  # the evaluation to begin at

    def __str__(self) -> str:
        said = {**self.settings, **self.call, **self.begin}
        return f"{self.name} {self.steps} " + " ".join(f"{key}={value}" for key, value in said.items())


class Asked(NamedTuple):
    """What a cell asks for, in the words that the paragraphs are about."""

    name: str
    steps: int
    get: Callable[..., Any]

    def named(self, *names: str) -> bool:
        return self.name.removesuffix("Scheduler") in names

    @property
    def spacing(self) -> str:
        return self.get("timestep_spacing", "")

    @property
    def least(self) -> bool:
        return self.get("final_sigmas_type") == "sigma_min"


def _one_step_of_linspace(cell: Asked) -> bool:
    linspace = cell.spacing == "linspace" and not cell.named(*MULTISTEP)
    return cell.steps == 1 and (linspace or cell.get("sigma_schedule") == "exponential")


def _previous_timestep(cell: Asked) -> bool:
    uneven = cell.spacing == "trailing" and 1000 % cell.steps != 0
    return cell.named("DDIM", "DDIMInverse", "PNDM") and (cell.spacing == "linspace" or uneven)


def _step_of_no_length(cell: Asked) -> bool:
    if cell.named("DDIM"):
        return cell.get("set_alpha_to_one") is False and not cell.get("steps_offset")
    visits_zero = cell.spacing != "trailing" or cell.steps > 666
    if cell.named("EulerDiscrete"):
        return cell.least and visits_zero
    if cell.name.startswith("EDM"):
        return cell.least
    respaced = any(cell.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta", "flow"))
    if cell.named("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"):
        return cell.least and (respaced or bool(cell.get("use_lu_lambdas")))
    return cell.named("DEISMultistep") and (respaced or (cell.spacing == "trailing" and visits_zero))


def _runge_kutta(cell: Asked) -> bool:
    short = cell.steps < 4 or 1000 // cell.steps % 2 == 1
    return cell.named("PNDM") and not cell.get("skip_prk_steps") and short


MULTISTEP = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")
FAULTS: dict[int, Callable[[Asked], Any]] = {
    1: _one_step_of_linspace,
    2: _previous_timestep,
    3: _step_of_no_length,
    4: lambda cell: (
        cell.named("DDPM")
        and cell.spacing == "trailing"
        and cell.get("variance_type") in ("fixed_large", "learned_range")
    ),
    5: lambda cell: cell.name.startswith("FlowMatch") and cell.get("shift", 1.0) != 1,
    6: lambda cell: cell.named("PNDM") and cell.get("prediction_type") == "v_prediction",
    7: _runge_kutta,
    8: lambda cell: (
        cell.named("DPMSolverMultistep", "EDMDPMSolverMultistep") and cell.get("solver_order") == 3
    ),
    9: lambda cell: cell.named("DPMSolverMultistep") and cell.get("variance_type") == "learned_range",
    10: lambda cell: (
        cell.named("UniPCMultistep")
        and cell.get("final_sigmas_type") == "zero"
        and (cell.get("solver_type") == "bh1" or cell.get("predict_x0") is False)
    ),
    11: lambda cell: cell.get("interpolation_type") == "log_linear",
    12: lambda cell: (
        cell.named("DPMSolverSinglestep")
        and cell.get("algorithm_type") == "sde-dpmsolver++"
        and cell.get("solver_order") != 1
    ),
    13: lambda cell: cell.get("shift_terminal") is not None and cell.steps == 1,
    14: lambda cell: cell.named("TCD") and cell.get("set_alpha_to_one", True),
    15: lambda cell: (
        cell.get("rescale_betas_zero_snr")
        and cell.get("beta_schedule") is None
        and cell.named("EulerDiscrete", "DPMSolverMultistep")
    ),
    16: lambda cell: cell.get("lambda_min_clipped") is not None and cell.steps > 990,
    17: lambda cell: cell.get("use_flow_sigmas") and (cell.steps > 100 or cell.get("shift_terminal")),
    18: lambda cell: cell.named(*MULTISTEP) and cell.get("steps_offset") and cell.steps > 990,
    19: lambda cell: cell.named("LCM", "TCD") and cell.steps > 50,
}


def fault_of(cell: Cell) -> str:
    """The paragraphs of docs/schedulers.md that say why a cell may differ; "" where it may not."""
    asked = Asked(cell.name, cell.steps, cell.settings.get)
    return " ".join(str(number) for number, applies in FAULTS.items() if applies(asked))


def product(
    name: str, predictions: tuple[str, ...], sigmas: tuple[str, ...], spacings: tuple[str, ...], **fixed: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    for prediction, kind, spacing in itertools.product(predictions, sigmas, spacings):
        settings: dict[str, Any] = {"prediction_type": prediction} if prediction else {}
        settings |= {"timestep_spacing": spacing} if spacing else {}
        settings |= {kind if kind == "use_lu_lambdas" else f"use_{kind}_sigmas": True} if kind else {}
        yield name, settings | fixed


THREE = ("epsilon", "sample", "v_prediction")
TWO = ("epsilon", "v_prediction")


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    plain = {"clip_sample": False}
    yield from product("DDPMScheduler", THREE, ("",), SPACINGS, **plain)
    for kind in ("fixed_small_log", "fixed_large", "learned_range"):
        yield from product("DDPMScheduler", ("epsilon",), ("",), SPACINGS, variance_type=kind, **plain)
    for kind in ("squaredcos_cap_v2", "scaled_linear", "sigmoid", "laplace"):
        yield from product(
            "DDPMScheduler", ("v_prediction",), ("",), ("leading",), beta_schedule=kind, **plain
        )
    yield from product("DDPMScheduler", THREE, ("",), ("leading",), clip_sample=True)
    yield from product(
        "DDPMScheduler", THREE, ("",), ("leading",), thresholding=True, sample_max_value=2.0, **plain
    )
    yield from product("DDIMScheduler", THREE, ("",), SPACINGS, **plain)
    yield from product(
        "DDIMScheduler", ("epsilon",), ("",), ("leading",), set_alpha_to_one=False, steps_offset=1, **plain
    )
    yield from product("DDIMScheduler", ("epsilon",), ("",), ("leading",), set_alpha_to_one=False, **plain)
    yield from product(
        "DDIMScheduler", ("v_prediction",), ("",), ("trailing",), rescale_betas_zero_snr=True, **plain
    )
    yield from product("DDIMInverseScheduler", THREE, ("",), ("leading", "trailing"), **plain)
    yield from product("PNDMScheduler", TWO, ("",), SPACINGS, skip_prk_steps=True, steps_offset=1)
    yield from product("PNDMScheduler", TWO, ("",), SPACINGS, steps_offset=1)
    yield from product("EulerDiscreteScheduler", THREE, SIGMAS, SPACINGS)
    yield from product(
        "EulerDiscreteScheduler", ("epsilon",), SIGMAS, SPACINGS, final_sigmas_type="sigma_min"
    )
    for table in ({}, STABLE):
        yield from product(
            "EulerDiscreteScheduler",
            ("v_prediction",),
            ("",),
            ("trailing",),
            rescale_betas_zero_snr=True,
            **table,
        )
    yield from product(
        "EulerDiscreteScheduler", ("epsilon",), ("",), ("leading",), interpolation_type="log_linear"
    )
    yield from product(
        "EulerDiscreteScheduler", ("epsilon",), ("karras",), ("leading",), sigma_min=0.05, sigma_max=9.0
    )
    yield from product("EulerAncestralDiscreteScheduler", TWO, ("",), SPACINGS)
    for name, predictions in (
        ("HeunDiscreteScheduler", THREE),
        ("KDPM2DiscreteScheduler", TWO),
        ("KDPM2AncestralDiscreteScheduler", TWO),
        ("LMSDiscreteScheduler", THREE),
        ("DPMSolverSDEScheduler", TWO),
    ):
        yield from product(name, predictions, SIGMAS, SPACINGS)
    yield from product("HeunDiscreteScheduler", THREE, ("",), ("linspace",), clip_sample=True)
    yield from multistep()
    for name, extra in (
        ("EDMEulerScheduler", ({},)),
        (
            "EDMDPMSolverMultistepScheduler",
            (
                {},
                {"solver_order": 1},
                {"solver_order": 3},
                {"algorithm_type": "sde-dpmsolver++"},
                {"euler_at_final": True},
                {"solver_type": "heun"},
            ),
        ),
    ):
        for more, kind, final, prediction in itertools.product(
            extra, ("karras", "exponential"), ("zero", "sigma_min"), TWO
        ):
            yield (
                name,
                {"sigma_schedule": kind, "final_sigmas_type": final, "prediction_type": prediction, **more},
            )
    for kind, shift in itertools.product(SIGMAS, (1.0, 3.0)):
        yield from product("FlowMatchEulerDiscreteScheduler", ("",), (kind,), ("",), shift=shift)
    yield "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}
    yield "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}
    yield "FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}
    for shift in (1.0, 3.0):
        yield "FlowMatchHeunDiscreteScheduler", {"shift": shift}
    for name in ("LCMScheduler", "TCDScheduler"):
        for prediction in THREE:
            yield name, {"prediction_type": prediction}
    yield "LCMScheduler", {"clip_sample": True}
    yield "TCDScheduler", {"set_alpha_to_one": False}


def multistep() -> Iterator[tuple[str, dict[str, Any]]]:
    zero, least = {"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}
    for kind in (*SIGMAS, "use_lu_lambdas"):
        yield from product("DPMSolverMultistepScheduler", THREE, (kind,), SPACINGS)
    for algorithm, order, solver, end in itertools.product(
        ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        (1, 2, 3),
        ("midpoint", "heun"),
        (zero, least),
    ):
        if algorithm.endswith("++") or end is least:
            yield (
                "DPMSolverMultistepScheduler",
                {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver, **end},
            )
    for more in (
        {"euler_at_final": True, **least},
        {"lower_order_final": False, **least},
        {"use_lu_lambdas": True, **least},
        {"use_karras_sigmas": True, "algorithm_type": "dpmsolver", **least},
        {"thresholding": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            **STABLE,
        },
        {"steps_offset": 1, "timestep_spacing": "leading"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"variance_type": "learned_range"},
    ):
        yield "DPMSolverMultistepScheduler", more
    for kind in SIGMAS:
        yield from product("DPMSolverSinglestepScheduler", THREE, (kind,), ("",))
    for algorithm, order, solver, lower, end in itertools.product(
        ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        (1, 2, 3),
        ("midpoint", "heun"),
        (True, False),
        (zero, least),
    ):
        if algorithm.endswith("++") or end is least:
            yield (
                "DPMSolverSinglestepScheduler",
                {
                    "algorithm_type": algorithm,
                    "solver_order": order,
                    "solver_type": solver,
                    "lower_order_final": lower,
                    **end,
                },
            )
    yield (
        "DPMSolverSinglestepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    )
    for kind in SIGMAS:
        yield from product("UniPCMultistepScheduler", THREE, (kind,), SPACINGS)
    for order, solver, x0, end in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False), (zero, least)):
        yield (
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": solver, "predict_x0": x0, **end},
        )
    for more in (
        {"lower_order_final": False, **least},
        {"disable_corrector": [0, 2]},
        {"use_karras_sigmas": True, **least},
        {"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True, "shift_terminal": 0.1, "prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"thresholding": True},
    ):
        yield "UniPCMultistepScheduler", more
    for kind in SIGMAS:
        yield from product("DEISMultistepScheduler", THREE, (kind,), SPACINGS)
    for order in (1, 3):
        yield "DEISMultistepScheduler", {"solver_order": order}
    yield (
        "DEISMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    )
