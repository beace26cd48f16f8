"""Merged tokens are means, and unmerged ones their destinations; keys of a coarser grid."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, interpolate, scaled_dot_product_attention

from gendiff.attention import Grid, Kind, Steps, stack
from gendiff.attention.merging import DownsampledKV, TokenMerging, destinations, merge, plan, unmerge
from tests.attention.models import UNET, build, said
from tests.attention.test_perturb import graphs, limited
from tests.zoo import ZOO

GRID = Grid(1, 5, 6)


@pytest.fixture
def hidden(generator):
    return torch.randn(2, 30, 8, generator=generator)


def merged(hidden, grid, count):
    """For each sample: source to destination, by the definition and without tensors' tricks."""
    places = [y * grid.width + x for y in range(0, grid.height, 2) for x in range(0, grid.width, 2)]
    found = []
    for x in hidden:
        near = {}
        for token in set(range(len(x))) - set(places):
            alike = [cosine_similarity(x[token], x[place], dim=0).item() for place in places]
            near[token] = max(alike), places[alike.index(max(alike))]
        ranked = sorted(near, key=lambda token: -near[token][0])[:count]
        found.append({token: near[token][1] for token in ranked})
    return found


@pytest.mark.parametrize("count", [1, 8, 21])
def test_a_round_is_the_definition(hidden, count) -> None:
    """Of merged tokens and their destination the mean, everywhere; of all others what they were."""
    chosen = plan(hidden, GRID, count)
    small = merge(hidden, chosen)
    assert small.shape == (2, 30 - count, 8)
    back = unmerge(small, chosen)
    for x, out, into in zip(hidden, back, merged(hidden, GRID, count), strict=True):
        assert len(into) == count
        for token in range(30):
            home = into.get(token, token)
            members = [home, *(other for other, of in into.items() if of == home)]
            torch.testing.assert_close(out[token], x[members].mean(0))


def test_equal_tokens_are_merged_without_loss(generator) -> None:
    """An image of flat 2×2 blocks has a quarter of its tokens, and comes back as it was."""
    small = torch.randn(2, 16, 3, 4, generator=generator)
    hidden = interpolate(small, scale_factor=2, mode="nearest").flatten(2).mT
    chosen = plan(hidden, Grid(1, 6, 8), 36)
    assert merge(hidden, chosen).shape[1] == 12
    torch.testing.assert_close(unmerge(merge(hidden, chosen), chosen), hidden)


def test_destinations_are_the_first_of_each_window() -> None:
    assert destinations(Grid(1, 3, 4)) == [0, 2, 8, 10]
    assert destinations(Grid(2, 1, 3)) == [0, 2, 3, 5]
    assert plan(torch.randn(1, 12, 2), Grid(1, 3, 4), 2).places.tolist() == [0, 2, 8, 10]


def test_none_merged_is_bit_identical() -> None:
    stock, changed, _, _ = limited(UNET, TokenMerging(0), Kind.SELF)
    assert torch.equal(changed, stock)


def test_a_layer_attends_among_what_is_left() -> None:
    """96 tokens, half of them merged: the layer of the 48, given back to all; then nothing is held."""
    middleware = TokenMerging(0.5)
    _, _, seen, site = limited(UNET, middleware, Kind.SELF)
    x, layer = seen.inputs[site.name], site.module
    assert seen.raw[site.name][0].shape[-2] == 48
    chosen = plan(x, Grid(1, 8, 12), 48)
    with torch.no_grad():
        expected = unmerge(layer(merge(x, chosen)), chosen)
        torch.testing.assert_close(seen.outputs[site.name], expected)
        assert not torch.allclose(expected, layer(x), atol=1e-4)
    assert middleware._plan is None


def test_keys_of_a_coarser_grid() -> None:
    """Nearest neighbours, as torch interpolates; queries stay."""
    _, _, seen, site = limited(UNET, DownsampledKV(2), Kind.SELF)
    q, k, v = seen.raw[site.name]
    small = [
        interpolate(x.transpose(-1, -2).flatten(0, 1).unflatten(-1, (8, 12)), (4, 6), mode="nearest")
        .flatten(2)
        .mT.unflatten(0, x.shape[:2])
        for x in (k, v)
    ]
    for used, expected in zip(seen.used[site.name][1:], small, strict=True):
        assert torch.equal(used, expected)
    torch.testing.assert_close(seen.out[site.name], scaled_dot_product_attention(q, *small))


def test_a_factor_of_one_is_bit_identical() -> None:
    stock, changed, _, _ = limited(UNET, DownsampledKV(1), Kind.SELF)
    assert torch.equal(changed, stock)


def test_flat_keys_lose_nothing_but_their_number() -> None:
    """Equal keys in each window are as many times each: the softmax is the same."""
    with stack(build(UNET)) as one:
        one.context.size = Grid(1, 8, 12)
        small = torch.randn(1, 2, 4, 6, 8)
        flat = small.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3)
        q, k, v = DownsampledKV(2).on_qkv(one.sites[0], one.context, flat, flat, flat)
    expected = scaled_dot_product_attention(flat, flat, flat)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("middleware", [TokenMerging(0.5), DownsampledKV(2)])
def test_layers_share_a_compiled_graph(middleware) -> None:
    assert graphs(middleware, Kind.SELF) == 1


def test_what_is_refused() -> None:
    for ratio in (-0.1, 0.8):
        with pytest.raises(ValueError, match="a share of tokens in"):
            TokenMerging(ratio)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DownsampledKV(0)
    model = build(UNET)
    with stack(model) as one:
        for middleware in (TokenMerging(0.5), DownsampledKV(2)):
            with pytest.raises(ValueError, match="attn2 is cross"):
                one.add(middleware)
        handle = one.add(TokenMerging(0.5), Kind.SELF, when=Steps(0, 1))
        with pytest.raises(ValueError, match="cannot be limited to some rows or steps"):
            said(model, UNET)
        with pytest.raises(ValueError, match="both claim kv"):
            one.add(DownsampledKV(2), Kind.SELF)
        handle.remove()
    for name in ("UNet2DModel", "WanTransformer3DModel", "HunyuanDiT2DModel", "RFD4ProteinaTransformer"):
        assert name in ZOO
        with stack(build(name)) as one, pytest.raises(ValueError, match="neither adds its own input nor"):
            one.add(TokenMerging(0.5), Kind.SELF)
