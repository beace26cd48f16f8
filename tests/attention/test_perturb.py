"""Perturbed attention is the values themselves, or that of blurred queries; only where it is asked for."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from gendiff.attention import Grid, Kind, Middleware, Stage, sites, stack
from gendiff.attention.perturb import BlurredQueries, IdentityProbs
from tests.attention.models import FLUX, SD3, UNET, build, said, state

PRX = "PRXTransformer2DModel"


class Seen(Middleware):
    """What comes out of the projections, what goes into the kernel, and what comes out at the end."""

    order = 0

    def __init__(self) -> None:
        self.raw, self.used, self.out, self.inputs, self.outputs = {}, {}, {}, {}, {}

    def on_inputs(self, site, context, hidden, other):
        self.inputs[site.name] = hidden
        return hidden, other

    def on_qkv(self, site, context, q, k, v):
        self.raw[site.name] = q, k, v
        return q, k, v

    def on_heads(self, site, context, out, q, k, v):
        self.used[site.name], self.out[site.name] = (q, k, v), out
        return out

    def on_output(self, site, context, out):
        self.outputs[site.name] = out
        return out


def limited(name, middleware, on, rows=("cond", "perturbed"), **how):
    """Both outputs and what was seen at the first site; undo is exact, and another model is untouched."""
    model, other = build(name), build(name)
    stock, before = said(model, name), state(model)
    with stack(model, rows=rows) as one:
        one.context.size = Grid(1, 4, 6)  # of Flux, which is given packed tokens
        one.add(middleware, on, **how)
        seen = one.add(Seen(), on).middleware
        changed = said(model, name)
        assert torch.equal(said(other, name), stock)
        first = one.sites.on(on)[0]
    assert state(model) == before
    assert torch.equal(said(model, name), stock)
    return stock, changed, seen, first


def graphs(middleware, on=None) -> int:
    """How many graphs two layers of a shape take, which say compiled what they say without it."""
    torch._dynamo.reset()
    model, counter = build(UNET), CompileCounter()
    blocks = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 96, 16, generator=generator), torch.randn(4, 5, 12, generator=generator)
    with stack(model, rows=("uncond", "cond")) as one, torch.no_grad():
        one.context.size, one.context.batch, one.context.text = Grid(1, 8, 12), 4, 5
        one.add(middleware, on)
        eager = [block(x, encoder_hidden_states=text) for block in blocks]
        for block, expected in zip(blocks, eager, strict=True):
            compiled = torch.compile(block, backend=counter, fullgraph=True)
            torch.testing.assert_close(compiled(x, encoder_hidden_states=text), expected)
    torch._dynamo.reset()
    return counter.frame_count


@pytest.mark.parametrize("middleware", [IdentityProbs(), BlurredQueries(math.inf)])
def test_layers_share_a_compiled_graph(middleware) -> None:
    assert graphs(middleware, Kind.SELF) == 1


# ---- perturbed-attention guidance


def test_identity_is_the_projected_values() -> None:
    """to_out(to_v(x)), with nothing of the layer's attention in it."""
    _, _, seen, site = limited(UNET, IdentityProbs(), Kind.SELF)
    x, layer = seen.inputs[site.name], site.module
    torch.testing.assert_close(seen.outputs[site.name], layer.to_out[0](layer.to_v(x)))


def test_identity_limited_to_rows() -> None:
    stock, changed, _, _ = limited(UNET, IdentityProbs(), Kind.SELF & Stage.MID)
    model = build(UNET)
    with stack(model, rows=("cond", "perturbed")) as one:
        one.add(IdentityProbs(), Kind.SELF & Stage.MID, rows="perturbed")
        half = said(model, UNET)
    assert torch.equal(half[0], stock[0])
    torch.testing.assert_close(half[1], changed[1])
    assert not torch.allclose(half[1], stock[1], atol=1e-4)


@pytest.mark.parametrize("name", [FLUX, SD3])
def test_identity_of_joint_layers_is_that_of_the_image(name) -> None:
    """Text tokens say what they said, wherever they stand; the image's are the values."""
    model = build(name)
    with stack(model) as one:
        stock = one.add(Seen()).middleware
        said(model, name)
    _, _, seen, site = limited(name, IdentityProbs(), Kind.JOINT)
    text = slice(0, 5) if site.text == "first" else slice(-5, None)
    image = slice(5, None) if site.text == "first" else slice(0, -5)
    out, v = seen.out[site.name], seen.used[site.name][2]
    assert out.shape[-2] == 29
    assert torch.equal(out[..., image, :], v[..., image, :])
    assert torch.equal(out[..., text, :], stock.out[site.name][..., text, :])


