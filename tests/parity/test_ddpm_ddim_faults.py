"""Where diffusers' DDPM and DDIM schedulers differ from ours: oracles show which of the two is right."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.math import Clip, GaussianOracle, LinearBeta, MixtureOracle, ZeroTerminalSNR, grids
from gendiff.math.bounds import eps_of
from gendiff.math.schedules import times
from gendiff.sampling import DDIM, DDPM, Bounded, iterate, sample
from tests.parity.schedulers import SPACINGS, Fake, converted, theirs

# one point: every x_t is alpha·0.7 + sigma·z, and DDIM is exact for steps of any size
POINT = GaussianOracle.isotropic(torch.tensor([0.7], dtype=torch.float64), 0.0)
UNIT = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # two samples of standard deviation 1


def exact(scheduler, denoise, steps, x, **settings):
    """Their loop with an exact noise prediction: the samples after every step."""
    schedule = denoise.schedule

    def network(x, timestep):
        return denoise(x, (timestep + 1.0) / schedule.size).eps

    return theirs(converted(scheduler, schedule), steps, network, x, **settings)


@pytest.mark.parametrize(("spacing", "steps", "excess"), [("trailing", 7, 1.008), ("linspace", 10, 5.8)])
def test_the_next_level_is_that_of_the_timestep_visited_next(spacing, steps, excess) -> None:
    """DDIMScheduler steps to `timestep - N // steps` and is called at another: too noisy by the excess."""
    schedule = LinearBeta()
    grid, denoise = SPACINGS[spacing](schedule, steps), OracleDenoiser(POINT, schedule)
    x = schedule.alpha(1.0) * 0.7 + schedule.sigma(1.0) * UNIT
    noise = [schedule.sigma(s).item() for s in grid.times[1:]]
    mine = [step.x.std(correction=0).item() for step in iterate(denoise, x, grid, DDIM())]
    assert mine == pytest.approx(noise, rel=1e-9, abs=1e-12)
    other = exact(DDIMScheduler(timestep_spacing=spacing, clip_sample=False), denoise, steps, x)
    ratios = [x.std(correction=0).item() / level for x, level in zip(other[:-1], noise[:-1], strict=True)]
    assert max(ratios) == pytest.approx(excess, rel=1e-2)
    if spacing == "trailing":  # 142 - 1000 // 7 is 0: they end at that timestep, in spite of set_alpha_to_one
        assert other[-1].std(correction=0) == pytest.approx(schedule.sigma(schedule.t_min).item(), rel=1e-2)


def test_trailing_has_as_many_timesteps_as_steps() -> None:
    """Theirs come from `arange` of floats, which at 62 numbers of steps up to 1000 adds one: timestep -1."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert (len(scheduler.timesteps), scheduler.timesteps[-1]) == (62, -1)
    grid = grids.trailing(LinearBeta(), 61)
    timesteps = grid.schedule.timestep(grid.t[:-1])
    assert timesteps.tolist() == scheduler.timesteps[:-1].tolist()


def test_one_step_of_linspace_starts_at_the_noise() -> None:
    """Theirs is `linspace(0, 999, 1)`: timestep 0, where noise passes for data. Ours gives the mean."""
    law, schedule = GaussianOracle.isotropic(torch.tensor([0.7]), 0.5), LinearBeta()
    denoise = OracleDenoiser(law, schedule)
    (other,) = exact(DDIMScheduler(timestep_spacing="linspace", clip_sample=False), denoise, 1, UNIT)
    torch.testing.assert_close(other, UNIT, rtol=1e-2, atol=0)
    mine = sample(denoise, UNIT, grids.linspace(schedule, 1), DDIM())
    torch.testing.assert_close(mine, torch.full_like(mine, 0.7), rtol=0, atol=1e-2)


