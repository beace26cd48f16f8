"""Collation: what goes in comes out in rows, and what does not fit is named with its key and its samples."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gendiff.data.collate import collate


def test_every_kind_of_value() -> None:
    def sample(n: int) -> dict[str, Any]:
        return {
            "id": f"s{n}",
            "image": torch.full((3, 2, 2), n / 10),
            "half": torch.tensor(n, dtype=torch.float16),
            "latent": np.arange(4, dtype=np.float64)[::-1] + n,
            "swapped": np.array([n, 256], dtype=">i2"),
            "frozen": np.frombuffer(bytes([n, 1]), dtype=np.uint8),
            "label": n,
            "score": n / 4,
            "flag": n == 1,
            "numpy": {"int": np.int32(n), "float": np.float64(n / 4), "bool": np.bool_(n == 1)},
            "caption": f"a {n}",
            "size": {"height": n, "crop": {"top": torch.tensor([n])}},
        }

    batch = collate([sample(n) for n in range(3)])
    assert list(batch) == [*sample(0), "weight"]
    assert batch["id"] == ["s0", "s1", "s2"]
    assert batch["caption"] == ["a 0", "a 1", "a 2"]
    arange = torch.arange(3)
    numbers = {"int": arange, "float": arange / 4, "bool": arange == 1}
    expected = {
        "image": (arange / 10)[:, None, None, None].expand(3, 3, 2, 2),
        "half": arange.half(),
        "latent": torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64) + arange[:, None],
        "swapped": torch.stack([arange, torch.full((3,), 256)], 1).short(),
        "frozen": torch.stack([arange, torch.ones(3)], 1).byte(),
        "label": arange,
        "score": arange / 4,
        "flag": arange == 1,
        "weight": torch.ones(3),
    }
    for got, wanted in [(batch, expected), (batch["numpy"], numbers), (batch["size"], {"height": arange})]:
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=0)  # dtype and shape as well
    assert batch["size"]["crop"]["top"].tolist() == [[0], [1], [2]]


def test_reserved_keys() -> None:
    batch = collate(
        [{"id": 2**40}, {"id": np.int64(-3), "weight": 2}, {"id": 0, "weight": torch.tensor(0.5)}]
    )
    assert batch["id"].tolist() == [2**40, -3, 0]
    assert batch["weight"].tolist() == [1, 2, 0.5]
    assert (batch["id"].dtype, batch["weight"].dtype) == (torch.int64, torch.float32)
    ids = collate([{"id": torch.tensor(7, dtype=torch.int32)}])["id"]
    assert (ids.tolist(), ids.dtype) == ([7], torch.int64)
    assert list(collate([{"a": {"weight": 3}}])) == ["a", "weight"]


def test_values_are_copies() -> None:
    image = torch.zeros(2)
    collate([{"image": image}])["image"].add_(1)
    assert image.tolist() == [0, 0]


A, B = {"id": "a.png"}, {"id": "b.png"}


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (
            {"image": torch.zeros(3, 8, 8)},
            {"image": torch.zeros(3, 8, 4)},
            r"'image' is float32 of shape \[3, 8, 8\] in sample 'a.png' but float32 of shape \[3, 8, 4\] in "
            r"sample 'b.png' .*resize.*Buckets",
        ),
        (
            {"x": torch.zeros(2)},
            {"x": torch.zeros(2).half()},
            r"float32 of shape \[2\] .* float16 of shape \[2\]",
        ),
        ({"x": 1}, {"x": 1.0}, "'x' is int in .* float in"),
        ({"x": "1"}, {"x": 1}, "'x' is a string in .* int in"),
        ({"x": 1}, {"x": {"y": 1}}, "'x' is int in .* a mapping in"),
        ({"x": {"y": {"z": 1}}}, {"x": {"y": {"z": "s"}}}, r"'x\.y\.z' is int"),
        ({"x": 1}, {}, "sample 'a.png' has 'x' but sample 'b.png' of the same batch has not"),
        ({}, {"x": 1}, "sample 'b.png' has 'x' but sample 'a.png' of the same batch has not"),
        ({"x": {"y": 1}}, {"x": {}}, r"sample 'a.png' has 'x\.y'"),
        ({"weight": float("nan")}, {}, "'weight' of sample 'a.png' is nan"),
    ],
)
def test_what_does_not_fit_is_named(one: Mapping[str, Any], two: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        collate([{**A, **one}, {**B, **two}])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"x": Image.new("RGB", (4, 4))}, r"'x' of sample 'a.png' is PIL\.Image\.Image; .*convert\('RGB'\)"),
        ({"x": None}, "is NoneType"),
        ({"x": [1, 2]}, "is list; accepted are tensors"),
        ({"x": {"y": b"raw"}}, r"'x\.y' .* is bytes"),
        ({"x": np.array(["a"])}, "a NumPy array of <U1"),
        ({"x": np.array([None])}, "a NumPy array of object"),
        ({1: 2}, "has the key 1"),
        ({"id": 0.5}, "'id' is reserved"),
        ({"id": True}, "'id' is reserved"),
        ({"id": torch.zeros(2).long()}, "'id' is reserved"),
        ({"weight": "heavy"}, "'weight' of sample 'a.png' is 'heavy'"),
        ({"weight": torch.ones(2)}, "'weight' of sample 'a.png' is tensor"),
    ],
)
def test_what_is_no_value_is_named(value: Mapping[Any, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        collate([{**A, **value}])


def test_the_advice_for_pil_images_is_sound() -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    pixels = torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    batch: dict[str, Tensor] = collate([{"image": pixels}])
    assert batch["image"].shape == (1, 3, 2, 4)
    assert batch["image"][0, 1, 0, 2].item() == pytest.approx(7 / 255)


def test_no_sample_and_samples_without_id() -> None:
    with pytest.raises(ValueError, match="no sample"):
        collate([])
    with pytest.raises(ValueError, match="'number 0' but float in sample 'number 2'"):
        collate([{"x": 1}, {"x": 2}, {"x": 1.5}])
