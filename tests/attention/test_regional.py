"""Image tokens of a region see the text that is meant for it, and what is meant for none."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gendiff.attention import Grid, Kind, stack
from gendiff.attention.regional import Regional
from tests.attention.models import FLUX, SD3, UNET, Kept, build, run, said
from tests.attention.test_perturb import PRX, graphs, limited

SPANS = [(1, 3), (3, 4)]  # of five tokens, of which 0 and 4 are everybody's


def halves(height=16, width=24):
    """The left third and the right third of an image; the middle is nobody's."""
    masks = torch.zeros(2, height, width)
    masks[0, :, : width // 3] = 1
    masks[1, :, -width // 3 :] = 1
    return masks


def rule(x, token, width):
    """Whether a column of a grid of this width sees a token."""
    region = 0 if x < width // 3 else 1 if x >= width - width // 3 else None
    span = {1: 0, 2: 0, 3: 1}.get(token)
    return region is None or span is None or region == span


def test_probabilities_are_zero_just_where_text_is_of_another_region() -> None:
    """At two grids, from masks of a third."""
    model = build(UNET)
    with stack(model) as one:
        one.add(Regional(halves(), SPANS), Kind.CROSS)
        kept = one.add(Kept(), Kind.CROSS).middleware
        said(model, UNET)
    sizes = {probs.shape[-2] for probs in kept.probs.values()}
    assert sizes == {8 * 12, 4 * 6}
    for probs in kept.probs.values():
        width = {96: 12, 24: 6}[probs.shape[-2]]
        for i in range(probs.shape[-2]):
            for token in range(5):
                assert (probs[..., i, token] > 0).all() == rule(i % width, token, width)
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))


def test_a_region_says_what_its_text_alone_would() -> None:
    """A region of the whole image is the same as cutting the other text off."""
    whole = torch.stack([torch.ones(8, 12), torch.zeros(8, 12)])
    _, _, seen, site = limited(UNET, Regional(whole, SPANS), Kind.CROSS)
    q, k, v = seen.raw[site.name]
    kept = [0, 1, 2, 4]
    expected = scaled_dot_product_attention(q, k[..., kept, :], v[..., kept, :])
    torch.testing.assert_close(seen.out[site.name], expected)


def test_no_region_is_stock() -> None:
    stock, changed, _, _ = limited(UNET, Regional(torch.zeros(1, 8, 12), [(1, 3)]), Kind.CROSS)
    torch.testing.assert_close(changed, stock)


@pytest.mark.parametrize("name", [FLUX, SD3])
def test_joint_layers_are_masked_between_the_streams_alone(name) -> None:
    model = build(name)
    with stack(model) as one:
        one.context.size = Grid(1, 4, 6)
        one.add(Regional(halves(), SPANS), Kind.JOINT)
        kept = one.add(Kept(), Kind.JOINT).middleware
        said(model, name)
        site = one.sites.on(Kind.JOINT)[0]
    probs = kept.probs[site.name]
    if site.text == "last":
        order = [*range(24, 29), *range(24)]
        probs = probs[..., order, :][..., order]
    for i in range(24):
        for token in range(5):
            seen = rule(i % 6, token, 6)
            assert (probs[..., 5 + i, token] > 0).all() == seen
            assert (probs[..., token, 5 + i] > 0).all() == seen
    assert (probs[..., :5, :5] > 0).all()
    assert (probs[..., 5:, 5:] > 0).all()


def test_joint_layers_where_the_image_alone_asks() -> None:
    model = build(PRX)
    with stack(model) as one:
        one.add(Regional(halves(), SPANS), Kind.JOINT)
        kept = one.add(Kept(), Kind.JOINT).middleware
        said(model, PRX)
    for probs in kept.probs.values():
        assert probs.shape[-2:] == (24, 29)
        for i in range(24):
            for token in range(5):
                assert (probs[0, :, i, token] > 0).all() == rule(i % 6, token, 6)
        assert (probs[0, ..., 5:] > 0).all()


def test_overlapping_regions_see_both_and_cells_are_shared_by_area() -> None:
    masks = torch.zeros(2, 1, 8)
    masks[0, :, :5] = 1  # of four cells: 1, 1, 0.5, 0
    masks[1, :, 3:] = 1  # 0, 0.5, 1, 1
    seen = Regional(masks, [(0, 1), (1, 2)]).allowed(Grid(2, 1, 4), 3)
    first = [[True, False], [True, True], [True, True], [False, True]]
    assert seen[:, :2].tolist() == first * 2  # both frames
    assert seen[:, 2].all()
    seen = Regional(masks, [(0, 1), (1, 2)], threshold=0.6).allowed(Grid(1, 1, 4), 2)
    assert seen.tolist() == [[True, False], [True, False], [False, True], [False, True]]


def test_it_is_limited_to_rows_and_masks_change_in_place() -> None:
    model = build(UNET)
    stock = said(model, UNET)
    with stack(model, rows=("uncond", "cond")) as one:
        regional = one.add(Regional(halves(), SPANS), Kind.CROSS, rows="cond").middleware
        half = said(model, UNET)
        regional.masks.zero_()
        torch.testing.assert_close(said(model, UNET), stock)
    torch.testing.assert_close(half[0], stock[0])
    assert not torch.allclose(half[1], stock[1], atol=1e-4)


def test_layers_share_a_compiled_graph() -> None:
    assert graphs(Regional(halves(), SPANS), Kind.CROSS) == 1


def test_what_is_refused() -> None:
    for masks, spans, message in (
        (halves(), [(1, 2)], "2 masks and 1 spans"),
        (halves(), [(1, 2), (3, 3)], r"got \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Regional(masks, spans)
    with pytest.raises(ValueError, match="threshold is a share"):
        Regional(halves(), SPANS, threshold=0)
    model = build(UNET)
    with stack(model) as one:
        with pytest.raises(ValueError, match=r"Regional works at sites of kind cross.*attn1 is self"):
            one.add(Regional(halves(), SPANS))
        one.add(Regional(halves(), [(1, 3), (3, 6)]), Kind.CROSS)
        with pytest.raises(ValueError, match=r"a span ends at token 6, and .* sees 5 tokens of text"):
            run(model, UNET)
