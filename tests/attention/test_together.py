"""LoRA, an image prompt, maps and a processor of the user on one model at once, taken off in any order."""

import itertools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from gendiff.attention import Capture, IPAdapter, Kind, Stage, set_processor, stack
from tests.attention.models import UNET, build, said, state
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PARTS = ("lora", "processor", "image", "maps")
ORDERS = [  # a third of them in the ordinary run
    pytest.param(order, id="-".join(order), marks=[] if i % 3 == 0 else pytest.mark.slow)
    for i, order in enumerate(itertools.permutations(PARTS))
]


class Sharper:
    """Cross-attention at a lower temperature."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        parts = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q / 0.5, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class Everything:
    """A UNet with any of the parts."""

    def __init__(self):
        self.unet = build(UNET)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), self.unet)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.unet.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        self.lora(False)
        embeds = torch.randn(1, 16, generator=generator)
        self.adapter = IPAdapter.new(self.unet, embeds).requires_grad_(False)
        self.capture = Capture()
        self.handles = {}
        self.stack = stack(self.unet)

    def lora(self, on):
        for module in self.unet.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(on)

    def put(self, part):
        if part == "lora":
            self.lora(True)
        elif part == "processor":
            self.handles[part] = set_processor(self.unet, Sharper, on=Kind.CROSS & Stage.MID)
        elif part == "image":
            self.handles[part] = self.stack.add(self.adapter, on=Kind.CROSS)
        else:
            self.handles[part] = self.stack.add(self.capture, on=Kind.CROSS)

    def take(self, part):
        self.lora(False) if part == "lora" else self.handles.pop(part).remove()

    def said(self):
        return said(self.unet, UNET)


@pytest.fixture(scope="module")
def truth():
    """What a model says with each set of parts, put on a fresh one in the same order."""
    found = {}
    for count in range(len(PARTS) + 1):
        for chosen in itertools.combinations(PARTS, count):
            one = Everything()
            for part in chosen:
                one.put(part)
            found[frozenset(chosen)] = one.said()
    return found


def test_each_has_its_effect_beside_the_others(truth) -> None:
    for chosen, out in truth.items():
        for part in chosen:
            without = truth[chosen - {part}]
            if part == "maps":
                assert torch.equal(out, without)
            else:
                assert not torch.allclose(out, without, atol=1e-4), f"{part} of {set(chosen)}"


@pytest.mark.parametrize("order", ORDERS)
def test_taken_off_in_any_order(truth, order) -> None:
    one = Everything()
    before, left = state(one.unet), set(PARTS)
    for part in PARTS:
        one.put(part)
    for part in order:
        assert torch.equal(one.said(), truth[frozenset(left)])
        if "maps" in left:
            assert one.capture.maps().any()
        one.take(part)
        left.remove(part)
    assert torch.equal(one.said(), truth[frozenset()])
    assert state(one.unet) == before
