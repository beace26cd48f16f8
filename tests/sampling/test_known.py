"""Inpainting: what is known ends as it was, at one noise level all the way; masks may be soft."""

import pytest
import torch

from gendiff.denoiser import Denoised, OracleDenoiser
from gendiff.math import Clip, GaussianOracle, LinearBeta, Rectified, grids
from gendiff.sampling import DDPM, Bounded, Euler, Heun, Known, iterate, sample, split
from tests.sampling.methods import METHODS

BETAS = LinearBeta()
GRID = grids.trailing(BETAS, 6)
SIZE = (2, 3, 4, 4)


class Restless:
    """A denoiser whose answers are never right and never the same."""

    schedule = BETAS

    def __call__(self, x_t, t, cond=None, carry=None):
        moment = self.schedule.moment(t, x_t.device)
        x0 = 3 * torch.sin(5 * x_t) + moment.t.mean()
        alpha, sigma = moment.level.like(x_t, x_t.dtype)
        return Denoised(x0, (x_t - alpha * x0) / sigma)


@pytest.fixture
def case(randn64):
    """(x0, keep, x): the left half is known, the right one free."""
    keep = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    keep[..., :2] = 1
    return randn64(*SIZE), keep, randn64(*SIZE)


@pytest.mark.parametrize("solver", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_known_ends_bit_for_bit_as_it_was(solver, dtype, case) -> None:
    x0, keep, x = (part.to(dtype) for part in case)
    ends = sample(Known(x0, keep)(Restless()), x, GRID, solver, rng=3)
    assert torch.equal(ends[..., :2], x0[..., :2])
    assert (ends[..., 2:] - x0[..., 2:]).abs().min() > 1e-3


@pytest.mark.parametrize("solver", [Euler(), Heun()], ids=repr)
def test_the_known_part_has_its_own_noise_and_the_level_of_the_step(solver, case) -> None:
    """A deterministic method keeps the noise it started from: the network sees alpha·x0 + sigma·eps there."""
    x0, keep, eps = case
    alpha, sigma = BETAS.level(1.0)
    seen = []

    class Spy(Restless):
        def __call__(self, x_t, t, cond=None, carry=None):
            seen.append((x_t, float(t)))
            return super().__call__(x_t, t, cond, carry)

    sample(Known(x0, keep)(Spy()), alpha * x0 + sigma * eps, GRID, solver)
    for x_t, t in seen:
        alpha, sigma = BETAS.level(t)
        torch.testing.assert_close(x_t[..., :2], (alpha * x0 + sigma * eps)[..., :2], rtol=1e-9, atol=1e-9)


def test_noise_that_is_added_keeps_the_level_of_the_known_part(randn64) -> None:
    x0 = torch.zeros(20_000, 1, dtype=torch.float64)
    steps = iterate(
        Known(x0, torch.ones(1, 1, dtype=torch.float64))(Restless()), randn64(20_000, 1), GRID, DDPM(), rng=1
    )
    for step in steps:
        assert step.x.std().item() == pytest.approx(BETAS.sigma(step.s).item(), rel=0.03)


def test_the_posterior_under_a_full_mask_of_an_independent_part() -> None:
    """Coordinates that know nothing of each other: the free one is drawn as if there were no mask."""
    law = GaussianOracle.isotropic(torch.tensor([0.4, -0.3]), 1.2)
    exact = OracleDenoiser(law, Rectified())
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = grids.uniform(Rectified(), 12)
    keep = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    masked = sample(Known(torch.full((1, 2), 9.0, dtype=torch.float64), keep)(exact), x, grid, Heun())
    assert torch.equal(masked[:, 1], sample(exact, x, grid, Heun())[:, 1])


def test_a_soft_mask_blends_in_the_space_of_x0(randn64) -> None:
    x0, x_t, keep = randn64(2, 3), randn64(2, 3), torch.tensor([[0.25, 0.0, 1.0]], dtype=torch.float64)
    plain, blended = Restless()(x_t, 0.5), Known(x0, keep)(Restless())(x_t, 0.5)
    torch.testing.assert_close(blended.x0[:, 0], 0.25 * x0[:, 0] + 0.75 * plain.x0[:, 0])
    assert torch.equal(blended.x0[:, 1], plain.x0[:, 1])
    assert torch.equal(blended.eps[:, 1], plain.eps[:, 1])
    assert torch.equal(blended.x0[:, 2], x0[:, 2])
    alpha, sigma = BETAS.level(0.5)
    torch.testing.assert_close(alpha * blended.x0 + sigma * blended.eps, x_t)


def test_a_differential_mask_lets_go_at_its_time(randn64) -> None:
    x0, x_t = randn64(1, 4), randn64(2, 4)
    keep = torch.tensor([[0.0, 0.25, 0.75, 1.0]], dtype=torch.float64)
    known = Known(x0, keep, kind="differential")
    held = {t: (known(Restless())(x_t, t).x0[0] == x0[0]).tolist() for t in (0.9, 0.8, 0.7, 0.3, 0.2, 0.01)}
    assert held == {
        0.9: [False, True, True, True],
        0.8: [False, True, True, True],
        0.7: [False, False, True, True],
        0.3: [False, False, True, True],
        0.2: [False, False, False, True],
        0.01: [False, False, False, True],
    }
    each = known(Restless())(x_t, torch.tensor([0.9, 0.2], dtype=torch.float64))
    assert (each.x0 == x0).tolist() == [held[0.9], held[0.2]]


def test_a_bound_round_what_is_known_does_not_undo_it(case) -> None:
    x0, keep, x = case
    ends = sample(Bounded(Known(3 * x0, keep)(Restless()), Clip()), x, GRID, Euler())
    assert torch.equal(ends[..., :2], 3 * x0[..., :2])


def test_two_stages_hand_over_one_noise_level(case) -> None:
    """Both networks of a split run see the known part at the level of their step, and it ends exactly."""
    x0, keep, eps = case
    known = Known(x0, keep)
    alpha, sigma = BETAS.level(1.0)
    high, low = split(GRID, at=0.5)
    *_, last = iterate(known(Restless()), alpha * x0 + sigma * eps, high, Euler())
    alpha, sigma = BETAS.level(last.s)
    left = last.x[..., :2] - (alpha * x0 + sigma * eps)[..., :2]
    assert left.abs().max() < 1e-9
    ends = sample(known(Restless()), last.handoff, low, Euler())
    assert torch.equal(ends[..., :2], x0[..., :2])
    whole = sample(known(Restless()), BETAS.alpha(1.0) * x0 + BETAS.sigma(1.0) * eps, GRID, Euler())
    assert torch.equal(ends, whole)


@pytest.mark.parametrize(
    ("keep", "kind", "says"),
    [
        (torch.full((1, 1, 4, 4), 1.5), "soft", r"keep lies in \[0, 1\].*got 1.5"),
        (torch.ones(2, 4), "soft", r"keep has shape \(2, 4\).*x0 of \(2, 3, 4, 4\).*\[B, 1, H, W\]"),
        (torch.ones(1, 1, 5, 4), "soft", r"does not fit x0"),
        (torch.ones(1, 1, 4, 4), "binery", r"unknown kind of mask 'binery'"),
    ],
)
def test_masks_that_make_no_sense_are_refused(keep, kind, says) -> None:
    with pytest.raises(ValueError, match=says):
        Known(torch.zeros(SIZE), keep, kind)


def test_known_data_of_another_size_is_refused(case) -> None:
    x0, keep, _ = case
    with pytest.raises(ValueError, match=r"known x0 has shape \(2, 3, 4, 4\) but x_t has \(5, 3, 4, 4\)"):
        Known(x0, keep)(Restless())(torch.zeros(5, 3, 4, 4), 0.5)
    one = Known(x0[:1], keep)(Restless())(torch.zeros(5, 3, 4, 4, dtype=torch.float64), 0.5)
    assert torch.equal(one.x0[..., :2], x0[:1, ..., :2].expand(5, 3, 4, 2))
