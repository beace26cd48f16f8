"""Parameter groups: every parameter once, later rules win field by field, a rule for nothing is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gendiff._groups import ParamGroup, group
from gendiff._patterns import match

NAMES = ["unet.conv.weight", "unet.conv.bias", "unet.norm.weight", "unet.norm.bias", "text.embed.weight"]


def named() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(2)) for name in NAMES}


def settings(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (one["lr"], one["weight_decay"]) for one in groups for name in one["names"]}


def test_later_rules_win_field_by_field() -> None:
    rules = [
        ParamGroup("**.bias", weight_decay=0.0),
        ParamGroup("unet.norm.*", learning_rate=3e-4, weight_decay=0.5),
        ParamGroup("**.bias", learning_rate=1e-5),
    ]
    assert settings(group(named(), rules, 1e-3, 0.01)) == {
        "unet.conv.weight": (1e-3, 0.01),
        "unet.conv.bias": (1e-5, 0.0),
        "unet.norm.weight": (3e-4, 0.5),
        "unet.norm.bias": (1e-5, 0.5),
        "text.embed.weight": (1e-3, 0.01),
    }


rule = st.tuples(
    st.sampled_from(["**", "unet.**", "**.bias", "*.norm.*", "text.** | **.conv.weight"]),
    st.sampled_from([0, 1e-3, 1e-4]),
    st.sampled_from([None, 0.0, 0.1]),
)


@given(st.lists(rule, max_size=5))
def test_every_parameter_is_in_one_group_with_what_the_last_rule_says(given_rules: list[Any]) -> None:
    rules = [ParamGroup(*values) for values in given_rules]
    parameters = named()
    groups = group(parameters, rules, 1e-2, 0.3)
    members = [name for one in groups for name in one["names"]]
    assert sorted(members) == sorted(NAMES)
    assert [id(p) for one in groups for p in one["params"]] == [id(parameters[name]) for name in members]
    for name, (rate, decay) in settings(groups).items():
        rates = [r.learning_rate for r in rules if match(r.pattern, name)]
        decays = [r.weight_decay for r in rules if match(r.pattern, name) and r.weight_decay is not None]
        assert rate == [1e-2, *rates][-1]
        assert decay == [0.3, *decays][-1]
    assert len({(one["lr"], one["weight_decay"]) for one in groups}) == len(groups)
    firsts = [NAMES.index(one["names"][0]) for one in groups]
    assert firsts == sorted(firsts)
    assert all(one["names"] == sorted(one["names"], key=NAMES.index) for one in groups)
    assert all(type(one["lr"]) is float and type(one["weight_decay"]) is float for one in groups)


def test_tied_parameters_are_there_once_and_obey_a_rule_for_either_name() -> None:
    parameters = named()
    parameters["text.head.weight"] = parameters["text.embed.weight"]
    groups = group(parameters, [ParamGroup("text.head.*", learning_rate=5e-5)], 1e-3, 0.0)
    assert settings(groups)["text.embed.weight"] == (5e-5, 0.0)
    assert sum(len(one["params"]) for one in groups) == len(NAMES)


def test_a_torch_optimizer_takes_them() -> None:
    groups = group(named(), [ParamGroup("text.**", learning_rate=0)], 1e-3, 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=1.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-3, 0.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ParamGroup("a..b", learning_rate=1.0), "empty segment"),
        (lambda: ParamGroup("a"), "sets nothing"),
        (lambda: ParamGroup("a", learning_rate=-1.0), "learning_rate of .*'a'.* >= 0"),
        (lambda: ParamGroup("a", weight_decay=float("nan")), "weight_decay"),
        (lambda: ParamGroup("a", learning_rate=float("inf")), "learning_rate"),
        (lambda: group(named(), [], -1.0), "learning_rate"),
        (lambda: group({}, []), "requires_grad"),
        (lambda: group(named(), [ParamGroup("*.bias", weight_decay=0.0)]), r"'\*\*\.bias' would match 2"),
        (lambda: group(named(), [ParamGroup("unet.nrom.weight", weight_decay=0.0)]), r"'unet\.norm\.weight'"),
        (lambda: group(named(), [ParamGroup("vae.**", weight_decay=0.0)]), "none of 5 trainable parameters"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
