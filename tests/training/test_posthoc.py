"""What is put together after training is the average that would have been kept, within what is stated."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendiff.training import posthoc
from gendiff.training.ema import EMA, Averages, gamma_of
from gendiff.training.posthoc import METADATA, Snapshot, combine, reconstruct, save_snapshot, snapshots

STEPS = 256
SCHEDULES = {
    "64 even ones": list(range(4, STEPS + 1, 4)),
    "16 even ones": list(range(16, STEPS + 1, 16)),
    "12 that thin out": [4, 12, 20, 32, 48, 64, 92, 128, 156, 192, 224, 256],
}


def train(thetas: Tensor, ema: EMA, folder: Path | None = None, at: list[int] | None = None) -> Averages:
    """Averages of parameters that are thetas[t] at update t, with snapshots at some updates."""
    parameter = nn.Parameter(torch.zeros_like(thetas[0]))
    averages = Averages({"net.w": parameter}, ema)
    for t, theta in enumerate(thetas, start=1):
        parameter.data.copy_(theta)
        averages.update(torch.tensor(t), torch.tensor(True))
        if folder is not None and t in (at or []):
            save_snapshot(folder, averages, t)
    return averages


@cache
def profiles(every: int = 1) -> dict[float, Tensor]:
    """The true weights of every update in averages of some widths, by width."""
    ema = EMA(sigma_rel=(0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25), every=every)
    kept = train(torch.eye(STEPS, dtype=torch.float64), ema)
    return {width: kept.weights(i)["net.w"] for i, width in enumerate(ema.widths)}


@pytest.fixture(scope="module")
def impulses(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of snapshots of a run whose parameters are 1 at one update each: averages are profiles."""
    made: dict[Any, Path] = {}

    def folder(schedule: str, every: int = 1, widths: tuple[float, ...] = (0.05, 0.1)) -> Path:
        key = schedule, every, widths
        if key not in made:
            made[key] = tmp_path_factory.mktemp("snapshots")
            ema = EMA(sigma_rel=widths, every=every)
            train(torch.eye(STEPS, dtype=torch.float64), ema, made[key], SCHEDULES[schedule])
        return made[key]

    return folder


# ---- the impulse response, and what it is off by


