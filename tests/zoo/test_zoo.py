from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.zoo import MUTE, QUIET, UNBUILT, ZOO, attentions, build, exported, queries, run
from tests.zoo.core import noise

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
every_class = pytest.mark.parametrize("name", sorted(ZOO))
some = pytest.mark.parametrize(  # a sixth of them in the ordinary run
    "name",
    [pytest.param(name, marks=[] if i % 6 == 0 else pytest.mark.slow) for i, name in enumerate(sorted(ZOO))],
)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def changed(value: Any) -> Any:
    """Another value of the same kind, every number of it."""
    if isinstance(value, list | tuple):
        return type(value)(changed(part) for part in value)
    return value + 0.5 if value.is_floating_point() else torch.where(value > 0, value - 1, value + 1)


def moves(name: str, model: torch.nn.Module, weights: Iterable[torch.Tensor], before: torch.Tensor) -> bool:
    """Whether the output changes with those weights, which are put back."""
    kept = [(weight, weight.clone()) for weight in weights]
    for weight, _ in kept:
        weight.add_(0.3 * noise(*weight.shape))
    after = run(model, name)
    for weight, value in kept:
        weight.copy_(value)
    return bool((after - before).abs().max() > 1e-5)


def test_every_exported_class_is_in_the_zoo_or_has_a_reason():
    assert sorted([*ZOO, *UNBUILT]) == exported()
    assert set(MUTE) <= set(ZOO)


@some
def test_a_model_is_a_function_of_its_seed_and_inputs(name: str):
    state = torch.get_rng_state()
    model = build(name)
    output = run(model, name)
    assert output.isfinite().all()
    assert torch.equal(output, run(model, name))
    assert torch.equal(output, run(build(name), name))
    assert not torch.equal(output, run(build(name, seed=1), name))
    sample, value = next(iter(ZOO[name].inputs().items()))
    assert not torch.equal(output, run(model, name, **{sample: changed(value)}))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@some
def test_the_output_depends_on_every_attention_layer_and_its_queries(name: str):
    model = build(name)
    before, layers = run(model, name), attentions(model)
    assert layers
    weights = {layer for layer in layers if not moves(name, model, layers[layer].parameters(), before)}
    asked = {layer for layer in layers if not moves(name, model, queries(layers[layer]), before)}
    assert weights == asked == set(MUTE.get(name, ()))


@every_class
def test_a_model_is_tiny(name: str):
    fixed = {  # a width of 2048 or 1280 that no setting changes
        "HunyuanImageTransformer2DModel": 5_000_000,
        "HunyuanVideo15Transformer3DModel": 5_000_000,
        "WanAnimate2Transformer3DModel": 2_000_000,
    }
    assert sum(weight.numel() for weight in build(name).parameters()) < fixed.get(name, 700_000)
