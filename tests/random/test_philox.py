"""The generator against published vectors and plain integers, the Triton kernel against torch."""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff import _philox
from gendiff._philox import (
    box_muller,
    component,
    draw,
    draw_with_torch,
    hash64,
    kernel,
    low_high,
    numbers,
    open32,
    open64,
    philox,
    sample_keys,
    signed,
)

WORD = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
PATH = st.lists(st.text("ab/\\", min_size=1, max_size=3), min_size=1, max_size=3)
EXTREMES = [0, 1, 511, 512, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 2, 2**32 - 1]

# kat_vectors of Random123: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper draws it: multiply the left words, exchange the halves, bump the key."""
    left, right = list(counter[0::2]), list(counter[1::2])
    for n in range(10):
        bumped = [(key[0] + n * 0x9E3779B9) % 2**32, (key[1] + n * 0xBB67AE85) % 2**32]
        high_0, low_0 = divmod(left[0] * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(left[1] * 0xCD9E8D57, 2**32)
        left = [high_1 ^ right[0] ^ bumped[0], high_0 ^ right[1] ^ bumped[1]]
        right = [low_1, low_0]
    return [left[0], right[0], left[1], right[1]]


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in units in the last place: the floats of one dtype, numbered in order."""
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    top = torch.iinfo(integer).min
    i, j = (
        torch.where(x.view(integer) < 0, top - x.view(integer).long(), x.view(integer).long()) for x in (a, b)
    )
    return (i - j).abs()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_vectors(counter: str, key: str, expected: str) -> None:
    c, k, words = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert plain(c, k) == words
    assert list(philox(c, k)) == words
    tensors = philox([torch.tensor([x]) for x in c], [torch.tensor([x]) for x in k])
    assert [int(x) for x in tensors] == words


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), st.tuples(WORD, WORD))
def test_tensors_and_integers_agree_with_the_plain_generator(
    counters: list[tuple[int, int, int, int]], key: tuple[int, int]
) -> None:
    expected = [plain(counter, key) for counter in counters]
    assert [list(philox(counter, key)) for counter in counters] == expected
    columns = [torch.tensor(column) for column in zip(*counters, strict=True)]
    assert torch.stack(philox(columns, key), 1).tolist() == expected


@pytest.mark.parametrize("few", [0, 10**9], ids=["tensors", "integers"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 262])
def test_element_e_is_word_e_mod_4_of_block_e_div_4(
    count: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_philox, "FEW", few)
    keys, counter = [5, -1, -(2**63), 2**63 - 1], (7, 2**32 - 1, 2**31)
    expected = [[plain((e // 4, *counter), low_high(key))[e % 4] for e in range(count)] for key in keys]
    assert draw(torch.tensor(keys), count, counter, "bits", torch.int64).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_chunks_leave_no_trace(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, counter = sample_keys(0, range(7)), (0, 1, 2)
    whole = draw(keys, 203, counter, "normal", dtype)
    monkeypatch.setattr(_philox, "FEW", 0)
    for chunk in (17, 51, 120):  # blocks, of 51 a sample
        monkeypatch.setattr(_philox, "CHUNK", -(-chunk // torch.get_num_threads()))
        assert torch.equal(draw(keys, 203, counter, "normal", dtype), whole)


def test_the_open_interval_is_open_exact_and_symmetric() -> None:
    words = torch.tensor(EXTREMES)
    narrow, wide = open32(words), open64(words)
    assert narrow.tolist() == [((x >> 9) + 0.5) / 2**23 for x in EXTREMES]
    assert wide.tolist() == [(x + 0.5) / 2**32 for x in EXTREMES]
    for u in (narrow, wide):
        assert 0.0 < float(u.min()) == 1 - float(u.max()) < 1e-7


def test_normals_are_those_of_box_and_muller_at_every_extreme() -> None:
    pairs = [(a, b) for a in EXTREMES for b in EXTREMES]
    first, second = (torch.tensor(column) for column in zip(*pairs, strict=True))
    for got, turn in zip(box_muller(first, second), (math.cos, math.sin), strict=True):
        expected = [
            math.sqrt(-2 * math.log((a + 0.5) / 2**32)) * turn(2 * math.pi * ((b + 0.5) / 2**32))
            for a, b in pairs
        ]
        assert got.isfinite().all()
        assert got.abs().max() < 6.8
        assert ulps(got, torch.tensor(expected, dtype=torch.float64)).max() <= 4


def test_sixteen_bits_are_rounded_from_float32() -> None:
    words = tuple(torch.tensor(EXTREMES) for _ in range(4))
    assert {x.dtype for x in numbers(words, "normal", torch.bfloat16)} == {torch.float32}
    keys, counter = sample_keys(0, [1]), (0, 0, 0)
    wide = draw(keys, 999, counter, "normal", torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(draw(keys, 999, counter, "normal", dtype), wide.float().to(dtype))


@pytest.mark.parametrize("size", [0, 1, 32, 33])
def test_keys_are_words_0_and_1_of_seed_id_epoch_and_occurrence(size: int) -> None:
    ids = [(-1) ** n * (n * 0x9E3779B97F4A7C15 % 2**63) for n in range(size)]
    epochs, occurrences = [2**32 - 1 - n for n in range(size)], list(range(size))
    seed = 2**64 - 3
    words = [
        plain((*low_high(i), epoch, occurrence), low_high(seed))
        for i, epoch, occurrence in zip(ids, epochs, occurrences, strict=True)
    ]
    expected = [signed(low + high * 2**32) for low, high, _, _ in words]
    assert sample_keys(seed, ids, epoch=epochs, occurrence=occurrences).tolist() == expected
    tensors = torch.tensor(ids, dtype=torch.int64), torch.tensor(epochs), torch.tensor(occurrences)
    assert sample_keys(seed, tensors[0], epoch=tensors[1], occurrence=tensors[2]).tolist() == expected


def test_a_string_id_is_its_hash() -> None:
    # BLAKE2b with a digest of 8 bytes, read as a little-endian number
    assert hash64("abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little")
    assert sample_keys(0, ["abc", "täglich.png"]).tolist() == [
        int(sample_keys(0, [signed(hash64(text))])) for text in ("abc", "täglich.png")
    ]
    assert sample_keys(0, ["\udcff.png"]).shape == (1,)  # a file name that is not valid UTF-8


def test_every_part_of_a_key_matters() -> None:
    keys = [
        sample_keys(seed, [i], epoch=epoch, occurrence=occurrence).item()
        for seed in (0, 1, 2**32)
        for i in (0, 1, 2**32)
        for epoch in (0, 1)
        for occurrence in (0, 1)
    ]
    assert len(set(keys)) == len(keys) == 36


@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (ValueError, "seed is -1, which is not in 0", {"seed": -1}),
        (ValueError, "seed is 18446744073709551616", {"seed": 2**64}),
        (ValueError, "a sample id is 9223372036854775808", {"ids": [2**63]}),
        (ValueError, "epoch is 4294967296", {"epoch": 2**32}),
        (ValueError, "occurrence is -1", {"occurrence": [0, -1]}),
        (ValueError, "epoch has 3 values for 2 ids", {"epoch": [0, 1, 2]}),
        (TypeError, "ids=\\['abc'\\]", {"ids": "abc"}),
        (TypeError, "(sample id|ids)", {"ids": [1.5, 2.5]}),
    ],
)
def test_impossible_keys_are_refused(error: type[Exception], text: str, changed: dict[str, object]) -> None:
    with pytest.raises(error, match=text):
        sample_keys(**({"seed": 0, "ids": [1, 2]} | changed))


@settings(max_examples=50)
@given(PATH, PATH)
def test_different_paths_are_different_strings(a: list[str], b: list[str]) -> None:
    assert ("/".join(map(component, a)) == "/".join(map(component, b))) == (a == b)
    assert component(1) not in (component("1"), component("\\1"))


def test_without_triton_the_fallback_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gendiff._philox_triton", None)  # what a failing import looks like
    with pytest.warns(RuntimeWarning, match=r"plain torch path on cpu.*: (Import|ModuleNotFound)Error"):
        assert kernel.__wrapped__(torch.device("cpu")) is None


CASES = [
    (kind, dtype, count)
    for kind, dtype in [
        ("bits", torch.int64),
        ("uniform", torch.float32),
        ("uniform", torch.float64),
        ("normal", torch.float16),
        ("normal", torch.bfloat16),
        ("normal", torch.float32),
        ("normal", torch.float64),
    ]
    for count in (1, 4, 7, 1204, 1027)
]
COUNTER = (3, 2**32 - 1, 2**31)
CHILD = """
import sys
import torch
from jaxtyping import install_import_hook

with install_import_hook("gendiff", "beartype.beartype"):  # not to come between kernel and compiler
    from gendiff._philox_triton import fill

keys, cases, counter = torch.load(sys.argv[1])
results = []
for kind, dtype, count in cases:
    results.append(torch.zeros(len(keys) + 1, count, dtype=dtype))  # one row more than the kernel may write
    fill(results[-1][:-1], keys, counter, kind)
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype, int], Tensor]:
    """What the Triton kernel writes in Triton's interpreter, which is chosen before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernel cannot be interpreted")
    folder: Path = tmp_path_factory.mktemp("interpreted")
    torch.save((sample_keys(1, range(3)), CASES, COUNTER), folder / "in.pt")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", CHILD, str(folder / "in.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "out.pt"), strict=True))


@pytest.mark.parametrize(("kind", "dtype", "count"), CASES)
def test_the_kernel_writes_what_torch_computes(
    kind: str, dtype: torch.dtype, count: int, interpreted: dict[tuple[str, torch.dtype, int], Tensor]
) -> None:
    got = interpreted[kind, dtype, count]
    expected = draw_with_torch(sample_keys(1, range(3)), count, COUNTER, kind, dtype)
    assert not got[-1].any()
    if kind == "normal":  # the interpreter cuts bfloat16 off where a GPU rounds
        assert ulps(got[:-1], expected).max() <= (4 if dtype == torch.float64 else 1)
    else:
        assert torch.equal(got[:-1], expected)