def test_identity_where_the_image_alone_asks() -> None:
    """Keys of text and image, queries of the image: each has its own value, which is not the first of all."""
    _, _, seen, site = limited(PRX, IdentityProbs(), Kind.JOINT)
    out, v = seen.out[site.name], seen.used[site.name][2]
    assert (out.shape[-2], v.shape[-2]) == (24, 29)
    assert torch.equal(out, v[..., 5:, :])
    _, _, seen, site = limited(PRX, BlurredQueries(math.inf), Kind.JOINT)
    q = seen.used[site.name][0]
    torch.testing.assert_close(q, seen.raw[site.name][0].mean(-2, keepdim=True).expand_as(q))


def test_identity_with_fewer_heads_of_values_and_appended_keys() -> None:
    site, q = sites(build(UNET))[0], torch.randn(1, 4, 6, 3)
    k = v = torch.randn(1, 2, 8, 3)  # two of them appended
    out = IdentityProbs().on_heads(site, None, torch.zeros_like(q), q, k, v)
    assert torch.equal(out, v[:, [0, 0, 1, 1], :6])
    with pytest.raises(ValueError, match="6 queries and 5 values"):
        IdentityProbs().on_heads(site, None, torch.zeros_like(q), q, k, v[..., :5, :])


# ---- smoothed-energy guidance


def brute(q, height, width, sigma):
    """Each query the weighted mean of all, in two dimensions at once."""
    out = torch.empty_like(q)
    place = [(y, x) for y in range(height) for x in range(width)]
    for i, (y, x) in enumerate(place):
        weights = torch.tensor([math.exp(-((y - b) ** 2 + (x - a) ** 2) / (2 * sigma**2)) for b, a in place])
        out[..., i, :] = (weights / weights.sum()) @ q
    return out


@pytest.mark.parametrize("sigma", [0.6, 1.5, 10.0])
def test_a_blur_is_brute_force(sigma) -> None:
    _, _, seen, site = limited(UNET, BlurredQueries(sigma), Kind.SELF)
    (q, k, v), (blurred, k_used, v_used) = seen.raw[site.name], seen.used[site.name]
    torch.testing.assert_close(blurred, brute(q, 8, 12, sigma), atol=1e-5, rtol=1e-5)
    assert k_used is k
    assert v_used is v


def test_an_infinite_blur_is_the_mean_query() -> None:
    _, _, seen, site = limited(UNET, BlurredQueries(math.inf), Kind.SELF)
    q, k, v = seen.raw[site.name]
    expected = scaled_dot_product_attention(q.mean(-2, keepdim=True), k, v).expand_as(q)
    torch.testing.assert_close(seen.out[site.name], expected)


def test_a_blur_has_limits_and_keeps_what_is_constant() -> None:
    model = build(UNET)
    with stack(model) as one:
        blur = one.add(BlurredQueries(1.0), Kind.SELF).middleware
        buffer = blur.sigma
        said(model, UNET)
        site, q = one.sites[0], torch.randn(2, 2, 96, 8)
        flat = torch.ones(1, 1, 96, 2)
        torch.testing.assert_close(blur.on_qkv(site, one.context, flat, flat, flat)[0], flat)
        blur.set(1e-20)
        assert torch.equal(blur.on_qkv(site, one.context, q, q, q)[0], q)
        blur.set(torch.tensor(torch.inf))
        mean = q.mean(-2, keepdim=True).expand_as(q)
        torch.testing.assert_close(blur.on_qkv(site, one.context, q, q, q)[0], mean)
        assert blur.sigma is buffer  # which a captured step reads


def test_a_blur_of_joint_layers_is_that_of_the_image() -> None:
    _, _, seen, site = limited(FLUX, BlurredQueries(1.5), Kind.JOINT)
    q, blurred = seen.raw[site.name][0], seen.used[site.name][0]
    assert torch.equal(blurred[..., :5, :], q[..., :5, :])
    torch.testing.assert_close(blurred[..., 5:, :], brute(q[..., 5:, :], 4, 6, 1.5), atol=1e-5, rtol=1e-5)


def test_a_blur_limited_to_rows() -> None:
    model = build(UNET)
    stock = said(model, UNET)
    with stack(model, rows=("cond", "perturbed")) as one:
        one.add(BlurredQueries(math.inf), Kind.SELF, rows="perturbed")
        half = said(model, UNET)
    assert torch.equal(half[0], stock[0])
    assert not torch.allclose(half[1], stock[1], atol=1e-4)


# ---- what is refused


def test_what_cannot_be_perturbed() -> None:
    with stack(build(UNET)) as one:
        for middleware in (IdentityProbs(), BlurredQueries(1.0)):
            with pytest.raises(ValueError, match=r"works at sites of kind self.*attn2 is cross"):
                one.add(middleware)
        one.add(BlurredQueries(1.0), Kind.SELF)
        with pytest.raises(ValueError, match="both claim queries"):
            one.add(BlurredQueries(2.0), Kind.SELF)
    for sigma in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma is above 0"):
            BlurredQueries(sigma)
