"""GendiffScheduler inside pipelines of diffusers: the same images as with theirs, and other solvers."""

import diffusers
import numpy as np
import pytest
import torch

from gendiff.interop.diffusers.scheduler import GendiffScheduler
from gendiff.testing import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEXT = {"prompt": "a red fox", "num_inference_steps": 4, "output_type": "np"}
SIZE = {"height": 32, "width": 32}
SAME = [
    ("sd15", {"guidance_scale": 3.0}),
    ("sdxl", {}),
    ("flux", {}),
    ("wan", {"num_frames": 5}),
    ("sana", {"use_resolution_binning": False}),
]


def images(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    result = pipe(generator=torch.Generator().manual_seed(0), **call)
    return np.asarray(result.frames if hasattr(result, "frames") else result.images)


@pytest.mark.parametrize(("name", "call"), SAME)
def test_the_same_images_as_with_theirs(name, call) -> None:
    pipe = tiny_pipeline(name)
    theirs = images(pipe, **TEXT, **SIZE, **call)
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler)
    np.testing.assert_allclose(images(pipe, **TEXT, **SIZE, **call), theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "solver", ["dpmpp-2", "heun", "unipc-3", "euler-ancestral", "ddim", "dpm2", "dpmpp-sde-2"]
)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_another_solver_in_a_stock_pipeline(name, solver) -> None:
    """On the timesteps of the pipeline's own scheduler; the denoised image is a finite picture."""
    pipe = tiny_pipeline(name)
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler, solver=solver)
    picture = images(pipe, **TEXT, **SIZE)
    assert np.isfinite(picture).all()
    assert picture.std() > 1e-3
    assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("scheduler", [diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler])
def test_image_to_image(scheduler) -> None:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny_pipeline("sd15").components, requires_safety_checker=False
    )
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    call = {**TEXT, "num_inference_steps": 10, "image": picture, "strength": 0.5}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    theirs = images(pipe, **call)
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler)
    np.testing.assert_allclose(images(pipe, **call), theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["sd15-inpaint", "sdxl-inpaint-4"])
def test_inpainting(name) -> None:
    pipe = tiny_pipeline(name)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24] = 1
    call = {**TEXT, **SIZE, "image": torch.rand(1, 3, 32, 32), "mask_image": mask, "strength": 0.75}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    theirs = images(pipe, **call)
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler)
    np.testing.assert_allclose(images(pipe, **call), theirs, rtol=0, atol=2e-3)


def test_a_pipeline_of_pixels() -> None:
    """DDPMPipeline; and DDIMPipeline, which passes eta and use_clipped_model_output."""
    pipe = tiny_pipeline("ddpm")
    call = {"num_inference_steps": 5, "output_type": "np"}
    theirs = images(pipe, **call)
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler)
    np.testing.assert_allclose(images(pipe, **call), theirs, rtol=0, atol=2e-3)
    other = diffusers.DDIMPipeline(pipe.unet, diffusers.DDIMScheduler())
    theirs = images(other, eta=0.5, use_clipped_model_output=True, **call)
    other.scheduler = GendiffScheduler.from_config(diffusers.DDIMScheduler())
    np.testing.assert_allclose(
        images(other, eta=0.5, use_clipped_model_output=True, **call), theirs, rtol=0, atol=2e-3
    )


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path) -> None:
    pipe = tiny_pipeline("ddpm")
    pipe.scheduler = GendiffScheduler.from_config(pipe.scheduler, solver="dpmpp-2")
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, GendiffScheduler)
    assert again.scheduler.solver == pipe.scheduler.solver
    call = {"num_inference_steps": 3, "output_type": "np"}
    np.testing.assert_allclose(images(again, **call), images(pipe, **call), rtol=0, atol=1e-4)
