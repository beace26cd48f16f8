"""Errors against loops, mpmath and torch; masks; the gradients of both."""

import math

import mpmath
import pytest
import torch
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from gendiff.objectives import MSE, Huber

ERRORS = pytest.mark.parametrize("error", [MSE(), Huber(0.001), Huber(0.5)], ids=repr)


# ------------------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 4), (1, 1)])
def test_mse_is_the_mean_square_of_every_sample(randn64, shape):
    prediction, target = randn64(*shape), randn64(*shape)
    losses = MSE()(prediction, target)
    assert_close(losses, torch.stack([mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]))


@pytest.mark.parametrize("c", [0.001, 0.03, 2.0])
def test_huber_is_its_formula_to_the_last_digits(c):
    d = torch.cat([torch.logspace(-9, 6, 61, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    with mpmath.workdps(50):
        exact = [
            float(mpmath.sqrt(mpmath.mpf(v) ** 2 + mpmath.mpf(c) ** 2) - mpmath.mpf(c)) for v in d.tolist()
        ]
    exact = torch.tensor(exact, dtype=torch.float64)
    assert_close(Huber(c).elementwise(d), exact, rtol=1e-14, atol=0)
    assert_close(Huber(c).elementwise(-d), exact, rtol=1e-14, atol=0)
    # in float32 too, where sqrt(d² + c²) - c keeps nothing of a small d
    assert_close(Huber(c).elementwise(d.float()).double(), exact, rtol=1e-6, atol=0)


def test_huber_is_that_of_the_scripts_of_diffusers(randn64):
    model_pred, target, huber_c = randn64(2, 3, 4, 4), randn64(2, 3, 4, 4), 0.001
    theirs = torch.mean(torch.sqrt((model_pred - target) ** 2 + huber_c**2) - huber_c)
    assert_close(Huber(huber_c)(model_pred, target).mean(), theirs, rtol=1e-12, atol=0)


def test_huber_is_a_square_near_zero_and_absolute_far_away():
    d, c = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64), 0.5
    assert_close(Huber(c).elementwise(d), d.square() / (2 * c), rtol=1e-10, atol=0)
    d = 1e6 * d.sign()
    assert_close(Huber(c).elementwise(d), d.abs() - c, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_huber_is_bounded_and_finite_everywhere(dtype):
    d = torch.tensor([[0.0, 1e-12, -1e-4, 1e-3, -1.0, 1e10, -1e30]], dtype=dtype, requires_grad=True)
    Huber(0.001).elementwise(d).sum().backward()
    exact = d.detach().double() / torch.hypot(d.detach().double(), torch.tensor(0.001, dtype=torch.float64))
    assert_close(d.grad.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


def test_gradients_are_those_of_finite_differences(randn64):
    prediction, target = randn64(2, 3, 2).requires_grad_(), randn64(2, 3, 2)
    where = randn64(2, 1, 2).abs().requires_grad_()
    for error in (MSE(), Huber(0.3)):
        assert torch.autograd.gradcheck(lambda p, w, error=error: error(p, target, w), (prediction, where))


# ------------------------------------------------------------------------------------------------------ masks


@ERRORS
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 1, 4, 4), (1, 1, 4, 4), (3, 1, 1, 1), (1, 2, 1, 1)])
def test_where_is_a_weighted_mean_of_every_sample(error, randn64, shape):
    prediction, target, where = randn64(3, 2, 4, 4), randn64(3, 2, 4, 4), randn64(*shape).abs()
    losses = error(prediction, target, where)
    elements, weights = error.elementwise(prediction - target), where.expand(3, 2, 4, 4)
    for sample in range(3):
        pairs = list(
            zip(weights[sample].flatten().tolist(), elements[sample].flatten().tolist(), strict=True)
        )
        expected = math.fsum(w * e for w, e in pairs) / math.fsum(w for w, _ in pairs)
        assert losses[sample].item() == pytest.approx(expected, rel=1e-12)
    assert_close(error(prediction, target, 7.5 * where), losses, rtol=1e-12, atol=0)
    assert_close(
        error(prediction, target, torch.ones_like(where)), error(prediction, target), rtol=1e-12, atol=0
    )


@ERRORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_a_masked_out_pixel_has_no_say_and_no_gradient(error, randn64, dtype):
    prediction, target = randn64(2, 3, 4, 4).requires_grad_(), randn64(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4, dtype=dtype)
    mask[:, :, :2] = 1
    losses = error(prediction, target, mask)
    assert_close(losses, error(prediction[:, :, :2], target[:, :, :2]), rtol=1e-12, atol=0)
    losses.sum().backward()
    assert (prediction.grad[:, :, 2:] == 0).all()
    assert (prediction.grad[:, :, :2] != 0).all()
    with torch.no_grad():
        elsewhere = prediction + 100 * (1 - mask.double())
    assert torch.equal(error(elsewhere, target, mask), losses)


@ERRORS
def test_a_sample_without_weight_has_loss_zero_and_gradient_zero(error, randn64):
    prediction, target = randn64(3, 2, 4).requires_grad_(), randn64(3, 2, 4)
    where = torch.ones(3, 1, 4)
    where[1] = 0
    losses = error(prediction, target, where)
    assert losses[1] == 0
    assert_close(losses[[0, 2]], error(prediction, target)[[0, 2]])
    losses.sum().backward()
    assert (prediction.grad[1] == 0).all()
    assert torch.isfinite(prediction.grad).all()
    losses = error(prediction.detach().requires_grad_(), target, torch.zeros(1, 1, 1))
    assert torch.equal(losses, torch.zeros(3, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------- precision


@ERRORS
def test_half_precision_is_compared_in_float32(error, randn64):
    prediction, target = (randn64(2, 64).to(torch.bfloat16) for _ in range(2))
    losses = error(prediction, target)
    assert losses.dtype == torch.float32
    assert_close(losses.double(), error(prediction.double(), target.double()), rtol=1e-6, atol=0)
    assert error(prediction, target.double()).dtype == torch.float64
    assert error(prediction, target, torch.ones(1, 1, dtype=torch.float64)).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (2, 3, 4, 5), (2, 2, 1, 1), (3, 1, 4, 4), ()])
def test_where_must_broadcast_dimension_by_dimension(shape):
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"must broadcast over \(2, 3, 4, 4\) dimension by dimension; use 1"):
        MSE()(x, x, torch.ones(shape))


@pytest.mark.usefixtures("as_users_run")
def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"target has shape \(2, 4\) but prediction has shape \(2, 3\)"):
        MSE()(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("c", [0.0, -1.0, math.nan, math.inf])
def test_c_is_positive(c):
    with pytest.raises(ValueError, match=f"c must be positive and finite, got {c}"):
        Huber(c)
