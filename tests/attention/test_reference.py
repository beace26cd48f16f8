"""Reference processors: equal to those of diffusers, and to closed forms where these ignore a setting."""

import copy
import math

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from gendiff.attention import Middleware, project, set_projector, sites, stack
from gendiff.attention.reference import ReferenceProcessor
from gendiff.attention.reference_joint import FluxReferenceProcessor, JointReferenceProcessor
from tests.attention.models import FLUX, SD3, UNET, Halved, build, run, said
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

REFERENCES = {
    "AttnProcessor2_0": ReferenceProcessor,
    "AttnProcessor": ReferenceProcessor,
    "JointAttnProcessor2_0": JointReferenceProcessor,
    "FluxAttnProcessor": FluxReferenceProcessor,
}
SAME_BITS = (
    UNET,
    "UNet2DModel",
    "UNet3DConditionModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "I2VGenXLUNet",
    "Kandinsky3UNet",
    "StableCascadeUNet",
    "UVit2DModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "Transformer2DModel",
    "LatteTransformer3DModel",
    "TransformerTemporalModel",
    SD3,
    FLUX,
    "ChromaTransformer2DModel",
)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / max(weight[0].numel(), 4) ** 0.5)
    return layer.eval()


def layer_of(stock=None, **settings):
    """A layer with weights that hide nothing; 2 heads of 4 numbers unless settings say otherwise."""
    settings = {"query_dim": 12, "heads": 2, "dim_head": 4, "bias": True} | settings
    return drawn(Attention(**settings, processor=stock))


def both(layer, stock, reference, *args, **kwargs):
    """What a layer says with the processor of diffusers, and with ours."""
    outs = []
    for processor in (stock, reference):
        layer.set_processor(processor)
        torch.manual_seed(1)
        with torch.no_grad():
            outs.append(layer(*args, **kwargs))
    return outs


# ---- models of the zoo


def placed(model):
    count = 0
    for site in sites(model):
        if site.processor in REFERENCES:
            site.module.set_processor(REFERENCES[site.processor]())
            count += 1
    return count


@pytest.mark.parametrize("name", SAME_BITS)
def test_a_model_says_the_same_bit_for_bit(name) -> None:
    model = build(name)
    before = said(model, name)
    assert placed(model) > 0
    assert torch.equal(said(model, name), before)


def test_a_model_of_the_slow_processor_says_the_same_up_to_rounding() -> None:
    model = build("T5FilmDecoder")
    before = said(model, "T5FilmDecoder")
    assert {site.processor for site in sites(model)} == {"AttnProcessor"}
    assert placed(model) == 4
    torch.testing.assert_close(said(model, "T5FilmDecoder"), before, rtol=1e-6, atol=1e-6)  # measured: 2.4e-7


# ---- settings of `Attention`

GRID = {
    "plain": {},
    "one head": {"heads": 1},
    "no bias": {"bias": False, "out_bias": False},
    "layer norm of queries and keys": {"qk_norm": "layer_norm"},
    "rms norm of queries and keys": {"qk_norm": "rms_norm"},
    "l2 norm of queries and keys": {"qk_norm": "l2"},
    "float32 layer norm": {"qk_norm": "fp32_layer_norm"},
    "layer norm of the context": {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
    "group norm of the context": {
        "cross_attention_dim": 6,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 2,
    },
    "group norm": {"norm_num_groups": 3},
    "residual": {"residual_connection": True},
    "residual and factor": {"residual_connection": True, "rescale_output_factor": 3.0},
    "another width": {"out_dim": 8},
}


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", GRID)
def test_settings_of_the_fast_processor_bit_for_bit(name, context) -> None:
    layer = layer_of(**GRID[name])
    width = layer.cross_attention_dim
    if not context and width != 12:
        width, context = 6, True
    given = {"encoder_hidden_states": noise(2, 5, width, seed=1)} if context else {}
    theirs, ours = both(layer, AttnProcessor2_0(), ReferenceProcessor(), noise(2, 7, 12), **given)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("name", [name for name in GRID if "queries" not in name and "float32" not in name])
def test_settings_of_the_slow_processor_up_to_rounding(name) -> None:
    layer = layer_of(**GRID[name], scale_qk=False)  # which is the one that honours the scale
    context = noise(2, 5, layer.cross_attention_dim, seed=1)
    theirs, ours = both(
        layer, AttnProcessor(), ReferenceProcessor(), noise(2, 7, 12), encoder_hidden_states=context
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"norm_num_groups": 3, "residual_connection": True}])
def test_images(settings) -> None:
    image = noise(2, 12, 3, 5)
    theirs, ours = both(layer_of(**settings), AttnProcessor2_0(), ReferenceProcessor(), image)
    assert torch.equal(theirs, ours)
    assert ours.shape == image.shape


