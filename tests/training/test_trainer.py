"""The trainer: its one override point, its events, and that it leaves everything as it was."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta
from gendiff.objectives import LossTerms
from gendiff.training import Callback, EarlyStop, TrainConfig, Trainer, Validation, read_log
from gendiff.training.setup import named_callbacks
from tests.training.toy import Images, Net, config, trainer

ROOT = Path(__file__).parents[2]


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder)


class Events(Callback):
    every = 3

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.seen.append(("begin", trainer.step))

    def on_step_end(self, trainer: Trainer) -> None:
        self.seen.append(("step", trainer.step))

    def on_log(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self.seen.append(("log", trainer.step))

    def on_save(self, trainer: Trainer, path: Path) -> None:
        self.seen.append(("save", int(path.name.split("-")[1])))

    def on_train_end(self, trainer: Trainer) -> None:
        self.seen.append(("end", trainer.step))


def test_events_come_in_order_at_their_steps(tmp_path: Path) -> None:
    events = Events()
    trainer(tmp_path, callbacks=[events], save_steps=6, logging_steps=4).train()
    assert events.seen == [
        ("begin", 0),
        ("step", 3),
        ("log", 4),
        ("step", 6),
        ("save", 6),
        ("log", 8),
        ("save", 8),
        ("end", 8),
    ]


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_steps=3)
    made.train()
    lines = rows(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [line["samples"] for line in lines] == [9, 18, 24]
    assert [line["epoch"] for line in lines] == [0.75, 1.5, 2.0]
    assert [sum(line["levels"]["count"]) for line in lines] == [9, 9, 6]
    curve = made.config.lr_scheduler
    assert isinstance(curve, object)
    for line in lines:
        expected = [curve.rate(peak, line["step"] - 1, 8) for peak in (1e-2, 2e-2)]  # pyright: ignore
        assert line["learning_rate"] == expected
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [3, 6, 8]
    assert all(line["images_per_second"] > 0 for line in timing)


def test_the_logged_loss_is_the_mean_over_the_interval(tmp_path: Path) -> None:
    by_step = trainer(tmp_path / "a", logging_steps=1)
    by_step.train()
    at_once = trainer(tmp_path / "b", logging_steps=8)
    at_once.train()
    (whole,) = rows(tmp_path / "b")
    single = rows(tmp_path / "a")
    assert whole["loss"] == pytest.approx(np.mean([line["loss"] for line in single]), rel=1e-9)
    assert whole["grad_norm"] == pytest.approx(np.mean([line["grad_norm"] for line in single]), rel=1e-9)


def test_a_subclass_gives_a_loss_of_its_own(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> LossTerms:
            x0, cond = self.inputs(batch, rng)
            draw = self.objective.draw(model.schedule, x0, rng=rng)  # pyright: ignore
            error = (model(draw.x_t, draw.t, cond).x0 - x0).abs().flatten(1).mean(1)
            return LossTerms(error, t=draw.t, metrics={"twice": 2 * error.detach()})

    made = trainer(tmp_path, kind=Own, logging_steps=8)
    made.train()
    (row,) = rows(tmp_path)
    assert row["metrics"]["twice"] == pytest.approx(2 * row["loss"], rel=1e-6)


def test_models_by_name_and_what_does_not_train(tmp_path: Path) -> None:
    class Distil(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Tensor:
            x0, cond = self.inputs(batch, rng)
            student, teacher = model["student"](x0, 0.5, cond).x0, model["teacher"](x0, 0.5, cond).x0
            return (student - teacher.detach()).square().flatten(1).mean(1)

    teacher = Denoiser(Net(), CosineBeta(), "v").requires_grad_(False)
    models = {"student": Denoiser(Net(), CosineBeta(), "v"), "teacher": teacher}
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1)
    before = [p.clone() for p in teacher.parameters()]
    base = trainer(tmp_path / "unused")
    made = Distil(models, Images(), codec=base.codec, config=config(tmp_path, param_groups=[]))
    made.train()
    assert all(name.startswith("student.") for name in made.parameters)
    assert all(map(torch.equal, before, teacher.parameters()))
    assert set(made.ema.model) == {"student", "teacher"}
    assert next(made.ema.model["teacher"].parameters()) is next(teacher.parameters())
    assert "frozen in float32" in repr(made)


def test_the_averages_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(Callback):
        every = 1

        def on_step_end(self, trainer: Trainer) -> None:
            seen.append({name: p.detach().clone() for name, p in trainer.parameters.items()})

    made = trainer(tmp_path, callbacks=[Watch()])
    average = {name: p.detach().double().clone() for name, p in made.parameters.items()}
    made.train()
    for weights in seen:
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in average}
    for name, p in made.ema.averages.weights().items():
        torch.testing.assert_close(p.double(), average[name], rtol=1e-5, atol=1e-7)
    twin = dict(made.ema.model.named_parameters())
    name = next(iter(made.parameters)).removeprefix("model.")
    assert twin[name].data_ptr() == made.ema.averages.weights()[f"model.{name}"].data_ptr()


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Any:
            terms: Any = super().compute_loss(model, batch, rng)
            bad = torch.tensor([float("inf") if int(i) == 5 else 1.0 for i in batch["id"]])
            return LossTerms(terms.loss * bad)

    made = trainer(tmp_path / "raise", kind=Poisoned, logging_steps=4)
    with pytest.raises(FloatingPointError, match="1 of the updates up to window 4 was not finite"):
        made.train()
    made = trainer(tmp_path / "skip", kind=Poisoned, nonfinite="skip", logging_steps=2)
    made.train()
    assert made.step == 8  # the run still has all its updates
    assert [row["step"] for row in rows(tmp_path / "skip")] == [2, 4, 6, 8]
    assert rows(tmp_path / "skip")[-1]["skipped"] == 2
    assert all(torch.isfinite(p).all() for p in made.parameters.values())
    assert all(torch.isfinite(a).all() for a in made.ema.averages.weights().values())


def test_a_run_that_never_applies_an_update_ends_with_an_error(tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Any:
            return super().compute_loss(model, batch, rng).loss * float("nan")

    made = trainer(tmp_path, kind=Poisoned, nonfinite="skip")
    with pytest.raises(FloatingPointError, match="none of the last 100 updates"):
        made.train()


def test_epochs_end_where_updates_were_skipped(tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Any:
            return super().compute_loss(model, batch, rng).loss * float("nan")

    made = trainer(tmp_path, kind=Poisoned, nonfinite="skip", num_epochs=2)
    made.train()
    assert (made.step, made.position.windows, made.position.epoch) == (0, 8, 2)


def test_validation_and_early_stop(tmp_path: Path) -> None:
    validation = Validation(every=2)
    made = trainer(
        tmp_path,
        eval_dataset=Images(5),
        callbacks=[validation, EarlyStop("eval/loss", patience=2, min_delta=100.0)],
        save_steps=100,
    )
    made.train()
    assert made.step == 6  # the first value is the best, two more are not better
    logged = [row["eval"]["loss"] for row in rows(tmp_path) if "eval" in row]
    assert len(logged) == 3
    assert logged[-1] == made.evaluate()["loss"]  # of the averages, with the same noise
    assert (tmp_path / "checkpoint-00000006").is_dir()
    with pytest.raises(ValueError, match="EarlyStop waited for 'evil/loss'"):
        trainer(tmp_path / "b", callbacks=[EarlyStop("evil/loss", patience=1)]).train()


def test_an_evaluation_disturbs_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", dropout=0.3)
    plain.train()

    class Look(Callback):
        every = 1

        def on_step_end(self, trainer: Trainer) -> None:
            before = torch.get_rng_state()
            modes = [m.training for m in trainer.model.modules()]
            values = [trainer.evaluate(weights=w)["loss"] for w in ("ema", "live", "ema")]
            assert values[0] == values[2]
            assert (values[0] == values[1]) == (trainer.step == 1)  # its rate was 0
            assert torch.equal(before, torch.get_rng_state())
            assert [m.training for m in trainer.model.modules()] == modes
            assert any(modes)

    watched = trainer(tmp_path / "watched", dropout=0.3, callbacks=[Look()], eval_dataset=Images(5))
    watched.train()
    assert rows(tmp_path / "plain") == rows(tmp_path / "watched")
    for a, b in zip(plain.parameters.values(), watched.parameters.values(), strict=True):
        assert torch.equal(a, b)


def everything_global() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),  # pyright: ignore
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "autocast": torch.is_autocast_enabled("cpu"),
        "group": torch.distributed.is_initialized(),
    }


def test_nothing_global_is_changed_and_the_model_is_unpatched(tmp_path: Path) -> None:
    Accelerator(cpu=True)  # accelerate has set its own environment by now
    made = trainer(
        tmp_path, dropout=0.2, deterministic=True, mixed_precision="bf16", num_workers=2, save_steps=4
    )
    model: Any = made.model

    def inside() -> list[Any]:
        return [
            (m, sorted(m.__dict__), m.training, len(m._forward_hooks), m.forward) for m in model.modules()
        ]

    before, attributes = everything_global(), inside()
    made.train()
    made.evaluate(Images(3))
    assert everything_global() == before
    assert inside() == attributes
    assert all(p.grad is None for p in model.parameters())


def test_the_generator_of_python_is_left_alone() -> None:
    """In a process of its own, since the type checks that tests run under draw from it."""
    code = """
