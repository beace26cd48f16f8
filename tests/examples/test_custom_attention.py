"""The example of a processor of one's own runs offline, checks it, changes both networks, and undoes it."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from gendiff.attention import registered, unregister

ROOT = Path(__file__).parents[2]


def test_attention_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", ["custom_attention.py", "--temperature", "3"])
    before = registered()
    try:
        runpy.run_path(str(ROOT / "examples" / "custom_attention.py"), run_name="__main__")
    finally:
        for name in registered().keys() - before.keys():
            unregister(name)
    said = capsys.readouterr().out
    moved = re.findall(r"(\w+): latents moved by (\S+)", said)
    assert [name for name, _ in moved] == ["StableDiffusionPipeline", "FluxPipeline"]
    assert all(float(amount) > 0.01 for _, amount in moved)
    assert said.rstrip().endswith("both undone exactly")