@pytest.mark.parametrize(
    ("schedule", "width", "bound"),
    [
        ("64 even ones", 0.03, 0.005),
        ("64 even ones", 0.07, 0.0005),
        ("64 even ones", 0.15, 0.001),
        ("64 even ones", 0.2, 0.003),
        ("16 even ones", 0.05, 1e-12),
        ("16 even ones", 0.1, 1e-12),
        ("16 even ones", 0.07, 0.015),
        ("16 even ones", 0.15, 0.035),
        ("16 even ones", 0.2, 0.08),
        ("12 that thin out", 0.07, 0.02),
        ("12 that thin out", 0.15, 0.05),
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_the_impulse_response_is_the_profile(
    impulses: Callable[..., Path], schedule: str, width: float, bound: float, every: int
) -> None:
    folder = impulses(schedule, every)
    true = profiles(every)[width]
    got = reconstruct(folder, width, tolerance=0.1)["net.w"]
    off = ((got - true).norm() / true.norm()).item()
    assert off < bound
    stated = combine(snapshots(folder), width).residual
    assert stated < bound or bound == 1e-12  # its square is a difference of numbers near 1
    assert off < stated * 1.2 + 1e-12  # averages over `every` updates are nearer, and have a smaller norm
    assert got.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("step", [128, 64])
def test_an_average_of_an_earlier_step_knows_nothing_later(impulses: Callable[..., Path], step: int) -> None:
    folder = impulses("16 even ones")
    true = train(torch.eye(STEPS)[:step].double(), EMA(sigma_rel=0.08)).weights()["net.w"]
    got = reconstruct(folder, 0.08, step)["net.w"]
    assert bool((got[step:] == 0).all())
    assert (got - true).norm() < 0.05 * true.norm()
    early = [one.file for one in snapshots(folder) if one.step <= step]
    assert torch.equal(reconstruct(early, 0.08)["net.w"], got)


def test_a_snapshot_between_two_moves_is_of_the_last_move(tmp_path: Path) -> None:
    thetas, at = torch.eye(100, dtype=torch.float64), [7, 15, 22, 31, 39, 46, 54, 63, 71, 78, 86, 92, 99]
    train(thetas, EMA(sigma_rel=(0.05, 0.1), every=4), tmp_path, at)
    true = train(thetas, EMA(sigma_rel=0.07, every=4)).weights()["net.w"]  # moves at 100 for the last time
    before = train(thetas[:99], EMA(sigma_rel=0.07, every=4)).weights()["net.w"]
    got = reconstruct(tmp_path, 0.07)["net.w"]
    assert (got - before).norm() < 0.03 * before.norm() < (got - true).norm()


def test_the_combination_is_the_least_squares_of_sampled_profiles() -> None:
    """Independent: functions at mid-points of a fine grid, and numpy's least squares in place of products."""
    stored = [Snapshot(Path(f"{step}"), step, (0.05, 0.12), 1) for step in (3, 5, 8, 10)]
    grid = (np.arange(40_000) + 0.5) / 4_000
    ends = [(one.step, width) for one in stored for width in one.sigma_rel]

    def density(end: float, width: float) -> Any:
        gamma = gamma_of(width)
        return np.where(grid < end, (gamma + 1) * (grid / end) ** gamma / end, 0)

    columns, target = np.stack([density(*one) for one in ends], axis=1), density(10, 0.2)
    expected = np.linalg.lstsq(columns, target)[0]
    expected /= expected.sum()
    plan = combine(list(reversed(stored)), 0.2)
    assert [one.step for one in plan.snapshots] == [3, 5, 8, 10]
    np.testing.assert_allclose(plan.weights.flatten(), expected, rtol=1e-4)
    off = np.linalg.norm(columns @ expected - target) / np.linalg.norm(target)
    assert plan.residual == pytest.approx(off, rel=1e-4)
    assert plan.residual > 0.1


@pytest.mark.parametrize("widths", [(0.05, 0.1), (0.1, 0.1 + 1e-12)])
def test_rounding_in_the_snapshots_is_not_amplified(widths: tuple[float, ...]) -> None:
    """Hundreds of profiles, and profiles that are the same but for rounding."""
    stored = [Snapshot(Path("x"), step, widths, 10) for step in range(1000, 300_001, 1000)]
    plan = combine(stored, 0.15)
    assert plan.residual < 0.01
    assert plan.weights.abs().sum() < 3


def test_a_random_walk_is_averaged_as_if_its_average_had_been_kept(tmp_path: Path) -> None:
    steps, noise = 500, torch.Generator().manual_seed(0)
    thetas = (torch.randn(steps, 300, generator=noise) * 0.01).cumsum(0) + torch.randn(300, generator=noise)
    train(thetas, EMA(sigma_rel=(0.05, 0.1)), tmp_path, list(range(25, steps + 1, 25)))
    bounds = {0.04: 0.01, 0.07: 0.002, 0.15: 0.004, 0.2: 0.01}
    directly = train(thetas, EMA(sigma_rel=tuple(bounds)))
    for i, (width, bound) in enumerate(bounds.items()):
        kept = directly.weights(i)["net.w"]
        moved = (kept - thetas[-1]).norm()  # the error counts against what averaging does at all
        made = reconstruct(tmp_path, width, tolerance=0.1)["net.w"]
        assert made.dtype == torch.float32
        assert (made - kept).norm() < bound * moved
        assert (made - kept).norm() < bound * kept.norm()


# ---- what is out of reach


def test_a_profile_out_of_reach_is_refused_with_what_it_is_off_by(impulses: Callable[..., Path]) -> None:
    folder = impulses("16 even ones")
    plan = combine(snapshots(folder), 0.25)
    with pytest.raises(ValueError, match=rf"off by {plan.residual:.2g} .*tolerance=0.05"):
        reconstruct(folder, 0.25)
    got = reconstruct(folder, 0.25, tolerance=1)["net.w"]
    true = profiles()[0.25]
    assert ((got - true).norm() / true.norm()).item() == pytest.approx(plan.residual, rel=0.02)
    with pytest.raises(ValueError, match=r"step 120 is out of reach of 7 snapshots.*last of step 112"):
        reconstruct(folder, 0.05, step=120)
    with pytest.raises(ValueError, match="first snapshot is of step 16"):
        reconstruct(folder, 0.05, step=15)
    with pytest.raises(ValueError, match="sigma_rel lies in"):
        reconstruct(folder, 0.3)


# ---- files


def averages(value: float = 1.0, ema: EMA | None = None) -> Averages:
    made = {"a": nn.Parameter(torch.full((2,), value)), "b.c": nn.Parameter(torch.full((3,), value).double())}
    return Averages(made, ema or EMA(sigma_rel=(0.05, 0.1), every=2))


def test_a_file_holds_all_profiles_and_what_they_are(tmp_path: Path) -> None:
    file = save_snapshot(tmp_path / "new" / "folder", averages(), 7)
    tensors = load_file(file)
    assert sorted(tensors) == ["0.a", "0.b.c", "1.a", "1.b.c"]
    assert (tensors["0.a"].dtype, tensors["0.b.c"].dtype) == (torch.float32, torch.float64)
    read = Snapshot.read(file)
    assert read == Snapshot(file, 7, (0.05, 0.1), 2)
    assert read.moved == 6
    with pytest.raises(ValueError, match="constant decay"):
        save_snapshot(tmp_path, averages(ema=EMA(0.9)), 1)
    with pytest.raises(ValueError, match="have not moved"):
        save_snapshot(tmp_path, averages(), 1)


@pytest.mark.parametrize("fails", ["save_file", "flush", "os.replace"])
def test_a_failure_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    file = save_snapshot(tmp_path, averages(1.0), 2)
    monkeypatch.setattr(f"gendiff.training.posthoc.{fails}", fail)
    with pytest.raises(OSError, match="no space"):
        save_snapshot(tmp_path, averages(2.0), 2)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == [file.name]
    assert load_file(file)["0.a"].tolist() == [1, 1]
    save_snapshot(tmp_path, averages(2.0), 2)
    assert load_file(file)["0.a"].tolist() == [2, 2]


def test_one_file_is_open_at_a_time(impulses: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = posthoc.safe_open

    class Counted:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Any:
            opened.append(opened[-1] + 1 if opened else 1)
            return self.file.__enter__()

        def __exit__(self, *args: Any) -> None:
            opened.append(opened[-1] - 1)
            self.file.__exit__(*args)

    monkeypatch.setattr(posthoc, "safe_open", Counted)
    reconstruct(impulses("16 even ones"), 0.07)
    assert len(opened) == 64
    assert max(opened) == 1


def facts(**changes: Any) -> dict[str, str]:
    return {METADATA: json.dumps({"format": 1, "step": 4, "sigma_rel": [0.05, 0.1], "every": 2} | changes)}


GOOD = {"0.a": torch.ones(2), "1.a": torch.ones(2)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        (GOOD, None, "no record of format 1"),
        (GOOD, {METADATA: "{"}, "no snapshot that save_snapshot wrote"),
        (GOOD, {METADATA: "[" * 100_000}, "no snapshot that save_snapshot wrote"),
        (GOOD, facts(format=2), "no record of format 1"),
        (GOOD, facts(step=0), "step is a whole number"),
        (GOOD, facts(step=10**400), "step is a whole number"),
        (GOOD, facts(every=5), "cannot be"),
        (GOOD, facts(sigma_rel=[]), "cannot be"),
        (GOOD, facts(sigma_rel=[float("nan"), 0.1]), "sigma_rel lies in"),
        (GOOD, facts(sigma_rel=0.1), "not iterable"),
        (GOOD, facts(sigma_rel=[0.05, 0.2]), "take the snapshots of one run"),
        (GOOD, facts(every=1), "take the snapshots of one run"),
        (GOOD, facts(step=2), "both of step 2"),
        (GOOD | {"2.a": torch.ones(2)}, facts(), "'2.a', which is of none of its profiles"),
        (GOOD | {"../a": torch.ones(2)}, facts(), "of none of its profiles"),
        ({"0.a": torch.ones(2)}, facts(), r"'a' is absent in bad.safetensors"),
        ({"0.a": torch.ones(2), "1.a": torch.ones(3)}, facts(), r"\(\[3\], 'F32'\) in bad.safetensors"),
        ({k: torch.ones(3) for k in GOOD}, facts(), r"\(\[2\], 'F32'\) in snapshot-0000000002"),
        ({k: t.double() for k, t in GOOD.items()}, facts(), r"\(\[2\], 'F64'\) in bad"),
        ({k: t.half() for k, t in GOOD.items()}, facts(), "averages are F32 or F64"),
        (
            GOOD | {"0.b": torch.ones(1), "1.b": torch.ones(1)},
            facts(),
            "'b' is .* in bad.*absent in snapshot",
        ),
        ({k: t / 0 for k, t in GOOD.items()}, facts(), "a of the average is not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, tensors: Any, metadata: Any, says: str) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), every=2)
    good = save_snapshot(tmp_path, Averages({"a": nn.Parameter(torch.ones(2))}, ema), 2)
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=says):
        reconstruct([good, tmp_path / "bad.safetensors"], 0.05, tolerance=10)


def test_what_is_no_safetensors_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no snapshot-\*"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ValueError, match="no snapshot was given"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match=r"no file gone\.safetensors"):
        reconstruct([tmp_path / "gone.safetensors"], 0.1)
    file = save_snapshot(tmp_path, averages(), 2)
    torch.save({"0.a": torch.ones(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match=r"pickle\.safetensors is damaged, or no safetensors"):
        reconstruct([file, tmp_path / "pickle.safetensors"], 0.1)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"snapshot-0000000002\.safetensors is damaged"):
        reconstruct(tmp_path, 0.1)
