"""The scheduler for pipelines on a GPU: no step waits for the device, one kernel does what several do."""

import diffusers
import pytest
import torch

from gendiff.interop.diffusers import GendiffScheduler
from gendiff.sampling.fused import Fused
from gendiff.sampling.stage import combined

pytestmark = pytest.mark.gpu
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = [
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


def run(name: str, dtype: torch.dtype, steps: int = 12) -> list[torch.Tensor]:
    theirs = getattr(diffusers, name)(**BETAS)
    scheduler = GendiffScheduler.from_config(theirs)
    scheduler.set_timesteps(steps, device="cuda")
    scheduler.set_begin_index(0)
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 4, 16, 16, device="cuda", generator=draw).to(dtype) * scheduler.init_noise_sigma
    samples = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            out = torch.tanh(scheduler.scale_model_input(x, t))
            x = scheduler.step(out, t, x, generator=draw, return_dict=False)[0]
            samples.append(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_and_one_kernel_is_several(name, dtype, monkeypatch) -> None:
    run(name, dtype)  # compiles
    fused = run(name, dtype)
    monkeypatch.setattr(Fused, "fits", lambda self, registers: False)
    run(name, dtype)
    for one, several in zip(fused, run(name, dtype), strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_registers_that_lie_anywhere_are_read(dtype) -> None:
    rows = [[{"x": 0.3, "out": 0.5, "m": -0.2}, {"x": 1.0}]]
    wide = torch.randn(3, 1 + 4 * 16 * 16, device="cuda", dtype=dtype)
    fused = Fused(rows)
    for part in (wide[:, :-1].contiguous(), wide[:, 1:], wide.T[:-1].T):
        registers = dict(zip(("x", "out", "m"), part, strict=True))
        one, same = fused(0, registers)
        assert fused.fits(registers)
        assert torch.equal(one, combined(rows[0][0], registers))
        assert torch.equal(same, registers["x"])
