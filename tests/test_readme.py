"""The snippets of the README run as they stand."""

import re
from pathlib import Path

import torch
from torch import nn

from gendiff import Denoiser, Objective
from gendiff.codec import PixelCodec
from gendiff.math import CosineBeta

README = Path(__file__).parents[1] / "README.md"


class Net(nn.Module):
    """The smallest network of the protocol: a scale per class."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Embedding(11, 1)

    def forward(self, x, timestep, cond):
        return x * self.scale(cond["label"])[:, :, None, None]


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_snippet_trains_and_samples():
    code = snippets()[0]
    assert len(code.splitlines()) <= 20
    net = Net()
    before = net.scale.weight.detach().clone()
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.arange(4), "id": [10, 11, 12, 13]}
    scope = {
        "net": net,
        "loader": [batch],
        "epoch": 0,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
    }
    exec(code, scope)
    assert not torch.equal(before, net.scale.weight)
    images = scope["images"]
    assert images.shape == (10, 1, 8, 8)
    assert bool(((images >= 0) & (images <= 1)).all())
    assert not images.requires_grad


def test_the_second_snippet_trains_and_saves(tmp_path: Path):
    code = snippets()[1]
    assert "runs/digits" in code
    assert "max_steps=500, lr_scheduler=WarmupCosine(50)" in code
    short = code.replace("runs/digits", str(tmp_path)).replace("500", "3").replace("Cosine(50)", "Cosine(1)")
    net = Net()
    before = net.scale.weight.detach().clone()
    scope = {
        "denoiser": Denoiser(net, CosineBeta(), "v"),
        "digits": [{"image": torch.rand(1, 8, 8), "label": i} for i in range(4)],
        "codec": PixelCodec(channels=1, classes=10),
        "objective": Objective(),
    }
    exec(short, scope)
    assert not torch.equal(before, net.scale.weight)
    assert scope["trainer"].step == 3
    assert (tmp_path / "final" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint-00000003").is_dir()
