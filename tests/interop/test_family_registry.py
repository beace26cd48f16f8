"""Which family a pipeline is of, families of one's own, and denoisers made of pipelines."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gendiff.interop.diffusers as interop
from gendiff import Condition
from gendiff.interop.diffusers import (
    Clock,
    Family,
    Images,
    Network,
    Prompt,
    codec_of,
    denoiser_of,
    family_of,
    register_family,
)
from gendiff.testing import TINY_PIPELINES, tiny_pipeline
from tests.interop.calls import PIPES, PROMPTS, Pipes

FAMILIES = {
    "sd15": "sd",
    "sd15-inpaint": "sd",
    "sd2": "sd",
    "sdxl-inpaint": "sdxl",
    "sdxl-inpaint-4": "sdxl",
    "sdxl-refiner": "sdxl",
    "ddpm": "unet2d",
}
PREDICTIONS = {"sd2": "v"} | dict.fromkeys(
    ("sd3", "flux", "flux2", "qwen", "wan", "z-image", "lumina2", "sana"), "flow"
)


@pytest.fixture
def pipes() -> Pipes:
    return PIPES


def test_every_tiny_pipeline_has_a_row_and_every_row_a_tiny_pipeline(pipes):
    found = {name: family_of(pipes[name]).name for name in TINY_PIPELINES}
    assert found == {name: FAMILIES.get(name, name) for name in TINY_PIPELINES}
    assert {row.name for row in interop.registry.ROWS} == set(found.values())  # pyright: ignore


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_a_denoiser_has_the_schedule_and_the_prediction_of_the_scheduler(pipes, name):
    pipe = pipes[name]
    denoise, codec = denoiser_of(pipe), codec_of(pipe)
    assert denoise.prediction.name == PREDICTIONS.get(name, "epsilon")
    assert denoise.schedule.size == (None if denoise.prediction.name == "flow" else 1000)
    assert denoise.learned_variance == (name == "pixart")
    cond = codec.null(codec.cond(PROMPTS)) if codec.groups == ("text",) else Condition()
    if "channels" in codec.accepts:
        return
    x = torch.randn(2, *codec.shape(64, 32), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    denoised = denoise(x, t, cond)
    timestep = denoise.schedule.timestep(t).float()
    assert timestep.tolist() == ([250, 750] if denoise.prediction.name == "flow" else [249, 749])
    out = denoise.backbone(x, timestep, cond)
    expected, variance = out.chunk(2, dim=1) if name == "pixart" else (out, None)
    assert torch.equal(denoised.out, expected)
    assert variance is None or torch.equal(denoised.log_var, variance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd2", "sd15-inpaint", "ddpm"])
def test_what_is_said_of_the_data_is_what_the_scheduler_makes_of_it(pipes, name):
    pipe = pipes[name]
    pipe.scheduler.set_timesteps(10)
    denoise, codec = denoiser_of(pipe), codec_of(pipe)
    x = torch.randn(2, *codec.shape(64, 32), generator=torch.Generator().manual_seed(0))
    cond = (
        Condition()
        if name == "ddpm"
        else codec.cond(
            PROMPTS,
            **(
                {"image": torch.rand(2, 3, 64, 32), "mask": torch.ones(2, 1, 64, 32)}
                if "inpaint" in name
                else {}
            ),
        )
    )
    timestep = int(pipe.scheduler.timesteps[3])
    denoised = denoise(x, (timestep + 1) / 1000, cond)
    theirs = pipe.scheduler.step(denoised.out, timestep, x).pred_original_sample
    ours = denoised.x0.clamp(-1, 1) if pipe.scheduler.config.clip_sample else denoised.x0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_network_in_place_of_the_pipelines_own(pipes):
    pipe, ema = pipes["sd15"], tiny_pipeline("sd15", seed=1).unet
    denoise = denoiser_of(pipe, unet=ema)
    assert denoise.backbone.module is ema
    assert pipe.unet is not ema
    with pytest.raises(TypeError, match=r"unknown network of family 'sd' 'transformer'.*Accepted: 'unet'"):
        denoiser_of(pipe, transformer=ema)
    bare = tiny_pipeline("sd15")
    bare.unet = None
    with pytest.raises(ValueError, match="loaded without its unet; give one, unet="):
        denoiser_of(bare)
    with pytest.raises(ValueError, match="loaded without its unet"):
        codec_of(bare)


def test_conditions_that_are_unknown_or_missing(pipes):
    denoise, codec = denoiser_of(pipes["sdxl"]), codec_of(pipes["sdxl"])
    x, cond = torch.zeros(2, 4, 8, 4), codec.cond(PROMPTS)
    with pytest.raises(TypeError, match="unknown condition 'txt'; did you mean 'text'"):
        denoise(x, 0.5, {**cond, "txt": torch.zeros(2, 1)})
    with pytest.raises(TypeError, match="unknown condition 'txt'"):
        denoise.backbone(x, torch.zeros(2), {**cond, "txt": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match=r"family 'sdxl' needs 'size', 'text_pooled' in its condition"):
        denoise(x, 0.5, {"text": cond["text"]})
    with pytest.raises(ValueError, match="do not fall into patches of 2 by 2"):
        denoiser_of(pipes["flux"])(torch.zeros(2, 16, 7, 4), 0.5, codec_of(pipes["flux"]).cond(PROMPTS))


# ---------------------------------------------------------------------------------- families of one's own


class Net(nn.Module):
    """x0 is the latent times the first number of the text; the rest is noise, of the other sign."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = {"in_channels": 4, "out_channels": 4}
        self.weight = nn.Parameter(torch.ones(()))

    def forward(
        self, latent: Tensor, when: Tensor, words: dict[str, Tensor], return_dict: bool = True
    ) -> Any:
        assert when.max() <= 1
        return (-(latent + self.weight * words["first"][:, :1, :1, None] * when[:, None, None, None]),)


