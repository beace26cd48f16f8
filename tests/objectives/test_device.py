"""An objective reads nothing from the device and copies nothing to it, shown without one.

Tensors of the device `meta` have no values: whatever asks for one raises, where a GPU would silently
synchronise. Copies between the host and the device are watched for, operation by operation. `tests/gpu` has
the real thing.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gendiff.denoiser import Denoiser
from gendiff.math import (
    CosineBeta,
    LinearBeta,
    Rectified,
    ScaledLinearBeta,
    SigmoidBeta,
    VarianceExploding,
    ZeroTerminalSNR,
)
from gendiff.objectives import (
    EDMWeighting,
    Huber,
    InputPerturbation,
    LogitNormal,
    LogNormal,
    MinSNR,
    Objective,
    OffsetNoise,
    SoftMinSNR,
    Stratified,
    Uniform,
)

CASES = {
    "epsilon": (Objective(), LinearBeta(), "epsilon"),
    "v": (Objective(weighting=MinSNR(), corruption=[OffsetNoise(), InputPerturbation()]), CosineBeta(), "v"),
    "flow": (Objective(times=LogitNormal(shift=3.0)), Rectified(), "flow"),
    "edm": (Objective(times=LogNormal(), weighting=EDMWeighting()), VarianceExploding(), "edm"),
    "x0": (
        Objective(times=Stratified(LogNormal()), weighting=SoftMinSNR(), error=Huber(), space="x0"),
        ZeroTerminalSNR(ScaledLinearBeta()),
        "v",
    ),
    "uniform": (Objective(times=Uniform()), SigmoidBeta(), "x0"),
}


class OnDevice:
    """Random numbers that are there already."""

    def normal(self, name, shape, *, dtype=torch.float32, device=None):
        return torch.empty(shape, dtype=dtype, device=device)

    uniform = normal

    def integers(self, name, high, shape, *, low=0, device=None):
        return torch.empty(shape, dtype=torch.int64, device=device)

    def fold(self, name):
        return self


class Copies(TorchDispatchMode):
    """The operations that have a tensor with values on one side and one of the device on the other."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.seen.append(str(function))
        return result


def step(objective, schedule, prediction):
    def net(x, timestep, cond):
        return x * timestep[:, None, None, None] * weight

    weight = torch.ones(1, device="meta", requires_grad=True)
    x0 = torch.empty(4, 3, 8, 8, device="meta")
    draw = objective.draw(schedule, x0, rng=OnDevice())
    denoised = Denoiser(net, schedule, prediction)(draw.x_t, draw.t)
    terms = objective.score(denoised, draw, where=torch.empty(4, 1, 8, 8, device="meta"))
    terms.mean().backward()
    assert weight.grad.device.type == "meta"


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_to_it(case):
    step(*CASES[case])  # a table goes to the device once
    with Copies() as copies:
        step(*CASES[case])
    assert copies.seen == []


def test_the_watch_sees_what_it_is_for():
    device = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool((device > 0).any())
    with Copies() as copies:
        torch.zeros(3).to("meta")
        step(Objective(), LinearBeta(size=7), "v")  # the first time, the table is copied
        torch.zeros(3).to("cpu")
    assert copies.seen == ["aten._to_copy.default"] * 2
