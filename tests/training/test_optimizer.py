"""Optimizers of other people: passed through, their state by name, the weights that they evaluate with."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gendiff.training import Callback, Trainer
from gendiff.training.optimizer import evaluated, load_named_state, made, named_state
from tests.training.toy import Images, trainer


def schedule_free(groups: Any) -> Any:
    return pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=1e-2, warmup_steps=2)


def prodigy(groups: Any) -> Any:
    return pytest.importorskip("prodigyopt").Prodigy(groups, lr=1.0)


def adafactor(groups: Any) -> Any:
    return torch.optim.Adafactor(groups)


FACTORIES: dict[str, Callable[[Any], Any]] = {
    "schedule-free": schedule_free,
    "Prodigy": prodigy,
    "Adafactor": adafactor,
    "NAdam": lambda groups: torch.optim.NAdam(groups),
}


def run(folder: Path, kind: str, **options: Any) -> Trainer:
    return trainer(folder, optimizer=FACTORIES[kind], param_groups=[], save_steps=2, max_steps=6, **options)


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_run_with_it_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    whole = run(tmp_path / "whole", kind)
    whole.train()
    assert "decided on the host" in repr(whole)
    cut = run(tmp_path / "cut", kind, callbacks=[Stop()])
    cut.train()
    assert cut.step == 4
    rest = run(tmp_path / "cut", kind)
    rest.train()
    for a, b in zip(whole.parameters.values(), rest.parameters.values(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


class Stop(Callback):
    every = 4

    def on_step_end(self, trainer: Trainer) -> None:
        trainer.stop("as asked")


def test_schedule_free_evaluates_with_its_average_and_goes_on_exactly(tmp_path: Path) -> None:
    made_ = run(tmp_path, "schedule-free", eval_dataset=Images(4), ema=None)
    made_.train()
    trained = {name: p.detach().clone() for name, p in made_.parameters.items()}
    optimizer: Any = made_.update.optimizer
    with evaluated(optimizer, made_.parameters):
        averaged = {name: p.detach().clone() for name, p in made_.parameters.items()}
    assert all(torch.equal(trained[name], p) for name, p in made_.parameters.items())
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)
    assert optimizer.param_groups[0]["train_mode"]
    made_.save_pretrained(tmp_path / "final")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "final" / "model.safetensors")
    for name, tensor in averaged.items():
        assert torch.equal(saved[name.removeprefix("model.")], tensor)


def test_a_state_does_not_depend_on_the_order_of_the_names() -> None:
    weights = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.Adam(list(weights.values()), lr=0.1)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = copy.deepcopy(named_state(optimizer, weights))
    assert set(state["parameters"]) == {"a", "b"}
    assert state["parameters"]["b"]["exp_avg"].shape == (3,)
    other = torch.optim.Adam(list(weights.values()), lr=0.3)
    load_named_state(other, weights, state)
    assert torch.equal(other.state[weights["b"]]["exp_avg"], optimizer.state[weights["b"]]["exp_avg"])
    assert other.param_groups[0]["lr"] == 0.3  # a rate is the run's, not the state's
    assert other.param_groups[0]["betas"] == (0.9, 0.999)


def test_what_is_wrong_is_named() -> None:
    weights = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(3))}
    groups = [{"params": [weight], "names": [name]} for name, weight in weights.items()]
    state = named_state(made(torch.optim.Adam, groups), weights)
    with pytest.raises(ValueError, match="the state is of Adam and the optimizer is SGD"):
        load_named_state(torch.optim.SGD(list(weights.values()), lr=1.0), weights, state)
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters and the state of \[1, 1\]"):
        load_named_state(torch.optim.Adam(list(weights.values())), weights, state)
    with pytest.raises(TypeError, match="optimizer is a function of parameter groups, got SGD"):
        made(torch.optim.SGD(list(weights.values()), lr=1.0), groups)
    with pytest.raises(TypeError, match="returns a torch Optimizer, got int"):
        made(lambda given: 3, groups)
    with pytest.raises(ValueError, match="has 1 groups of 1 parameters and was given 2 of 2"):
        made(lambda given: torch.optim.SGD(given[0]["params"], lr=1.0), groups)
