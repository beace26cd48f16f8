"""Trackers: what reaches them is read back from their files, and no failure of theirs stops a run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from torch import Tensor

from gendiff.training.rates import WarmupCosine
from gendiff.training.trackers import Trackers

ROW = {
    "loss": 0.5,
    "epoch": 1,
    "learning_rate": [1e-4, 1e-5],
    "metrics": {"fid": 12.5, "deep": {"er": np.float32(0.25)}},
    "levels": {"loss": [1.0, 2.0], "count": [3, 4]},
    "note": "text",
    "nothing": None,
}
NUMBERS = {
    "loss": 0.5,
    "epoch": 1,
    "learning_rate/0": 1e-4,
    "learning_rate/1": 1e-5,
    "metrics/fid": 12.5,
    "metrics/deep/er": 0.25,
}
CONFIG = {
    "seed": 3,
    "ema": None,
    "optimizer": {"betas": (0.9, 0.99), "fused": True},
    "lr_scheduler": WarmupCosine(warmup=10),
    "output_dir": Path("run"),
}


class Fake(GeneralTracker):
    """Writes down what it is asked; raises at those events that `breaks` names."""

    requires_logging_directory = False

    def __init__(self, name: str, *breaks: str, error: type[BaseException] = OSError) -> None:
        self.name, self.breaks, self.error, self.calls = name, breaks, error, list[Any]()
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def _call(self, event: str, *what: Any) -> None:
        self.calls.append((event, *what))
        if event in self.breaks:
            raise self.error(f"no {event} today")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._call("log", values, step)

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self._call("images", values, step)

    def finish(self) -> None:
        self._call("finish")

    def events(self) -> list[str]:
        return [call[0] for call in self.calls]


def process(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"is_main_process": True, "trackers": [], "log_with": [], **changes})


def made(given: Any, folder: Path = Path("run"), accelerator: Any = None) -> Trackers:
    accelerator = accelerator or process()
    return Trackers(given, project="project", config=CONFIG, folder=folder, accelerator=accelerator)


def pictures() -> Tensor:
    """Two of 3 x 4 pixels, all different; the level that is nearest is the next one."""
    return (torch.arange(2 * 3 * 3 * 4, dtype=torch.float32).view(2, 3, 3, 4) + 0.7) / 255


def run(trackers: Trackers, step: int | None = None) -> None:
    trackers.start(step)
    trackers.log(ROW, 10)
    trackers.images("samples", pictures(), 10)
    trackers.log({"loss": 0.25}, 20)
    trackers.finish()


@pytest.fixture
def accelerate_state() -> None:
    """accelerate's trackers ask its state which process this is."""
    Accelerator(cpu=True)


def test_an_object_gets_numbers_pictures_and_a_flat_configuration() -> None:
    fake = Fake("mine")
    trackers = made([fake, fake])
    run(trackers)
    start, config, log, images, more, finish = fake.calls
    assert (start, more, finish) == (("start",), ("log", {"loss": 0.25}, 20), ("finish",))
    assert config[1] == {
        "seed": 3,
        "ema": "None",
        "optimizer/betas": "(0.9, 0.99)",
        "optimizer/fused": True,
        "lr_scheduler": str(WarmupCosine(warmup=10)),
        "output_dir": "run",
    }
    assert log[1:] == (NUMBERS, 10)
    assert {type(value) for value in log[1].values()} == {int, float}
    shown = np.stack([np.asarray(image) for image in images[1]["samples"]])
    assert (shown == 1 + np.arange(72).reshape(2, 3, 3, 4).transpose(0, 2, 3, 1)).all()
    assert trackers.failures == {}
    trackers.log(ROW, 30)  # after the end
    assert len(fake.calls) == 6


@pytest.mark.usefixtures("accelerate_state")
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(made("tensorboard", tmp_path))
    folder = tmp_path / "logs" / "project"
    read = accumulator.EventAccumulator(str(folder)).Reload()
    assert set(read.Tags()["scalars"]) == set(NUMBERS)
    for name, value in NUMBERS.items():
        event = read.Scalars(name)[0]
        assert (event.step, event.value) == (10, pytest.approx(value))
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert read.Images("samples")[0].step == 10
    [written] = folder.glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text())["optimizer/betas"] == "(0.9, 0.99)"
    # A run that was killed at 20 goes on from 10: the row of 20 is of the past.
    trackers = made("tensorboard", tmp_path)
    trackers.start(10)
    trackers.log({"loss": 0.125}, 15)
    trackers.finish()
    read = accumulator.EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(10, 0.5), (15, 0.125)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their own makers
