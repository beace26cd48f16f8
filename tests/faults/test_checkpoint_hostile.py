"""A checkpoint that was made to harm, with hashes that are right: no code runs, nothing leaves the folder."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gendiff.training.checkpoint import CheckpointError, read, verify, write
from gendiff.training.manifest import sealed

TENSORS, STATE, MANIFEST = "a.safetensors", "state.json", "manifest.json"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, 1, {"a": {"b": torch.ones(2)}, "c": [1, 2.5]})


def content(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_bytes())["content"]


def forge(path: Path, name: str, text: bytes) -> None:
    """Put a file in place of another, with its size and hash in the manifest."""
    (path / name).write_bytes(text)
    made = content(path)
    made["files"][name] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (path / MANIFEST).write_bytes(sealed(made))


def refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read(path)


TENSOR = '{"a":{"b":{"$tensor":"b"}}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TENSOR + ',"c":NaN}', "has NaN, which is no JSON"),
        (TENSOR + ',"c":-Infinity}', "has -Infinity"),
        (TENSOR + ',"c":1e999}', "too large"),
        (TENSOR + ',"c":' + "9" * 5000 + "}", "state.json"),
        (TENSOR + ',"c":1,"c":2}', "has the key 'c' twice"),
        (TENSOR + ',"c":{"x":[{"d":1,"d":2}]}}', "has the key 'd' twice"),
        (TENSOR + ',"c":' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
        (TENSOR + ',"c":' + "[" * 10**6 + "]" * 10**6 + "}", "nested deeper than 64"),
        (TENSOR + ',"c":' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}", "nested deeper than 64"),
        (TENSOR + ',"c":{"$tensor":"b"}}', "'.tensor' of 'b', which is not there"),
        ('{"a":[{"$tensor":"b"},{"$tensor":"b"}]}', "'b', which is not there or is there twice"),
        ('{"a":{"$tensor":["b"]}}', "'.tensor' where it means nothing"),
        ('{"a":{"$tensor":"b","x":1}}', "'.tensor' where it means nothing"),
        ('{"a":{"$import":"os"}}', "'.import' of 'os'"),
        (TENSOR + ',"c":{"$int":"1_0"}}', "'.int' of '1_0'"),
        (TENSOR + ',"c":{"$float":"nan"}}', "'.float' of 'nan'"),
        ('{"a":1}', r"does not say where the tensors \['b'\] of 'a' belong"),
        ('{"c":1}', r"does not say where the tensors \['b'\] of 'a' belong"),
        ("[]", "is no JSON object"),
        ("", "is no JSON"),
        ("\ufeff" + TENSOR + "}", "is no JSON"),
    ],
)
def test_state_that_we_do_not_write(good: Path, text: str, says: str) -> None:
    forge(good, STATE, text.encode())
    refused(good, f"^checkpoint-00000001: state.json .*{says}|{says}.*")


def header(text: str, payload: int = 8) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + bytes(payload)


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'"b":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"PK\x03\x04",
        b"\x80\x04\x95",
        (2**63).to_bytes(8, "little") + b"{}",
        (101 * 2**20).to_bytes(8, "little") + b"{}",
        header("{" + entry(shape="[4611686018427387904]") + "}"),
        header("{" + entry(shape="[2,4611686018427387904]") + "}"),
        header("{" + entry(shape="[-2]") + "}"),
        header("{" + entry(offsets="[0,16]") + "}"),
        header("{" + entry(offsets="[8,0]") + "}"),
        header("{" + entry(dtype="F31") + "}"),
        header("{" + entry(dtype="F4", shape="[16]") + "}"),
        header("{" + entry() + "}", payload=9),
        header("{" + entry() + "," + entry(offsets="[8,16]") + "}", payload=16),
        header("{" + entry().replace('"b"', '"x"') + "}"),
        header('{"b":' * 50000 + "1" + "}" * 50000),
    ],
)
def test_tensors_that_we_do_not_write(good: Path, text: bytes) -> None:
    forge(good, TENSORS, text)
    refused(good, r"^checkpoint-00000001: (a\.safetensors|state\.json) ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=2), "has format 2, and this version of gendiff reads 1. Use the version"),
        (lambda c: c.update(format="1"), "has format '1'"),
        (lambda c: c.pop("format"), "has format None"),
        (lambda c: c.update(step=2), r"says that this is step 2\. If the folder was renamed, call it"),
        (lambda c: c.update(step=-1), "says that this is step -1"),
        (lambda c: c.update(step=1.0), "does not say its step"),
        (lambda c: c.update(step=True), "does not say its step"),
        (lambda c: c.update(more=1), "nothing more"),
        (lambda c: c.update(files=[STATE]), "does not say its step and its files"),
        (lambda c: c["files"].pop(STATE), "does not say its step and its files"),
        (lambda c: c["files"].pop(TENSORS), "'a.safetensors' is not in the manifest"),
        (lambda c: c["files"].update({"z.safetensors": c["files"][TENSORS]}), "z.safetensors is missing"),
        (lambda c: c["files"][TENSORS].update(size=True), "says of 'a.safetensors'"),
        (lambda c: c["files"][TENSORS].update(size=2**60), "had 1152921504606846976 when written"),
        (lambda c: c["files"][TENSORS].update(sha256=1), "says of 'a.safetensors'"),
        (lambda c: c["files"][TENSORS].update(more=1), "says of 'a.safetensors'"),
        *[
            (lambda c, name=name: c["files"].update({name: c["files"][TENSORS]}), "what it says of no file")
            for name in ("../a.safetensors", "/a.safetensors", "b/a.safetensors", "a.pkl", "", "..", MANIFEST)
        ],
        (lambda c: c["files"].update({"a.safetensors\n": c["files"][TENSORS]}), "what it says of no file"),
    ],
)  # fmt: skip
def test_manifests_that_we_do_not_write(good: Path, change: Callable[[Any], Any], says: str) -> None:
    made = content(good)
    change(made)
    (good / MANIFEST).write_bytes(sealed(made))
    refused(good, f"^checkpoint-00000001: .*{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[]", "does not agree with its own SHA-256"),
        (b'{"content":{}}', "does not agree with its own SHA-256"),
        (b"[" * 10**5 + b"]" * 10**5, "nested deeper"),
        (b'{"content":{},"content":{}}', "twice"),
        (b" " * (2**20 + 1), "has 1048577 bytes, and 1048576 is the most"),
        ("{}".encode("utf-16"), "is no JSON"),
    ],
)
def test_text_that_is_no_manifest(good: Path, text: bytes, says: str) -> None:
    (good / MANIFEST).write_bytes(text)
    refused(good, f"manifest.json .*{says}")


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST, "extra"])
@pytest.mark.parametrize("kind", ["link", "link to nowhere", "folder", "pipe"])
def test_what_is_no_plain_file(good: Path, tmp_path: Path, name: str, kind: str) -> None:
    (good / "extra").touch()
    (good / name).rename(tmp_path / "elsewhere")
    if kind == "folder":
        (good / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(good / name)
    else:
        (good / name).symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    refused(good, f"(?s)'{name}' is no plain file|'extra' is not in the manifest")


def test_what_is_no_folder_or_has_another_name(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-00000009").symlink_to(good)
    (tmp_path / "checkpoint-00000008").touch()
    refused(
        tmp_path / "checkpoint-00000009", "is no folder; give the folder of a checkpoint itself, and no link"
    )
    refused(tmp_path / "checkpoint-00000008", "is no folder")
    refused(tmp_path / "checkpoint-00000007", "is not there")
    monkeypatch.chdir(good)
    verify(Path())
    good.rename(tmp_path / "best")
    refused(tmp_path / "best", "^best: manifest.json says that this is step 1. If .* checkpoint-00000001")


def test_what_cannot_be_read_is_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(5, "Input/output error", str(good / STATE))

    monkeypatch.setattr(os, "scandir", fail)
    refused(good, r"^checkpoint-00000001: state.json cannot be read \(Input/output error\)")


def test_no_code_of_a_pickle_runs(good: Path, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"b": torch.ones(2), "c": Canary()}, tmp_path / "hostile")
    forge(good, TENSORS, (tmp_path / "hostile").read_bytes())
    refused(good, "a.safetensors is no safetensors file")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_says_it_is_large_takes_no_memory(good: Path) -> None:
    """Sparse files of a terabyte and a gigabyte: their lengths are refused before they are read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.truncate(good / TENSORS, 2**40)
    refused(good, "a.safetensors has 1099511627776 bytes, and had")
    forge(good, TENSORS, b"")
    os.truncate(good / STATE, 2**30)
    made = content(good)
    made["files"][STATE]["size"] = 2**30
    (good / MANIFEST).write_bytes(sealed(made))
    refused(good, "state.json has 1073741824 bytes, and 67108864 is the most")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
