"""A checkpoint that was changed anywhere is refused by name, and the one before it is used."""

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from gendiff.training import manifest
from gendiff.training.checkpoint import newest, path_of, write
from tests.training.bits import same

State = dict[str, Any]
Files = dict[str, bytes]


def state_of(run: int, step: int) -> State:
    generator = torch.Generator().manual_seed(100 * run + step)
    numbers = torch.randn(4, 16, generator=generator)
    return {
        "weights": {"net.weight": numbers, "net.bias": numbers[0].bfloat16()},
        "update": {
            "moments": {"net.weight": numbers**2},
            "options": [{"lr": 10.0**-step, "betas": [0.9, 0.99]}],
        },
        "position": {"step": step, "epoch": run, "samples": 64 * step, "logged": [step, None]},
    }


def files_of(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- mutations: each changes the files of one checkpoint, given those of three others


def flip(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    text, bit = bytearray(files[name]), draw.randrange(8 * len(files[name]))
    text[bit // 8] ^= 1 << (bit % 8)
    files[name] = bytes(text)


def _range(draw: random.Random, text: bytes) -> tuple[int, int]:
    begin = draw.randrange(len(text))
    return begin, min(len(text), begin + draw.choice([1, 2, 8, 64, 512]))


def truncate(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    files[name] = files[name][: draw.randrange(len(files[name]))]


def cut_out(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    begin, end = _range(draw, files[name])
    files[name] = files[name][:begin] + files[name][end:]


def zero(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    begin, end = _range(draw, files[name])
    files[name] = files[name][:begin] + bytes(end - begin) + files[name][end:]


def insert(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    at = draw.randrange(len(files[name]) + 1)
    files[name] = files[name][:at] + draw.randbytes(draw.choice([1, 8, 100])) + files[name][at:]


def splice(draw: random.Random, files: Files, others: list[Files]) -> None:
    """Bytes of the same place of another checkpoint, or of another place or file of this one."""
    name = draw.choice(sorted(files))
    source = draw.choice([one[name] for one in others] + [files[draw.choice(sorted(files))]])
    begin, end = _range(draw, files[name])
    at = draw.choice([begin, draw.randrange(len(source))])
    files[name] = files[name][:begin] + source[at : at + end - begin] + files[name][end:]


def swap(draw: random.Random, files: Files, others: list[Files]) -> None:
    """A whole file, the manifest among them, of another step or another run, or of this checkpoint."""
    name = draw.choice(sorted(files))
    if draw.random() < 0.8:
        files[name] = draw.choice(others)[name]
    else:
        other = draw.choice(sorted(files))
        files[name], files[other] = files[other], files[name]


def swap_all_but(draw: random.Random, files: Files, others: list[Files]) -> None:
    """Everything of another checkpoint but one file; another run's, whole, would be that run's."""
    source, name = draw.choice(others), draw.choice(sorted(files))
    files.update({other: text for other, text in source.items() if other != name})


def delete(draw: random.Random, files: Files, others: list[Files]) -> None:
    for name in draw.sample(sorted(files), draw.choice([1, 1, 2, len(files)])):
        del files[name]


def rename(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(sorted(files))
    new = draw.choice([name.upper(), f"{name}~", f".{name}", "other.safetensors", *sorted(files)])
    files[new] = files.pop(name)


def add(draw: random.Random, files: Files, others: list[Files]) -> None:
    name = draw.choice(["extra.safetensors", "a.pkl", ".hidden", "state.json~", "Manifest.json", "weights"])
    files[name] = draw.choice([b"", draw.randbytes(50), files[draw.choice(sorted(files))]])


def edit(draw: random.Random, files: Files, others: list[Files]) -> None:
    """A field of the manifest, without its seal."""
    whole = json.loads(files["manifest.json"])
    content = whole["content"]
    file = draw.choice(sorted(content["files"]))
    new: list[Callable[[], Any]] = [
        lambda: content.update(step=content["step"] + draw.choice([-1, 1, 2**70])),
        lambda: content.update(format=draw.choice([0, 2, "1", None])),
        lambda: content["files"][file].update(size=draw.choice([0, -1, 2**60, "9", None])),
        lambda: content["files"][file].update(sha256=draw.choice(["", "0" * 64, None])),
        lambda: content["files"].update({draw.choice(["../a", "/etc/a"]): content["files"][file]}),
        lambda: content["files"].pop(file),
        lambda: whole.update(sha256="0" * 64),
        lambda: whole.pop(draw.choice(["content", "sha256"])),
        lambda: whole.update(extra=1),
    ]  # fmt: skip
    draw.choice(new)()
    files["manifest.json"] = json.dumps(whole, sort_keys=True, indent=draw.choice([None, 2])).encode()


MUTATIONS = [flip] * 3 + [
    truncate, cut_out, zero, insert, splice, swap, swap_all_but, delete, rename, add, edit
]  # fmt: skip


# ---- the test


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Files]]:
    """A run with two steps, and the files of its first step and of the two steps of another run."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    folders = [write(tmp_path / f"run{run}", step, state_of(run, step)) for run in (0, 1) for step in (1, 2)]
    first, _, *other_run = map(files_of, folders)
    return tmp_path / "run0", [first, *other_run]


def mutated(number: int, seed: int, original: Files, others: list[Files]) -> Iterator[tuple[str, Files]]:
    """Mutations that change something, every kind in turn."""
    draw = random.Random(seed)
    for mutation in (MUTATIONS * (number // len(MUTATIONS) + 1))[:number]:
        files = dict(original)
        while files == original:
            mutation(draw, files, others)
        yield mutation.__name__, files


def outcome(root: Path) -> str:
    """What `newest` makes of a run with steps 1 and 2, whose second is damaged."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = newest(root)
    assert found is not None
    path, state = found
    step = int(path.name[-1])
    if not same(state, state_of(0, step)):
        return "wrong"
    if step == 2:
        return "harmless"
    told = [str(one.message) for one in warned]
    assert len(told) == 1
    assert told[0].startswith("checkpoint-00000002: ")
    assert told[0].endswith("checkpoint-00000001 is used instead.")
    return "refused"


def outcomes(three: tuple[Path, list[Files]], number: int, seed: int) -> Counter[tuple[str, str]]:
    root, others = three
    folder = path_of(root, 2)
    original = files_of(folder)
    seen = Counter[tuple[str, str]]()
    for kind, files in mutated(number, seed, original, others):
        shutil.rmtree(folder)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_bytes(text)
        seen[kind, outcome(root)] += 1
    return seen


def total(seen: Counter[tuple[str, str]]) -> dict[str, int]:
    result = Counter[str]()
    for (_, what), count in seen.items():
        result[what] += count
    return dict(result)


def test_every_mutation_is_refused_and_the_one_before_is_used(three: tuple[Path, list[Files]]) -> None:
    seen = outcomes(three, 1000, seed=0)
    print(dict(seen))
    assert total(seen) == {"refused": 1000}
    assert {kind for kind, _ in seen} == {mutation.__name__ for mutation in MUTATIONS}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_more_mutations_are_refused(three: tuple[Path, list[Files]], seed: int) -> None:
    assert total(outcomes(three, 1000, seed)) == {"refused": 1000}


def test_without_the_hashes_many_go_unnoticed(
    three: tuple[Path, list[Files]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes are what refuses them: sizes, names and the formats of the files alone do not."""
    monkeypatch.setattr(manifest, "digest_of", lambda file: ANY)
    seen = outcomes(three, 200, seed=0)
    print(dict(seen))
    assert seen["flip", "wrong"] >= 10
    assert seen["swap", "wrong"] >= 3