def test_spatial_norm() -> None:
    layer = layer_of(query_dim=32, spatial_norm_dim=4, residual_connection=True)
    temb = noise(2, 4, 2, 3, seed=3)
    theirs, ours = both(layer, AttnProcessor2_0(), ReferenceProcessor(), noise(2, 32, 4, 6), temb=temb)
    assert torch.equal(theirs, ours)
    _, other = both(layer, AttnProcessor2_0(), ReferenceProcessor(), noise(2, 32, 4, 6), temb=temb + 1)
    assert not torch.equal(ours, other)


def test_dropout_in_train_mode() -> None:
    layer = layer_of(dropout=0.4).train()
    theirs, ours = both(layer, AttnProcessor2_0(), ReferenceProcessor(), noise(2, 7, 12))
    assert torch.equal(theirs, ours)
    assert 0.2 < (ours == 0).float().mean() < 0.6


def test_fused_projections() -> None:
    for width in (None, 6):
        layer = layer_of(cross_attention_dim=width)
        given = {} if width is None else {"encoder_hidden_states": noise(2, 5, 6, seed=1)}
        x = noise(2, 7, 12)
        with torch.no_grad():
            layer.set_processor(ReferenceProcessor())
            plain = layer(x, **given)
            layer.fuse_projections()
            torch.testing.assert_close(layer(x, **given), plain, rtol=1e-5, atol=1e-6)


# ---- closed forms, where the processor of diffusers ignores what a layer asks for


def closed(layer, x, context=None, mask=None, scale=None, across=False):
    """Attention written in float64, head by head."""
    layer = copy.deepcopy(layer).double()
    x = x.double()
    context = x if context is None else context.double()
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    dim = q.shape[-1] // layer.heads
    if across:
        q, k = layer.norm_q(q), layer.norm_k(k)
    times = layer.heads // (k.shape[-1] // dim)
    outs = []
    for head in range(layer.heads):
        other = head // times
        mine, theirs = slice(head * dim, (head + 1) * dim), slice(other * dim, (other + 1) * dim)
        scores = q[..., mine] @ k[..., theirs].mT * (dim**-0.5 if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        outs.append(scores.softmax(-1) @ v[..., theirs])
    return layer.to_out[0](torch.cat(outs, -1))


def ours_of(layer, *args, **kwargs):
    layer.set_processor(ReferenceProcessor())
    with torch.no_grad():
        return layer(*args, **kwargs)


@torch.no_grad()
def test_the_scale_of_the_layer() -> None:
    """The fast processor of diffusers ignores it."""
    layer, x = layer_of(scale_qk=False), noise(2, 7, 12)
    torch.testing.assert_close(ours_of(layer, x).double(), closed(layer, x, scale=1.0), rtol=1e-5, atol=1e-5)
    layer.set_processor(AttnProcessor2_0())
    assert (layer(x).double() - closed(layer, x, scale=1.0)).abs().max() > 0.01
    layer.scale = 0.3
    torch.testing.assert_close(ours_of(layer, x).double(), closed(layer, x, scale=0.3), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_heads_of_keys(heads) -> None:
    """The fast processor of diffusers refuses them."""
    layer, x = layer_of(heads=4, kv_heads=heads), noise(2, 7, 12)
    torch.testing.assert_close(ours_of(layer, x).double(), closed(layer, x), rtol=1e-5, atol=1e-5)
    layer.set_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError):
        layer(x)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layer_norm_across_heads", "rms_norm_across_heads"])
def test_norms_across_heads(norm) -> None:
    """The fast processor of diffusers refuses them."""
    layer, x = layer_of(qk_norm=norm, kv_heads=2), noise(2, 7, 12)
    torch.testing.assert_close(
        ours_of(layer, x).double(), closed(layer, x, across=True), rtol=1e-5, atol=1e-5
    )
    layer.set_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError):
        layer(x)


