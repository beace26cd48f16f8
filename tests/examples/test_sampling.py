"""The sampling examples run offline on tiny pipelines, and do what they say; the figures of a handoff."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gendiff.interop.diffusers import codec_of
from gendiff.testing import pipeline_folder, tiny_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module


def test_text_to_image(part: Callable) -> None:
    example, pipe = part("text_to_image"), tiny_pipeline("sd15")
    images = example.draw(pipe, ["a red fox", "a red fox"], "blurry", 64, 6, 7.5, seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert (images[0] - images[1]).abs().max() > 0.05  # other noise
    again = example.draw(pipe, ["a red fox"], "blurry", 64, 6, 7.5, seed=0)
    torch.testing.assert_close(again, images[:1], rtol=1e-3, atol=1e-3)
    other = example.draw(pipe, ["a blue whale"], "blurry", 64, 6, 7.5, seed=0)
    assert (other - again).abs().max() > 0.01


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow(name: str, part: Callable) -> None:
    example, pipe = part("flow"), tiny_pipeline(name)
    first, second = (example.draw(pipe, "a lighthouse", 64, 4, scale, seed=0) for scale in (3.5, 7.0))
    assert first.shape == (1, 3, 64, 64)
    assert (first - second).abs().max() > 1e-3  # the scale says something, as guidance or to the network


@pytest.mark.parametrize("base", ["sdxl-inpaint", "sdxl-inpaint-4"])
def test_inpainting_in_two_stages(base: str, part: Callable) -> None:
    example = part("sdxl_inpaint")
    photo, hole = example.example(64)
    image = example.paint(
        tiny_pipeline(base), tiny_pipeline("sdxl-refiner"), photo, hole, "a pagoda", steps=10, seed=0
    )
    kept = hole.expand_as(photo) == 0
    assert torch.equal(image[kept], photo[kept])
    assert (image - photo)[~kept].abs().mean() > 0.05


def test_the_loop_by_hand(part: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import runpy
    import sys

    part("local_pipeline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["latent_loop.py", "--steps", "5", "--device", "cpu"])
    runpy.run_path(str(ROOT / "examples" / "latent_loop.py"), run_name="__main__")  # asserts equality itself
    assert (tmp_path / "runs" / "latent_loop" / "00000.png").stat().st_size > 1000


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = pipeline_folder("sd15", tmp_path / "sd15")
    index = folder / "model_index.json"
    written = index.stat().st_mtime_ns
    assert pipeline_folder("sd15", folder) == folder
    assert index.stat().st_mtime_ns == written
    opened, image = DiffusionPipeline.from_pretrained(folder), torch.rand(1, 3, 64, 64)
    mine, theirs = (codec_of(pipe).latents(image) for pipe in (opened, tiny_pipeline("sd15")))
    assert torch.equal(mine, theirs)


def test_what_is_left_of_the_noise_after_a_handoff(part: Callable) -> None:
    """A nine-channel base hands noise over that stays; ours has none at the end."""
    figures = part("handoff").figures()
    handed, end = figures["diffusers, sdxl-inpaint"]
    assert handed == end > 0.3
    handed, end = figures["gendiff"]
    assert handed > 0.3  # it is the level of the cut
    assert end == 0
