"""A window of the grid: brute force, and the layer as it is where the window holds all."""

import pytest
import torch

from gendiff.attention import Context, Grid, Kind, Steps, stack
from gendiff.attention.local import SlidingWindow
from gendiff.attention.shared import SharedKV
from tests.attention.models import FLUX, UNET, Kept, build, said
from tests.attention.test_perturb import graphs, limited


def within(i, j, size, length):
    """Whether j is one of the `size` places round i, moved inside at the border; written without tensors."""
    first = max(0, min(i - size // 2, length - size))
    return first <= j < first + size


@pytest.mark.parametrize("size", [(1, 3, 5), (2, 4, 1), (9, 9, 9), (1, 1, 1)])
def test_seen_is_brute_force(size) -> None:
    grid = Grid(3, 4, 6)
    place = [(f, y, x) for f in range(3) for y in range(4) for x in range(6)]
    expected = [
        [all(within(i, j, s, n) for i, j, s, n in zip(a, b, size, grid, strict=True)) for b in place]
        for a in place
    ]
    assert SlidingWindow(size).seen(grid, torch.device("cpu")).tolist() == expected


def test_every_token_sees_as_many() -> None:
    seen = SlidingWindow(3).seen(Grid(1, 5, 7), torch.device("cpu"))
    assert (seen.sum(-1) == 9).all()
    assert seen.diagonal().all()


def test_the_layer_is_softmax_over_the_window() -> None:
    _, _, seen, site = limited(UNET, SlidingWindow(3), Kind.SELF)
    q, k, v = seen.raw[site.name]
    for i in range(96):
        keys = [j for j in range(96) if within(i // 12, j // 12, 3, 8) and within(i % 12, j % 12, 3, 12)]
        probs = (q[..., i : i + 1, :] @ k[..., keys, :].mT / q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(seen.out[site.name][..., i : i + 1, :], probs @ v[..., keys, :])


@pytest.mark.parametrize("size", [12, (1, 8, 12)])
def test_a_window_as_large_as_the_grid_is_stock(size) -> None:
    stock, changed, _, site = limited(UNET, SlidingWindow(size), Kind.SELF)
    assert torch.equal(changed, stock)
    context = Context()
    context.size = Grid(1, 8, 12)
    q = torch.zeros(1, 1, 96, 2)
    assert SlidingWindow(size).on_bias(site, context, q, q) is None  # so that any kernel serves


def test_a_window_of_one_sees_itself_alone() -> None:
    _, _, seen, site = limited(UNET, SlidingWindow(1), Kind.SELF)
    torch.testing.assert_close(seen.out[site.name], seen.raw[site.name][2])


def test_text_and_appended_keys_are_seen_by_all() -> None:
    model = build(FLUX)
    with stack(model, rows=("all",)) as one:
        one.context.size = Grid(1, 4, 6)
        one.add(SharedKV(), Kind.JOINT)
        one.add(SlidingWindow(3), Kind.JOINT)
        kept = one.add(Kept(), Kind.JOINT).middleware
        said(model, FLUX)
    probs = kept.probs["transformer_blocks.0.attn"] > 0
    assert probs[..., :5, :].all()
    assert probs[..., :, :5].all()
    assert probs[..., :, 29:].all()
    assert probs.shape[-1] == 29 + 24
    assert torch.equal(probs[0, 0, 5:, 5:29], SlidingWindow(3).seen(Grid(1, 4, 6), torch.device("cpu")))


def test_it_is_limited_to_rows_and_steps() -> None:
    model = build(UNET)
    stock = said(model, UNET)
    with stack(model, rows=("uncond", "cond")) as one:
        one.add(SlidingWindow(3), Kind.SELF, rows="cond", when=Steps(0, 1))
        half = said(model, UNET)
        torch.testing.assert_close(said(model, UNET), stock)
    torch.testing.assert_close(half[0], stock[0])
    assert not torch.allclose(half[1], stock[1], atol=1e-4)


def test_layers_share_a_compiled_graph() -> None:
    assert graphs(SlidingWindow(3), Kind.SELF) == 1


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token along each axis, got 0"):
        SlidingWindow(0)
    with stack(build(UNET)) as one:
        with pytest.raises(ValueError, match="attn2 is cross"):
            one.add(SlidingWindow(3))
        q = torch.zeros(1, 1, 96, 2)
        with pytest.raises(ValueError, match="96 queries and 24 keys"):
            SlidingWindow(3).on_bias(one.sites[0], one.context, q, q[..., :24, :])