@torch.no_grad()
def test_causal_order() -> None:
    """The fast processor of diffusers ignores it."""
    layer, x = layer_of(is_causal=True), noise(2, 7, 12)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(ours_of(layer, x).double(), closed(layer, x, mask=seen), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flag", ["upcast_attention", "upcast_softmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcasts(flag, dtype) -> None:
    """Attention proper is then as exact as float32: what is left is rounding before and after it.

    The fast processor of diffusers ignores the flags.
    """
    layer = layer_of(**{flag: True}).to(dtype)
    with torch.no_grad():
        layer.to_q.weight.mul_(20)
    x = noise(2, 7, 12, dtype=dtype)
    out = ours_of(layer, x)
    assert out.dtype == dtype
    q, k, v = (one.unflatten(-1, (2, 4)).transpose(1, 2).double() for one in project(layer, x))
    heads = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.equal(out, layer.to_out[0](heads.to(dtype)))  # what was rounded once is equal


@torch.no_grad()
def test_upcasts_hold_scores_that_float16_cannot() -> None:
    layer = layer_of(upcast_attention=True, scale_qk=False).half()
    layer.to_q.weight.copy_(layer.to_q.weight * 300)
    layer.to_k.weight.copy_(layer.to_k.weight * 300)
    x = noise(2, 7, 12, dtype=torch.float16)
    q, k, _ = project(layer, x)
    assert (q.double() @ k.double().mT).abs().max() > torch.finfo(torch.float16).max
    assert ours_of(layer, x).isfinite().all()


# ---- masks


@pytest.mark.parametrize("shape", ["keys", "queries", "heads", "four"])
def test_masks_of_numbers_bit_for_bit(shape) -> None:
    sizes = {"keys": (2, 1, 5), "queries": (2, 7, 5), "heads": (4, 7, 5), "four": (2, 5)}[shape]
    mask = torch.where(noise(*sizes, seed=4) < 0, -10000.0, 0.0)
    mask[..., 0] = 0
    layer, context = layer_of(cross_attention_dim=6), noise(2, 5, 6, seed=1)
    given = {"encoder_hidden_states": context, "attention_mask": mask}
    theirs, ours = both(layer, AttnProcessor2_0(), ReferenceProcessor(), noise(2, 7, 12), **given)
    assert torch.equal(theirs, ours)


@torch.no_grad()
def test_masks_of_booleans() -> None:
    layer, x = layer_of(cross_attention_dim=6), noise(2, 7, 12)
    context, mask = noise(2, 5, 6, seed=1), torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]]).bool()
    want = closed(layer, x, context, mask[:, None])
    for given in (mask, mask[:, None], mask[:, None, None], mask[:, None].expand(2, 7, 5)):
        got = ours_of(layer, x, encoder_hidden_states=context, attention_mask=given)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_short_mask_is_lengthened_to_the_keys() -> None:
    """That of diffusers is lengthened by their number, and refused."""
    layer, x, context = layer_of(cross_attention_dim=6), noise(2, 7, 12), noise(2, 5, 6, seed=1)
    for mask, value in (
        (torch.tensor([[0.0, -1e4, 0.0]] * 2), 0.0),
        (torch.tensor([[True, False, True]] * 2), True),
    ):
        long = torch.nn.functional.pad(mask, (0, 2), value=value)
        short = ours_of(layer, x, encoder_hidden_states=context, attention_mask=mask)
        assert torch.equal(short, ours_of(layer, x, encoder_hidden_states=context, attention_mask=long))
    layer.set_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError):
        layer(x, encoder_hidden_states=context, attention_mask=mask)


