"""Optimizers: the default one, and the state of any of them by the names of the parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gendiff._checks import unknown

Groups = Sequence[dict[str, Any]]
Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
UNSAVED = frozenset({"params", "lr", "initial_lr"})  # a rate comes from the table of the run


def adamw(groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW in its fused form, which is gated on the device and, on CUDA, can be captured."""
    on_cuda = any(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(list(groups), betas=betas, eps=eps, fused=True, capturable=on_cuda)


def made(factory: Any, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer of a factory, which must have all the parameters, each once, in the groups given.

    Raises:
        TypeError: for a factory that is none, or one that makes something else.
        ValueError: where the optimizer has other parameters than it was given.
    """
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise TypeError(
            f"optimizer is a function of parameter groups, got {type(factory).__name__}; write "
            f"optimizer=lambda groups: torch.optim.AdamW(groups)."
        )
    given = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    optimizer = factory([dict(group, params=list(group["params"])) for group in given])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the optimizer factory returns a torch Optimizer, got {type(optimizer).__name__}.")
    mine = [[id(p) for p in group["params"]] for group in given]
    theirs = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    if mine != theirs:
        raise ValueError(
            f"the optimizer has {len(theirs)} groups of {sum(map(len, theirs))} parameters and was given "
            f"{len(mine)} of {sum(map(len, mine))}; pass the groups on as they are: AdamW(groups)."
        )
    return optimizer


def named_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer by the names of its parameters, and the options of its groups.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.grad = torch.ones(1)
    >>> optimizer.step()
    >>> named_state(optimizer, {"net.weight": weight})["parameters"]
    {'net.weight': {'momentum_buffer': tensor([1.])}}
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    raw = optimizer.state_dict()
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for live, saved in zip(optimizer.param_groups, raw["param_groups"], strict=True):
        for parameter, index in zip(live["params"], saved["params"], strict=True):
            if index in raw["state"]:
                state[names[id(parameter)]] = dict(raw["state"][index])
        options = {key: _plain(value) for key, value in saved.items() if key not in UNSAVED}
        groups.append({"names": [names[id(p)] for p in live["params"]], "options": options})
    return {"class": type(optimizer).__name__, "parameters": state, "groups": groups}


def load_named_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Continue from what `named_state` gave; the class, the groups and the shapes must be the same.

    Raises:
        ValueError: where they are not.
    """
    if state["class"] != type(optimizer).__name__:
        raise ValueError(
            f"the state is of {state['class']} and the optimizer is {type(optimizer).__name__}; use the one "
            f"of the run that wrote it."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    raw = optimizer.state_dict()
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["names"] for group in state["groups"]]
    if mine != theirs:
        raise ValueError(
            f"the optimizer has groups of {[len(group) for group in mine]} parameters and the state of "
            f"{[len(group) for group in theirs]}, or their names differ; use the param_groups of the run "
            f"that wrote it."
        )
    for name in state["parameters"]:
        if name not in parameters:
            raise ValueError(unknown("parameter in the state of the optimizer", name, parameters))
    index = {
        name: number
        for group, saved in zip(mine, raw["param_groups"], strict=True)
        for name, number in zip(group, saved["params"], strict=True)
    }
    groups = [
        {**saved, **{key: _like(value, saved.get(key)) for key, value in given["options"].items()}}
        for saved, given in zip(raw["param_groups"], state["groups"], strict=True)
    ]
    named = {index[name]: dict(values) for name, values in state["parameters"].items()}
    optimizer.load_state_dict({"state": named, "param_groups": groups})


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The weights that an optimizer evaluates with, where it has others (schedule-free); exact on exit.

    Its own `train()` computes the weights back, which is not exact, so that they are put back here.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    any_optimizer: Any = optimizer
    any_optimizer.eval()
    try:
        yield
    finally:
        any_optimizer.train()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _like(value: Any, live: Any) -> Any:
    """The value as the optimizer had it: JSON knows no tuples."""
    if isinstance(live, tuple):
        return tuple(value)
    return value.to(live.device) if isinstance(live, Tensor) and isinstance(value, Tensor) else value
