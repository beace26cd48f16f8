"""An adapter in the Trainer: its learning rates, its files, and a fresh pipeline that reads them."""

import pytest
import torch

from gendiff import ParamGroup
from gendiff._groups import group
from gendiff.codec import PixelCodec
from gendiff.denoiser import Denoiser
from gendiff.lora import inject, plan
from gendiff.math import CosineBeta
from gendiff.testing import tiny_pipeline
from gendiff.training import Trainer
from tests.attention.models import UNET, build
from tests.attention.test_training import Net, Squares
from tests.training.toy import config
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def test_learning_rates_of_a_and_b_and_of_layers() -> None:
    model = build(UNET)
    rules = {"mid_block.**": {"learning_rate": 1e-5}}
    handle = inject(model, plan(model, "sd/attention", rank=2, rules=rules), "style")
    named = {f"unet.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for one in group(named, handle.param_groups(1e-4, loraplus_lr_ratio=4)):
        found |= dict.fromkeys(one["names"], one["lr"])
    for name, rate in found.items():
        expected = (1e-5 if "mid_block" in name else 1e-4) * (4 if ".lora_B." in name else 1)
        assert rate == pytest.approx(expected)
    assert len(found) == 2 * len(handle.plan)
    assert all(isinstance(one, ParamGroup) for one in handle.param_groups(1e-4))
    with pytest.raises(ValueError, match=r"by a ratio of 1 or more, got 0\.5"):
        handle.param_groups(1e-4, loraplus_lr_ratio=0.5)


def test_trained_saved_and_read_by_a_fresh_pipeline(tmp_path) -> None:
    """Of mixed ranks, and a strength other than the rank, the file gives the same weights and strengths."""
    net = Net()
    rules = {"mid_block.**": {"rank": 3, "lora_alpha": 12}}
    handle = inject(net.unet, plan(net.unet, "sd/attention", rank=2, lora_alpha=4, rules=rules), "style")
    settings = config(
        tmp_path / "run", max_steps=3, per_device_batch_size=2, param_groups=handle.param_groups(1e-2)
    )
    made = Trainer(
        Denoiser(net, CosineBeta(), "v"), Squares(), codec=PixelCodec(1, 10, drop=0.2), config=settings
    )
    assert len(made.parameters) == 2 * len(handle.plan)
    made.train()
    made.save_pretrained(tmp_path / "final", weights="live")
    deltas = {row.name: handle.delta(row.name) for row in handle.plan.rows}
    assert all(bool(value.any()) for value in deltas.values())

    pipe = tiny_pipeline("sd15")
    pipe.unet = build(UNET)
    pipe.load_lora_weights(tmp_path / "final", adapter_name="read")
    layers = {name: one for name, one in pipe.unet.named_modules() if "read" in getattr(one, "lora_A", ())}
    assert layers.keys() == deltas.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("read"), deltas[name], rtol=1e-6, atol=1e-7)
