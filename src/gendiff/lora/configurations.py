"""Configurations of peft, read as peft reads them: which layers, of what rank, strength and beginning."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, final

from torch import nn

from gendiff._checks import unknown
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.choosing import carries_none
from gendiff.lora.fitting import check_init, check_options
from gendiff.lora.targets import Target

KINDS = ("LORA", "LOHA", "LOKR", "OFT")  # what peft calls the algorithms
CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
RANKS = ("r", "rank_pattern", "alpha_pattern")
READ: Mapping[str, tuple[str, ...]] = {  # what a plan says, and what says nothing beside it
    "LORA": (*RANKS, "lora_alpha", "use_rslora", "use_dora", "init_lora_weights"),
    "LOHA": (*RANKS, "alpha", "init_weights"),
    "LOKR": (*RANKS, "alpha", "init_weights", *ALGORITHMS["lokr"].options),
    "OFT": ("r", "oft_block_size", "init_weights", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"),
}
ASIDE = (  # where a configuration comes from and what it was for
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "inference_mode",
)


@final
@dataclass(frozen=True)
class Reading:
    """What a configuration says of a model.

    Attributes:
        targets: the layers, in the order of the model's modules.
        settings: of each layer, by name: rank and lora_alpha.
        kind: the algorithm, its options, and whether it is rslora.
        init: how the adapters begin.
    """

    targets: list[Target]
    settings: Mapping[str, Mapping[str, Any]]
    kind: Mapping[str, Any]
    init: str | bool


def is_config(given: object) -> bool:
    """Whether something is a configuration of peft."""
    return hasattr(given, "peft_type") and hasattr(given, "target_modules")


def read(root: nn.Module, every: list[Target], config: Any) -> Reading:
    """What a configuration of peft says of a model.

    Args:
        root: the network.
        every: its layers that can carry an adapter.
        config: of LoRA, LoHa, LoKr or OFT.

    Raises:
        ValueError: for what an adapter here has not, by the name of the setting; for layers, and patterns of
            ranks and strengths, that are for nothing.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in KINDS:
        raise ValueError(unknown("kind of a configuration", kind, KINDS))
    _refuse_others(config, kind)
    targets = _targets(root, every, config)
    algorithm = kind.lower()
    if kind == "LORA" and config.use_dora:
        algorithm = "dora"
    options = {name: getattr(config, name) for name in ALGORITHMS[algorithm].options}
    check_options(algorithm, options)
    init = config.init_lora_weights if kind == "LORA" else config.init_weights
    check_init(algorithm, init)
    known = ALGORITHMS[algorithm].options
    return Reading(
        targets,
        _settings(targets, config, kind),
        {
            "rslora": kind == "LORA" and bool(config.use_rslora),
            "algorithm": algorithm,
            "options": tuple((key, value) for key, value in sorted(options.items()) if value != known[key]),
        },
        init,
    )


def _refuse_others(config: Any, kind: str) -> None:
    """Raise for settings, other than at their defaults, that a plan does not carry."""
    plain, carried = type(config)(), {*CHOICE, *READ[kind], *ASIDE}
    for name in (field.name for field in fields(config)):
        value, usual = getattr(config, name), getattr(plain, name)
        if name not in carried and value != usual and (value or usual):
            raise ValueError(
                f"the configuration sets {name}={value!r}, which adapters here have not: leave it at "
                f"{usual!r}."
            )
    if kind == "OFT" and config.use_cayley_neumann:
        raise ValueError(
            "the configuration sets use_cayley_neumann=True, a series in the place of Cayley's map, of which "
            "the matrices are not quite orthogonal: set it to False."
        )


def _targets(root: nn.Module, every: list[Target], config: Any) -> list[Target]:
    """The layers that peft would put adapters on."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    if config.target_modules is None:
        raise ValueError("the configuration says no target_modules: name the layers that are to be adapted.")
    said = config.target_modules
    config = _maybe_include_all_linear_layers(copy.copy(config), root)
    by_name = {target.name: target for target in every}
    inside = tuple(f"{name}." for name in by_name)  # the parts of a layer that carries adapters already
    found: list[str] = []
    for name, module in root.named_modules():
        if not name or name.startswith(inside) or not check_target_module_exists(config, name):
            continue
        if name not in by_name:
            raise ValueError(f"target_modules {carries_none(name, module, by_name)}")
        found.append(name)
    for ending in () if isinstance(said, str) else sorted(said):
        if not any(_ends(name, ending) for name in found):
            raise ValueError(_for_nothing("target_modules", ending, by_name))
    if not found:
        raise ValueError(_for_nothing("target_modules", said, by_name))
    return [by_name[name] for name in found]


def _settings(targets: Iterable[Target], config: Any, kind: str) -> dict[str, dict[str, Any]]:
    """Rank and strength of each layer."""
    if kind == "OFT":
        size, blocks = config.oft_block_size, config.r
        return {one.name: {"rank": size or _size(one, blocks), "lora_alpha": None} for one in targets}
    names = [one.name for one in targets]
    ranks = _by_pattern("rank_pattern", config.rank_pattern, config.r, names)
    strength = config.lora_alpha if kind == "LORA" else config.alpha
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, strength, names)
    return {name: {"rank": ranks[name], "lora_alpha": alphas[name]} for name in names}


def _size(target: Target, blocks: int) -> int:
    width = target.shape[1]
    if width % blocks:
        raise ValueError(f"{target.name} has {width} inputs, which r={blocks} blocks do not divide evenly.")
    return width // blocks


def _by_pattern(what: str, patterns: Mapping[str, Any], usual: Any, names: list[str]) -> dict[str, Any]:
    from peft.utils.other import get_pattern_key

    keys = {name: get_pattern_key(patterns, name) for name in names}  # pyright: ignore[reportArgumentType]
    for pattern in patterns:
        if not any(get_pattern_key([pattern], name) == pattern for name in names):
            raise ValueError(_for_nothing(what, pattern, names))
    return {name: patterns.get(key, usual) for name, key in keys.items()}


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _for_nothing(what: str, pattern: str, names: Iterable[str]) -> str:
    """That a part of a configuration is for no layer, and the nearest ends of names."""
    names, depth = list(names), str(pattern).count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names)
    near = get_close_matches(str(pattern), ends, n=3, cutoff=0.3) or list(ends)[:3]
    return (
        f"{what} {pattern!r} of the configuration is for none of {len(names)} layers: leave it out. Nearest: "
        f"{', '.join(map(repr, near))}."
    )
