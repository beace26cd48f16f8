"""Loading is strict, changes all or nothing, and takes no more from a file than numbers."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gendiff.testing import text, tiny_pipeline
from gendiff.training.saving import load_pretrained, save_pretrained
from tests.training.kept import network, same


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_pretrained({"net": network()}, tmp_path / "run")


def refused(trained: Mapping[str, nn.Module], path: Path, says: str) -> None:
    """Loading raises, and the components are as they were."""
    before = {name: copy.deepcopy(module.state_dict()) for name, module in trained.items()}
    with pytest.raises(ValueError, match=says):
        load_pretrained(trained, path)
    assert same(before, {name: module.state_dict() for name, module in trained.items()})


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_other_components_are_refused(run: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(3, 3))
    other[3].requires_grad_(False)
    refused({"net": other}, run, r"2\.weight of net was saved with shape \(3, 4\)")
    refused({"net": network().requires_grad_(True)}, run, r"missing '3\.weight'")
    refused({"other": other}, run, r"holds net \(rest\), but .* is other \(rest\)")
    refused(
        {"net": nn.ModuleList(network())}, run, "saved from a Sequential, and the live one is a ModuleList"
    )
    refused({"net": network().half()}, run.parent, r"no gendiff\.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("0.weight"), r"missing '0\.weight'; unknown none"),
        (lambda t: t.update(extra=torch.zeros(1)), "missing none; unknown 'extra'"),
        (lambda t: t.update({"0.weight": torch.zeros(4, 3, 1)}), r"saved with shape \(4, 3, 1\)"),
        (lambda t: t["2.bias"].fill_(float("nan")), r"NaN or infinity in the saved net\.2\.bias"),
        (lambda t: t.update({"2.bias": torch.full((3,), 1e300, dtype=torch.float64)}), "as torch.float32"),
        (lambda t: t.update({"2.bias": torch.zeros(3, dtype=torch.int32)}), "saved as torch.int32"),
        (lambda t: t.update({"2.bias": torch.zeros(3, dtype=torch.complex64)}), "saved as torch.complex64"),
        (lambda t: t.update({"1.num_batches_tracked": torch.tensor(0.5)}), "the live one is torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(run: Path, change: Callable[[Any], Any], says: str) -> None:
    rewritten(run / "net.safetensors", change)
    refused({"net": network()}, run, says)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 64, b"\x08" + b"\x00" * 7 + b'{"a":{}}'])
def test_a_damaged_file_is_refused(run: Path, content: bytes) -> None:
    (run / "net.safetensors").write_bytes(content)
    refused({"net": network()}, run, r"net\.safetensors cannot be read as safetensors|the saved names")


@pytest.mark.parametrize(
    "file",
    [
        "../other/net.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../net.safetensors",
        "a\\b",
        "C:net",
        "gone",
    ],
)
def test_a_manifest_cannot_lead_out_of_its_folder(run: Path, file: str) -> None:
    save_pretrained({"net": network()}, run.parent / "other")
    manifest = json.loads((run / "gendiff.json").read_text())
    manifest["parts"][0]["file"] = file
    (run / "gendiff.json").write_text(json.dumps(manifest))
    refused({"net": network()}, run, "which is not in the folder run")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "a mapping is expected, got list"),
        ("{}", "format None"),
        ('{"format": 2, "parts": []}', "format 2"),
        ('{"format": 1}', "lists no parts"),
        ('{"format": 1, "parts": {}}', "lists no parts"),
        ('{"format": 1, "parts": [1]}', "1 does not say what a part is"),
        ('{"format": 1, "parts": [{"kind": "rest"}]}', "does not say what a part is"),
        ('{"format": 1, "parts": []}', r"holds nothing, but .* is net \(rest\)"),
    ],
)
def test_a_damaged_manifest_is_refused(run: Path, content: str, says: str) -> None:
    (run / "gendiff.json").write_text(content)
    refused({"net": network()}, run, says)


def test_links_are_followed_as_the_hub_lays_its_downloads_out(tmp_path: Path, run: Path) -> None:
    (tmp_path / "blobs").mkdir()
    linked = tmp_path / "snapshots" / "main"
    linked.mkdir(parents=True)
    for number, file in enumerate(run.iterdir()):
        blob = file.rename(tmp_path / "blobs" / str(number))
        (linked / file.name).symlink_to(blob)
    net = network()
    load_pretrained({"net": net}, linked)
    saved = load_file(linked / "net.safetensors")
    assert same({name: net.state_dict()[name] for name in saved}, saved)


# ---- models


def model(kind: str) -> Any:
    if kind == "diffusers":
        return tiny_pipeline("ddpm").components["unet"]
    return text.clip_encoder(text.clip_tokenizer(), width=16)


@pytest.mark.filterwarnings("ignore:`ignore_mismatched_sizes`")
@pytest.mark.parametrize("kind", ["diffusers", "transformers"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(next(iter(t))), "names of model are not those of the live one.*missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "names of model are not those of the live one.*extra"),
        (lambda t: t.update({next(iter(t)): torch.zeros(3, 3)}), "shape|does not fit"),
        (lambda t: next(iter(t.values())).fill_(float("inf")), "NaN or infinity in the saved model"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, kind: str, change: Callable[[Any], Any], says: str
) -> None:
    run = save_pretrained({"model": model(kind)}, tmp_path / "run")
    (file,) = (run / "model").glob("*.safetensors")
    rewritten(file, change)
    refused({"model": model(kind)}, run, says)


@pytest.mark.parametrize("kind", ["diffusers", "transformers"])
def test_nothing_is_built_from_a_saved_configuration(tmp_path: Path, kind: str) -> None:
    """Sizes, code and adapters that a folder asks for have no part in loading weights."""
    first, fresh = model(kind), model(kind)
    fresh.requires_grad_(True)
    with torch.no_grad():
        next(fresh.parameters()).zero_()
    run = save_pretrained({"model": first}, tmp_path / "run")
    hostile = {
        "vocab_size": 2**60,
        "block_out_channels": [2**40],
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": {"quant_method": "evil"},
        "_class_name": "Evil",
    }
    (run / "model" / "config.json").write_text(json.dumps(hostile))
    (run / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    load_pretrained({"model": fresh}, run)
    assert same(first.state_dict(), fresh.state_dict())


def test_the_files_of_a_model_may_be_several(tmp_path: Path) -> None:
    first, fresh = model("diffusers"), model("diffusers")
    run = save_pretrained({"model": first}, tmp_path / "run")
    (file,) = (run / "model").glob("*.safetensors")
    file.unlink()
    first.save_pretrained(run / "model", max_shard_size="20KB")
    assert len(list((run / "model").glob("*.safetensors"))) > 2
    with torch.no_grad():
        next(fresh.parameters()).zero_()
    load_pretrained({"model": fresh}, run)
    assert same(first.state_dict(), fresh.state_dict())
