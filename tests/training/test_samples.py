"""Sample grids, streams of samples, recomputed activations and broken trackers, through a whole run."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from gendiff import Guider, Rng, cfg, sample
from gendiff.codec import PixelCodec
from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta, grids
from gendiff.sampling import DDIM
from gendiff.testing import tiny_pipeline
from gendiff.training import SampleGrid, Trainer, read_log
from tests.training.toy import Images, config, trainer

GRID = grids.uniform(CosineBeta(), 5)


def weights(made: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in made.parameters.values()]


def test_a_grid_shows_what_a_hand_written_loop_samples_and_disturbs_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", dropout=0.3)
    plain.train()
    shown = SampleGrid([3, 1, 4], every=4, size=(6, 6), grid=GRID, combine=partial(cfg, scale=2.0), seed=9)
    made = trainer(tmp_path / "shown", dropout=0.3, callbacks=[shown])
    made.train()
    assert all(map(torch.equal, weights(plain), weights(made)))
    assert read_log(tmp_path / "plain") == read_log(tmp_path / "shown")
    files = sorted((tmp_path / "shown" / "samples").iterdir())
    assert [file.name for file in files] == ["step-00000004.png", "step-00000008.png"]
    codec: Any = made.codec
    cond = codec.cond([3, 1, 4])
    guided = Guider(made.ema.model, {"cond": cond, "uncond": codec.null(cond)}, partial(cfg, scale=2.0))
    x = Rng(9, ids=range(3)).normal("start", (3, 1, 6, 6))
    expected = codec.decode(sample(guided, x, GRID, DDIM()))
    assert torch.equal(shown.images(made), expected)
    pixels = np.asarray(Image.open(files[-1]).convert("L"))
    first = (expected[0, 0] * 255).round().numpy()
    found = any(
        np.array_equal(pixels[y : y + 6, x_ : x_ + 6], first)
        for y in range(pixels.shape[0] - 5)
        for x_ in range(pixels.shape[1] - 5)
    )
    assert found


def test_the_weights_of_a_grid_are_chosen_by_name(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    ema, live = (
        SampleGrid([1], every=1, size=(6, 6), grid=GRID, weights=name).images(made)
        for name in ("ema", "live")
    )
    assert not torch.equal(ema, live)


class Stream(IterableDataset):
    """Samples without an index or a length."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        images = Images(10)
        for i in range(10):
            yield {**images[i], "id": i}


def test_a_stream_of_samples_trains_and_goes_on(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", train_dataset=Stream(), save_steps=3, max_steps=8)
    assert "a stream of samples" in repr(whole)
    whole.train()
    assert [row["epoch"] for row in read_log(tmp_path / "whole")] == [1.0, 2.0]
    folder = tmp_path / "cut"
    trainer(folder, train_dataset=Stream(), save_steps=3, max_steps=8).train(
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-00000003"
    )
    ours, theirs = (
        (place / "checkpoint-00000008" / "weights.safetensors").read_bytes()
        for place in (folder, tmp_path / "whole")
    )
    assert ours == theirs
    with pytest.raises(TypeError, match="count in steps instead of epochs"):
        trainer(tmp_path / "epochs", train_dataset=Stream(), num_epochs=2)


class Backbone(nn.Module):
    """A UNet of diffusers as a backbone."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = tiny_pipeline("ddpm").components["unet"]

    def forward(self, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.unet(x, timestep).sample


def test_recomputed_activations_change_no_gradient_and_are_switched_off_again(tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        model = Denoiser(Backbone(), CosineBeta(), "v")
        data = [
            {"image": torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(4)
        ]
        settings = config(
            tmp_path / str(on), gradient_checkpointing=on, max_steps=2, param_groups=[], logging_steps=1
        )
        made = Trainer(model, data, codec=PixelCodec(3), config=settings)
        seen: list[bool] = []
        unet: Any = model.backbone.unet  # pyright: ignore[reportAttributeAccessIssue]
        unet.register_forward_hook(
            lambda *_, seen=seen, unet=unet: seen.append(unet.is_gradient_checkpointing)
        )
        made.train()
        assert seen == [on, on]
        assert not unet.is_gradient_checkpointing
        runs.append([row["grad_norm"] for row in read_log(tmp_path / str(on))])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)
    with pytest.raises(ValueError, match="no component has a diffusers or transformers model"):
        trainer(tmp_path / "own", gradient_checkpointing=True).train()


class Broken(GeneralTracker):
    """Fails at everything but to exist."""

    name = "broken"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        raise ConnectionError("the server is away")


def test_a_tracker_that_breaks_does_not_stop_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain")
    plain.train()
    made = trainer(tmp_path / "tracked", log_with=[Broken()])
    with pytest.warns(RuntimeWarning, match="broken"):
        made.train()
    assert made.trackers.failures == {"broken": 2}
    assert all(map(torch.equal, weights(plain), weights(made)))


def test_tensorboard_is_told_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, log_with="tensorboard", logging_steps=2).train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({row["step"]: row["loss"] for row in read_log(tmp_path)})
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["step"] == 2
