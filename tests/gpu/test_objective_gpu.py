"""The objective's forward and backward inside one CUDA graph, and without a synchronisation.

A replay reads its data, labels and keys from static buffers. Its losses and gradients are compared bit by bit
with those of an eager step on the same numbers: both launch the same kernels, and cuDNN is asked for
deterministic ones.
"""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta, LinearBeta, Rectified, ScaledLinearBeta, VarianceExploding
from gendiff.objectives import (
    EDMWeighting,
    Huber,
    InputPerturbation,
    LogitNormal,
    LogNormal,
    LossTerms,
    MinSNR,
    Objective,
    OffsetNoise,
    OnGrid,
    SoftMinSNR,
    Stratified,
)
from gendiff.random import Rng, sample_keys

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BATCH, LABELS, WIDTH = 6, 10, 16
CASES = {
    "epsilon": (Objective(times=OnGrid()), LinearBeta(), "epsilon"),
    "v": (Objective(weighting=MinSNR(), corruption=[OffsetNoise()]), CosineBeta(), "v"),
    "flow": (Objective(times=LogitNormal(shift=3.0)), Rectified(), "flow"),
    "edm": (Objective(times=LogNormal(), weighting=EDMWeighting()), VarianceExploding(), "edm"),
    "everything else": (
        Objective(
            times=Stratified(LogNormal(0.0, 1.0)),
            weighting=SoftMinSNR(),
            error=Huber(0.1),
            corruption=[InputPerturbation(), OffsetNoise()],
            space="x0",
        ),
        ScaledLinearBeta(),
        "epsilon",
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
PROTOTYPE = "ignore:Synchronization debug mode is a prototype"  # what torch says of the switch


class Net(nn.Module):
    """Two convolutions that see the time and the label; no sum in it depends on the order of threads."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inward, self.outward = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
            self.label, self.wave = (nn.Parameter(torch.randn(n, WIDTH)) for n in (LABELS, 1))
        self.register_buffer("labels", torch.arange(LABELS))

    def forward(self, x: Tensor, timestep: Tensor, cond) -> Tensor:
        chosen = (cond["label"][:, None] == self.labels).to(x.dtype)
        seen = (chosen[:, :, None] * self.label).sum(1) + torch.sin(timestep[:, None] / 100 * self.wave)
        return self.outward(nn.functional.silu(self.inward(x) + seen[:, :, None, None]))


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, label, keys) on the host, pinned, so that they are copied without blocking."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(BATCH, 3, 8, 8, generator=generator)
    label = torch.randint(LABELS, (BATCH,), generator=generator)
    keys = sample_keys(seed, range(BATCH))
    return tuple(v.pin_memory() if DEVICE == "cuda" else v for v in (x0, label, keys))


class Step:
    """A step of training on static buffers, without the optimizer."""

    def __init__(self, case: str, net: nn.Module) -> None:
        self.objective, schedule, prediction = CASES[case]
        self.net = deepcopy(net).to(DEVICE)
        self.denoiser = Denoiser(self.net, schedule, prediction)
        self.buffers = tuple(torch.empty_like(v, device=DEVICE) for v in batch(0))
        self.load(batch(0))

    def load(self, values: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value, non_blocking=True)

    def __call__(self) -> LossTerms:
        self.net.zero_grad(set_to_none=True)  # backward then writes gradients instead of adding to them
        x0, label, keys = self.buffers
        terms = self.objective(self.denoiser, x0, {"label": label}, rng=Rng.from_keys(keys))
        terms.mean().backward()
        return terms

    def captured(self) -> tuple[torch.cuda.CUDAGraph, LossTerms]:
        """The step as a graph, and the static terms that its replays write."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            terms = self()
        return graph, terms

    def results(self, terms: LossTerms) -> dict[str, Tensor]:
        """Copies of everything that the step has made."""
        made = {name: getattr(terms, name) for name in ("loss", "weight", "t", "log_snr")}
        made |= {f"gradient of {name}": p.grad for name, p in self.net.named_parameters()}
        return {name: value.detach().clone() for name, value in made.items() if value is not None}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Call `torch.cuda.set_sync_debug_mode("error")` in the test; it is undone here."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@EVERY_CASE
def test_replays_with_new_keys_and_data_are_the_eager_steps(case):
    net = Net()
    replayed, eager = Step(case, net), Step(case, net)
    graph, terms = replayed.captured()
    losses = []
    for seed in (1, 2, 3, 1):
        replayed.load(batch(seed))
        graph.replay()
        eager.load(batch(seed))
        ours, theirs = replayed.results(terms), eager.results(eager())
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.isfinite(value).all(), name
            assert_close(value, theirs[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        losses.append(ours["loss"])
    assert all((losses[0] != other).all() for other in losses[1:3])  # nothing was frozen at capture
    assert torch.equal(losses[0], losses[3])


@EVERY_CASE
def test_new_keys_alone_give_new_noise_and_times(case):
    step = Step(case, Net())
    graph, terms = step.captured()
    seen = []
    for seed in (1, 2):
        x0, label, _ = batch(0)
        step.load((x0, label, batch(seed)[2]))
        graph.replay()
        seen.append(step.results(terms))
    assert (seen[0]["loss"] != seen[1]["loss"]).all()
    assert (seen[0]["t"] != seen[1]["t"]).any()


@EVERY_CASE
@pytest.mark.filterwarnings(PROTOTYPE)
@pytest.mark.usefixtures("no_synchronisation")
def test_an_eager_step_does_not_synchronise(case):
    step, first, second = Step(case, Net()), batch(1), batch(2)
    step()  # tables go to the device once, and the kernel is compiled
    step.load(first)
    expected = step.results(step())
    step.load(second)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step.load(first)
    terms = step()
    with pytest.raises(RuntimeError, match="synchroniz"):  # the switch is on and would have seen it
        terms.loss.sum().item()
    torch.cuda.set_sync_debug_mode("default")
    for name, value in step.results(terms).items():
        assert torch.equal(value, expected[name]), name


@EVERY_CASE
@pytest.mark.filterwarnings(PROTOTYPE)
@pytest.mark.usefixtures("no_synchronisation")
def test_a_replay_does_not_synchronise(case):
    step, values = Step(case, Net()), batch(1)
    graph, terms = step.captured()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        step.load(values)
        graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(terms.loss).all()


@EVERY_CASE
def test_draws_are_those_of_the_cpu(case):
    objective, schedule, _ = CASES[case]
    x0, _, keys = batch(1)
    here, there = (objective.draw(schedule, x0.to(d), rng=Rng.from_keys(keys.to(d))) for d in ("cpu", DEVICE))
    assert_close(there.t.cpu(), here.t, rtol=1e-11, atol=0)
    for name in ("eps", "x_t"):
        assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-6, atol=1e-6)
