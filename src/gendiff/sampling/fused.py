"""All linear combinations of an evaluation in one kernel, for steps that are launched one by one."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, final

import torch
from torch import Tensor

from gendiff.sampling.stage import Combination, ordered
from gendiff.sampling.table import tried

MOST = 8  # registers that a kernel reads, and writes
Kernel = Callable[..., Any]


@final
class Fused:
    """The combinations of every evaluation of a run, for one kernel on a CUDA device.

    Terms are added in the order of `combined` and rounded as there, so that the numbers are the same.

    Args:
        rows: of every evaluation, its combinations, as many each time and at least two.

    >>> fused = Fused([[{"x": 2.0, "out": 1.0}, {"x": 1.0}], [{"x": 3.0}, {}]])
    >>> fused.names, fused.factors[1]
    (('x', 'out'), {'c0_0': 3.0, 'c0_1': 0.0, 'c1_0': 0.0, 'c1_1': 0.0})
    """

    def __init__(self, rows: Sequence[Sequence[Combination]]) -> None:
        used = {name for row in rows for part in row for name, factor in part.items() if factor}
        self.names, self.outputs = ordered(tuple(sorted({"x", *used}))), len(rows[0])
        self.factors = [
            {
                f"c{j}_{k}": float(part.get(name, 0.0))
                for j, part in enumerate(row)
                for k, name in enumerate(self.names)
            }
            for row in rows
        ]

    def fits(self, registers: Mapping[str, Tensor]) -> bool:
        """Whether one kernel can read these registers."""
        x = registers["x"]
        if not x.is_cuda or max(len(self.names), self.outputs) > MOST:
            return False
        return all(r.dtype == x.dtype and r.shape == x.shape for r in registers.values()) and usable()

    def __call__(self, row: int, registers: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The combinations of an evaluation."""
        inputs = [registers.get(name, registers["x"]) for name in self.names]  # times 0 where it is absent
        return kernel(len(self.names), self.outputs)(*inputs, **self.factors[row])


@cache
def kernel(inputs: int, outputs: int) -> Kernel:
    """An elementwise kernel that torch compiles at run time: outputs o_j = Σ c_jk·r_k."""
    jiterator: Any = import_module("torch.cuda.jiterator")
    registers = [f"T r{k}" for k in range(inputs)]
    factors = [f"c{j}_{k}" for j in range(outputs) for k in range(inputs)]
    results = [f"T& o{j}" for j in range(outputs)]
    sums = [
        f"o{j} = c{j}_0 * r0;" + "".join(f" o{j} = fma(c{j}_{k}, r{k}, o{j});" for k in range(1, inputs))
        for j in range(outputs)
    ]
    arguments = ", ".join([*registers, *(f"T {name}" for name in factors), *results])
    code = f"template <typename T> void combine({arguments}) {{ {' '.join(sums)} }}"
    return jiterator._create_multi_output_jit_fn(code, outputs, **dict.fromkeys(factors, 0.0))


@cache
def usable() -> bool:
    """Whether such kernels can be compiled here, which is tried once."""

    def make() -> Any:
        return kernel(1, 2)(torch.zeros(1, device="cuda"), c0_0=1.0, c1_0=1.0)

    return tried(make, "steps on a GPU take several kernels in place of one") is not None
