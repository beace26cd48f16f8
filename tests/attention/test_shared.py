"""Keys and values of a reference row: appended, or taken; each part of the batch has its own reference."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gendiff.attention import Context, Depth, Grid, Kind, Steps, sites, stack
from gendiff.attention.shared import SharedKV, by_part
from tests.attention.models import FLUX, UNET, build, said, state
from tests.attention.test_perturb import PRX, Seen, graphs
from tests.zoo import ZOO, main

PARTS = ("uncond", "cond")


def inputs(name, seed=0):
    """Four rows, all different: two samples without and two with the prompt."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.cat([value, torch.randn(value.shape, generator=generator)])
        if isinstance(value, torch.Tensor) and value.ndim > 1 and not key.endswith("_ids")
        else torch.cat([value, value])
        if isinstance(value, torch.Tensor) and value.ndim == 1
        else value
        for key, value in ZOO[name].inputs().items()
    }


def ran(model, name, **changes):
    with torch.no_grad():
        return main(model(**{**inputs(name), **changes}))


def four(name, middleware, on, **how):
    """Outputs of four rows without and with it, and what was seen at the first site; undo is exact."""
    model, other = build(name), build(name)
    stock, before = ran(model, name), state(model)
    with stack(model, rows=PARTS) as one:
        one.context.size = Grid(1, 4, 6)
        one.add(middleware, on, **how)
        seen = one.add(Seen(), on).middleware
        changed = ran(model, name)
        assert torch.equal(ran(other, name), stock)
        first = one.sites.on(on)[0]
    assert state(model) == before
    assert torch.equal(ran(model, name), stock)
    return stock, changed, seen, first


@pytest.mark.parametrize("reference", [0, 1, -1])
def test_appended_keys_are_those_of_the_parts_reference(reference) -> None:
    """Row by row: softmax over its own keys and the reference's, with the formula written out."""
    _, _, seen, site = four(UNET, SharedKV(reference), Kind.SELF)
    q, k, v = seen.raw[site.name]
    for row in range(4):
        of = row // 2 * 2 + reference % 2
        keys, values = torch.cat([k[row], k[of]], -2), torch.cat([v[row], v[of]], -2)
        probs = (q[row] @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1)
        torch.testing.assert_close(seen.out[site.name][row], probs @ values)


