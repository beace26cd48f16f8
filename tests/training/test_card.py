"""The model card: true, without traces of a machine, and its code runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from gendiff.testing import tiny_pipeline
from gendiff.training.card import check_facts, scrubbed
from gendiff.training.saving import save_pretrained
from tests.training.kept import components, network, same

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_card_says_what_was_done_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline("flux")
    facts = {
        "title": "Foxes: red ones",
        "text": "Of a forest.",
        "base_model": "someone/foxes-v1",
        "tags": ["text-to-image", "a: b", "no", "gendiff", 'ä "🦊"'],
        "steps": 1200,
        "seed": 3,
        "weights": "ema",
        "settings": {
            "learning_rate": 1e-5,
            "output_dir": tmp_path / "run",
            "cache": str(tmp_path),
            "lr_scheduler": lambda: None,
            "note": f"read from {tmp_path}/photos | sorted",
        },
    }
    save_pretrained(components(pipe, "transformer"), tmp_path / "run", pipeline=pipe, card=facts)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert " at 0x" not in card
    assert ModelCard(card).data.to_dict() == {
        "library_name": "diffusers",
        "base_model": "someone/foxes-v1",
        "tags": ["gendiff", "text-to-image", "a: b", "no", 'ä "🦊"'],
    }
    count = sum(p.numel() for p in pipe.transformer.parameters())
    for fact in (
        "# Foxes: red ones\n\nOf a forest.\n",
        f"| `model.backbone.network` | `transformer/` | {count:,} |",
        "| steps | 1200 |\n| seed | 3 |\n| weights | ema |\n| learning_rate | `1e-05` |",
        "| note | `'read from … \\| sorted'` |",
        torch.__version__,
        "No license is stated",
    ):
        assert fact in card
    assert "| output_dir |" not in card
    assert "| cache |" not in card
    monkeypatch.chdir(tmp_path / "run")
    scope: dict[str, Any] = {}
    (code,) = CODE.findall(card)
    exec(code, scope)
    assert torch.equal(scope["pipeline"].transformer.x_embedder.weight, pipe.transformer.x_embedder.weight)


def test_the_code_of_every_kind_of_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")

    def make() -> dict[str, Any]:
        pipe = tiny_pipeline("flux", seed=5)
        trained = components(pipe, "text_encoder")
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
        return {"network": pipe.transformer, "codec": trained["codec"], "my-head": network()}

    trained, fresh = make(), make()
    save_pretrained(trained, tmp_path / "run", card={"license": "mit"})
    monkeypatch.chdir(tmp_path / "run")
    card = Path("README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.to_dict() == {
        "library_name": "diffusers",
        "license": "mit",
        "tags": ["gendiff", "lora"],
    }
    assert "No license" not in card
    scope: dict[str, Any] = {"pipeline": tiny_pipeline("flux"), "my_head": fresh["my-head"], **fresh}
    for code in CODE.findall(card):
        exec(code, scope)
    assert set(scope["pipeline"].transformer.peft_config) == {"default_0"}
    assert same(scope["text_encoder"].state_dict(), trained["codec"].text_encoder.state_dict())
    assert same(scope["my_head_tensors"]["0.weight"], trained["my-head"][0].weight.detach())
    assert same(fresh["my-head"][0].weight.detach(), trained["my-head"][0].weight.detach())


def test_a_plain_network_is_no_model_of_diffusers(tmp_path: Path) -> None:
    card = (save_pretrained({"net": network()}, tmp_path / "run") / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.to_dict() == {"library_name": "gendiff", "tags": ["gendiff"]}
    assert "| `net` | `net.safetensors` | 39 |" in card  # 12 + 4 + 4 + 4 + 12 + 3, without the frozen 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/x.png", "…"),
        ("~/x", "…"),
        ("C:\\Users\\me", "…"),
        ("{'a': '/data/b', 'c': 1}", "{'a': '…', 'c': 1}"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("someone/foxes 1/2 a/b.md", "someone/foxes 1/2 a/b.md"),
        ("<function f at 0x7f00Ab>", "<function f>"),
    ],
)
def test_no_path_and_no_address_of_a_machine(text: str, expected: str) -> None:
    assert scrubbed(text) == expected


def test_a_fact_that_has_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'base_model'"):
        check_facts({"base_modle": "a/b"})
    with pytest.raises(ValueError, match=r"give \['art'\]"):
        check_facts({"tags": "art"})