import random, tempfile
from pathlib import Path
from tests.training.toy import Images, trainer
before = random.getstate()
for workers in (0, 1):
    folder = Path(tempfile.mkdtemp())
    made = trainer(folder, train_dataset=Images(augment=True), num_workers=workers, save_steps=4, max_steps=4)
    made.train()
    made.evaluate(Images(3))
assert random.getstate() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_error_leaves_nothing_changed_either(tmp_path: Path) -> None:
    class Broken(Trainer):
        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Any:
            raise RuntimeError("a bug of the user's")

    made = trainer(tmp_path, kind=Broken, deterministic=True, num_workers=1)
    before = everything_global()
    with pytest.raises(RuntimeError, match="a bug of the user's"):
        made.train()
    gc.collect()
    assert everything_global() == before


def test_weights_below_single_precision_are_raised_and_it_is_said(tmp_path: Path) -> None:
    base = trainer(tmp_path / "unused")
    model = Denoiser(Net().to(torch.bfloat16), CosineBeta(), "v")
    made = Trainer(model, Images(), codec=base.codec, config=config(tmp_path, mixed_precision="bf16"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert "5 trained tensors, to float32" in repr(made)


def test_a_run_that_is_over_does_nothing_more(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_steps=4)
    made.train()
    before = [p.detach().clone() for p in made.parameters.values()]
    log = (tmp_path / "log.jsonl").read_bytes()
    made.train()
    again = trainer(tmp_path, save_steps=4)
    again.train()
    for other in (made, again):
        assert all(map(torch.equal, before, other.parameters.values()))
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_trainer_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """As after an interrupt in a notebook, when the cell is run again; there is no checkpoint."""

    class Interrupt(Callback):
        every = 3
        armed = True

        def on_step_end(self, trainer: Trainer) -> None:
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", dropout=0.2)
    whole.train()
    cut = trainer(tmp_path / "cut", dropout=0.2, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert cut.step == 3
    cut.train()
    for a, b in zip(whole.parameters.values(), cut.parameters.values(), strict=True):
        assert torch.equal(a, b)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_trainer_that_was_interrupted_within_a_window_goes_on(tmp_path: Path) -> None:
    class Interrupted(Trainer):
        calls = 0

        def compute_loss(self, model: Any, batch: Mapping[str, Any], rng: Any) -> Any:
            self.calls += 1
            if self.calls in (
                12,
                14,
            ):  # in the sixth window of two, after a log line, and when it is run again
                raise KeyboardInterrupt
            return super().compute_loss(model, batch, rng)

    options: dict[str, Any] = {"dropout": 0.2, "gradient_accumulation_steps": 2, "logging_steps": 4}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    cut = trainer(tmp_path / "cut", kind=Interrupted, **options)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cut.train()
    cut.train()
    assert cut.step == 8
    for a, b in zip(whole.parameters.values(), cut.parameters.values(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert ours[0] == theirs[0]
    assert (ours[1]["step"], ours[1]["samples"]) == (theirs[1]["step"], theirs[1]["samples"])
    assert sum(ours[1]["levels"]["count"]) == 18  # of the three windows since the interruption


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_steps": None}, "give one of the two"),
        ({"windows": "cary"}, "did you mean 'carry'"),
        ({"mixed_precision": "float16"}, "Accepted: 'no', 'bf16', 'fp16'"),
        ({"learning_rate": -1.0}, "learning_rate is a positive number"),
        ({"save_steps": 0}, "save_steps is a whole number of at least 1, got 0"),
        ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"seed": -1}, "seed lies in"),
        ({"max_grad_norm": 0.0}, "None for no clipping"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainConfig(**({"output_dir": tmp_path, "max_steps": 1} | change))


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing requires grad in 'model'"):
        Trainer(nn.Linear(1, 1).requires_grad_(False), Images(), config=config(tmp_path, param_groups=[]))
    with pytest.raises(ValueError, match="was given 2 of 5"):
        trainer(tmp_path, optimizer=lambda groups: torch.optim.SGD(groups[0]["params"], lr=1.0))
    with pytest.raises(TypeError, match="callbacks are instances of"):
        named_callbacks([Validation])
    with pytest.raises(ValueError, match="windows='drop' leaves nothing"):
        trainer(tmp_path, windows="drop", num_epochs=1, gradient_accumulation_steps=9)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4 and TrainConfig says 2"):
        trainer(
            tmp_path,
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4),
            gradient_accumulation_steps=2,
        )
    with pytest.raises(TypeError, match="give the trainer a codec"):
        Trainer(Denoiser(Net(), CosineBeta(), "v"), Images(), config=config(tmp_path)).train()
    with pytest.raises(TypeError, match="which is no Denoiser, and there is no objective"):
        Trainer(nn.Linear(1, 1), Images(), config=config(tmp_path, param_groups=[])).train()
    with pytest.raises(ValueError, match="there are no averages"):
        _ = trainer(tmp_path, ema=None).ema
    with pytest.raises(ValueError, match="there is no dataset to evaluate on"):
        trainer(tmp_path).evaluate()
