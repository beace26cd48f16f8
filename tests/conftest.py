from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator that starts the same in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn64(generator: torch.Generator) -> Callable[..., Tensor]:
    """`randn64(2, 3)`: float64 normals of that shape from `generator`, a fresh draw at each call."""
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def torch_settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn TF32": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
    }


@pytest.fixture(autouse=True)
def nothing_global() -> Iterator[None]:
    """No test, and nothing that a test calls, leaves a switch of torch changed."""
    before = torch_settings()
    yield
    assert torch_settings() == before
