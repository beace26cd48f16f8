"""One call finds what is wrong with a processor, names it, and says how to mend it; it leaves no trace."""

import re

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from gendiff.attention import Kind, sites
from gendiff.attention.check import check_processor
from gendiff.attention.check.contracts import CONTRACTS
from gendiff.attention.reference import ReferenceProcessor
from gendiff.attention.reference_joint import FluxReferenceProcessor, JointReferenceProcessor
from tests.attention.models import FLUX, SD3, UNET, WAN, build
from tests.attention.wrong import Flux, Forward, Joint, Lossy, Nameless, Soft, Unet
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in (UNET, SD3, FLUX)}


PLAIN = {"query_dim": 8, "heads": 2, "dim_head": 4}


def broken(processor, model, **options) -> set[str]:
    """The contracts that a check finds broken, each with its number and its remedy in the message."""
    with pytest.raises(AssertionError) as caught:
        check_processor(processor, model, **options)
    text = str(caught.value)
    rows = re.findall(r"^ ?(\d+) (.{14})(.*)\n +the fix: (.*)$", text, flags=re.MULTILINE)
    assert rows
    for number, name, _, fix in rows:
        assert CONTRACTS[name.strip()] == (int(number), fix)
    return {name.strip() for _, name, _, _ in rows}


RIGHT = [
    (UNET, ReferenceProcessor),
    (UNET, AttnProcessor2_0),
    (UNET, Unet()),
    (SD3, JointReferenceProcessor),
    (SD3, JointAttnProcessor2_0),
    (SD3, Joint),
    (FLUX, FluxReferenceProcessor),
    (FLUX, FluxAttnProcessor),
    (FLUX, Flux),
]


@pytest.mark.parametrize(("name", "processor"), RIGHT)
def test_what_is_right_passes(name, processor, models) -> None:
    check_processor(processor, models[name])


@pytest.mark.parametrize(("name", "processor"), [(SD3, Joint()), (FLUX, Flux), (UNET, Soft())])
def test_what_is_right_passes_without_comparing_outputs(name, processor, models) -> None:
    check_processor(processor, models[name], exact=False)


WRONG = {
    "or": "context",
    "the context is forgotten": "context",
    "a zero is no context": "context",
    "the list is called": "output layer",
    "no output layer": "output layer",
    "no dropout": "dropout",
    "no head split": "heads",
    "split without a transpose": "transposes",
    "joined without a transpose": "transposes",
    "no residual": "residual",
    "not rescaled": "rescale",
    "rescaled before the residual": "rescale",
    "images are not known": "image",
    "an image comes back as tokens": "image",
    "an image's axes back": "image",
    "no group norm": "group norm",
    "no spatial norm": "spatial norm",
    "no norm of the context": "context norm",
    "a norm of no context": "context norm",
    "no norms of queries and keys": "norms",
    "scores without the mask": "mask",
    "softmax by hand": "empty rows",
    "scaled twice": "scale",
    "not scaled": "scale",
    "float32 out": "dtype",
    "a row per guidance branch": "rows",
    "written into the input": "inputs",
    "detached": "gradients",
    "no gradient for values": "gradients",
    "a bias kept from the first call": "resolutions",
    "a tensor kept from the first call": "resolutions",
    "counted calls": "determinism",
    "broken by an error": "errors",
    "a generator": "copies",
    "a lambda": "pickling",
    "keys of the first layer": "sharing",
    "weights used directly": "adapters",
    "fused by its flag": "fusing",
    "counted gradients": "checkpointing",
    "a branch on values": "compile",
    "an attribute of the layer": "layer",
    "the layer's scale is changed": "layer",
    "a buffer in a projection": "layer",
}


