"""The demonstration on real digits: its parts against known answers, a short run, and (slow) its claim."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from gendiff import Denoiser
from gendiff.codec import PixelCodec
from gendiff.math import CosineBeta

ROOT = Path(__file__).parents[2]
ROW = re.compile(
    r"^(real, held out|scale \S+) +(\S+)% +(\S+) = (\S+) × real +(\S+)%$", re.MULTILINE
)  # name, accuracy, distance, ratio, share


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`part("digits_metrics")`: a file of the examples as a module, found as the script finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return import_module


@pytest.fixture
def normals() -> Callable[..., NDArray]:
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape)


def run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, tuple[float, ...]]]:
    """The finished script, and the rows of its table: accuracy, distance, ratio, share."""
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--out", str(out), *arguments]
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = {name: tuple(map(float, rest)) for name, *rest in ROW.findall(done.stdout)}
    return done, rows


# --- the figures, on sets whose figures are known ---


def test_the_distance_of_a_set_to_itself_is_zero(part: Callable, normals: Callable) -> None:
    a = normals(200, 20)
    assert part("digits_metrics").frechet(a, a) == pytest.approx(0, abs=1e-10)


def test_the_distance_of_a_shift_is_its_square_and_of_a_scaling_known_too(
    part: Callable, normals: Callable
) -> None:
    frechet, a, shift = part("digits_metrics").frechet, normals(300, 5) @ normals(5, 5), normals(5)
    assert frechet(a, a + shift) == pytest.approx(np.square(shift).sum(), rel=1e-9)
    spread = np.trace(np.cov(a, rowvar=False))  # of 3a: tr(A + 9A - 2·3A) = 4 tr A
    assert frechet(a, 3 * a) == pytest.approx(4 * spread + np.square(2 * a.mean(0)).sum(), rel=1e-9)


def test_the_distance_agrees_with_a_matrix_square_root_and_is_symmetric(
    part: Callable, normals: Callable
) -> None:
    frechet, a, b = part("digits_metrics").frechet, normals(90, 6) @ normals(6, 6), normals(80, 6) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b)  # the form that is published for FID
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)


def nearest(x: NDArray, real: NDArray) -> NDArray:
    return np.linalg.norm(x[:, None] - real, axis=-1).min(1)


@pytest.mark.parametrize(
    ("copies", "share"),
    [
        (0.0, 0.5),
        (0.5, 9 / 13),  # nearest to the 4 times larger set: 1/2 + 1/2·4/5 = 9/10, against 1/10
        (1.0, 1.0),
    ],
)
def test_the_share_tells_copies_from_new_draws_of_the_same_law(
    part: Callable, normals: Callable, copies: float, share: float
) -> None:
    train, held_out, x = normals(400, 3), normals(100, 3), normals(2000, 3)
    made = int(copies * len(x))
    x[:made] = np.resize(train, (made, 3))
    got = part("digits_metrics").share_nearer(nearest(x, train), nearest(x, held_out), (400, 100))
    assert got == pytest.approx(
        share, abs=0.04
    )  # two standard deviations are 0.03, of the sets and the draws


def test_the_judge_on_real_digits(part: Callable) -> None:
    digits = part("digits_data").Digits.load()
    judge = part("digits_metrics").Judge(digits.images, digits.labels, digits.held_images, digits.held_labels)
    assert judge.real.accuracy > 0.98
    assert judge.real.ratio == 1
    assert judge.real.share == pytest.approx(0.5, abs=0.06)
    copies = judge(digits.images, digits.labels)
    assert (copies.share, copies.ratio) == (1, 1)
    assert copies.distance == judge.real.distance == judge.yardstick
    held = judge(digits.held_images, digits.held_labels)
    assert (held.share, held.accuracy) == (0, judge.real.accuracy)
    assert held.distance == pytest.approx(0, abs=1e-10)
    shuffled = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    assert judge(digits.images, digits.labels[shuffled]).accuracy == pytest.approx(0.1, abs=0.04)
    noise = torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0))
    assert judge((digits.images + 0.3 * noise).clamp(0, 1), digits.labels).ratio > 2  # beyond the bound
    assert (
        judge(digits.images[:359], digits.labels[:359]).distance != judge.yardstick
    )  # a mean of sets of 359


def test_every_bound_is_reported_by_itself(part: Callable) -> None:
    report, figures = part("digits_report"), part("digits_metrics").Figures
    assert report.missed(figures(accuracy=0.98, distance=1.0, ratio=2.0, share=0.62)) == []
    for worse, word in [
        (figures(0.979, 1.0, 2.0, 0.62), "accuracy"),
        (figures(0.98, 1.0, 2.01, 0.62), "Fréchet"),
        (figures(0.98, 1.0, 2.0, 0.621), "training"),
    ]:
        (text,) = report.missed(worse)
        assert word in text


def test_the_digits_are_split_once_and_for_all(part: Callable) -> None:
    digits, again = (part("digits_data").Digits.load() for _ in range(2))
    assert torch.equal(digits.images, again.images)
    assert (len(digits.train), len(digits.held_labels)) == (1436, 359)
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    shares = [labels.bincount() / len(labels) for labels in (digits.labels, digits.held_labels)]
    torch.testing.assert_close(*shares, atol=0.005, rtol=0)
    together = torch.cat([digits.images, digits.held_images]).flatten(1)
    assert len(together.unique(dim=0)) == 1795  # no image is in both
    batch = torch.utils.data.default_collate([digits.train[3], digits.train[5]])
    assert batch["id"].tolist() == [3, 5]
    assert torch.equal(batch["image"], digits.images[[3, 5]])


def test_the_network_is_small_and_knows_every_class_and_none(part: Callable) -> None:
    torch.manual_seed(0)
    net = part("digits_unet").UNet(10)
    assert 0.40e6 < sum(parameter.numel() for parameter in net.parameters()) < 0.42e6
    for block in net.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(
                block.conv2.weight, std=0.05
            )  # as if trained: a block starts as its shortcut
    codec, denoiser = PixelCodec(1, 10), Denoiser(net, CosineBeta(), "v")
    cond = codec.cond(torch.arange(10))
    x = torch.randn(1, 1, 8, 8).expand(10, -1, -1, -1)
    with torch.no_grad():
        by_class, unknown, later = (
            denoiser(x, 0.5, cond).out,
            denoiser(x, 0.5, codec.null(cond)).out,
            denoiser(x, 0.6, cond).out,
        )
    assert len(by_class.flatten(1).unique(dim=0)) == 10
    assert torch.allclose(unknown, unknown[:1], atol=1e-6)
    assert not any(torch.allclose(row, unknown[0], atol=1e-3) for row in by_class)
    assert not torch.allclose(by_class, later, atol=1e-3)


# --- the script ---


def test_a_short_run_learns_the_classes_and_writes_its_report(tmp_path: Path) -> None:
    done, rows = run(tmp_path, "--short")
    assert done.returncode == 0, done.stderr
    assert list(rows) == ["real, held out", "scale 0", "scale 1", "scale 1.5", "scale 3"]
    accuracy = [row[0] for row in rows.values()]
    assert accuracy[0] > 98
    assert accuracy[1] < 25  # the class is not seen at scale 0: this is chance
    assert accuracy[3] > 60  # six times chance
    assert accuracy[2] < accuracy[3] < accuracy[4]  # guidance makes the class plainer
    assert rows["scale 1.5"][2] < 8
    assert all(30 < row[3] < 70 for row in rows.values())
    assert "not the claim" in done.stdout
    assert "images/s" in done.stderr
    assert "loss 0." in done.stderr
    picture = (tmp_path / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 20_000 < len(picture) < 200_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_claim(tmp_path: Path, seed: int) -> None:
    done, rows = run(tmp_path, "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy, _, ratio, share = rows["scale 1.5"]
    assert accuracy >= 98
    assert ratio <= 2
    assert share <= 62
    assert "all bounds hold" in done.stdout