@torch.no_grad()
def test_a_query_without_any_key_attends_to_nothing() -> None:
    layer, x = layer_of(), noise(2, 7, 12)
    for mask in (torch.zeros(2, 1, 7), torch.ones(2, 1, 7, dtype=torch.bool)):
        mask[0] = False if mask.dtype == torch.bool else -math.inf
        out = ours_of(layer, x, attention_mask=mask)
        torch.testing.assert_close(out[0], layer.to_out[0].bias.expand(7, -1))
        assert torch.equal(out[1:], ours_of(layer, x[1:]))


def test_a_mask_of_another_shape_is_refused() -> None:
    for shape in ((3, 1, 7), (2, 1, 8), (1, 2, 1, 1, 7)):
        with pytest.raises(ValueError, match="does not fit 2 rows, 2 heads and 7 keys"):
            ours_of(layer_of(), noise(2, 7, 12), attention_mask=torch.zeros(shape))


# ---- added keys of a text


ADDED = {"query_dim": 8, "added_kv_proj_dim": 6, "norm_num_groups": 2, "residual_connection": True}
NORMED = {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"only_cross_attention": True}, NORMED])
def test_added_keys(settings, masked) -> None:
    layer = layer_of(AttnAddedKVProcessor2_0(), **ADDED, **settings)
    given = {"encoder_hidden_states": noise(2, 5, 6, seed=1)}
    if masked:
        given["attention_mask"] = torch.where(noise(2, 1, 5, seed=4) < 0, -10000.0, 0.0)
    stock = AttnAddedKVProcessor2_0()
    if masked and "only_cross_attention" in settings:
        with pytest.raises(RuntimeError):  # that of diffusers is lengthened by keys that are not there
            both(layer, stock, ReferenceProcessor(), noise(2, 8, 2, 3), **given)
        return
    theirs, ours = both(layer, stock, ReferenceProcessor(), noise(2, 8, 2, 3), **given)
    assert torch.equal(theirs, ours)
    if not masked:
        slow, _ = both(layer, AttnAddedKVProcessor(), ReferenceProcessor(), noise(2, 8, 2, 3), **given)
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)


def test_added_keys_without_a_text() -> None:
    """They are made of the tokens before the group norm, the layer's own keys of those behind it."""
    layer = layer_of(AttnAddedKVProcessor2_0(), **ADDED | {"added_kv_proj_dim": 8})
    theirs, ours = both(layer, AttnAddedKVProcessor2_0(), ReferenceProcessor(), noise(2, 8, 2, 3))
    assert torch.equal(theirs, ours)


# ---- two streams


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", [None, "rms_norm", "layer_norm"])
def test_streams_of_sd3(last, norm) -> None:
    layer = layer_of(JointAttnProcessor2_0(), added_kv_proj_dim=12, context_pre_only=last, qk_norm=norm)
    x, text = noise(2, 7, 12), noise(2, 5, 12, seed=1)
    theirs, ours = both(layer, JointAttnProcessor2_0(), JointReferenceProcessor(), x, text)
    assert len(ours) == 2
    assert all(map(torch.equal, theirs, ours))
    alone, mine = both(layer, JointAttnProcessor2_0(), JointReferenceProcessor(), x)
    assert isinstance(mine, torch.Tensor)
    assert torch.equal(alone, mine)