BESIDE = {  # further contracts that a mistake breaks too
    "the context is forgotten": {"context norm"},
    "images are not known": {"spatial norm"},
    "an image's axes back": {"spatial norm"},
    "a row per guidance branch": {"context"},  # the context of one number has one row
    "a generator": {"pickling"},
    "counted gradients": {"gradients"},
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_a_unet_is_named(mistake) -> None:
    assert broken(Unet(mistake), Attention(**PLAIN)) == {WRONG[mistake]} | BESIDE.get(mistake, set())


def bare(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    """A function, of which a layer sees no names."""
    return Unet()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("processor", [Lossy, Nameless, Forward, bare])
def test_keywords_that_are_lost_are_named(processor) -> None:
    assert broken(processor, Attention(**PLAIN)) == {"keywords"}


WRONG_JOINT = {
    "no norms of queries and keys": "norms",
    "no norms of the text": "norms",
    "text first, split as if last": "streams",
    "the image alone": "streams",
    "text and image": "streams",
    "no output layer of the text": "output layer",
    "no dropout": "dropout",
    "no head split": "heads",
    "split without a transpose": "heads",
    "scaled twice": "scale",
    "weights used directly": "adapters",
}


@pytest.mark.parametrize("mistake", WRONG_JOINT)
def test_a_mistake_in_two_streams_is_named(mistake, models) -> None:
    assert broken(Joint(mistake), models[SD3]) == {WRONG_JOINT[mistake]}


WRONG_FLUX = {
    "no norms of queries and keys": {"norms"},
    "no rotation": {"rotation"},
    "rotated before the norms": {"rotation"},
    "image first": {"rotation", "mask"},
    "an output layer everywhere": {"output layer"},
    "scores without the mask": {"mask"},
    "no head split": {"heads"},
    "split without a transpose": {"heads"},
    "scaled twice": {"scale"},
    "not scaled": {"scale"},
}


@pytest.mark.parametrize("mistake", WRONG_FLUX)
def test_a_mistake_in_flux_is_named(mistake, models) -> None:
    assert broken(Flux(mistake), models[FLUX]) == WRONG_FLUX[mistake]


VALUES = ("heads", "transposes", "scale", "rows")  # told by values only
STRUCTURAL = {contract: mistake for mistake, contract in WRONG.items() if contract not in VALUES}
STRUCTURAL |= {"context": "or", "context norm": "no norm of the context"}


@pytest.mark.parametrize("contract", STRUCTURAL)
def test_a_mistake_is_named_without_comparing_outputs(contract) -> None:
    mistake = STRUCTURAL[contract]
    beside = {"pickling"} if mistake == "a generator" else set()
    assert broken(Unet(mistake), Attention(**PLAIN), exact=False) == {contract} | beside


def test_a_context_must_have_an_effect() -> None:
    found = broken(Unet("the context is forgotten"), Attention(**PLAIN), exact=False)
    assert found == {"context", "context norm"}
    layer, context = Attention(**PLAIN), torch.ones(2, 6, 8)
    with pytest.raises(AssertionError, match="wrote into hidden_states"):
        check_processor(Unet("written into the input"), layer, inputs={"hidden_states": context})
    assert torch.equal(context, torch.ones(2, 6, 8))  # what was given is not written to


def test_what_changes_attention_fails_where_outputs_are_compared() -> None:
    assert broken(Soft(), Attention(**PLAIN)) == {
        "heads",
        "context",
    }  # plain self- and cross-attention differ


# ---- settings of the model's own layers


def test_fewer_heads_of_keys_are_asked_where_a_layer_has_them() -> None:
    layer = Attention(**PLAIN | {"heads": 4, "kv_heads": 2})
    check_processor(ReferenceProcessor, layer)
    assert "heads" in broken(Unet, layer)
    assert "heads" in broken(AttnProcessor2_0, layer)


def test_another_scale_is_asked_where_a_layer_has_it() -> None:
    layer = Attention(**PLAIN, scale_qk=False)
    check_processor(Unet, layer)
    assert broken(AttnProcessor2_0, layer) == {"heads"}  # which ignores it


def test_added_keys() -> None:
    layer = Attention(
        **PLAIN,
        added_kv_proj_dim=6,
        norm_num_groups=2,
        residual_connection=True,
        bias=True,
        processor=AttnAddedKVProcessor2_0(),
    )
    check_processor(AttnAddedKVProcessor2_0, layer)
    check_processor(AttnAddedKVProcessor2_0, layer, exact=False)
    check_processor(ReferenceProcessor, layer)
    assert "heads" in broken(Unet, layer)


def test_the_slow_processor_of_diffusers_is_found_out() -> None:
    assert broken(AttnProcessor, Attention(**PLAIN)) == {"norms", "empty rows"}


def test_a_family_without_a_reference_is_compared_with_its_own_processor() -> None:
    model = build(WAN)
    on = [site for site in sites(model) if site.kind == "self"]
    check_processor(type(on[0].module.processor), model, on=on)
    found = broken(AttnProcessor2_0, model, on=on)
    assert found


def test_what_a_family_s_own_processor_breaks_is_not_asked() -> None:
    model = build("AnyFlowFARTransformer3DModel")  # its kernel has no gradient on a CPU
    on = [site for site in sites(model) if site.processor == "AnyFlowCausalAttnProcessor"]
    check_processor(type(on[0].module.processor), model, on=on)


def test_inputs_may_be_given() -> None:
    model = build("StableAudio3DiTModel")
    site = next(site for site in sites(model) if site.processor == "StableAudio3SelfAttnProcessor")
    with pytest.raises(ValueError, match="pass `inputs`"):
        check_processor(type(site.module.processor), model, on=[site])
    inputs = {"hidden_states": torch.randn(2, 6, site.module.to_qkv.in_features), "rope": torch.randn(6, 4)}
    check_processor(type(site.module.processor), model, on=[site], inputs=inputs)


# ---- how it is called, and what it leaves


def everything(model):
    weights = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    layers = [(id(site.module.processor), sorted(vars(site.module))) for site in sites(model)]
    return weights, layers, [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "mistake", ["", "the list is called", "an attribute of the layer", "written into the input"]
)
def test_nothing_is_left_behind(mistake) -> None:
    model = build(UNET).train()
    next(model.parameters()).requires_grad_(False)
    processor = Unet(mistake)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(77)  # not what a check leaves, if it leaves its own
        leaves_nothing(processor, mistake, model)


def leaves_nothing(processor, mistake, model) -> None:
    before, state, grad = everything(model), torch.get_rng_state(), torch.is_grad_enabled()
    if mistake:
        broken(processor, model)
    else:
        check_processor(processor, model)
    weights, *rest = everything(model)
    assert rest == list(before[1:])
    assert all(torch.equal(weights[n][0], w) and weights[n][1] == g for n, (w, g) in before[0].items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() is grad
    assert vars(processor) == {"mistake": mistake, "kept": None, "calls": 0}


def test_a_processor_is_a_class_an_object_a_function_or_a_name(models) -> None:
    from gendiff.attention import register, unregister

    names = []

    def made(site):
        names.append(site.name)
        return Unet()

    check_processor(made, models[UNET], on=Kind.CROSS)
    assert any(name.endswith("attn2") for name in names)
    register("softer")(Soft)
    try:
        check_processor("softer", models[UNET], on=Kind.CROSS, exact=False)
    finally:
        unregister("softer")


def test_a_selector_that_matches_nothing_is_an_error(models) -> None:
    with pytest.raises(ValueError, match="nothing matches"):
        check_processor(Unet, models[UNET], on=Kind.JOINT)


def test_the_table_says_where_what_and_how() -> None:
    with pytest.raises(AssertionError) as caught:
        check_processor(Unet("no residual"), Attention(**PLAIN))
    text = str(caught.value)
    assert text.startswith("Unet breaks 1 of 18 contracts, tried on 1 settings of the model's layers and 19")
    assert " 6 residual      fresh, residual_connection=True (and in 2 more): off by" in text
    assert "the fix: add the layer's input at the end `if attn.residual_connection`." in text


def test_every_contract_has_a_number_and_a_remedy() -> None:
    assert {contract.number for contract in CONTRACTS.values()} == set(range(1, 19))
    assert all(contract.fix.endswith(".") for contract in CONTRACTS.values())
    tested = set(WRONG.values()) | set(WRONG_JOINT.values()) | {"keywords", "rotation"}
    assert tested == set(CONTRACTS)
