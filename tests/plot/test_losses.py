"""Losses: the lines are the means that a plain loop finds, from samples and from logs alike."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gendiff.plot import loss, loss_by_level
from gendiff.plot.figure import Picture

Row = dict[str, Any]


def samples(count: int = 4000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    log_snr = rng.normal(0, 5, count)
    log_snr[:4] = [-10.0, 10.0, math.inf, -3.0]  # on edges, which belong to the level above, and beyond them
    return log_snr, rng.gamma(2.0, 1.0, count) * np.linspace(2, 1, count)


def by_level(log_snr: NDArray, losses: NDArray) -> dict[float, list[float]]:
    """The losses of each level by its centre, from the words of the documentation."""
    found: dict[float, list[float]] = {}
    for level, value in zip(log_snr.tolist(), losses.tolist(), strict=True):
        centre = -10.5 if level < -10 else 10.5 if level >= 10 else math.floor(level) + 0.5
        found.setdefault(centre, []).append(value)
    return {centre: values for centre, values in sorted(found.items()) if len(values) >= 20}


def logged(log_snr: NDArray, losses: NDArray, rows: int = 20, every: int = 5) -> list[Row]:
    """A log of the samples, in rows of equal numbers of them, with levels counted by a plain loop."""
    made = []
    for i, (levels, values) in enumerate(
        zip(np.split(log_snr, rows), np.split(losses, rows), strict=True), start=1
    ):
        sums, count = [0.0] * 22, [0] * 22
        for level, value in zip(levels, values, strict=True):
            place = 0 if level < -10 else 21 if level >= 10 else math.floor(level) + 11
            sums[place] += value
            count[place] += 1
        made.append({"step": every * i, "loss": values.mean(), "levels": {"loss": sums, "count": count}})
    return made


def lines(picture: Picture, axes: int = 0) -> list[NDArray[np.float64]]:
    return [line.get_xydata() for line in picture.axes[axes].lines]


def legend(picture: Picture) -> list[str]:
    return [text.get_text() for one in picture.legends for text in one.get_texts()]


def test_from_samples_the_lines_are_means_and_the_bands_standard_errors() -> None:
    log_snr, losses = samples()
    picture = loss_by_level((torch.from_numpy(log_snr), torch.from_numpy(losses)))
    assert len(lines(picture)) == 2
    for part, line, band in zip(
        (slice(0, 400), slice(3000, 4000)), lines(picture), picture.axes[0].collections, strict=True
    ):
        expected = by_level(log_snr[part], losses[part])
        assert line[:, 0].tolist() == list(expected)
        np.testing.assert_allclose(line[:, 1], [np.mean(values) for values in expected.values()])
        (path,) = band.get_paths()
        for centre, values in expected.items():
            ends = [y for x, y in path.vertices if x == centre]
            error = np.std(values, ddof=1) / math.sqrt(len(values))
            np.testing.assert_allclose(max(ends) - min(ends), 2 * error, rtol=1e-9)
    counted = {round(b.get_x() + b.get_width() / 2, 6): b.get_height() for b in picture.axes[1].patches}
    assert counted == {centre: len(values) for centre, values in by_level(log_snr, losses).items()}
    assert "first tenth (samples 1–400)" in legend(picture)


def test_a_log_gives_the_lines_of_its_samples() -> None:
    log_snr, losses = samples()
    from_samples = loss_by_level((log_snr, losses))
    from_log = loss_by_level(logged(log_snr, losses))
    for one, other in zip(lines(from_samples), lines(from_log), strict=True):
        np.testing.assert_allclose(one, other)
    assert not from_log.axes[0].collections
    assert legend(from_log)[:2] == ["first tenth (steps 1–10)", "last quarter (steps 76–100)"]


def test_phases_of_the_same_rows_are_one_line_and_a_thin_one_says_so() -> None:
    log_snr, losses = samples()
    once = loss_by_level(logged(log_snr, losses, rows=1))
    assert legend(once)[0] == "first tenth and last quarter (steps 1–5)"
    np.testing.assert_allclose(lines(once)[0][:, 1], [np.mean(v) for v in by_level(log_snr, losses).values()])
    thin = loss_by_level((log_snr, losses), {"start": (0.0, 0.001), "all": (0, 1)})
    assert legend(thin)[0] == "start (samples 1–4): too few samples"


def test_runs_are_read_from_their_folder(tmp_path: Path) -> None:
    rows = logged(*samples())
    other: list[Row] = [{"step": 7, "eval": {"loss": 1.0}}, *rows]
    text = "".join(json.dumps(row) + "\n" for row in other)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 105, "lo', encoding="utf-8")
    for draw in (loss, loss_by_level):
        for source in (tmp_path, str(tmp_path), tmp_path / "log.jsonl"):
            for one, same in zip(lines(draw(source)), lines(draw(rows)), strict=True):
                np.testing.assert_array_equal(one, same)


def test_the_loss_is_drawn_as_logged_and_as_the_mean_of_a_window() -> None:
    rng = np.random.default_rng(1)
    steps = np.cumsum(rng.integers(1, 20, 80)).tolist()
    values = rng.gamma(2.0, 1.0, 80).tolist()
    values[30], values[31] = math.nan, 1e20  # which must not take the digits of what follows
    rows = [
        {"step": s, "loss": v, "learning_rate": [s * 1e-6, 1e-5]} for s, v in zip(steps, values, strict=True)
    ]
    rows[40]["learning_rate"] = None
    picture = loss(rows, smooth=0.1)
    raw, smooth, bad = lines(picture)
    np.testing.assert_array_equal(raw, np.stack([steps, values], 1))
    half = 0.05 * (steps[-1] - steps[0])
    for at, mean in smooth:
        near = [v for s, v in zip(steps, values, strict=True) if abs(s - at) <= half and math.isfinite(v)]
        assert mean == pytest.approx(np.mean(near), rel=1e-12)
    assert bad[:, 0].tolist() == [steps[30]]
    rates = lines(picture, 1)
    assert [math.isnan(y) for y in rates[0][:, 1]].index(True) == 40
    np.testing.assert_allclose(np.delete(rates[0], 40, 0)[:, 1], 1e-6 * np.delete(steps, 40))
    single = loss([{"step": 1, "loss": 2.0}])
    assert len(single.axes) == 1
    assert [line.tolist() for line in lines(single)] == [[[1.0, 2.0]]] * 2


def test_the_scale_follows_the_range_unless_it_is_said() -> None:
    narrow, wide = (
        [{"step": i, "loss": v} for i, v in enumerate(values)] for values in ([2.0, 1.0], [20.0, 1.0])
    )
    assert [loss(rows).axes[0].get_yscale() for rows in (narrow, wide)] == ["linear", "log"]
    assert loss(narrow, log=True).axes[0].get_yscale() == "log"
    assert loss(wide, log=False).axes[0].get_ylim()[0] == 0
    assert loss([{"step": 1, "loss": -100.0}, {"step": 2, "loss": -1.0}]).axes[0].get_yscale() == "linear"


GOOD = logged(*samples())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: loss_by_level([{"step": 1, "loss": 1.0}]), "no row of the log has 'levels'.*compute_loss"),
        (lambda: loss_by_level([{**GOOD[0], "levels": {"loss": [1.0], "count": [1]}}]), "22 sums.*got 1"),
        (lambda: loss_by_level([{**GOOD[0], "levels": {}}]), "22 sums.*got 0 in 'loss'"),
        (lambda: loss_by_level((torch.zeros(3), torch.zeros(4))), r"\(3,\) and \(4,\)"),
        (lambda: loss_by_level((torch.zeros(0), torch.zeros(0))), "two lists"),
        (
            lambda: loss_by_level((torch.tensor([math.nan] * 40), torch.zeros(40))),
            "40 of the log_snr are NaN",
        ),
        (lambda: loss_by_level((torch.zeros(5), torch.ones(5))), "20 samples .* the most is [12];"),
        (lambda: loss_by_level(GOOD, {"late": (0.9, 0.5)}), "phase 'late'"),
        (lambda: loss_by_level(GOOD, {}), "no phase"),
        (lambda: loss([]), "none of the 0 rows has a 'loss'"),
        (lambda: loss([{"loss": 1.0}]), "'step'"),
        (lambda: loss([{"step": 2, "loss": 1.0}, {"step": 2, "loss": 1.0}]), "got 2 after 2"),
        (lambda: loss([{"step": 2, "loss": math.nan}]), "none of the 1 losses .* finite"),
        (lambda: loss([{"step": 2, "loss": -1.0}], log=True), "log=True needs losses above 0"),
        (lambda: loss(GOOD, smooth=1.0), r"\[0, 1\)"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_missing_or_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\noops\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(FileNotFoundError, match=r"there is one in .*run"):
        loss(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the output_dir"):
        loss(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"line 2 of .*log\.jsonl is no JSON"):
        loss(tmp_path / "run")
