"""Attention on a GPU: nothing waits, captured calls see what changes in place, runs are captured anew."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from gendiff import Denoiser, Guider, cfg
from gendiff.attention import (
    BlurredQueries,
    Capture,
    DownsampledKV,
    IdentityProbs,
    IPAdapter,
    Kind,
    Middleware,
    Regional,
    SharedKV,
    SlidingWindow,
    Stage,
    Steps,
    Temperature,
    TokenMerging,
    stack,
)
from gendiff.math import LinearBeta, grids
from gendiff.sampling import DDIM, Graphs, iterate
from tests.attention.models import FLUX, UNET, Same, build
from tests.zoo import QUIET, ZOO

pytestmark = [pytest.mark.gpu, *(pytest.mark.filterwarnings(warning) for warning in QUIET)]
ROWS = ("uncond", "cond")


def moved(value, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", dtype if value.is_floating_point() else value.dtype)


def on_gpu(name, dtype=torch.float32):
    """A tiny model on the device, and a call of it that waits for nothing."""
    model = build(name).to("cuda", dtype)
    inputs = {key: moved(value, dtype) for key, value in ZOO[name].inputs().items()}

    def call():
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return model, call


@contextmanager
def nothing_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def middlewares(unet):
    """What can be added to a UNet, with where."""
    masks = torch.zeros(2, 8, 12)
    masks[0, :, :6] = masks[1, :, 6:] = 1
    width = unet.config.cross_attention_dim
    yield Same(), None, {}
    yield Temperature(0.7), Kind.CROSS, {"when": Steps(0, 2)}
    yield Capture(), Kind.CROSS, {"rows": "cond"}
    yield IPAdapter.new(unet, torch.randn(1, width, device="cuda")).requires_grad_(False), Kind.CROSS, {}
    yield IdentityProbs(), Kind.SELF & Stage.MID, {"rows": "cond"}
    yield BlurredQueries(2.0), Kind.SELF, {"rows": "cond"}
    yield SharedKV(adain=("q", "k")), Kind.SELF, {}
    yield Regional(masks, [(0, 2), (2, 5)]), Kind.CROSS, {}
    yield SlidingWindow(3), Kind.SELF, {}
    yield TokenMerging(0.5), Kind.SELF & Stage.DOWN, {}
    yield DownsampledKV(2), Kind.SELF & Stage.DOWN, {}


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_middleware_waits_and_all_are_undone(number, dtype) -> None:
    unet, call = on_gpu(UNET, dtype)
    plain = call()
    middleware, on, limits = list(middlewares(unet))[number]
    rows = ("cond",) if isinstance(middleware, SharedKV) else ROWS  # it shares among the rows of a branch
    with stack(unet, rows=rows) as one:
        one.add(middleware, on=on, **limits)
        call()
        with nothing_waits():
            changed = call()
    if not isinstance(middleware, Same | Capture):
        assert (changed - plain).abs().max() > 1e-4
    else:
        assert torch.equal(changed, plain)
    assert torch.equal(call(), plain)


@pytest.mark.parametrize("name", [UNET, FLUX])
def test_a_captured_call_sees_what_is_changed_in_place_and_gathers_on(name) -> None:
    model, call = on_gpu(name)
    with stack(model) as one:
        warm, capture = Temperature(1.0), Capture()
        one.add(warm)
        one.add(capture, on=Kind.CROSS | Kind.JOINT | Kind.SINGLE)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        capture.reset()
        found = []
        with nothing_waits():
            for value in (1.0, 0.5, 1.0):
                warm.set(value)
                graph.replay()
                found.append(out.clone())
        assert torch.equal(found[0], found[2])
        assert not torch.equal(found[0], found[1])
        gathered = capture.of(capture.sites[0])
        capture.reset()
        for value in (1.0, 0.5, 1.0):
            warm.set(value)
            call()
        torch.testing.assert_close(gathered, capture.of(capture.sites[0]), rtol=1e-4, atol=1e-5)


def test_what_is_attached_is_not_changed_in_a_capture() -> None:
    unet, call = on_gpu(UNET)
    call()
    with stack(unet) as one:
        handle = one.add(Same())
        call()
        torch.cuda.synchronize()

        for change in (handle.remove, partial(one.add, Same())):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device="cuda")
                with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
                    change()
        assert handle.attached


class Backbone(torch.nn.Module):
    """A UNet whose condition is the text."""

    accepts = frozenset({"text"})

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timestep, cond):
        return self.unet(x, timestep, cond["text"]).sample


class Halved(Middleware):
    def on_qkv(self, site, context, q, k, v):
        return q * 0.5, k, v


def test_captured_sampling_follows_the_stack() -> None:
    """Equal to the eager run with each stack, and captured anew when it changes."""
    unet, _ = on_gpu(UNET)
    inputs = ZOO[UNET].inputs()
    text, x = inputs["encoder_hidden_states"].cuda(), inputs["sample"].cuda()
    denoise = Denoiser(Backbone(unet), LinearBeta(), "epsilon")
    branches = {"cond": {"text": text}, "uncond": {"text": torch.zeros_like(text)}}
    grid, engine = grids.trailing(LinearBeta(), 5), Graphs()
    with stack(unet, rows=("cond", "uncond")) as one, torch.no_grad():
        guider = Guider(denoise, branches, partial(cfg, scale=3.0), context=one.context)

        def last(**settings):
            return [step.x for step in iterate(guider, x, grid, DDIM(), **settings)][-1]

        plain = last()
        assert torch.equal(last(engine=engine), plain)
        handle = one.add(Halved(), rows="cond")
        changed = last()
        assert not torch.equal(changed, plain)
        assert torch.equal(last(engine=engine), changed)
        handle.remove()
        assert torch.equal(last(engine=engine), plain)
