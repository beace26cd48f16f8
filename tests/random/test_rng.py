"""What an Rng promises: streams, samples and draws that are independent, distributions that are right."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gendiff import _philox
from gendiff._philox import hash64, low_high, open32, philox
from gendiff.random import GeneratorRng, Randomness, Rng, as_rng, sample_keys

MANY = 200_000
DRAWS = ["bits", "normal", "uniform", "integers"]
SOURCES = [Rng(0), GeneratorRng(torch.Generator().manual_seed(0))]


def any_draw(rng: Rng, kind: str, shape: Sequence[int], name: str = "noise") -> Tensor:
    if kind == "integers":
        return rng.integers(name, 1000, shape, low=-7)
    return getattr(rng, kind)(name, shape)


def largest_correlation(rows: Tensor) -> float:
    """The largest |r|·sqrt(n) between two rows; unit normal for each pair of independent ones."""
    off_diagonal = torch.corrcoef(rows.double()) - torch.eye(len(rows), dtype=torch.float64)
    return float(off_diagonal.abs().max()) * math.sqrt(rows.shape[1])


def bound(pairs: int) -> float:
    """What `largest_correlation` of so many pairs exceeds once in a thousand times."""
    return float(stats.norm.isf(0.001 / pairs / 2))


@pytest.mark.parametrize("path", [["noise"], ["loss", "noise"], [3, "noise"], ["a/b", "c\\d", -1, "/"]])
def test_the_numbers_are_a_pure_function_of_key_stream_draw_and_element(path: list[str | int]) -> None:
    text = {"noise": "noise", "loss": "loss/noise", 3: "\\3/noise", "a/b": "a\\/b/c\\\\d/\\-1/\\/"}[path[0]]
    rng = Rng(123)
    for name in path[:-1]:
        rng = rng.fold(name)
    for nth in range(3):
        expected = [philox((e // 4, nth, *low_high(hash64(text))), (123, 0))[e % 4] for e in range(6)]
        assert rng.bits(path[-1], (2, 3)).flatten().tolist() == expected


@given(st.data())
def test_a_batch_may_be_split_anywhere(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6), "samples")
    cuts = data.draw(st.lists(st.integers(0, size), max_size=2).map(sorted), "cuts")
    inner = data.draw(st.lists(st.integers(1, 5), max_size=3), "shape of a sample")
    kind, few = data.draw(st.sampled_from(DRAWS)), data.draw(st.sampled_from([0, 8, 32]))
    edges = [0, *cuts, size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_philox, "FEW", few)  # so that parts go one way and the whole the other
        rng = Rng(5, ids=range(size), epoch=2, occurrence=[n % 3 for n in range(size)])
        parts = [rng[a:b] for a, b in pairwise(edges)]
        for _ in range(2):
            pieces = [any_draw(part, kind, (len(part.keys), *inner)) for part in parts]
            assert torch.equal(torch.cat(pieces), any_draw(rng, kind, (size, *inner)))


def test_a_slice_starts_where_the_whole_is_and_goes_on_separately() -> None:
    rng, twin = Rng(0, ids=range(3)), Rng(0, ids=range(3))
    rng.normal("noise", (3, 2)), twin.normal("noise", (3, 2))
    part = rng[1:]
    second = rng.normal("noise", (3, 2))
    assert torch.equal(part.normal("noise", (2, 2)), second[1:])
    assert torch.equal(rng.normal("noise", (3, 2)), [twin.normal("noise", (3, 2)) for _ in range(2)][1])
    assert torch.equal(rng.fold("a")[1:].normal("x", (2, 2)), rng[1:].fold("a").normal("x", (2, 2)))
    assert torch.equal(rng[::2].fold("a").normal("x", (2, 5)), rng.fold("a").normal("x", (3, 5))[::2])


def test_a_longer_sample_begins_like_a_shorter_one() -> None:
    assert torch.equal(Rng(0).normal("x", (1001,))[:7], Rng(0).normal("x", (7,)))


def test_streams_do_not_know_of_each_other() -> None:
    alone, mixed = Rng(1), Rng(1)
    expected = [alone.normal("noise", (5,)) for _ in range(3)]
    got = []
    for _ in range(3):
        mixed.uniform("time", (2,))
        mixed.fold("noise").normal("noise", (4,))
        got.append(mixed.normal("noise", (5,)))
        mixed.integers("index", 7, (3,))
    assert all(map(torch.equal, got, expected))
    assert not torch.equal(expected[0], expected[1])


def test_every_method_continues_the_one_count_of_a_name() -> None:
    rng, words = Rng(1), Rng(1)
    first, second = words.bits("x", (9,)), words.bits("x", (9,))
    assert torch.equal(rng.bits("x", (9,)), first)
    assert torch.equal(rng.uniform("x", (9,)), open32(second))


def test_rewind_and_a_new_rng_start_over() -> None:
    rng = Rng(0, ids=["a", "b"], epoch=1)
    child = rng.fold("child")
    first, of_child = rng.normal("x", (2, 3)), child.normal("x", (2, 3))
    rng.normal("x", (2, 3))
    rng.rewind()
    assert torch.equal(rng.normal("x", (2, 3)), first)
    assert torch.equal(Rng(0, ids=["a", "b"], epoch=1).normal("x", (2, 3)), first)
    assert not torch.equal(child.normal("x", (2, 3)), of_child)


def test_children_are_told_apart_and_start_at_their_first_draw() -> None:
    rng = Rng(0)
    rng.normal("x", (8,))
    children = [
        rng.fold("a"),
        rng.fold("b"),
        rng.fold("a").fold("b"),
        rng.fold("a/b"),
        rng.fold(1),
        rng.fold("1"),
    ]
    drawn = [tuple(child.normal("x", (8,)).tolist()) for child in children]
    drawn += [tuple(Rng(0).normal(name, (8,)).tolist()) for name in ("x", "a", "a/x")]
    assert len(set(drawn)) == len(drawn)
    assert tuple(Rng(0).fold("a").normal("x", (8,)).tolist()) == drawn[0]


def test_keys_in_a_buffer_are_read_at_every_draw() -> None:
    old, new = sample_keys(0, range(3)), sample_keys(0, range(3), epoch=1)
    buffer = old.clone()
    rng, view = Rng.from_keys(buffer), Rng.from_keys(buffer)[1:]
    assert rng.keys is buffer
    assert torch.equal(rng.normal("x", (3, 5)), Rng(0, ids=range(3)).normal("x", (3, 5)))
    buffer.copy_(new)
    rng.rewind()
    expected = Rng(0, ids=range(3), epoch=1).normal("x", (3, 5))
    assert torch.equal(rng.normal("x", (3, 5)), expected)
    assert torch.equal(view.normal("x", (2, 5)), expected[1:])
    assert torch.equal(Rng.from_keys(torch.tensor(9)).normal("x", (3, 5)), Rng(9).normal("x", (3, 5)))


def test_an_rng_travels_to_a_worker_with_its_counts() -> None:
    rng = Rng(3, ids=range(2)).fold("data")
    rng.normal("x", (2,))
    others = [pickle.loads(pickle.dumps(rng)), copy.deepcopy(rng), rng.to("cpu"), rng.to(None)]
    expected = rng.normal("x", (2,))
    assert all(torch.equal(other.normal("x", (2,)), expected) for other in others)


def test_shapes_and_dtypes() -> None:
    rng, batch = Rng(0), Rng(0, ids=[4, 5])
    assert rng.normal("x", ()).shape == ()
    assert rng.normal("x", torch.Size([2, 0, 3])).shape == (2, 0, 3)
    assert batch.uniform("x", [2]).shape == (2,)
    assert batch.normal("x", (2, 0)).shape == (2, 0)
    assert Rng(0, ids=[]).normal("x", (0, 3)).shape == (0, 3)
    assert rng.bits("x", (2,)).dtype == rng.integers("x", 3, (2,)).dtype == torch.int64
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert rng.normal("x", (2,), dtype=dtype).dtype == dtype
    assert repr(batch.fold("loss")) == "Rng(2 samples, path='loss/', device='cpu')"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_normal(dtype: torch.dtype) -> None:
    x = Rng(0).normal("noise", (MANY,), dtype=dtype).double().numpy()
    assert stats.kstest(x, "norm").pvalue > 0.01
    # standard errors of the moments of n unit normals: sqrt(1, 2, 15, 96, …) over sqrt(n)
    for power, moment, variance in (1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225):
        assert abs((x**power).mean() - moment) < 3.5 * math.sqrt(variance / MANY)
    beyond = int((abs(x) > 4).sum())
    assert stats.binomtest(beyond, MANY, 2 * stats.norm.sf(4)).pvalue > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform(dtype: torch.dtype) -> None:
    u = Rng(0).uniform("time", (MANY,), dtype=dtype).double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 0.01
    lattice = 2**23 if dtype == torch.float32 else 2**32
    assert np.array_equal(u * lattice % 1, np.full(MANY, 0.5))


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-3, 4), (5, 7)])
def test_integers_are_equally_frequent(low: int, high: int) -> None:
    counts = torch.bincount(Rng(0).integers("index", high, (MANY,), low=low) - low)
    assert len(counts) == high - low
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("span", [1, 3, 1000, 2**31, 2**31 + 1, 2**32 - 1, 2**32])
@pytest.mark.parametrize("low", [0, -(2**62), 2**62])
def test_integers_are_the_scaled_words_whatever_the_span(span: int, low: int) -> None:
    words = Rng(2).bits("x", (100,)).tolist()
    expected = [low + x * span // 2**32 for x in words]
    assert Rng(2).integers("x", low + span, (100,), low=low).tolist() == expected


def test_nothing_is_correlated() -> None:
    n, size = 4096, 24
    samples = Rng(0, ids=range(size)).normal("noise", (size, n))
    epochs = torch.stack([Rng(0, ids=[7], epoch=e).normal("noise", (1, n))[0] for e in range(size)])
    seeds = torch.stack([Rng(s).normal("noise", (n,)) for s in range(size)])
    rng = Rng(0)
    draws = torch.stack([rng.normal("noise", (n,)) for _ in range(size)])
    names = torch.stack([Rng(0).normal(f"stream {i}", (n,)) for i in range(size)])
    lanes = Rng(0).normal("long", (n * size,)).view(n, size).T  # neighbours in memory
    for rows in (samples, epochs, seeds, draws, names, lanes):
        assert largest_correlation(rows) < bound(size * (size - 1) // 2)
        assert largest_correlation(rows.square()) < bound(size * (size - 1) // 2)


@pytest.mark.parametrize(
    ("error", "text", "draw"),
    [
        (ValueError, r"\(3, 4\).*must be 2", lambda: Rng(0, ids=[1, 2]).normal("x", (3, 4))),
        (ValueError, r"\(\).*must be 2", lambda: Rng(0, ids=[1, 2]).uniform("x", ())),
        (ValueError, "no size below 0", lambda: Rng(0).normal("x", (2, -1))),
        (ValueError, r"2\^34", lambda: Rng(0).bits("x", (2**20, 2**15))),
        (ValueError, "name of a stream is empty", lambda: Rng(0).normal("", (2,))),
        (ValueError, "name of a stream is empty", lambda: Rng(0).fold("")),
        (TypeError, "float16.*cast", lambda: Rng(0).uniform("x", (2,), dtype=torch.float16)),
        (TypeError, "bfloat16.*cast", lambda: Rng(0).uniform("x", (2,), dtype=torch.bfloat16)),
        (TypeError, "int64", lambda: Rng(0).normal("x", (2,), dtype=torch.int64)),
        (ValueError, "high - low is 0", lambda: Rng(0).integers("x", 5, (2,), low=5)),
        (ValueError, "high - low is 4294967297", lambda: Rng(0).integers("x", 2**32 + 1, (2,))),
        (ValueError, "no ids were given", lambda: Rng(0, epoch=3)),
        (ValueError, "no ids were given", lambda: Rng(0, occurrence=[1, 2])),
        (ValueError, "seed is -1", lambda: Rng(-1)),
        (ValueError, r"shape \(2, 2\)", lambda: Rng.from_keys(torch.zeros(2, 2, dtype=torch.int64))),
        (TypeError, "made without ids", lambda: Rng(0)[0:1]),
        (TypeError, "slice", lambda: Rng(0, ids=[1, 2])[0]),
        (ValueError, r"rng is None.*give Rng\(seed\)", lambda: as_rng(None)),
        (TypeError, "float16.*cast", lambda: SOURCES[1].uniform("x", (2,), dtype=torch.float16)),
    ],
)
def test_mistakes_are_named(error: type[Exception], text: str, draw: Callable[[], object]) -> None:
    with pytest.raises(error, match=text):
        draw()


def test_a_refused_draw_is_not_counted() -> None:
    rng = Rng(0, ids=[1, 2])
    with pytest.raises(ValueError, match="must be 2"):
        rng.normal("x", (3,))
    assert torch.equal(rng.normal("x", (2,)), Rng(0, ids=[1, 2]).normal("x", (2,)))


def test_as_rng_takes_what_callers_have() -> None:
    rng, generator = Rng(5), torch.Generator().manual_seed(5)
    assert as_rng(rng) is rng
    wrapped = as_rng(generator)
    assert isinstance(wrapped, GeneratorRng)
    assert as_rng(wrapped) is wrapped
    assert torch.equal(as_rng(np.int64(5)).bits("x", (4,)), Rng(5).bits("x", (4,)))
    assert all(isinstance(source, Randomness) for source in SOURCES)


def test_a_generator_gives_what_torch_gives_and_has_one_stream() -> None:
    source, generator = as_rng(torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)
    assert source.fold("anything") is source
    for name, dtype in ("a", torch.float32), ("b", torch.float64), ("a", torch.float16):
        expected = torch.randn(2, 3, generator=generator, dtype=dtype)
        assert torch.equal(source.normal(name, (2, 3), dtype=dtype), expected)
    expected = torch.randint(-2, 9, (50,), generator=generator)
    assert torch.equal(source.integers("index", 9, (50,), low=-2), expected)
    for dtype in (torch.float32, torch.float64):
        u = source.uniform("time", (MANY,), dtype=dtype)
        assert u.dtype == dtype
        assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01


def test_drawing_leaves_the_generators_of_torch_alone() -> None:
    before = torch.get_rng_state()
    Rng(0, ids=range(3)).fold("x").normal("noise", (3, 100))
    assert torch.equal(torch.get_rng_state(), before)
