"""A temperature divides the scores of a layer: 1 is off, 0 is the best key, infinity the mean of values."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gendiff.attention import Kind, stack
from gendiff.attention.temperature import Temperature
from tests.attention.models import UNET, build, said
from tests.attention.test_perturb import graphs, limited


def test_one_is_off_exactly() -> None:
    stock, changed, _, _ = limited(UNET, Temperature(1), None)
    assert torch.equal(changed, stock)


def test_it_is_another_scale() -> None:
    stock, changed, seen, site = limited(UNET, Temperature(0.5), Kind.CROSS)
    q, k, v = seen.raw[site.name]
    expected = scaled_dot_product_attention(q, k, v, scale=2 / q.shape[-1] ** 0.5)
    torch.testing.assert_close(seen.out[site.name], expected)
    assert not torch.allclose(changed, stock)


def test_its_limits() -> None:
    _, _, seen, site = limited(UNET, Temperature(1e9), Kind.SELF)
    v = seen.raw[site.name][2]
    torch.testing.assert_close(seen.out[site.name], v.mean(-2, keepdim=True).expand_as(v))
    _, _, seen, site = limited(UNET, Temperature(1e-7), Kind.SELF)
    q, k, v = seen.raw[site.name]
    best = (q @ k.mT).argmax(-1)[..., None].expand_as(v)
    torch.testing.assert_close(seen.out[site.name], v.gather(-2, best))


def test_it_changes_in_place_and_rows_alone() -> None:
    model = build(UNET)
    stock = said(model, UNET)
    with stack(model, rows=("uncond", "cond")) as one:
        warm = one.add(Temperature(1.0), rows="cond").middleware
        buffer = warm.value
        assert torch.equal(said(model, UNET), stock)
        warm.set(3.0)
        hot = said(model, UNET)
        warm.set(torch.tensor(1.0))
        assert torch.equal(said(model, UNET), stock)
        assert warm.value is buffer
    assert torch.equal(hot[0], stock[0])
    assert not torch.allclose(hot[1], stock[1])


def test_layers_share_a_compiled_graph() -> None:
    assert graphs(Temperature(0.5), None) == 1


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_what_is_no_temperature(value) -> None:
    with pytest.raises(ValueError, match="a temperature is above 0"):
        Temperature(value)
