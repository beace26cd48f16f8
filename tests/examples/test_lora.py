"""The adapter of the example is trained, shipped and read, and the base is what it was where it is off."""

import runpy
import sys
from pathlib import Path

import torch

from gendiff.data import save_images
from gendiff.testing import tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_whole_of_it_on_a_tiny_pipeline(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    for path in save_images(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), "photos"):
        Path(path).with_suffix(".txt").write_text("a photo", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["lora.py", "--data", "photos", "--steps", "3", "--batch", "2"])
    runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")  # asserts the base's bits itself
    printed = capsys.readouterr().out
    assert "unet       128 of" in printed
    assert (tmp_path / "runs/lora/00000.png").stat().st_size > 1000
    pipe = tiny_pipeline("sd15")
    pipe.load_lora_weights(tmp_path / "runs/lora/style.safetensors", adapter_name="read")
    assert pipe.get_active_adapters() == ["read"]
    layers = [one for one in pipe.unet.modules() if "read" in getattr(one, "lora_A", ())]
    assert {one.scaling["read"] for one in layers} == {2.0}
    assert all(bool(one.get_delta_weight("read").any()) for one in layers)
