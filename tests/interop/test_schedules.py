"""Schedules and predictions of diffusers' schedulers, against their own tables and equations."""

import diffusers
import pytest
import torch

from gendiff.interop.diffusers.schedules import prediction_of, schedule_of
from gendiff.math import (
    CosineBeta,
    LinearBeta,
    Prediction,
    Rectified,
    ScaledLinearBeta,
    SigmoidBeta,
    Tabulated,
    VarianceExploding,
    ZeroTerminalSNR,
)

BETAS = [0.1, 0.05, 0.2, 0.3]
CASES = [
    (diffusers.DDPMScheduler(), LinearBeta()),
    (diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"), ScaledLinearBeta(1e-4, 0.02)),
    (diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"), CosineBeta()),
    (diffusers.DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=50), SigmoidBeta(size=50)),
    (diffusers.DDIMScheduler(trained_betas=BETAS, num_train_timesteps=4), Tabulated(BETAS)),
    (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), ZeroTerminalSNR(LinearBeta())),
]


@pytest.mark.parametrize(("scheduler", "schedule"), CASES)
def test_tables(scheduler, schedule) -> None:
    """Exactly one of our classes, whose table is theirs but for its float32."""
    assert schedule_of(scheduler) == schedule
    assert schedule_of({"_class_name": type(scheduler).__name__, **scheduler.config}) == schedule
    alpha_bar = schedule.log_alpha_bar.exp()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="laplace"),
        diffusers.HeunDiscreteScheduler(beta_schedule="exp"),
    ],
)
def test_betas_that_have_no_class_of_their_own(scheduler) -> None:
    schedule = schedule_of(scheduler)
    assert isinstance(schedule, Tabulated)
    alpha_bar = schedule.log_alpha_bar.exp()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, rtol=2e-4, atol=2e-7)


def test_flows_and_edm() -> None:
    assert schedule_of(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)) == Rectified()
    assert schedule_of(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)) == Rectified()
    assert schedule_of(diffusers.EDMEulerScheduler(sigma_max=50.0)) == VarianceExploding(0.002, 50.0)


def test_predictions() -> None:
    """By what theirs makes of an output at a level; EDM's epsilon is F, its v the negative of F."""
    assert prediction_of(diffusers.DDIMScheduler()) == Prediction("epsilon")
    assert prediction_of(diffusers.DDIMScheduler(prediction_type="sample")) == Prediction("x0")
    assert prediction_of(diffusers.FlowMatchEulerDiscreteScheduler()) == Prediction("flow")
    assert prediction_of(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)) == Prediction(
        "flow", -1
    )
    x, out, sigma = torch.randn(2, 3).double(), torch.randn(2, 3).double(), 1.7
    for kind in ("epsilon", "v_prediction"):
        theirs = diffusers.EDMEulerScheduler(prediction_type=kind, sigma_data=0.7)
        level = VarianceExploding(1e-3, sigma).level(1.0)
        x0, _ = prediction_of(theirs).solve(out, x, level)
        torch.testing.assert_close(x0, theirs.precondition_outputs(x, out, torch.tensor(sigma).double()))
        scale = prediction_of(theirs).input_scale(level)
        torch.testing.assert_close(x * scale, theirs.precondition_inputs(x, torch.tensor(sigma).double()))


def test_stable_video_diffusion_in_our_words() -> None:
    """v of a table whose network is given log(sigma)/4 is EDM's F with sigma_data = 1, but for its sign."""
    theirs = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    )
    schedule, prediction = schedule_of(theirs), prediction_of(theirs)
    assert schedule == VarianceExploding(0.002, 700.0)
    x, out, level = torch.randn(2, 3).double(), torch.randn(2, 3).double(), schedule.level(0.6)
    sigma = level.sigma
    x0, _ = prediction.solve(out, x, level)
    torch.testing.assert_close(x0, out * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1))
    torch.testing.assert_close(schedule.timestep(0.6), sigma.log() / 4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"unknown beta_schedule 'quadratic'"):
        schedule_of({"_class_name": "DDIMScheduler", "beta_schedule": "quadratic"})
    with pytest.raises(ValueError, match=r"unknown prediction_type 'noise'"):
        prediction_of({"_class_name": "DDIMScheduler", "prediction_type": "noise"})
    with pytest.raises(ValueError, match=r"unknown scheduler of diffusers 'DDMScheduler'; did you mean"):
        schedule_of({"_class_name": "DDMScheduler"})
    with pytest.raises(ValueError, match="has neither betas nor sigmas of a kind"):
        schedule_of(diffusers.ScoreSdeVeScheduler())
    with pytest.raises(TypeError, match="give a scheduler of diffusers, its config, or a pipeline"):
        schedule_of(3)
