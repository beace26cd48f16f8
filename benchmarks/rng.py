"""How fast `gendiff.random.Rng` draws, beside torch's own generators.

    python benchmarks/rng.py [cpu | cuda] [--threads 1]

Prints millions of numbers a second, the same for torch, and the ratio; for small draws the time of one call
is what counts. On CUDA both are timed inside a CUDA graph, so that the device is measured and not Python, and
the host time of one eager call stands beside them.
"""

import argparse
import time
from collections.abc import Callable

import torch

from gendiff.random import Rng

SHAPES = [(16, 1), (16, 77), (4096, 1), (16, 4, 64, 64), (4, 16, 128, 128), (16, 16, 128, 128)]
REPLAYS = 20


def seconds_on_cpu(call: Callable[[], object]) -> float:
    """The shortest of nine calls."""
    call()
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def seconds_on_cuda(call: Callable[[], object]) -> float:
    """The time of one call inside a CUDA graph that repeats it, the shortest of five replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    best = float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / REPLAYS)
    return best


def seconds_of_a_launch(call: Callable[[], object]) -> float:
    """Host time of one eager call that nobody waits for."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call()
    seconds = (time.perf_counter() - start) / 100
    torch.cuda.synchronize()
    return seconds


def calls(rng: Rng, shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is compared, by name: our call and torch's."""
    device = rng.device
    other = torch.bfloat16 if device.type == "cuda" else torch.float64
    return {
        "normal float32": (lambda: rng.normal("x", shape), lambda: torch.randn(shape, device=device)),
        f"normal {str(other).removeprefix('torch.')}": (
            lambda: rng.normal("x", shape, dtype=other),
            lambda: torch.randn(shape, device=device, dtype=other),
        ),
        "uniform float32": (lambda: rng.uniform("x", shape), lambda: torch.rand(shape, device=device)),
        "integers": (
            lambda: rng.integers("x", 1000, shape),
            lambda: torch.randint(1000, shape, device=device),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    clock = seconds_on_cuda if cuda else seconds_on_cpu
    where = torch.cuda.get_device_name() if cuda else f"CPU, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}; M/s: millions of numbers a second")
    print(
        f"{'shape':>20} {'numbers':>16} {'gendiff':>12} {'torch':>12} {'ratio':>6} {'one call':>10}", end=""
    )
    print(f" {'eager, host':>12}" if cuda else "")
    for shape in SHAPES:
        rng, size = Rng(0, ids=range(shape[0]), device=options.device), torch.Size(shape).numel()
        for name, (ours, theirs) in calls(rng, shape).items():
            mine, other = clock(ours), clock(theirs)
            row = f"{'x'.join(map(str, shape)):>20} {name:>16} {size / mine / 1e6:>8,.1f} M/s "
            row += f"{size / other / 1e6:>8,.1f} M/s {other / mine:>6.2f} {mine * 1e6:>7,.0f} µs"
            print(row + (f" {seconds_of_a_launch(ours) * 1e6:>9,.0f} µs" if cuda else ""))


if __name__ == "__main__":
    main()
