"""Clipping and dynamic thresholding against torch.quantile and diffusers; the eps of a bounded x0."""

import math
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.math.bounds import Clip, DynamicThreshold, eps_of
from gendiff.math.schedules import Level

SEEDS = st.integers(0, 2**32 - 1)

few = settings(max_examples=30)  # with checked annotations a call takes a millisecond


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user sees, whose functions do not check their annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def samples(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_clip_is_the_nearest_value_within_the_limit() -> None:
    x0 = torch.tensor([[-3.0, -1.0, 0.25, 2.0]])
    assert Clip()(x0).tolist() == [[-1.0, -1.0, 0.25, 1.0]]
    assert Clip(2.5)(x0).tolist() == [[-2.5, -1.0, 0.25, 2.0]]


@few
@given(SEEDS, st.floats(0.05, 1), st.floats(1, 5), st.integers(1, 40))
def test_dynamic_threshold_is_the_quantile_of_each_sample(
    seed: int, quantile: float, limit: float, values: int
) -> None:
    x0 = samples(seed, 3, values)
    s = torch.quantile(x0.abs(), quantile, dim=1).clamp(1, limit)[:, None]
    expected = torch.maximum(torch.minimum(x0, s), -s) / s
    torch.testing.assert_close(DynamicThreshold(quantile, limit)(x0), expected, rtol=1e-12, atol=1e-14)


def test_dynamic_threshold_equals_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    x0 = samples(0, 4, 3, 5, 7)
    torch.testing.assert_close(DynamicThreshold(0.9, 2.0)(x0), scheduler._threshold_sample(x0).to(x0))


def test_dynamic_threshold_takes_samples_one_by_one() -> None:
    """A quiet sample is left alone beside a loud one; a limit of 1 is plain clipping."""
    x0 = torch.stack([samples(1, 2, 8, scale=0.1), samples(2, 2, 8, scale=5.0)])
    bounded = DynamicThreshold(1.0, 100.0)(x0)
    assert bounded.shape == x0.shape
    assert bounded[0].equal(x0[0])
    assert bounded[1].abs().max() == 1
    assert DynamicThreshold(0.5)(x0).equal(Clip()(x0))


def test_dynamic_threshold_of_samples_that_are_numbers() -> None:
    assert DynamicThreshold(0.5, 2.0)(torch.tensor([-3.0, 1.5, 0.5])).tolist() == [-1.0, 1.0, 0.5]


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_clip_needs_a_positive_limit(limit: float) -> None:
    with pytest.raises(ValueError, match=f"Clip needs a positive limit, got {limit}"):
        Clip(limit)


@pytest.mark.parametrize(
    ("quantile", "limit"), [(0.0, 1.0), (1.5, 1.0), (0.5, 0.5), (math.nan, 1.0), (0.5, math.nan)]
)
def test_dynamic_threshold_says_what_it_needs(quantile: float, limit: float) -> None:
    with pytest.raises(
        ValueError, match=rf"quantile in \(0, 1\] .* got quantile={quantile} and limit={limit}"
    ):
        DynamicThreshold(quantile, limit)


@few
@given(SEEDS, st.floats(0.01, math.pi / 2))
def test_eps_of_keeps_the_pair_at_x_t(seed: int, angle: float) -> None:
    x0, x_t = samples(seed, 2, 3, 4)
    alpha, sigma = math.cos(angle), math.sin(angle)
    eps = eps_of(
        x0, x_t, Level(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    )
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=1e-12, atol=1e-12)


def test_eps_of_takes_a_level_per_sample() -> None:
    level = Level(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 4.0]))
    eps = eps_of(torch.ones(2, 3), torch.full((2, 3), 5.0), level)
    assert eps[:, 0].tolist() == [2.0, 1.125]


@pytest.mark.usefixtures("unchecked")
def test_eps_of_names_shapes_that_differ() -> None:
    level = Level(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 4\) but x0 has shape \(2, 3\)"):
        eps_of(torch.ones(2, 3), torch.ones(2, 4), level)
