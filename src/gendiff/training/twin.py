"""A second set of modules, called like the live ones, that work on averaged weights without copying any."""

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.denoiser import Denoiser
from gendiff.training.names import parameters, unwrapped

CALLED = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
# Hooks that belong to what a module computes: weight and spectral norm, and how transformers returns hidden
# states, which it installs once and remembers. They work on the module that they are called with.
OWN_HOOKS = ("torch.nn.utils.", "transformers.utils.output_capturing")
ATOMS = (type, FunctionType, BuiltinFunctionType, ModuleType)  # what deepcopy does not copy


def twin(components: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Modules that compute what the components would with other weights, such as their averages.

    Every trained parameter is replaced by one in the memory of the given tensor: where that is changed in
    place, the next call follows. Everything else that is a tensor, a frozen base or a running mean, is the
    live one itself. The modules round them are new, in evaluation mode, and need no gradient; wrappers
    (compiled, distributed, checkpointing) and hooks that somebody attached are left out. A schedule of a
    `Denoiser` is the same object. The components are not changed.

    Args:
        components: modules by name; what they share with each other, their twins share.
        weights: tensors for all trained parameters, by canonical name
            (`gendiff.training.names.parameters`), in the parameters' shape, dtype and place.

    Returns:
        The modules by the same names.

    Raises:
        ValueError: for weights that are missing, unknown, or of another shape, dtype or device.
        TypeError: for a component that cannot be copied.

    >>> import torch
    >>> live, average = nn.Linear(1, 1, bias=False), torch.full((1, 1), 2.0)
    >>> averaged = twin({"net": live}, {"net.weight": average})["net"]
    >>> averaged(torch.ones(1))
    tensor([2.])
    >>> _ = average.fill_(3.0)
    >>> averaged(torch.ones(1))
    tensor([3.])
    """
    replaced = _averaged(parameters(components), weights)
    live = [module for component in components.values() for module in component.modules()]
    memo: dict[int, Any] = {}  # what deepcopy finds in here, by identity, it takes instead of copying
    for module in live:
        memo |= {id(hooks): kept for hooks, kept in _hooks(module)}
        if isinstance(module, Denoiser):
            memo |= {id(one): one for one in (module.schedule, module.prediction)}
    tensors = {id(tensor): tensor for tensor in _tensors(components, set(memo))}
    memo |= tensors | replaced
    made: dict[str, nn.Module] = {}
    for name, component in components.items():
        try:
            for module in reversed(list(component.modules())):  # what is inside comes first
                if unwrapped(module) is not module:
                    memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
            made[name] = copy.deepcopy(component, memo)
        except Exception as error:
            raise TypeError(
                f"{name!r} ({type(component).__name__}) cannot have a twin, since something in it cannot be "
                f"copied: {error}. Keep locks, files and processes out of the attributes of modules."
            ) from error
    _check_apart(live, made)
    return {name: module.eval() for name, module in made.items()}


def _averaged(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> dict[int, nn.Parameter]:
    """What stands for each trained parameter, by the identity of the live one."""
    for name in weights:
        if name not in trained:
            raise ValueError(unknown("trained parameter", name, trained))
    missing = [name for name in trained if name not in weights]
    if missing:
        raise ValueError(
            f"a twin needs weights for all trained parameters, and has none for {len(missing)} of them, such "
            f"as {missing[0]!r}."
        )
    for name, parameter in trained.items():
        ours, theirs = ((tuple(t.shape), t.dtype, str(t.device)) for t in (parameter, weights[name]))
        if ours != theirs:
            raise ValueError(
                f"the weights for {name} are of shape {theirs[0]}, {theirs[1]} on {theirs[2]}, and the "
                f"parameter of shape {ours[0]}, {ours[1]} on {ours[2]}; they must be equal, as the twin "
                f"works in the memory of what it is given: train float32 weights, or give copies."
            )
    return {id(p): nn.Parameter(weights[name].detach(), requires_grad=False) for name, p in trained.items()}


def _hooks(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The tables of a module's hooks, each with the one that its twin has."""
    tables: dict[str, dict[int, Any]] = {name: getattr(module, name) for name in (*CALLED, *FLAGS)}
    own = {
        key
        for name in CALLED
        for key, hook in tables[name].items()
        if str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS)
    }
    for hooks in tables.values():
        yield hooks, OrderedDict((key, value) for key, value in hooks.items() if key in own)


def _tensors(root: Any, skipped: set[int]) -> Iterator[Tensor]:
    """Every tensor that copying an object would come upon, in whatever containers and objects it lies."""
    seen, waiting = set(skipped), [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, ATOMS) or not gc.is_tracked(one):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        else:
            waiting += gc.get_referents(one)


def _check_apart(live: list[nn.Module], made: Mapping[str, nn.Module]) -> None:
    """A module that copies itself in its own way may give back itself, which would be moved with the twin."""
    known = {id(module) for module in live}
    for name, component in made.items():
        for path, module in component.named_modules():
            if id(module) in known:
                raise TypeError(
                    f"{name!r} cannot have a twin: {path or 'it'} ({type(module).__name__}) gives itself "
                    f"when it is copied; see its __deepcopy__."
                )