def mine(**changes: Any) -> Family:
    network = Network(
        component="net",
        x="latent",
        clock=Clock(keyword="when", steps=((0, 1000),)),
        sign=-1,
        names={"text": "words.first"},
    )
    settings: dict[str, Any] = {"name": "mine", "pipelines": ("MyPipeline",), "network": network}
    return Family(**settings | changes)


def test_a_family_of_ones_own_is_registered_used_and_taken_back(pipes):
    kind = type("MyPipeline", (), {"scheduler": pipes["sd3"].scheduler})
    pipe: Any = kind()
    pipe.net = Net()
    with pytest.raises(ValueError, match=r"unknown pipeline 'MyPipeline'.*Families: sd, .*register_family"):
        family_of(pipe)
    with register_family(mine()) as family:
        assert family_of(pipe) is family
        assert family_of(type("Derived", (kind,), {})) is family
        denoise = denoiser_of(pipe)
        text = torch.full((2, 3, 5), 2.0)
        out = denoise(torch.ones(2, 4, 8, 8), 0.5, {"text": text}).out
        assert torch.equal(out, torch.full((2, 4, 8, 8), 1 + 2 * 0.5))
        with pytest.raises(ValueError, match=r"family 'mine' already, of MyPipeline"):
            register_family(mine(pipelines=("Other",)))
        with pytest.raises(
            ValueError, match="MyPipeline is of family 'mine' already, and cannot be of 'yours'"
        ):
            register_family(mine(name="yours"))
    with pytest.raises(ValueError, match="unknown pipeline"):
        family_of(pipe)
    assert denoiser_of(pipe, mine()).accepts == {"text"}
    registration = register_family(mine())
    registration.remove()
    registration.remove()
    with pytest.raises(ValueError, match="FluxPipeline is of family 'flux' already"):
        register_family(mine(pipelines=("MyPipeline", "FluxPipeline")))
    with pytest.raises(ValueError, match="unknown family 'flx'; did you mean 'flux'"):
        denoiser_of(pipes["flux"], "flx")
    assert denoiser_of(pipes["flux"], "flux").backbone.family is family_of("FluxPipeline")


def test_a_family_whose_null_is_zeros(pipes):
    import dataclasses

    row = family_of("FluxPipeline")
    zeros = dataclasses.replace(row, prompt=Prompt(results=("text", "text_pooled", None), null="zeros"))
    codec = codec_of(pipes["flux"], zeros)
    null = codec.null(codec.cond(PROMPTS))
    assert bool((null["text"] == 0).all() and (null["text_pooled"] == 0).all())
    assert null["guidance"].tolist() == [3.5, 3.5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: mine(pipelines=()), "needs the names of its pipeline classes"),
        (lambda: mine(pipelines="MyPipeline"), "needs the names of its pipeline classes"),
        (lambda: Network(sign=2), "the sign of a network is 1 or -1, got 2"),
        (lambda: mine(network=Network(names={"channels": "x"})), "say `beside` instead"),
        (lambda: Prompt(null="nothing"), "unknown null 'nothing'"),
        (lambda: Prompt(results=("txt",)), "unknown canonical name of a text 'txt'"),
        (lambda: Prompt(null="negative"), "belong together"),
        (lambda: Network(beside="picture"), "unknown beside 'picture'"),
        (lambda: Images(frames="few"), "unknown frames 'few'"),
    ],
)
def test_rows_that_cannot_be(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_method_that_the_pipeline_has_not(pipes):
    import dataclasses

    row = dataclasses.replace(family_of("FluxPipeline"), prompt=Prompt(method="encode"))
    with pytest.raises(ValueError, match="FluxPipeline has no method 'encode'"):
        codec_of(pipes["flux"], row)


def test_importing_the_bridge_loads_no_library_of_models():
    heavy = {"diffusers", "transformers", "accelerate"}
    code = (
        "import sys, gendiff.interop, gendiff.interop.diffusers as d; d.Family, d.family_of, d.codec_of; "
        f"print({heavy} & set(sys.modules), 'torch' in sys.modules)"
    )
    source = Path(interop.__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert result.stdout.strip() == "set() True"
    with pytest.raises(AttributeError, match=r"unknown attribute of gendiff.interop.diffusers 'famly_of'"):
        interop.famly_of  # noqa: B018
