"""The Triton kernel on a GPU: the numbers of the CPU, without synchronising, inside CUDA graphs."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from gendiff._philox import draw, draw_with_torch, kernel, numbers, words
from gendiff.random import Rng, sample_keys
from tests.random.test_philox import ulps

pytestmark = pytest.mark.gpu

SHAPES = [(1,), (3,), (4,), (5,), (255, 4), (1025,), (2, 3, 5), (1_000_003,), (1 << 20,)]
INNER = [(), (1,), (3,), (4, 7), (1027,), (4, 64, 64)]
IDS = ["a", "b", 3, -4, 2**63 - 1]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def pair(inner: Sequence[int] | None, shape: Sequence[int]) -> tuple[Rng, Rng, tuple[int, ...]]:
    """The same Rng on both devices, batched where `inner` is given."""
    if inner is None:
        return Rng(2**63 + 5), Rng(2**63 + 5, device="cuda"), tuple(shape)
    settings = {"ids": IDS, "epoch": 2**32 - 1, "occurrence": range(len(IDS))}
    return Rng(1, **settings), Rng(1, **settings, device="cuda"), (len(IDS), *inner)


CASES = [(None, shape) for shape in SHAPES] + [(inner, ()) for inner in INNER]


def test_the_kernel_runs_here() -> None:
    assert kernel(torch.zeros(1, device="cuda").device) is not None


@pytest.mark.parametrize(("inner", "shape"), CASES)
def test_bits_uniforms_and_integers_equal_those_of_the_cpu(
    inner: tuple[int, ...] | None, shape: tuple[int, ...]
) -> None:
    cpu, cuda, shape = pair(inner, shape)
    for name in ("noise", "time"):
        for _ in range(2):
            assert torch.equal(cuda.bits(name, shape).cpu(), cpu.bits(name, shape))
        for dtype in (torch.float32, torch.float64):
            got, expected = (rng.uniform(name, shape, dtype=dtype) for rng in (cuda, cpu))
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), expected)
        got, expected = (rng.fold(name).integers("index", 2**32 - 6, shape, low=-5) for rng in (cuda, cpu))
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(("inner", "shape"), CASES)
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 2), (torch.float16, 1), (torch.bfloat16, 1), (torch.float64, 4)]
)
def test_normals_are_within_two_units_in_the_last_place(
    dtype: torch.dtype, allowed: int, inner: tuple[int, ...] | None, shape: tuple[int, ...]
) -> None:
    cpu, cuda, shape = pair(inner, shape)
    distance = ulps(cuda.normal("noise", shape, dtype=dtype).cpu(), cpu.normal("noise", shape, dtype=dtype))
    unequal = float((distance > 0).double().mean())
    print(f"{dtype} {shape}: at most {distance.max().item()} ulp, a share of {unequal:.1e} unequal")
    assert distance.max() <= allowed


def test_slices_of_keys_need_not_be_contiguous() -> None:
    cpu, cuda = Rng(0, ids=range(9)), Rng(0, ids=range(9), device="cuda")
    for part in (slice(1, 4), slice(0, 9, 3), slice(8, 9)):
        shape = (len(cpu[part].keys), 6)
        assert torch.equal(cuda[part].bits("x", shape).cpu(), cpu[part].bits("x", shape))


@pytest.mark.parametrize("kind", ["bits", "uniform", "normal"])
def test_the_fallback_gives_the_same_on_the_gpu(kind: str) -> None:
    dtype = torch.int64 if kind == "bits" else torch.float32
    keys = sample_keys(0, range(5))
    got = draw_with_torch(keys.cuda(), 1027, (0, 1, 2), kind, dtype)
    expected = draw_with_torch(keys, 1027, (0, 1, 2), kind, dtype)
    assert torch.equal(got.cpu(), expected) if kind != "normal" else ulps(got.cpu(), expected).max() <= 2


@pytest.mark.parametrize(("samples", "count"), [(1, 2**31 + 64), (3, 2**30 + 1)], ids=["whole", "cut"])
def test_offsets_beyond_int32(samples: int, count: int) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * samples * count:
        pytest.skip("needs free memory of 6 bytes a number")
    keys, counter = sample_keys(0, range(samples)), (1, 2, 3)
    got = draw(keys.cuda(), count, counter, "uniform", torch.float32)
    last = -(-count // 4)
    for first in (0, last // 2, last - 40):
        block = words(keys, first, first + 40, counter)
        expected = torch.stack(list(numbers(block, "uniform", torch.float32)), -1).flatten(1)
        piece = got[:, 4 * first : 4 * first + 160].cpu()
        assert torch.equal(piece, expected[:, : piece.shape[1]])


def step(rng: Rng) -> list[Tensor]:
    size = len(rng.keys)
    return [
        rng.normal("noise", (size, 4, 16, 16)),
        rng.uniform("time", (size,)),
        rng.integers("index", 1000, (size, 3)),
        rng.fold("augment")[1:3].bits("flip", (2, 7)),
        rng.normal("noise", (size, 5), dtype=torch.bfloat16),
    ]


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((ulps(a.cpu(), b) <= 2).all()) if a.is_floating_point() else torch.equal(a.cpu(), b)
        for a, b in zip(got, expected, strict=True)
    )


def test_a_captured_graph_follows_the_keys_in_its_buffer() -> None:
    keys = sample_keys(0, IDS)
    buffer = keys.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        step(Rng.from_keys(buffer))
        Rng(3).normal("noise", (8,), device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(Rng.from_keys(buffer))
        unbatched = Rng(3).normal("noise", (8,), device="cuda")
    for epoch in (0, 1, 2, 1):
        new = sample_keys(0, IDS, epoch=epoch).pin_memory()
        buffer.copy_(new, non_blocking=True)
        graph.replay()
        torch.cuda.synchronize()
        assert close(results, step(Rng(0, ids=IDS, epoch=epoch)))
        assert close([unbatched], [Rng(3).normal("noise", (8,))])
    assert not close(results, step(Rng(0, ids=IDS, epoch=2)))  # the comparison can fail


def test_drawing_does_not_synchronise(no_synchronisation: None) -> None:
    cuda, host = Rng.from_keys(torch.arange(5, device="cuda")), Rng(0)
    for _ in range(2):
        step(cuda)
        host.normal("x", (1027,), device="cuda")
        host.uniform("x", (1027,), device="cuda")
        host.integers("x", 10, (3,), device="cuda")
        host.to("cuda").fold("y").bits("x", (3,))


def test_keys_of_samples_are_moved_once(no_synchronisation: None) -> None:
    rng = Rng(0, ids=range(3))
    with pytest.raises(RuntimeError, match="synchroniz"):
        rng.normal("x", (3, 2), device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    first = rng.bits("y", (3, 2), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    second = rng.bits("y", (3, 2), device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    twin = Rng(0, ids=range(3))
    assert torch.equal(first.cpu(), twin.bits("y", (3, 2)))
    assert torch.equal(second.cpu(), twin.bits("y", (3, 2)))


def test_a_buffer_of_the_caller_is_read_anew_when_it_lies_elsewhere() -> None:
    buffer = sample_keys(0, range(3))
    rng = Rng.from_keys(buffer)
    rng.bits("x", (3, 2), device="cuda")
    buffer.copy_(sample_keys(1, range(3)))
    rng.rewind()
    assert torch.equal(rng.bits("x", (3, 2), device="cuda").cpu(), Rng(1, ids=range(3)).bits("x", (3, 2)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_need_not_be_the_current_one() -> None:
    got = Rng(0, ids=range(3), device="cuda:1").bits("x", (3, 9))
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), Rng(0, ids=range(3)).bits("x", (3, 9)))