@pytest.mark.usefixtures("accelerate_state")
class TestOthers:
    """Those that take seconds to start; none of them needs a network."""

    def test_wandb_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
        for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        run(trackers := made(["wandb"], tmp_path))
        assert trackers.failures == {}
        wandb.teardown()  # its own process has then written the file
        [written] = tmp_path.glob("wandb/offline-run-*/*.wandb")
        raw, at, rows = written.read_bytes(), 7, list[dict[str, Any]]()
        while at + 7 <= min(len(raw), 2**15):  # one block: checksum, length, kind, and a record
            size = int.from_bytes(raw[at + 4 : at + 6], "little")
            record = pb.Record.FromString(raw[at + 7 : at + 7 + size])
            rows += [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}]
            at += 7 + size
        logged = [row for row in rows if "loss" in row]
        assert [(row["_step"], row["loss"]) for row in logged] == [(10, 0.5), (20, 0.25)]
        assert logged[0] == {**logged[0], **NUMBERS}
        assert len(list(written.parent.rglob("media/images/*.png"))) == 2

    def test_mlflow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        trackers = made(["mlflow"], tmp_path)
        run(trackers)
        assert trackers.failures == {}
        client = mlflow.MlflowClient()
        [found] = client.search_runs([client.get_experiment_by_name("project").experiment_id])
        assert found.data.metrics == {**NUMBERS, "loss": 0.25}
        assert found.data.params["optimizer/betas"] == "(0.9, 0.99)"
        assert len(list(tmp_path.rglob("*samples*.png"))) == 1

    def test_trackio(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
        trackio = pytest.importorskip("trackio")
        run(trackers := made(["trackio"], tmp_path))
        assert trackers.failures == {}
        [found] = trackio.Api().runs("project")
        rows = trackio.sqlite_storage.SQLiteStorage.get_logs("project", found.name)
        assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(10, 0.5), (20, 0.25)]
        assert rows[0] == {**rows[0], **NUMBERS}
        assert len(list(tmp_path.rglob("media/**/*.png"))) == 1


@pytest.mark.parametrize("event", ["start", "config", "log", "images", "finish"])
def test_one_that_raises_is_warned_of_once_and_the_others_go_on(event: str) -> None:
    before, broken, after = Fake("before"), Fake("broken", event), Fake("after")
    trackers = made([before, broken, after])
    with pytest.warns(RuntimeWarning, match=f"'broken'.*OSError: no {event} today") as warned:
        run(trackers)
    whole = ["start", "config", "log", "images", "log", "finish"]
    assert [fake.events() for fake in (before, after)] == [whole] * 2
    assert broken.events() == (["start"] if event == "start" else whole)
    assert trackers.failures == {"broken": whole.count(event)}
    assert len(warned) == 1


def test_an_interrupt_is_not_swallowed() -> None:
    trackers = made([Fake("mine", "log", error=KeyboardInterrupt)])
    trackers.start()
    with pytest.raises(KeyboardInterrupt):
        trackers.log(ROW, 1)


def test_what_the_user_initialised_is_used_and_not_finished() -> None:
    theirs, mine = Fake("theirs"), Fake("mine")
    accelerator = Accelerator(cpu=True, log_with=[theirs])
    accelerator.init_trackers("own")
    run(made([mine, theirs], accelerator=accelerator))
    assert theirs.events() == ["start", "log", "images", "log"]
    assert mine.events() == ["start", "config", "log", "images", "log", "finish"]
    left = Fake("left")
    run(made([], accelerator=Accelerator(cpu=True, log_with=[left])))  # and never initialised
    assert left.events() == ["start", "config", "log", "images", "log", "finish"]


def test_only_the_main_process_logs() -> None:
    fake = Fake("mine")
    run(made([fake], accelerator=process(is_main_process=False, trackers=[fake])))
    assert fake.calls == []


def test_a_run_may_start_again() -> None:
    fake = Fake("mine")
    trackers = made([fake])
    run(trackers)
    run(trackers)
    assert fake.events() == ["start", "config", "log", "images", "log", "finish"] * 2


def test_names_are_checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match="'wandbb'; did you mean 'wandb'"):
        made(["wandbb"])
    with pytest.raises(ValueError, match=r"'wandb' .*pip install wandb.* Installed: tensorboard"):
        made(["tensorboard", "wandb"])
    with pytest.raises(ValueError, match="pip install 'aim<4'"):
        made([tracking.LoggerType.AIM], accelerator=process(is_main_process=False))
    with pytest.raises(TypeError, match=r"GeneralTracker.*Fake"):
        made([Fake])
    assert made("all").asked == ["tensorboard"]
    assert made([tracking.LoggerType.TENSORBOARD]).asked == ["tensorboard"]


def test_a_registered_class_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Fake] = []

    class Registered(Fake):
        name = "registered"
        requires_logging_directory = True

        def __init__(self, project: str, folder: str) -> None:
            super().__init__("registered")
            kept.append(self)
            assert (project, folder) == ("project", os.path.join(tmp_path, "logs"))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "registered", Registered)
    run(made(["registered"], tmp_path))
    assert kept[0].events()[-1] == "finish"