def test_the_step_to_the_data_adds_no_noise() -> None:
    """DDPMScheduler adds it unless the last timestep is 0: here a std of 0.39."""
    schedule = LinearBeta()
    grid, denoise = grids.trailing(schedule, 8), OracleDenoiser(POINT, schedule)
    x = torch.zeros(4000, 1, dtype=torch.float64)
    scheduler = DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing", clip_sample=False)
    other = exact(scheduler, denoise, 8, x)[-1]
    beta = 1 - schedule.alpha(grid.times[-2]).square().item()
    assert other.std().item() == pytest.approx(beta**0.5, rel=0.05)
    mine = sample(denoise, x, grid, DDPM("fixed_large"), rng=0)
    torch.testing.assert_close(mine, torch.full_like(mine, 0.7), rtol=0, atol=1e-12)


class Loud:
    """Exact for data of -1 and 1, but above time 0.1 it says 3: guidance that leaves the range."""

    schedule = LinearBeta()
    law = MixtureOracle(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1, 1))

    def __call__(self, x_t, t, cond=None, carry=None):
        level = self.schedule.level(times(t))
        loud = t > 0.1
        x0 = torch.full_like(x_t, 3.0) if loud else self.law.x0(x_t, *level)
        return Denoised(x0, eps_of(x0, x_t, level))


def test_a_clip_needs_eps_recomputed() -> None:
    """Clipped to 1, the network says 1 at every time that decides, so the samples are to end at 1.

    DDIMScheduler moves them along the eps of 3 all the same, so that even a step of length zero moves a
    sample: the more steps, the further off they are, and they end at -1. It has to be told
    `use_clipped_model_output`.
    """
    denoise, x = Loud(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    bounded, ends = Bounded(denoise, Clip()), torch.ones_like(x)
    denoised = bounded(x, 0.5)
    alpha, sigma = denoise.schedule.level(0.5)
    torch.testing.assert_close(alpha * denoised.x0 + sigma * denoised.eps, x)
    drifts = []
    for steps in (20, 40):
        mine = sample(bounded, x, grids.leading(denoise.schedule, steps), DDIM())
        torch.testing.assert_close(mine, ends)
        told = exact(DDIMScheduler(), denoise, steps, x, use_clipped_model_output=True)[-1]
        torch.testing.assert_close(told, ends)
        other = exact(DDIMScheduler(), denoise, steps, x)
        torch.testing.assert_close(other[-1], -ends)
        alpha, sigma = denoise.schedule.level(0.101)  # where timestep 100 is, at 9/10 of the steps
        drifts.append(((other[9 * steps // 10 - 1] - alpha) / sigma).mean().item())
    assert drifts[1] < drifts[0] - 5 < -10  # in standard deviations of a noise that had mean 0


def test_variances_that_are_logarithms() -> None:
    """`learned` channels are log variances (Nichol & Dhariwal 2021, code); DDPMScheduler takes their root.

    Its `fixed_large_log` is the root of a logarithm too: both are NaN for every variance below 1.
    """
    schedule = LinearBeta()
    x = torch.zeros(1, 1, dtype=torch.float64)
    for name in ("learned", "fixed_large_log"):
        scheduler = converted(DDPMScheduler(variance_type=name, clip_sample=False), schedule)
        out = torch.tensor([[0.0, -2.0]], dtype=torch.float64)[:, : 2 if name == "learned" else 1]
        scheduler.set_timesteps(10)
        assert scheduler.step(out, 900, x).prev_sample.isnan().all()
    denoised = Denoised(x, x, log_var=torch.full_like(x, -2.0))
    state = DDPM("learned").init(x, grids.leading(schedule, 10))
    moved = DDPM("learned").tell(state, denoised, torch.ones_like(x)).x
    assert moved.item() == pytest.approx(math.exp(-1))
    large, large_log = (
        DDPM(name).tell(state, denoised, torch.ones_like(x)).x for name in ("fixed_large", "fixed_large_log")
    )
    torch.testing.assert_close(large, large_log)


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    """DDIMScheduler divides by alpha = 0 and goes on with infinities."""
    schedule = ZeroTerminalSNR(LinearBeta())
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    assert not theirs(scheduler, 4, Fake(), torch.ones(1, 2))[-1].isfinite().any()
    with pytest.raises(ValueError, match=r"epsilon prediction cannot be used .* Use 'v' or 'flow'"):
        Denoiser(Fake(), schedule, "epsilon")
