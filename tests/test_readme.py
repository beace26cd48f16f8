"""The snippet that the README opens with runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


class Net(nn.Module):
    """The smallest network of the protocol: a scale per class."""

    accepts = frozenset({"label"})

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Embedding(11, 1)

    def forward(self, x, timestep, cond):
        return x * self.scale(cond["label"])[:, :, None, None]


def test_the_snippet_trains_and_samples():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 20
    net = Net()
    before = net.scale.weight.detach().clone()
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.arange(4), "id": [10, 11, 12, 13]}
    scope = {
        "net": net,
        "loader": [batch],
        "epoch": 0,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
    }
    exec(code[1], scope)
    assert not torch.equal(before, net.scale.weight)
    images = scope["images"]
    assert images.shape == (10, 1, 8, 8)
    assert bool(((images >= 0) & (images <= 1)).all())
    assert not images.requires_grad
