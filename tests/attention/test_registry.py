"""Processors by name: on the layers that are meant, one a layer, nothing lost, undone exactly."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.nn import functional as F

from gendiff import attention
from gendiff.attention import Kind, Stage, set_processor, sites, stack
from tests.attention.models import FLUX, SD3, UNET, Halved, build, said, state


class Mean:
    """Every query reads the mean of the values."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mean = attn.to_v(text).mean(1, keepdim=True).expand(-1, hidden_states.shape[1], -1)
        return attn.to_out[1](attn.to_out[0](mean))


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return Mean()(attn, hidden_states, encoder_hidden_states) * self.gain


@pytest.fixture
def unet():
    return build(UNET)


@pytest.fixture
def mean():
    attention.register("mean")(Mean)
    yield "mean"
    attention.unregister("mean")


def test_by_name_on_some_layers_and_back(unet, mean) -> None:
    before, plain = state(unet), said(unet, UNET)
    with set_processor(unet, mean, on=Kind.CROSS & Stage.UP):
        kinds = {site.name: type(site.module.processor) for site in sites(unet)}
        chosen = {site.name for site in sites(unet) if site.kind == "cross" and site.stage == "up"}
        assert {name for name, kind in kinds.items() if kind is Mean} == chosen
        assert not torch.equal(said(unet, UNET), plain)
    assert state(unet) == before
    assert torch.equal(said(unet, UNET), plain)


def test_names(mean) -> None:
    assert attention.registered()["mean"] is Mean
    with pytest.raises(ValueError, match=r"there is a processor 'mean' already"):
        attention.register("mean")(Mean)
    with pytest.raises(ValueError, match=r"unknown processor 'meen'; did you mean 'mean'"):
        set_processor(build(UNET), "meen")
    with pytest.raises(ValueError, match=r"unknown processor 'os.system'"):  # nothing is imported by its name
        set_processor(build(UNET), "os.system")


def test_one_object_a_layer_unless_it_may_be_shared(unet) -> None:
    class Shared(Mean):
        shareable = True

    def objects(what):
        with set_processor(unet, what, on=Kind.CROSS):
            return {id(site.module.processor) for site in sites(unet).on(Kind.CROSS)}

    count = len(sites(unet).on(Kind.CROSS))
    assert len(objects(Mean)) == len(objects(Mean())) == len(objects(lambda site: Mean())) == count
    assert len(objects(Shared())) == 1
    assert len(objects(Trained)) == count
    with pytest.raises(
        ValueError, match=r"Trained has weights and is put on 8 layers, which would share them"
    ):
        objects(Trained())


def test_a_mapping_stays_as_it_is_and_works_twice(unet) -> None:
    """As the dictionaries of diffusers, whose own setter empties them."""
    chosen = {f"{site.name}.processor": Mean() for site in sites(unet).on(Kind.CROSS)}
    kept, before = dict(chosen), state(unet)
    for _ in range(2):
        with set_processor(unet, chosen):
            for site in sites(unet).on(Kind.CROSS):
                assert site.module.processor is chosen[f"{site.name}.processor"] or len(chosen) > 1
        assert chosen == kept
        assert state(unet) == before
    with pytest.raises(ValueError, match=r"is matched by two patterns"):
        set_processor(unet, {"**.attn2": Mean, "mid_block.**": Mean})
    with pytest.raises(ValueError, match=r"the pattern 'middle.\*\*' matches none of 16 sites"):
        set_processor(unet, {"middle.**": Mean})


