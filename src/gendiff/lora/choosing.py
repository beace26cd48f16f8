"""Which layers are meant by the targets and the rules of a plan."""

from collections.abc import Iterable

from torch import nn

from gendiff import _patterns
from gendiff.attention.selectors import Selector
from gendiff.lora.presets import is_preset, preset
from gendiff.lora.targets import Target


def chosen(root: nn.Module, every: list[Target], targets: str | Selector | Iterable[str]) -> list[Target]:
    """The layers that the targets of a plan mean.

    Args:
        root: the network.
        every: its layers that can carry an adapter.
        targets: a preset, patterns of names, or a selector.

    Raises:
        ValueError: where one of them, or one alternative of a pattern, means none.
    """
    if isinstance(targets, Selector):
        found = [target for target in every if targets(target)]
        if not found:
            raise ValueError(f"{targets} covers none of {len(every)} layers; {_kinds(every)}.")
        return found
    if isinstance(targets, str):
        patterns = preset(targets) if is_preset(targets) else (targets,)
    else:
        patterns = tuple(targets)
    names = [target.name for target in every]
    wanted: set[str] = set()
    for alternative in (part.strip() for pattern in patterns for part in pattern.split("|")):
        covered = {name for name in names if _patterns.match(alternative, name)}
        if not covered:
            raise ValueError(_nothing(root, alternative, names))
        wanted |= covered
    return [target for target in every if target.name in wanted]


def covered(key: Selector | str, among: list[Target]) -> list[Target]:
    """The planned layers that a rule is for.

    Raises:
        ValueError: where it is for none.
    """
    if isinstance(key, Selector):
        found = [target for target in among if key(target)]
        if not found:
            raise ValueError(
                f"the rule for {key} covers none of {len(among)} planned layers; {_kinds(among)}."
            )
        return found
    names = set(_patterns.select(key, [target.name for target in among], "planned layers"))
    return [target for target in among if target.name in names]


def carries_none(name: str, module: nn.Module, names: Iterable[str]) -> str:
    """That a module is no layer that carries adapters, and which of its parts are."""
    below = [repr(one) for one in names if one.startswith(f"{name}.")]
    hint = f"; its layers are {', '.join(below[:3])}" if below else ""
    return f"covers {name!r}, a {type(module).__name__}, which carries no adapter{hint}."


def _nothing(root: nn.Module, pattern: str, names: list[str]) -> str:
    """Why a target covers no layer."""
    for name, module in root.named_modules():
        if _patterns.match(pattern, name):
            return f"{pattern!r} {carries_none(name, module, names)}"
    try:
        _patterns.select(pattern, names, "layers that can carry an adapter")
    except ValueError as error:
        return str(error)
    raise AssertionError  # it covers none, which select has just refused


def _kinds(targets: list[Target]) -> str:
    kinds = sorted({target.kind for target in targets})
    return f"there are {', '.join(kinds)}"
