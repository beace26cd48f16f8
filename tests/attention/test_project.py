"""The projections: one seam; adapters in it have their effect, fused weights without them are refused."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model

from gendiff.attention import Kind, project, set_processor, set_projector, sites, stack
from tests.attention.models import FLUX, SD3, UNET, Halved, Same, build, said, state
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def adapted(model, targets=("to_q", "to_k", "to_v", "to_out.0")):
    """LoRA with weights that matter on the attention layers."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(targets)), model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(layer, *shape):
    return torch.randn(*shape, layer.to_q.in_features, generator=torch.Generator().manual_seed(1))


def test_the_layers_own_linear_layers() -> None:
    site = sites(build(UNET)).on(Kind.CROSS)[0]
    layer = site.module
    x, text = tokens(layer, 2, 6), torch.randn(2, 3, layer.to_k.in_features)
    q, k, v = project(site, x, text)
    assert torch.equal(q, layer.to_q(x))
    assert torch.equal(k, layer.to_k(text))
    assert torch.equal(v, layer.to_v(text))
    own = sites(build(UNET)).on(Kind.SELF)[0].module
    x = tokens(own, 2, 6)
    for ours, theirs in zip(project(own, x), (own.to_q(x), own.to_k(x), own.to_v(x)), strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_stream() -> None:
    layer = sites(build(SD3)).on(Kind.JOINT)[0].module
    text = torch.randn(2, 3, layer.add_q_proj.in_features)
    for ours, name in zip(
        project(layer, text, added=True), ("add_q_proj", "add_k_proj", "add_v_proj"), strict=True
    ):
        assert torch.equal(ours, getattr(layer, name)(text))


def test_fused_projections_are_the_same() -> None:
    for name in (UNET, SD3, FLUX):
        model = build(name)
        layers = [site.module for site in sites(model)]
        plain = []
        for layer in layers:
            x = tokens(layer, 2, 6)
            cross = layer.to_k.in_features != layer.to_q.in_features
            plain.append((x, torch.randn(2, 3, layer.to_k.in_features) if cross else x))
        before = [project(layer, *pair) for layer, pair in zip(layers, plain, strict=True)]
        model.fuse_qkv_projections()
        assert any(layer.fused_projections for layer in layers)
        for layer, pair, expected in zip(layers, plain, before, strict=True):
            for ours, theirs in zip(project(layer, *pair), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_another_projector() -> None:
    site = sites(build(UNET))[0]
    kept = dict(vars(site.module))

    def twice(layer, x, context, added):
        return 2 * layer.to_q(x), layer.to_k(context), layer.to_v(context)

    x = tokens(site.module, 1, 4)
    plain = project(site, x)
    with set_projector(site, twice):
        assert torch.equal(project(site, x)[0], 2 * plain[0])
        with pytest.raises(ValueError, match=r"Attention has a projector already"):
            set_projector(site, twice)
    assert torch.equal(project(site, x)[0], plain[0])
    assert vars(site.module) == kept


def test_a_layer_without_such_projections_is_refused() -> None:
    layer = sites(build("Flux2Transformer2DModel")).on(Kind.SINGLE)[0].module
    with pytest.raises(
        ValueError, match=r"has no to_q, to_k, to_v: its projections are not those of three linear"
    ):
        project(layer, torch.zeros(1, 2, 32))


# ---- adapters


def test_adapters_and_middlewares_and_processors_have_all_their_effects() -> None:
    plain_model, model = build(UNET), adapted(build(UNET))
    plain, with_lora, before = said(plain_model, UNET), said(model, UNET), state(model)
    assert not torch.allclose(plain, with_lora, atol=1e-3)
    with stack(model) as one:
        one.add(Same())
        assert torch.equal(said(model, UNET), with_lora)
        one.add(Halved())
        assert not torch.allclose(said(model, UNET), with_lora, atol=1e-3)
    with set_processor(model, AttnProcessor2_0):
        assert torch.equal(said(model, UNET), with_lora)
    assert torch.equal(said(model, UNET), with_lora)
    assert state(model) == before


def test_fusing_over_adapters_is_refused() -> None:
    """The fused weights are those of the base; theirs would drop the adapters in silence."""
    model = adapted(build(UNET))
    with_lora = said(model, UNET)
    model.fuse_qkv_projections()
    assert not torch.allclose(said(model, UNET), with_lora, atol=1e-3)  # what happens without us
    message = (
        r"the projections of down.* are fused, and the adapters in to_q, to_k, to_v .*unfuse_qkv_projections"
    )
    with stack(model) as one, pytest.raises(ValueError, match=message):
        one.add(Same())
    with set_processor(model, AttnProcessor2_0):  # which uses the parts
        assert torch.equal(said(model, UNET), with_lora)
    layer = sites(model)[0].module
    with pytest.raises(ValueError, match=r"the projections of Attention are fused"):
        project(layer, tokens(layer, 1, 2))
    model.unfuse_qkv_projections()
    with stack(model) as one:
        one.add(Same())
        assert torch.equal(said(model, UNET), with_lora)