@torch.no_grad()
def test_sd3_honours_the_scale_and_a_mask() -> None:
    """The processor of diffusers ignores both."""
    layer = layer_of(JointReferenceProcessor(), added_kv_proj_dim=12, context_pre_only=False, scale_qk=False)
    x, text = noise(2, 7, 12), noise(2, 5, 12, seed=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:] = False  # the text's last three
    image, other = layer(x, text, attention_mask=mask)
    parts = [
        torch.cat(pair, 1) for pair in zip(project(layer, x), project(layer, text, added=True), strict=True)
    ]
    q, k, v = (one.double().unflatten(-1, (2, 4)).transpose(1, 2) for one in parts)
    heads = (q @ k.mT).masked_fill(~mask[:, None, None], -math.inf).softmax(-1) @ v
    heads = heads.transpose(1, 2).flatten(2).float()
    torch.testing.assert_close(image, layer.to_out[0](heads[:, :7]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, layer.to_add_out(heads[:, 7:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_of_flux(masked, dtype) -> None:
    double = FluxAttention(
        query_dim=12, heads=3, dim_head=4, added_kv_proj_dim=12, context_pre_only=False, bias=True
    )
    single = FluxAttention(query_dim=12, heads=3, dim_head=4, bias=True, pre_only=True)
    angle = noise(12, 2, seed=5).repeat_interleave(2, -1)
    given = {"image_rotary_emb": (angle.cos(), angle.sin())}
    if masked:
        given["attention_mask"] = noise(2, 1, 1, 12, seed=6) < 0.5
    stock, reference = FluxAttnProcessor(), FluxReferenceProcessor()
    x, text = noise(2, 7, 12, dtype=dtype), noise(2, 5, 12, seed=1, dtype=dtype)
    theirs, ours = both(drawn(double).to(dtype), stock, reference, x, text, **given)
    assert all(map(torch.equal, theirs, ours))
    assert [one.shape[1] for one in ours] == [7, 5]
    theirs, ours = both(drawn(single).to(dtype), stock, reference, torch.cat([text, x], 1), **given)
    assert torch.equal(theirs, ours)
    assert ours.dtype == dtype


# ---- what others do with them


@pytest.mark.parametrize("name", [UNET, SD3, FLUX])
def test_a_stack_reaches_their_kernels(name) -> None:
    model = build(name)
    plain = said(model, name)
    with stack(model) as stock:
        stock.add(Halved())
        want = said(model, name)
    assert placed(model) == len(sites(model))
    assert all(site.kernels == ("scaled_dot_product_attention",) for site in sites(model))
    with stack(model) as ours:
        ours.add(Halved())
        assert torch.equal(said(model, name), want)
    assert torch.equal(said(model, name), plain)
    assert not torch.equal(plain, want)


class Heads(Middleware):
    """The shapes of what comes in."""

    def on_heads(self, site, context, out, q, k, v):
        self.shapes = q.shape, k.shape
        return out


def test_a_stack_sees_fewer_heads_of_keys() -> None:
    layer, seen = layer_of(heads=4, kv_heads=2), Heads()
    layer.set_processor(ReferenceProcessor())
    with stack(layer) as st:
        st.add(seen)
        layer(noise(2, 7, 12))
    assert seen.shapes == ((2, 4, 7, 4), (2, 2, 7, 4))


@pytest.mark.parametrize("name", [UNET, SD3, FLUX])
def test_a_projector_is_used(name) -> None:
    model = build(name)
    placed(model)
    plain = said(model, name)

    def doubled(layer, x, context, added):
        parts = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        q, k, v = (getattr(layer, part) for part in parts)
        return q(x), k(context), 2 * v(context)

    site = sites(model)[0]
    with set_projector(site, doubled):
        assert not torch.equal(said(model, name), plain)
    assert torch.equal(said(model, name), plain)


def test_gradients_are_those_of_diffusers() -> None:
    model = build(UNET)
    want = torch.autograd.grad(run(model, UNET).square().sum(), list(model.parameters()))
    placed(model)
    got = torch.autograd.grad(run(model, UNET).square().sum(), list(model.parameters()))
    assert all(map(torch.equal, want, got))
