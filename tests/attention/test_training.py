"""A middleware with weights in the Trainer: trained, averaged, checkpointed and saved; the model is not."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gendiff.attention import Kind, Middleware, stack
from gendiff.codec import PixelCodec
from gendiff.denoiser import Denoiser
from gendiff.math import CosineBeta
from gendiff.training import Trainer
from gendiff.training.saving import load_pretrained
from tests.attention.models import UNET, build
from tests.training.toy import Images, config
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Gain(Middleware, nn.Module):
    """The heads times a number that is learned."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gain = nn.Parameter(torch.ones(1))

    def on_heads(self, site, context, out, q, k, v):
        return out * self.gain


class Net(nn.Module):
    """A UNet of four channels and a text, for images of one and a class."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.unet = build(UNET)
        self.unet.requires_grad_(False)

    def forward(self, x, timestep, cond):
        text = cond["label"][:, None, None].float().expand(-1, 3, self.unet.config.cross_attention_dim)
        return self.unet(x.repeat(1, 4, 1, 1), timestep, text).sample[:, :1]


class Squares(Images):
    def __init__(self) -> None:
        super().__init__(6)
        self.pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def trainer(net, folder, steps):
    settings = config(folder, max_steps=steps, per_device_batch_size=2, param_groups=[], save_steps=2)
    return Trainer(
        Denoiser(net, CosineBeta(), "v"), Squares(), codec=PixelCodec(1, 10, drop=0.2), config=settings
    )


def test_it_is_trained_averaged_saved_and_loaded_alone(tmp_path) -> None:
    net, learned = Net(), Gain()
    frozen = {name: value.clone() for name, value in net.state_dict().items()}
    with stack(net.unet) as one:
        one.add(learned, on=Kind.CROSS, name="gain")
        made = trainer(net, tmp_path / "run", 4)
        assert list(made.parameters) == ["model.backbone.unet.attention_middlewares.gain.gain"]
        made.train()
        trained = learned.gain.detach().clone()
        (average,) = made.ema.averages.weights().values()
        assert float((trained - 1).abs()) > 1e-4
        assert 0 < float((average - 1).abs()) < float((trained - 1).abs())
        made.save_pretrained(tmp_path / "final", weights="live")
    assert net.state_dict().keys() == frozen.keys()
    assert all(torch.equal(value, frozen[name]) for name, value in net.state_dict().items())
    weights = list((tmp_path / "final").rglob("*.safetensors"))
    saved = [name for file in weights for name in load_file(file)]
    assert len(saved) == 1, "the network was not trained, and is not saved"

    again, other = Net(), Gain()
    with stack(again.unet) as one:
        one.add(other, on=Kind.CROSS, name="gain")
        load_pretrained({"model": Denoiser(again, CosineBeta(), "v")}, tmp_path / "final")
        assert torch.equal(other.gain, trained)


def test_a_run_goes_on_from_its_checkpoint(tmp_path) -> None:
    found = []
    for steps in ((4,), (2, 4)):
        for until in steps:
            net, learned = Net(), Gain()
            with stack(net.unet) as one:
                one.add(learned, on=Kind.CROSS, name="gain")
                trainer(net, tmp_path / str(len(steps)), until).train()
        found.append(learned.gain.detach().clone())
    assert torch.equal(*found)
