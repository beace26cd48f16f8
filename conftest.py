"""For tests and doctests alike: Hypothesis profiles, GPU tests without a GPU, modules without Triton."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis"):  # a GPU machine may have pytest and no more; the GPU tests need no more
    from hypothesis import settings

    settings.register_profile("here", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "here")

collect_ignore = [] if find_spec("triton") else ["src/gendiff/_philox_triton.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine that has none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