def test_the_reference_is_as_it_was_alone() -> None:
    """Its own keys twice are the same softmax; taken from itself they are the same numbers."""
    for adain in ((), ("q", "k"), ("q", "k", "v")):
        stock, changed, _, _ = four(UNET, SharedKV(adain=adain, shift=1.5), Kind.SELF)
        torch.testing.assert_close(changed[::2], stock[::2], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(changed[1::2], stock[1::2], atol=1e-3)
    stock, changed, _, _ = four(UNET, SharedKV(mode="replace"), Kind.SELF)
    assert torch.equal(changed[::2], stock[::2])
    assert not torch.allclose(changed[1::2], stock[1::2], atol=1e-3)


def test_adain_takes_over_mean_and_deviation() -> None:
    _, _, seen, site = four(UNET, SharedKV(adain=("q", "k")), Kind.SELF)
    for before, after, own in zip(seen.raw[site.name], seen.used[site.name], (96, 96, 0), strict=True):
        if not own:
            assert torch.equal(after[..., :96, :], before)  # the values keep theirs
            continue
        for row in range(4):
            reference, adapted = before[row // 2 * 2], after[row, :, :own]
            torch.testing.assert_close(adapted.mean(-2), reference.mean(-2), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(adapted.std(-2), reference.std(-2), atol=1e-3, rtol=1e-3)
            flat = before[row] - before[row].mean(-2, keepdim=True)  # nothing but shifted and scaled
            angle = torch.cosine_similarity(flat, adapted - adapted.mean(-2, keepdim=True), dim=-2)
            torch.testing.assert_close(angle, torch.ones_like(angle))


def test_a_shift_weighs_the_reference() -> None:
    """Minus infinity takes it away; log 2 counts each of its keys twice; it changes in place."""
    model = build(UNET)
    stock = ran(model, UNET)
    with stack(model, rows=PARTS) as one:
        shared = one.add(SharedKV(shift=-math.inf), Kind.SELF).middleware
        torch.testing.assert_close(ran(model, UNET), stock)
        buffer = shared.shift
        shared.set(math.log(2))
        assert shared.shift is buffer
        seen = one.add(Seen(), Kind.SELF).middleware
        ran(model, UNET)
        site = one.sites[0]
    q, k, v = seen.raw[site.name]
    twice = [torch.cat([x[1], x[0], x[0]], -2) for x in (k, v)]
    torch.testing.assert_close(seen.out[site.name][1], scaled_dot_product_attention(q[1], *twice))


def test_keys_are_taken_from_a_layer_and_a_step_on() -> None:
    """MasaCtrl: nothing before the step, then softmax(q k_ref) v_ref in the chosen layers and rows."""
    model = build(UNET)
    stock, late = ran(model, UNET), Kind.SELF & Depth(0.5, 1)
    with stack(model, rows=PARTS) as one:
        one.add(SharedKV(mode="replace"), late, rows="cond", when=Steps(1, 3))
        seen = one.add(Seen(), late).middleware
        assert torch.equal(ran(model, UNET), stock)
        changed = ran(model, UNET)
        site = one.sites.on(late)[0]
    q, k, v = seen.raw[site.name]
    out = seen.out[site.name]
    torch.testing.assert_close(out[3], scaled_dot_product_attention(q[3], k[2], v[2]))
    torch.testing.assert_close(out[1], scaled_dot_product_attention(q[1], k[1], v[1]))
    assert torch.equal(changed[:3], stock[:3])
    assert not torch.allclose(changed[3], stock[3], atol=1e-3)


def test_joint_layers_share_the_image_and_not_the_text() -> None:
    _, _, seen, site = four(FLUX, SharedKV(mode="replace"), Kind.JOINT)
    for before, after in zip(seen.raw[site.name][1:], seen.used[site.name][1:], strict=True):
        assert torch.equal(after[..., :5, :], before[..., :5, :])
        assert torch.equal(after[1, :, 5:], before[0, :, 5:])
        assert torch.equal(after[3, :, 5:], before[2, :, 5:])
    _, _, seen, site = four(FLUX, SharedKV(), Kind.JOINT)
    assert seen.used[site.name][1].shape[-2] == 5 + 24 + 24


def test_frames_take_the_same_frame_and_unnamed_rows_stay() -> None:
    """Two samples of three frames: frame f of sample 1 has that of sample 0."""
    context = Context({"cond": slice(1, 3)})
    context.batch = 3
    x = torch.arange(9.0)[:, None]
    taken = by_part(x, context, lambda part: part[:1].expand_as(part))
    assert taken.flatten().tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("middleware", [SharedKV(adain=("q",), shift=1.0), SharedKV(mode="replace")])
def test_layers_share_a_compiled_graph(middleware) -> None:
    assert graphs(middleware, Kind.SELF) == 1


def test_joint_layers_where_the_image_alone_asks() -> None:
    _, _, seen, site = four(PRX, SharedKV(mode="replace", adain=("q",)), Kind.JOINT)
    before, after = seen.raw[site.name], seen.used[site.name]
    torch.testing.assert_close(after[0][1].mean(-2), before[0][0].mean(-2), atol=1e-5, rtol=1e-4)
    for own, used in zip(before[1:], after[1:], strict=True):
        assert torch.equal(used[3, :, 5:], own[2, :, 5:])
        assert torch.equal(used[..., :5, :], own[..., :5, :])


def test_one_token_has_no_deviation() -> None:
    context = Context(("all",))
    site = sites(build(UNET))[0]
    q = torch.randn(2, 1, 1, 4)
    adapted, _, _ = SharedKV(adain=("q",)).on_qkv(site, context, q, q, q)
    torch.testing.assert_close(adapted[1], q[0])


def test_layers_that_cannot_share_are_refused() -> None:
    context = Context(("all",))
    site = sites(build(UNET))[0]
    q = torch.randn(2, 1, 6, 4)
    with pytest.raises(ValueError, match="6 queries and 5 keys, which are of something else"):
        SharedKV().on_qkv(site, context, q, q[..., :5, :], q[..., :5, :])
    context.batch = 4
    with pytest.raises(ValueError, match="the layer runs on 2 rows, and the batch has 4"):
        SharedKV().on_qkv(site, context, q, q, q)


def test_what_is_refused() -> None:
    model = build(UNET)
    with pytest.raises(ValueError, match="unknown mode 'instead'"):
        SharedKV(mode="instead")
    with pytest.raises(ValueError, match="unknown part for adain 'out'"):
        SharedKV(adain=("out",))
    with pytest.raises(ValueError, match="a shift is that of appended keys"):
        SharedKV(mode="replace", shift=1.0)
    with pytest.raises(ValueError, match="has no shift"):
        SharedKV().set(1.0)
    with stack(model) as one, pytest.raises(ValueError, match="works on rows of the batch"):
        one.add(SharedKV(), Kind.SELF)
    with stack(model, rows=PARTS) as one:
        with pytest.raises(ValueError, match="attn2 is cross"):
            one.add(SharedKV())
        one.add(SharedKV(1), Kind.SELF)
        with pytest.raises(ValueError, match="both claim kv"):
            one.add(SharedKV(), Kind.SELF)
        with pytest.raises(ValueError, match="the reference is sample 1, and a part of the batch has 1"):
            said(model, UNET)
