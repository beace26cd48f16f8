"""Meters against numpy, and that reading them begins anew in place."""

import numpy as np
import pytest
import torch

from gendiff.training.meters import EDGES, Meters


def seen(generator: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    return {
        "loss": torch.rand(rows, generator=generator),
        "weight": torch.rand(rows, generator=generator).round(),
        "log_snr": 30 * torch.rand(rows, generator=generator, dtype=torch.float64) - 15,
        "metrics.accuracy": torch.rand(rows, generator=generator),
    }


def test_means_and_levels_are_those_of_numpy() -> None:
    generator, meters = torch.Generator().manual_seed(0), Meters("cpu")
    batches = [seen(generator, 8) for _ in range(5)]
    for batch in batches:
        meters.add(batch, rows=6)  # two are padding
        meters.add_update(torch.tensor(2.0), torch.tensor(True))
    meters.add_update(torch.tensor(float("inf")), torch.tensor(False))
    row = meters.read(samples=30, updates=5)
    every = {name: np.concatenate([b[name][:6].double().numpy() for b in batches]) for name in batches[0]}
    assert row["loss"] == pytest.approx((every["loss"] * every["weight"]).sum() / 30, rel=1e-12)
    assert row["metrics"]["accuracy"] == pytest.approx(every["metrics.accuracy"].mean(), rel=1e-12)
    assert row["grad_norm"] == 2.0
    bins = np.digitize(every["log_snr"], EDGES)
    assert row["levels"]["count"] == np.bincount(bins, minlength=22).tolist()
    expected = np.bincount(bins, weights=every["loss"], minlength=22)
    assert row["levels"]["loss"] == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_row_of_weight_zero_counts_for_nothing_even_with_a_nan() -> None:
    meters = Meters("cpu")
    meters.add({"loss": torch.tensor([1.0, float("nan")]), "weight": torch.tensor([1.0, 0.0])}, rows=2)
    assert meters.read(samples=2, updates=0)["loss"] == 0.5


def test_reading_begins_anew_in_the_same_memory() -> None:
    meters = Meters("cpu")
    meters.add(seen(torch.Generator().manual_seed(0), 4), rows=4)
    places = {name: value.data_ptr() for name, value in meters.sums.items()}
    meters.read(samples=4, updates=1)
    assert all(not value.any() for value in meters.sums.values())
    meters.add(seen(torch.Generator().manual_seed(1), 4), rows=4)
    assert {name: value.data_ptr() for name, value in meters.sums.items()} == places


def test_a_state_goes_on() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = seen(generator, 4), seen(generator, 4)
    whole, cut, rest = Meters("cpu"), Meters("cpu"), Meters("cpu")
    for batch in (first, second):
        whole.add(batch, rows=4)
    cut.add(first, rows=4)
    rest.load_state_dict({name: value.clone() for name, value in cut.state_dict().items()})
    rest.add(second, rows=4)
    assert rest.read(8, 1) == whole.read(8, 1)


def test_processes_are_summed_but_for_the_norm() -> None:
    meters = Meters("cpu")
    meters.add({"loss": torch.ones(2), "weight": torch.ones(2)}, rows=2)
    meters.add_update(torch.tensor(3.0), torch.tensor(True))
    row = meters.read(samples=4, updates=1, reduce=lambda value: 2 * value)
    assert (row["loss"], row["grad_norm"]) == (1.0, 3.0)
    meters.add({"loss": torch.ones(2), "weight": torch.ones(2)}, rows=2)
    meters.gather(lambda value: 2 * value, keep=False)
    assert meters.read(4, 1, None)["loss"] == 0.0


def test_a_process_without_real_rows_has_every_sum() -> None:
    with_rows, without = Meters("cpu"), Meters("cpu")
    batch = seen(torch.Generator().manual_seed(0), 4)
    with_rows.add(batch, rows=4)
    without.add(batch, rows=0)
    assert set(with_rows.sums) == set(without.sums)
    assert all(not value.any() for value in without.sums.values())
