"""The Triton kernels of steps, in Triton's interpreter, against plain torch and combinations by hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gendiff.sampling.fused import Fused
from gendiff.sampling.stage import combined, ordered
from gendiff.sampling.table import mix_with_torch

CHILD = """
import sys
import torch
from jaxtyping import install_import_hook

with install_import_hook("gendiff", "beartype.beartype"):  # not to come between kernel and compiler
    from gendiff.sampling._mix_triton import mix

cases = torch.load(sys.argv[1])
for stack, x0, eps, rows, index in cases:
    mix(stack, x0, eps, rows, index)
torch.save([case[0] for case in cases], sys.argv[2])
"""
SIZE = 300  # more than one block, and no whole number of them


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cases():
    """Stacks with 1 … 6 registers that are written."""
    mixes = []
    for out in range(1, 7):
        for dtype in (torch.float32, torch.float64):
            x0, eps = draw(2, SIZE // 2, dtype=dtype, seed=1), draw(2, SIZE // 2, dtype=dtype, seed=2)
            rows = draw(3, out, 3 + out, dtype=dtype, seed=3)
            mixes.append((draw(3 + out, *x0.shape, dtype=dtype), x0, eps, rows, torch.tensor(out % 3)))
    return mixes


@pytest.fixture(scope="module")
def interpreted(cases, tmp_path_factory: pytest.TempPathFactory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels cannot be interpreted")
    folder: Path = tmp_path_factory.mktemp("interpreted")
    torch.save(cases, folder / "in.pt")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", CHILD, str(folder / "in.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def test_the_step_of_a_table_is_that_of_torch(cases, interpreted) -> None:
    for (stack, x0, eps, rows, index), got in zip(cases, interpreted, strict=True):
        expected = stack.clone()
        mix_with_torch(expected, x0, eps, rows, index)
        # the noise is left as it was, the answer is written, and the sums agree but for fused rounding
        torch.testing.assert_close(
            got, expected, rtol=1e-5 if got.dtype == torch.float32 else 1e-12, atol=1e-5
        )
        assert torch.equal(got[1], x0)
        assert torch.equal(got[3], stack[3])


def test_one_kernel_adds_in_the_order_of_combinations() -> None:
    rows = [[{"m_1": 0.5, "x": 2.0, "out": -1.0}, {"x": 1.0}], [{"noise": 0.25, "x": 1.0}, {}]]
    fused = Fused(rows)
    assert fused.names == ordered(("m_1", "x", "out", "noise")) == ("x", "noise", "m_1", "out")
    registers = {name: draw(5, seed=k) for k, name in enumerate(fused.names)}
    for factors, parts in zip(fused.factors, rows, strict=True):
        for j, part in enumerate(parts):
            total = torch.zeros(5, dtype=torch.float64)
            for k, name in enumerate(fused.names):
                total = torch.add(total, registers[name], alpha=factors[f"c{j}_{k}"])
            assert torch.equal(total, combined(part, registers))
    assert not fused.fits(registers)  # there is no such kernel on a CPU
