"""Canonical names: wrappers of every kind leave no trace in them, and what is no wrapper stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from gendiff.training.names import canonical, parameters, state, unwrapped


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1))


PLAIN = [*network().state_dict()]
TRAINED = ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("outer", [compiled, DataParallel, checkpoint_wrapper, AveragedModel])
@pytest.mark.parametrize("inner", [compiled, DataParallel, checkpoint_wrapper, nn.Identity])
@pytest.mark.parametrize("place", ["0", "0.0"])
def test_wrappers_leave_no_trace(
    outer: Callable[[nn.Module], Any], inner: Callable[[nn.Module], Any], place: str
) -> None:
    net = network()
    if inner is not nn.Identity:
        owner, _, attribute = place.rpartition(".")
        setattr(net.get_submodule(owner), attribute, inner(net.get_submodule(place)))
    wrapped = outer(net)
    assert [name for name in state(wrapped) if name != "n_averaged"] == PLAIN  # AveragedModel counts
    assert list(parameters({"net": wrapped})) == [f"net.{name}" for name in TRAINED]
    if outer is not AveragedModel:  # which holds a copy
        assert unwrapped(wrapped) is net


def test_distributed_wrappers_leave_no_trace() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(compiled(network()))
        assert list(state(wrapped)) == PLAIN
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_wrapper_keeps_its_names() -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    assert list(parameters({"net": Own(nn.Linear(1, 1))})) == ["net.module.weight", "net.module.bias"]
    deep = DataParallel(Own(DataParallel(nn.Linear(1, 1))))
    assert list(state(deep)) == ["module.weight", "module.bias"]
    assert canonical(deep, "module.module.module") == "module"  # of a module, as of a parameter


def test_tied_and_frozen_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    assert list(parameters({"a": net, "b": net[0]})) == ["a.0.weight", "a.0.bias"]
    assert list(parameters({"a": net}, trainable=False)) == ["a.0.weight", "a.0.bias", "a.1.bias"]
    live = state(net)
    assert live["1.weight"] is live["0.weight"] is net[0].weight


def test_one_name_for_two_tensors_is_refused() -> None:
    wrapped = DataParallel(nn.Linear(1, 1))
    wrapped.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    for read in (lambda: parameters({"net": wrapped}), lambda: state(wrapped)):
        with pytest.raises(ValueError, match=r"two tensors have the name '(net\.)?weight'"):
            read()


def test_a_state_that_is_no_tensor_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

    with pytest.raises(TypeError, match=r"'0\._extra_state' .* is a dict"):
        state(nn.Sequential(Extra(1, 1)))
