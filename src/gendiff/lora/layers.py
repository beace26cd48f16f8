"""The layers of peft that carry adapters: what makes them, and where they keep their parts."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.plan import LoraPlan, Planned
from gendiff.lora.scales import let_go

PLACES = {"magnitude": "lora_magnitude_vector"}  # where peft calls a part otherwise
MARKS = (".lora_", ".hada_", ".lokr_", ".oft_")  # in the names of the parameters of peft's layers


def place_of(part: str) -> str:
    """What peft calls a part."""
    return PLACES.get(part, part)


def part_of(layer: Any, part: str, adapter_name: str) -> nn.Parameter:
    """A tensor of an adapter in a layer."""
    held = getattr(layer, place_of(part))[adapter_name]
    return getattr(held, "weight", held)


def carries(layer: Any, part: str, adapter_name: str) -> bool:
    """Whether a module is a layer with that part of that adapter."""
    return adapter_name in getattr(layer, place_of(part), ())


def tuner(algorithm: str) -> str:
    """Which of peft's families of layers carries an algorithm; a layer has those of one family."""
    return "lora" if algorithm == "dora" else algorithm


def family(layer: Any) -> str | None:
    """The family of a layer of peft, or None for any other module."""
    if not hasattr(layer, "adapter_layer_names"):
        return None
    homes = (kind.__module__.split(".") for kind in type(layer).__mro__)
    return next((home[2] for home in homes if home[:2] == ["peft", "tuners"]), None)


def take_off(root: nn.Module, path: str, adapter_name: str) -> None:
    """Take an adapter out of a layer, and put the layer that peft's is round back where it has no other."""
    layer: Any = root.get_submodule(path)
    if family(layer) is None:
        return  # nothing was put on
    layer._active_adapter = [one for one in layer.active_adapters if one != adapter_name]
    layer.delete_adapter(adapter_name)
    let_go(layer)
    if not any(len(getattr(layer, kind, ())) for kind in layer.adapter_layer_names):
        parent, _, last = path.rpartition(".")
        root.get_submodule(parent)._modules[last] = layer.get_base_layer()


def config(plan: LoraPlan, init: str | bool) -> Any:
    """What peft makes the same adapters of; every pattern is a whole name."""
    import peft

    first = plan.rows[0]
    exact = {row.name: f"^{re.escape(row.name)}" for row in plan.rows}
    kinds: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(
            init_lora_weights=init,  # pyright: ignore[reportArgumentType] -- one of peft's words
            use_rslora=first.rslora,
            use_dora=first.algorithm == "dora",
        ),
        "loha": lambda: peft.LoHaConfig(init_weights=bool(init)),
        "lokr": lambda: peft.LoKrConfig(
            init_weights=init,  # pyright: ignore[reportArgumentType] -- or "lycoris"
            **{option: first.option(option) for option in ALGORITHMS["lokr"].options},
        ),
        "oft": lambda: peft.OFTConfig(init_weights=bool(init), use_cayley_neumann=False),
    }
    made = kinds[tuner(first.algorithm)]()
    made.target_modules = "|".join(map(re.escape, exact))
    rank, ranks = _pattern(plan, exact, lambda row: row.rank)
    if first.algorithm == "oft":
        made.oft_block_size = rank  # one for all: see `mend`
        return made
    made.r, made.rank_pattern = rank, ranks
    name = "lora_alpha" if tuner(first.algorithm) == "lora" else "alpha"
    alpha, made.alpha_pattern = _pattern(plan, exact, lambda row: row.lora_alpha)
    setattr(made, name, alpha)
    return made


def mend(layer: Any, row: Planned, adapter_name: str, made: Any) -> None:
    """Give a layer its own size of blocks, of which a configuration of OFT says one for all."""
    if row.algorithm == "oft" and layer.oft_block_size[adapter_name] != row.rank:
        own = type(made)(init_weights=True, oft_block_size=row.rank, use_cayley_neumann=False)
        layer.update_layer(adapter_name, 0, config=own)


def _pattern(
    plan: LoraPlan, exact: Mapping[str, str], of: Callable[[Planned], Any]
) -> tuple[Any, dict[str, Any]]:
    """The value of most layers, and by name those of the rest."""
    common = Counter(map(of, plan.rows)).most_common(1)[0][0]
    return common, {exact[row.name]: of(row) for row in plan.rows if of(row) != common}