class Plain:
    """Attention without any of the layer's options, half as loud."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]
        out = 0.5 * F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class Louder:
    """The same, half as loud again."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]
        return attn.to_out[0](1.5 * F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_handles_in_any_order_with_a_stack_between(unet, order) -> None:
    before, plain = state(unet), said(unet, UNET)
    one, halved = stack(unet), Halved()
    first = set_processor(unet, Plain, on=Kind.CROSS)
    middle = one.add(halved)
    last = set_processor(unet, Louder, on=Stage.MID)
    handles = [first, middle, last]
    mid, up = (sites(unet).on(Kind.CROSS & stage) for stage in (Stage.MID, Stage.UP))
    for index in order:
        assert not torch.equal(said(unet, UNET), plain)
        handles[index].remove()
        expected = Louder if last.attached else Plain if first.attached else AttnProcessor2_0
        assert all(isinstance(site.module.processor, expected) for site in mid)
        expected = Plain if first.attached else AttnProcessor2_0
        assert all(isinstance(site.module.processor, expected) for site in up)
        halved.seen.clear()
        said(unet, UNET)
        assert len(halved.seen) == (len(sites(unet)) if middle.attached else 0)
    assert state(unet) == before
    assert torch.equal(said(unet, UNET), plain)


def test_what_works_inside_is_not_lost_to_a_processor_that_is_closed(unet) -> None:
    with stack(unet) as one:
        one.add(Halved(), on=Kind.CROSS)
        with pytest.raises(
            ValueError, match=r"Mean computes its attention in one piece, and Halved at .* works inside"
        ):
            set_processor(unet, Mean)


def test_a_processor_under_a_stack_goes_through_it(unet) -> None:
    """Set while a stack is on, one that computes by the same kernels is stacked on too."""
    with stack(unet) as one:
        halved = Halved()
        one.add(halved, on=Kind.SELF)
        changed = said(unet, UNET)
        with set_processor(unet, AttnProcessor2_0, on=Kind.SELF):
            assert torch.equal(said(unet, UNET), changed)
        assert torch.equal(said(unet, UNET), changed)


def test_trained_weights_are_not_dropped(unet) -> None:
    handle = set_processor(unet, Trained, on=Kind.CROSS)
    names, values = list(unet.state_dict()), [p for n, p in unet.named_parameters() if "processor" in n]
    assert len(values) == len(sites(unet).on(Kind.CROSS))
    with pytest.raises(ValueError, match=r"Trained of .* holds 1 weights, which would have no effect"):
        set_processor(unet, Mean)
    with set_processor(unet, Mean, replace=True):
        assert not [name for name in unet.state_dict() if "processor" in name]
    assert list(unet.state_dict()) == names
    assert all(
        a is b
        for a, b in zip(values, [p for n, p in unet.named_parameters() if "processor" in n], strict=True)
    )
    handle.remove()
    assert not [name for name in unet.state_dict() if "processor" in name]


def test_a_foreign_processor_is_left_in_place(unet) -> None:
    handle = set_processor(unet, Mean, on=Stage.MID)
    foreign = AttnProcessor2_0()
    site = sites(unet).on(Stage.MID)[0]
    site.module.set_processor(foreign)
    with pytest.warns(RuntimeWarning, match=r"Mean was replaced by AttnProcessor2_0, not by a handle"):
        handle.remove()
    assert site.module.processor is foreign


# ---- misfits, before the first forward


def test_a_processor_of_another_family_is_refused() -> None:
    flux, unet = build(FLUX), build(UNET)
    before = state(flux)
    with pytest.raises(
        TypeError,
        match=r"AttnProcessor2_0 is of another family: it reads attn.group_norm, .*attn.spatial_norm",
    ):
        set_processor(flux, AttnProcessor2_0)
    with pytest.raises(TypeError, match=r"FluxAttnProcessor.* is of another family"):
        set_processor(unet, FluxAttnProcessor)
    with pytest.raises(
        TypeError, match=r"Mean at .* would lose image_rotary_emb, which FluxAttention passes"
    ):
        set_processor(flux, Mean)
    assert state(flux) == before


def test_lost_keywords_are_refused(unet) -> None:
    class Deaf:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None):
            return hidden_states

    with pytest.raises(TypeError, match=r"Deaf at .* would lose attention_mask, which Attention passes"):
        set_processor(unet, Deaf)
    with pytest.raises(TypeError, match=r"a processor is called with a layer and its tokens, got 3"):
        set_processor(unet, 3)


def test_processors_of_diffusers_fit_their_families() -> None:
    for name, kind in ((UNET, AttnProcessor), (UNET, AttnProcessor2_0), (FLUX, FluxAttnProcessor)):
        model = build(name)
        plain = said(model, name)
        with set_processor(model, kind):
            torch.testing.assert_close(said(model, name), plain, rtol=1e-4, atol=1e-5)
    sd3 = build(SD3)
    with set_processor(sd3, type(sites(sd3)[0].module.processor)):
        said(sd3, SD3)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Indirect:
    """Whose kernel is called by a function, in a method."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]
        return attn.to_out[0](self.attended(heads).transpose(1, 2).flatten(2))

    def attended(self, heads):
        return attend(*heads)


def test_a_kernel_in_a_method_or_a_function_is_reached(unet) -> None:
    with set_processor(unet, Indirect), stack(unet) as one:
        halved = Halved()
        plain = said(unet, UNET)
        one.add(halved)
        assert not torch.allclose(said(unet, UNET), plain, atol=1e-3)
        assert len(halved.seen) == len(one.sites)


def test_where_the_text_is_does_not_depend_on_the_users_processor() -> None:
    model = build(SD3)

    class Mine(type(sites(model)[0].module.processor)): ...

    with set_processor(model, Mine, on=Kind.JOINT):
        found = sites(model).on(Kind.JOINT)
        assert {(site.processor, site.text) for site in found} == {("Mine", "last")}


def test_parts_of_a_layer_come_back_in_their_order(unet) -> None:
    """Where a processor with weights is not the last of them."""
    site = sites(unet).on(Kind.CROSS)[0]
    handle = set_processor(unet, Trained, on=[site])
    parts = site.module._modules
    site.module._modules = {"processor": parts.pop("processor"), **parts}
    names = list(unet.state_dict())
    set_processor(unet, Mean, on=[site], replace=True).remove()
    assert list(unet.state_dict()) == names
    handle.remove()
