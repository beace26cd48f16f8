"""The rules of guidance, on tensors and on pairs, against the exact guided score of two Gaussians."""

import pytest
import torch

from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.guidance import cfg, elementwise
from gendiff.math import GaussianOracle, Level, LinearBeta, Prediction, Rectified, VarianceExploding

COND = GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
UNCOND = GaussianOracle(torch.tensor([0.0, 0.1]), torch.tensor([[2.0, -0.3], [-0.3, 1.5]]))
SCHEDULES = pytest.mark.parametrize(
    "schedule", [LinearBeta(), Rectified(), VarianceExploding()], ids=lambda s: type(s).__name__
)


@SCHEDULES
@pytest.mark.parametrize("scale", [0.0, 0.5, 3, 7.5, torch.tensor([0.0, 1.0, 2.5, 7.5])], ids=str)
def test_guidance_of_pairs_follows_the_guided_score(schedule, scale, randn64) -> None:
    """score = -eps/sigma = (alpha·x0 - x_t)/sigma², so that both halves of the pair say what the law says."""
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    level = schedule.level(t)
    alpha, sigma = (value[:, None] for value in level)
    x = alpha * randn64(4, 2) + sigma * randn64(4, 2)
    cond, uncond = (OracleDenoiser(law, schedule)(x, t) for law in (COND, UNCOND))
    guided = cfg(cond, uncond, scale)
    score = COND.guided_score(UNCOND, x, *level, scale)
    torch.testing.assert_close(-guided.eps / sigma, score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((alpha * guided.x0 - x) / sigma**2, score, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x)


@SCHEDULES
@pytest.mark.parametrize("name", ["x0", "v", "flow", "edm"])
def test_the_output_is_guided_with_the_pair(schedule, name, randn64) -> None:
    """p·x0 + q·eps is linear, so that guidance in any parameterisation is one and the same."""
    cond, uncond = (Denoiser(lambda x, timestep, cond, k=k: k * x.cos(), schedule, name) for k in (0.9, -0.4))
    x, t = randn64(3, 2), 0.6
    guided = cfg(cond(x, t), uncond(x, t), 4.0)
    level = Level(*schedule.level(t))
    torch.testing.assert_close(Prediction(name).output(guided.x0, guided.eps, level), guided.out)
    assert guided.prediction == Prediction(name)


def test_tensors(randn64) -> None:
    cond, uncond = randn64(2, 3, 4), randn64(2, 3, 4)
    torch.testing.assert_close(cfg(cond, uncond, 7.5), 7.5 * cond - 6.5 * uncond)
    per_sample = cfg(cond, uncond, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(per_sample[0], 2 * cond[0] - uncond[0])
    assert torch.equal(per_sample[1], uncond[1])
    torch.testing.assert_close(cfg(cond, uncond, torch.tensor(3.0)), 3 * cond - 2 * uncond)


@pytest.mark.parametrize("scale", [1, 1.0, True])
def test_a_scale_of_one_is_off_exactly(scale, randn64) -> None:
    cond, uncond = randn64(2, 3) * 1e-3, randn64(2, 3) * 1e6
    assert cfg(cond, uncond, scale) is cond
    pair, other = Denoised(cond, cond), Denoised(uncond, uncond)
    assert cfg(pair, other, scale) is pair
    assert not torch.equal(uncond + 1.0 * (cond - uncond), cond)  # which is why


def test_the_dtype_is_that_of_the_predictions() -> None:
    cond, uncond = torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    assert cfg(cond, uncond, torch.tensor([2.0, 3.0], dtype=torch.float64)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(randn64) -> None:
    cond, uncond = randn64(2, 3), randn64(2, 3)
    with pytest.raises(TypeError, match=r"two tensors or two Denoised, got Denoised and Tensor"):
        cfg(Denoised(cond, cond), uncond, 2.0)
    with pytest.raises(ValueError, match=r"uncond has shape \(2, 2\) but cond has shape \(2, 3\)"):
        cfg(cond, uncond[:, :2], 2.0)
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit samples of shape \(2, 3\)"):
        cfg(cond, uncond, torch.ones(3))


def test_elementwise_keeps_what_is_not_combined(randn64) -> None:
    a, b, c = (Denoised(randn64(2, 3), randn64(2, 3), log_var=randn64(2, 3)) for _ in range(3))
    total = elementwise(lambda x, y, z: x + 2 * y - z, a, b, c)
    torch.testing.assert_close(total.x0, a.x0 + 2 * b.x0 - c.x0)
    torch.testing.assert_close(total.eps, a.eps + 2 * b.eps - c.eps)
    assert total.log_var is a.log_var
    assert total.out is None


def test_outputs_of_different_kinds_are_not_combined(randn64) -> None:
    x = randn64(2, 3)
    one, other = (Denoiser(lambda x, timestep, cond: x, LinearBeta(), name) for name in ("epsilon", "v"))
    assert cfg(one(x, 0.5), other(x, 0.5), 2.0).out is None
    assert cfg(one(x, 0.5), one(x, 0.5), 2.0).out is not None
    assert cfg(one(x, 0.5), one(x, 0.5).replace(out=None), 2.0).out is None
