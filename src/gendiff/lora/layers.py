"""The layers of peft that carry adapters: what makes them, and where they keep their parts."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.plan import LoraPlan, Planned

PLACES = {"magnitude": "lora_magnitude_vector"}  # where peft calls a part otherwise
MARKS = (".lora_", ".hada_", ".lokr_", ".oft_")  # in the names of the parameters of peft's layers


def part_of(layer: Any, part: str, adapter_name: str) -> nn.Parameter:
    """A tensor of an adapter in a layer."""
    held = getattr(layer, PLACES.get(part, part))[adapter_name]
    return getattr(held, "weight", held)


def carries(layer: Any, part: str, adapter_name: str) -> bool:
    """Whether a module is a layer with that part of that adapter."""
    return adapter_name in getattr(layer, PLACES.get(part, part), ())


def is_bare(layer: Any) -> bool:
    """Whether no adapter is left in a layer."""
    return not any(len(getattr(layer, kind, ())) for kind in layer.adapter_layer_names)


def tuner(algorithm: str) -> str:
    """Which of peft's families of layers carries an algorithm; a layer has those of one family."""
    return "lora" if algorithm == "dora" else algorithm


def family(layer: Any) -> str | None:
    """The family of a layer of peft, or None for any other module."""
    if not hasattr(layer, "adapter_layer_names"):
        return None
    return type(layer).__module__.split(".")[2]  # peft.tuners.<family>


def config(plan: LoraPlan, init: str | bool) -> Any:
    """What peft makes the same adapters of; every pattern is a whole name."""
    import peft

    first = plan.rows[0]
    exact = {row.name: f"^{re.escape(row.name)}" for row in plan.rows}
    targets = "|".join(map(re.escape, exact))
    kinds: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(
            init_lora_weights=init,  # pyright: ignore[reportArgumentType] -- one of peft's words
            use_rslora=first.rslora,
            use_dora=first.algorithm == "dora",
        ),
        "loha": lambda: peft.LoHaConfig(init_weights=bool(init)),
        "lokr": lambda: peft.LoKrConfig(
            init_weights=bool(init),
            **{option: first.option(option) for option in ALGORITHMS["lokr"].options},
        ),
        "oft": lambda: peft.OFTConfig(init_weights=bool(init), oft_block_size=0, use_cayley_neumann=False),
    }
    made = kinds[tuner(first.algorithm)]()
    made.target_modules = targets
    made.r, made.rank_pattern = _pattern(plan, exact, ranks_of(first.algorithm))
    if ALGORITHMS[first.algorithm].scaled:
        name = "lora_alpha" if tuner(first.algorithm) == "lora" else "alpha"
        alpha, made.alpha_pattern = _pattern(plan, exact, lambda row: row.lora_alpha)
        setattr(made, name, alpha)
    return made


def ranks_of(algorithm: str) -> Callable[[Planned], int]:
    """What peft calls r: of OFT the number of blocks."""
    if algorithm == "oft":
        return lambda row: row.shape[1] // row.rank
    return lambda row: row.rank


def _pattern(
    plan: LoraPlan, exact: Mapping[str, str], of: Callable[[Planned], Any]
) -> tuple[Any, dict[str, Any]]:
    """The value of most layers, and by name those of the rest."""
    common = Counter(map(of, plan.rows)).most_common(1)[0][0]
    return common, {exact[row.name]: of(row) for row in plan.rows if of(row) != common}
