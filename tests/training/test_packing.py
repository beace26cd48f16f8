"""Every bit of a state comes back, and what cannot be held is refused by its path."""

import math
import os
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gendiff.training.checkpoint import read, write
from gendiff.training.packing import DEPTH, DTYPES
from tests.training.bits import same


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of every dtype, with any bits in it; empty, of no dimension, transposed, and a part of another."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    numbers = [*shape, 2, dtype.itemsize] if dtype != torch.bool else [*shape, 2]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, numbers, dtype=torch.uint8, generator=generator)
    made = raw.view(dtype).reshape(*shape, 2)[..., draw(st.integers(0, 1))]
    return made.movedim(0, -1) if draw(st.booleans()) and made.ndim > 1 else made


keys = st.one_of(
    st.sampled_from(["a", "a.b", "b", "", "$tensor", "$", "$$a", "__metadata__"]), st.text(max_size=3)
)
leaves = st.one_of(
    tensors(), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.integers(-(2**200), 2**200), st.sampled_from([-0.0, math.nan, -math.nan, math.inf, 5e-324, 2**63]),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
states = st.dictionaries(
    st.sampled_from(["weights", "update", "state", "manifest", "a-b_9"]), trees, max_size=4
)


@given(states)
def test_every_bit_comes_back(state: dict[str, Any]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # most of the time, and none of the bits
        assert same(state, read(write(Path(root), 7, state)))


def test_what_is_shared_strided_lazy_or_a_parameter_is_saved_by_its_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": {"whole": base, "row": base[1], "column": base[:, 1], "turned": base.t(), "same": base},
        "b": [base, torch.ones(1).expand(5), torch.complex(base, base).conj(), torch.empty(0, 3)],
        "c": OrderedDict(
            p=nn.Parameter(base[0]), images=torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last)
        ),
    }
    again = read(write(tmp_path, 0, state))
    again["a"]["whole"].zero_()
    assert bool(again["a"]["row"].any())  # nothing is shared afterwards
    assert same({**state, "a": {**state["a"], "whole": base * 0}}, again)
    assert not again["c"]["p"].requires_grad
    assert again["b"][2].is_conj() is False


def test_paths_that_make_the_same_name_stay_apart(tmp_path: Path) -> None:
    one, *more = torch.arange(8.0).split(1)
    names = ["a.b", "__metadata__", "é", "è", "", "tensor", "x" * 300]
    state = {"s": {"a": {"b": one}, **dict(zip(names, more, strict=True))}, "t": one, "u": [[one]]}
    assert same(read(write(tmp_path, 1, state)), state)


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    state = {"a": torch.ones(5000)}
    path = write(tmp_path, 1, state)
    again = read(path)
    with (path / "a.safetensors").open("r+b") as file:
        file.write(bytes(20000))
    assert same(again, state)


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            {"optimizer": {"net.weight": {"step": (i for i in [])}}},
            r"^optimizer\.net\.weight\.step is a generator",
        ),
        ({"a": [0, {"b": (1, 2)}]}, r"^a\.1\.b is a tuple; .* make it a list"),
        ({"a": {"b": {3: 1}}}, r"^a\.b has the key 3 of type int"),
        ({"a": torch.ones(1).numpy()}, "^a is a ndarray"),
        ({"a": torch.ones(1).numpy()[0]}, "^a is a float32"),
        ({"a": b"bytes"}, "^a is a bytes"),
        ({"a": 1j}, "^a is a complex"),
        ({"a": torch.float32}, "^a is a dtype"),
        (
            {"a": torch.ones(1, dtype=torch.complex128)},
            r"^a is a tensor of torch\.complex128; accepted: torch\.f",
        ),
        ({"a": torch.ones(1).to_sparse()}, "^a is a Tensor .*sparse"),
        ({"a": torch.ones(1, device="meta")}, "^a is a Tensor .meta"),
        ({"a": {"b": "\ud800"}}, r"^a\.b has the text .* not valid Unicode"),
        ({"a": {"\udc00": 1}}, "^a has the text .* not valid Unicode"),
    ],
)
def test_what_it_cannot_hold_is_a_type_error_by_its_path(tmp_path: Path, state: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        write(tmp_path / "run", 1, {"fine": torch.ones(1), **state})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "state", "says"),
    [
        (1, {"../a": 1}, r"'\.\./a' is no section"),
        (1, {"": 1}, "is no section"),
        (1, {"a": 1, "A": 1}, "two sections are called 'A'"),
        (1, {"a": nested(DEPTH)}, "nested deeper than 64 levels"),
        (-1, {}, "step of a checkpoint"),
        (True, {}, "step of a checkpoint"),
        (10**18, {}, "step of a checkpoint"),
    ],
)
def test_what_the_format_cannot_hold_is_a_value_error(
    tmp_path: Path, step: int, state: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        write(tmp_path / "run", step, state)
    assert not (tmp_path / "run").exists()


def test_the_deepest_state_and_a_long_number_are_read(tmp_path: Path) -> None:
    state = {"a": nested(DEPTH - 1), "b": [-(2**20000)]}
    assert same(read(write(tmp_path, 10**18 - 1, state)), state)
