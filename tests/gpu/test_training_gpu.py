"""Training on a CUDA device: one captured step, no synchronisation between log lines, fp16, exact resume."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gendiff.codec import PixelCodec
from gendiff.data import Loader
from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta
from gendiff.training import EMA, Callback, ParamGroup, Step, TrainConfig, Trainer, WarmupCosine
from gendiff.training.loss import moved
from gendiff.training.session import session

pytestmark = pytest.mark.gpu
BATCH = 6


class Net(nn.Module):
    """Convolutions that see time and label; no sum in it depends on the order of threads."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inward, self.outward = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
            self.label = nn.Parameter(torch.randn(11, 16))
        self.register_buffer("labels", torch.arange(11))

    def forward(self, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        chosen = (cond["label"][:, None] == self.labels).to(x.dtype)
        seen = (chosen[:, :, None] * self.label).sum(1) + torch.sin(timestep / 100)[:, None]
        return self.outward(nn.functional.silu(self.inward(x) + seen[:, :, None, None]))


def images(count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.rand(1, 8, 8, generator=generator), "label": i % 10} for i in range(count)]


def trainer(folder: Path, **settings: Any) -> Trainer:
    given: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 24,
        "per_device_batch_size": BATCH,
        "learning_rate": 1e-2,
        "lr_scheduler": WarmupCosine(3),
        "param_groups": [ParamGroup("**.bias", weight_decay=0.0, learning_rate=2e-2)],
        "ema": EMA(0.9),
        "logging_steps": 8,
        "save_steps": None,
        "deterministic": True,
        "progress": "none",
    }
    arguments = {name: settings.pop(name) for name in ("optimizer", "callbacks") if name in settings}
    model = Denoiser(Net(), CosineBeta(), "v")
    return Trainer(
        model,
        images(),
        codec=PixelCodec(1, 10, drop=0.2),
        config=TrainConfig(**(given | settings)),
        **arguments,
    )


def everything(made: Trainer) -> dict[str, Tensor]:
    """Weights, averages, moments, rates, counters and meters."""
    state = made.update.state_dict()
    found = {f"weights.{name}": p.detach().clone() for name, p in made.parameters.items()}
    found |= {f"averages.{name}": a.clone() for name, a in made.ema.averages.weights().items()}
    for name, values in state["optimizer"]["parameters"].items():
        found |= {f"{name}.{key}": v.clone() for key, v in values.items() if isinstance(v, Tensor)}
    found |= {f"meters.{name}": value.clone() for name, value in made.meters.sums.items()}
    return found | {
        "applied": made.update.applied.clone(),
        "norm": made.update.norm.clone(),
        "rates": made.update.learning_rates.clone(),
    }


def micro_batches(count: int) -> list[Any]:
    stream = Loader(images(), BATCH, seed=5, pin_memory=True).stream()
    return [next(stream) for _ in range(count)]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_whole_step_is_captured_and_replayed_as_the_eager_one(tmp_path: Path, precision: str) -> None:
    """Forward to averages in one CUDA graph, with new data and keys, without a synchronisation."""
    micros = micro_batches(9)
    eager = trainer(tmp_path / "eager", mixed_precision=precision)
    with session(eager, None) as step:
        for micro in micros:
            step.micro(moved(micro.batch, eager.device), micro.keys.cuda(), BATCH, BATCH)
            step.close()
    captured = trainer(tmp_path / "captured", mixed_precision=precision)
    with session(captured, None) as step:
        replay(step, micros, captured.device)
    ours, theirs = everything(captured), everything(eager)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert int(ours["applied"]) >= (7 if precision == "fp16" else 9)  # the first scale may overflow


def replay(step: Step, micros: list[Any], device: torch.device) -> None:
    """Three steps as warm-up, one that is captured, and its replays."""
    batch: Any = moved(micros[0].batch, device)
    keys = micros[0].keys.to(device)
    samples = torch.full((), BATCH, device=device)

    def load(micro: Any) -> None:
        for name in ("image", "label", "weight", "id"):
            batch[name].copy_(micro.batch[name], non_blocking=True)
        keys.copy_(micro.keys, non_blocking=True)

    def run() -> None:
        step.micro(batch, keys, samples, BATCH)
        step.close()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for micro in micros[:3]:
            load(micro)
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    with no_synchronisation():
        for micro in micros[3:]:
            load(micro)
            graph.replay()
    torch.cuda.synchronize()


def test_a_captured_step_skips_an_update_that_is_not_finite(tmp_path: Path) -> None:
    made = trainer(tmp_path, nonfinite="skip")
    good = micro_batches(4)
    with session(made, None) as step:
        replay(step, good, made.device)
        before = everything(made)
        # The same graph is not at hand here; the eager step goes through the same gates.
        bad = moved(good[0].batch, made.device)
        bad["image"] = torch.full_like(bad["image"], float("nan"))
        with no_synchronisation():
            step.micro(bad, good[0].keys.to(made.device, non_blocking=True), BATCH, BATCH)
            step.close()
    after = everything(made)
    moved_ = [n for n in before if not n.startswith("meters") and not torch.equal(before[n], after[n])]
    assert moved_ == ["norm"]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_nothing_synchronises_between_two_log_lines(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    class Watched(Trainer):
        def _run(self, step: Step, window: Any) -> None:
            with no_synchronisation() if ran else nullcontext():  # the first copies what is constant
                super()._run(step, window)
            ran.append(window)

    made = trainer(tmp_path, mixed_precision=precision, gradient_accumulation_steps=2, num_workers=2)
    made.__class__ = Watched
    made.train()
    assert len(ran) >= 24
    assert made.step == 24
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        made.update.applied.item()  # the switch notices


def test_an_overflow_under_fp16_halves_the_scale_and_moves_nothing_else(tmp_path: Path) -> None:
    made = trainer(tmp_path, mixed_precision="fp16", logging_steps=1)
    scaler = made.update.scaler
    assert scaler is not None
    scaler.scale.fill_(2.0**40)  # far above what fp16 holds
    made.train()
    rows = list((tmp_path / "log.jsonl").read_text().splitlines())
    assert made.step == 24
    assert len(rows) == 24  # one row an applied update, none for a skipped one
    assert made.position.skipped > 5
    assert scaler.scale <= 2.0**34
    assert all(torch.isfinite(p).all() for p in made.parameters.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_that_goes_on_ends_bit_equal(tmp_path: Path, precision: str) -> None:
    whole = trainer(tmp_path / "whole", mixed_precision=precision, save_steps=5)
    whole.train()

    class Interrupt(Callback):
        every = 13

        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.position.step == 13:
                raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, mixed_precision=precision, save_steps=5, callbacks=[Interrupt()]).train()

    rest = trainer(folder, mixed_precision=precision, save_steps=5)
    rest.train()
    ours, theirs = everything(rest), everything(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (folder / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
