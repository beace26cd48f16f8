"""Conditions are read-only tables of rows: what they hold, refuse, join and survive."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from gendiff.condition import Condition

LABEL, TEXT = torch.tensor([3, 7, 5]), torch.arange(24.0).reshape(3, 4, 2)


def cond():
    return Condition(label=LABEL, text=TEXT)


def test_a_mapping_that_cannot_be_written_to() -> None:
    given = {"label": LABEL}
    made = Condition(given, text=TEXT)
    given["label"] = TEXT
    assert dict(made) == {"label": LABEL, "text": TEXT}
    assert (len(made), made.rows, list(made)) == (2, 3, ["label", "text"])
    assert "label" in made
    assert made.get("size") is None
    with pytest.raises(TypeError, match="item assignment"):
        made["label"] = TEXT
    with pytest.raises(KeyError, match=r"unknown condition 'lable'; did you mean 'label'"):
        made["lable"]
    assert repr(made) == "Condition(label=[3] torch.int64, text=[3, 4, 2] torch.float32)"


def test_the_empty_condition_fits_any_batch() -> None:
    assert Condition().rows is None
    assert not Condition.of(None)
    assert Condition.of({"label": LABEL})["label"] is LABEL
    made = cond()
    assert Condition.of(made) is made


def test_rows_must_agree_and_be_tensors() -> None:
    with pytest.raises(ValueError, match=r"one row per sample, got \{'label': 3, 'text': 2\}"):
        Condition(label=LABEL, text=TEXT[:2])
    with pytest.raises(
        TypeError, match=r"condition 'label' must be a tensor with one row per sample, got a scalar"
    ):
        Condition(label=torch.tensor(3))
    with pytest.raises(TypeError, match="label"):
        Condition({"label": [3, 7]})


def test_equality_is_by_content() -> None:
    assert cond() == Condition(text=TEXT.clone(), label=LABEL.clone())
    assert cond() != cond().replace(label=LABEL + 1)
    assert cond() != Condition(label=LABEL)
    assert cond() != Condition(label=LABEL, text=TEXT[..., :1])
    assert cond() != {"label": LABEL}
    with pytest.raises(TypeError, match="unhashable"):
        hash(cond())


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, None), [1, 2]),
        (slice(0, 0), []),
        ([2, 0], [2, 0]),
        ((2, 0), [2, 0]),
        (range(2), [0, 1]),
        (torch.tensor([2, 2]), [2, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
    ids=str,
)
def test_rows_are_selected_by_any_index(index, rows) -> None:
    """A tuple too is a list of rows, not an index of several dimensions."""
    selected = cond().select(index)
    assert selected["label"].tolist() == [LABEL[row].item() for row in rows]
    assert selected["text"].shape == (len(rows), 4, 2)
    assert selected.rows == len(rows)


def test_replace_and_to() -> None:
    made = cond()
    assert made.replace(label=LABEL + 1)["label"].tolist() == [4, 8, 6]
    assert made["label"].tolist() == [3, 7, 5]
    assert list(made.replace(size=LABEL)) == ["label", "text", "size"]
    with pytest.raises(ValueError, match="one row per sample"):
        made.replace(label=LABEL[:1])
    moved = made.to("meta")
    assert {value.device.type for value in moved.values()} == {"meta"}


def test_concat_undoes_select() -> None:
    made = cond()
    assert Condition.concat([made.select(slice(1)), made.select(slice(1, 3))]) == made
    assert Condition.concat([made, {"text": TEXT, "label": LABEL}]).rows == 6
    assert not Condition.concat([Condition(), Condition()])


def test_collate_is_what_a_loader_does() -> None:
    samples = [{"label": LABEL[i], "text": TEXT[i]} for i in range(3)]
    assert Condition.collate(samples) == cond()
    (batch,) = DataLoader(samples, batch_size=3, collate_fn=Condition.collate)
    assert batch == cond()


def test_parts_that_do_not_join_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no condition given to join"):
        Condition.concat([])
    with pytest.raises(ValueError, match=r"same names, got \['label', 'text'\] and \['label'\].*codec.null"):
        Condition.concat([cond(), Condition(label=LABEL)])
    with pytest.raises(ValueError, match=r"'text' has rows of shapes \[\(3, 2\), \(4, 2\)\]; pad them.*mask"):
        Condition.concat([Condition(text=TEXT), Condition(text=TEXT[:, :3])])
    with pytest.raises(ValueError, match=r"'text' has rows of shapes \[\(3, 2\), \(4, 2\)\]"):
        Condition.collate([{"text": TEXT[0]}, {"text": TEXT[0, :3]}])
    with pytest.raises(TypeError, match="label"):
        Condition.collate([{"label": 3}, {"label": 7}])


def test_copies_and_pickles() -> None:
    """As workers of a DataLoader send it."""
    made = cond()
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin == made
        assert twin.rows == 3
    assert copy.deepcopy(made)["label"] is not LABEL
