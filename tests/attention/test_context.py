"""The context: what a guider tells a stack, and how tokens lie."""

from functools import partial

import pytest
import torch

from gendiff import Denoiser, Guider, cfg
from gendiff.attention import Call, Kind, Middleware, sites, stack
from gendiff.attention.context import Context, Grid
from gendiff.attention.kernels import probabilities
from gendiff.math import Rectified
from gendiff.sampling.static import fingerprint
from tests.attention.models import FLUX, UNET, Halved, Same, build, said
from tests.zoo import QUIET, ZOO, run

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Net:
    """A UNet as a backbone: the text is its condition."""

    accepts = frozenset({"text"})

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, x, timestep, cond):
        return self.unet(x, timestep, cond["text"]).sample


class Told(Middleware):
    """The rows, the time and the level that it was told."""

    def __init__(self):
        self.seen = []

    def on_heads(self, site, context, out, q, k, v):
        self.seen.append((context.rows, len(q), float(context.t), float(context.alpha), float(context.sigma)))
        return out


@pytest.mark.parametrize(("batching", "rows"), [("together", ("cond", "uncond")), ("separate", ("uncond",))])
def test_a_guider_tells_rows_time_and_level(batching, rows) -> None:
    unet = build(UNET)
    inputs = ZOO[UNET].inputs()
    text, x = inputs["encoder_hidden_states"], inputs["sample"]
    branches = {"cond": {"text": text}, "uncond": {"text": torch.zeros_like(text)}}
    with stack(unet) as one, torch.no_grad():
        told = Told()
        one.add(told, on=one.sites[:1])
        denoise = Denoiser(Net(unet), Rectified(), "flow")
        guider = Guider(denoise, branches, partial(cfg, scale=3.0), batching=batching, context=one.context)
        guider(x, 0.25)
        assert told.seen[-1] == (rows, len(rows) * len(x), 0.25, 0.75, 0.25)
        guider(x, torch.tensor(0.5))
        assert told.seen[-1][2:] == (0.5, 0.5, 0.5)


def test_a_branch_is_changed_alone_through_a_guider() -> None:
    """Half the queries in the conditional branch: cfg of the two is that of the two alone."""
    unet = build(UNET)
    inputs = ZOO[UNET].inputs()
    text, x = inputs["encoder_hidden_states"], inputs["sample"]
    branches = {"cond": {"text": text}, "uncond": {"text": torch.zeros_like(text)}}
    denoise = Denoiser(Net(unet), Rectified(), "flow")
    with stack(unet, rows=("cond", "uncond")) as one, torch.no_grad():
        uncond = denoise(x, 0.5, branches["uncond"])
        handle = one.add(Halved())
        cond = denoise(x, 0.5, branches["cond"])
        handle.remove()
        one.add(Halved(), rows="cond")
        guider = Guider(denoise, branches, partial(cfg, scale=3.0), context=one.context)
        torch.testing.assert_close(guider(x, 0.5).x0, cfg(cond, uncond, scale=3.0).x0, rtol=1e-4, atol=1e-4)


def test_a_captured_step_is_for_what_is_attached() -> None:
    unet = build(UNET)
    before = fingerprint(unet)
    with stack(unet) as one:
        assert fingerprint(unet) == before
        handle = one.add(Same(), on=Kind.CROSS)
        with_one = fingerprint(unet)
        assert with_one != before
        handle.remove()
        one.add(Same(), on=Kind.CROSS)
        assert fingerprint(unet) not in (before, with_one)
    assert fingerprint(unet) == before


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        (Grid(1, 8, 12), 96, (1, 8, 12)),
        (Grid(1, 8, 12), 24, (1, 4, 6)),
        (Grid(1, 9, 13), 35, (1, 5, 7)),
        (Grid(3, 8, 12), 72, (3, 4, 6)),
        (Grid(5, 8, 12), 72, (3, 4, 6)),
    ],
)
def test_how_tokens_lie(size, tokens, grid) -> None:
    context = Context()
    context.size = size
    assert context.grid(sites(build(UNET))[0], tokens) == grid


def test_packed_tokens_lie_as_their_ids_say() -> None:
    model = build(FLUX)
    ids = ZOO[FLUX].inputs()["img_ids"]
    with stack(model) as one:
        one.add(Same())
        said(model, FLUX)
        height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
        assert height != width
        assert one.context.grid(one.sites[0], height * width) == (1, height, width)


def test_rows_that_do_not_fit() -> None:
    context = Context(("a", "b"))
    assert (context.rows_of("a", 6), context.rows_of("b", 6)) == (slice(0, 3), slice(3, 6))
    with pytest.raises(ValueError, match=r"a batch of 5 rows does not split into \('a', 'b'\)"):
        context.rows_of("a", 5)
    with pytest.raises(ValueError, match=r"unknown rows 'c'"):
        context.rows_of("c", 6)
    with pytest.raises(ValueError, match=r"every part of a batch has a name of its own"):
        Context(("a", "a"))
    with pytest.raises(ValueError, match=r"rows are names in the order of the batch"):
        Context("cond")
    with pytest.raises(ValueError, match=r"the rows 'b' are none, or some are another part's too"):
        Context({"a": slice(0, 2), "b": slice(1, 3)})
    with pytest.raises(ValueError, match=r"the rows 'a' go from a number to another"):
        Context({"a": slice(2)})
    named = Context({"first": slice(0, 1), "rest": slice(1, 3)})
    named.batch = 3
    assert named.rows_of("rest", 12) == slice(4, 12)  # frames are folded into the batch
    with pytest.raises(ValueError, match=r"the layer runs on 1 rows at a time, and the batch has 3"):
        named.rows_of("rest", 1)


def test_what_has_no_size_is_no_grid() -> None:
    context, site = Context(), sites(build(UNET))[0]
    with pytest.raises(
        ValueError, match=r"50 tokens at .* are no grid of the network's input of None; say how"
    ):
        context.grid(site, 50)
    assert context.grid(site, 50, line=True) == (1, 1, 50)


def test_a_query_that_may_see_nothing_sees_nothing() -> None:
    q, k = torch.randn(2, 1, 1, 3, 4).unbind()
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    for call in (Call(mask=mask), Call(mask=torch.zeros(3, 3).masked_fill(~mask, -torch.inf))):
        probs = probabilities(q, k, call)
        assert not probs[..., 1, :].any()
        torch.testing.assert_close(probs[..., [0, 2], :].sum(-1), torch.ones(1, 1, 2))


def test_masks_of_appended_and_removed_keys() -> None:
    mask = torch.tensor([[True, False, True]])
    assert torch.equal(Call(mask=mask).longer(5).mask, torch.tensor([[True, False, True, True, True]]))
    assert torch.equal(Call(mask=mask.float()).longer(4).mask, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"masks 3 keys and a middleware leaves 2 of them"):
        Call(mask=mask).longer(2)


def test_the_root_is_called_by_keyword_or_place() -> None:
    unet = build(UNET)
    inputs = ZOO[UNET].inputs()
    with stack(unet) as one, torch.no_grad():
        one.add(Same())
        unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        seen = one.context.size, one.context.text
        one.context.size = one.context.text = None
        run(unet, UNET)
        assert (one.context.size, one.context.text) == seen
