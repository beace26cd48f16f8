"""Windows: how micro-batches become updates, and what each is divided by."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gendiff.data.loader import Loader, Micro
from gendiff.training.windows import POLICIES, Policy, count, windows

policies = st.sampled_from(POLICIES)


def stream(samples: int, batch: int, epochs: int, **options: Any) -> list[Micro]:
    loader = Loader([{"x": float(i)} for i in range(samples)], batch, seed=3, **options)
    return list(loader.stream(epochs=epochs))


def test_what_each_policy_does_with_five_micro_batches_in_windows_of_two() -> None:
    micros = stream(samples=9, batch=2, epochs=2)
    places = {
        policy: [[(m.epoch, m.index) for m in w.micros] for w in windows(micros, 2, policy)]
        for policy in POLICIES
    }
    both = [[(e, 0), (e, 1)] for e in (0, 1)], [[(e, 2), (e, 3)] for e in (0, 1)]
    assert places["carry"] == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(0, 4), (1, 0)],
        [(1, 1), (1, 2)],
        [(1, 3), (1, 4)],
    ]
    assert places["short"] == [both[0][0], both[1][0], [(0, 4)], both[0][1], both[1][1], [(1, 4)]]
    assert places["drop"] == [both[0][0], both[1][0], both[0][1], both[1][1]]


def test_the_divisor_is_the_number_of_real_samples() -> None:
    micros = stream(samples=9, batch=2, epochs=2)
    assert [w.samples for w in windows(micros, 2, "carry")] == [4, 4, 3, 4, 3]
    assert [w.samples for w in windows(micros, 2, "short")] == [4, 4, 1, 4, 4, 1]
    assert [w.samples for w in windows(stream(3, 8, 1), 4)] == [3]  # fewer samples than a batch


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), policies, st.integers(1, 3))
def test_windows_are_as_many_as_was_counted(
    samples: int, batch: int, length: int, policy: Policy, epochs: int
) -> None:
    micros = stream(samples, batch, epochs)
    made = list(windows(micros, length, policy))
    assert len(made) == count(len(micros) // epochs, length, policy, epochs)
    if policy != "drop":
        assert [m for w in made for m in w.micros] == micros
        assert sum(w.samples for w in made) == samples * epochs
    assert all(len(w.micros) == length for w in made[:-1]) or policy == "short"


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 5), policies, st.data())
def test_a_run_that_goes_on_at_the_end_of_a_window_makes_the_same_windows(
    samples: int, batch: int, length: int, policy: Policy, data: st.DataObject
) -> None:
    loader = Loader([{"x": float(i)} for i in range(samples)], batch, seed=3)
    whole = list(windows(loader.stream(epochs=3), length, policy))
    if not whole:
        return
    cut = data.draw(st.integers(0, len(whole) - 1))
    rest = list(windows(loader.stream(*whole[cut].end, epochs=3), length, policy))
    ids = [[m.batch["id"].tolist() for m in w.micros] for w in whole[cut + 1 :]]
    assert [[m.batch["id"].tolist() for m in w.micros] for w in rest] == ids
    assert [w.samples for w in rest] == [w.samples for w in whole[cut + 1 :]]


def test_the_same_samples_are_in_a_window_however_it_is_split() -> None:
    """(1 process, 4 micro-batches), (2, 2), (2 processes with half the batch, 4)."""

    def seen(ranks: int, batch: int, length: int, samples: int, policy: Policy) -> list[Any]:
        found: list[tuple[set[int], int]] = []
        for rank in range(ranks):
            micros = stream(samples, batch, 2, ranks=ranks, rank=rank)
            for number, window in enumerate(windows(micros, length, policy)):
                ids = {int(i) for m in window.micros for i in m.batch["id"][: m.rows]}
                if rank == 0:
                    found.append((ids, window.samples))
                else:
                    assert found[number][1] == window.samples
                    found[number] = found[number][0] | ids, window.samples
        return found

    # Where a window goes on into the next epoch, an epoch has to be whole micro-batches on every side.
    for samples, policy in ((24, "carry"), (21, "short")):
        one, two, half = (seen(*split, samples, policy) for split in ((1, 2, 4), (2, 2, 2), (2, 1, 4)))
        assert one == two == half


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="at least one micro-batch, got 0"):
        list(windows([], 0))
    with pytest.raises(ValueError, match="did you mean 'carry'"):
        count(1, 1, "cary", 1)


def test_padding_weighs_nothing() -> None:
    last = stream(samples=3, batch=2, epochs=1)[-1]
    assert (last.rows, last.total) == (1, 1)
    assert torch.equal(last.batch["weight"], torch.tensor([1.0, 0.0]))
