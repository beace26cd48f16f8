"""DPM-Solver(++), UniPC and DEIS equal diffusers' where those are right, and the places where they are not.

Both sides walk the table of sigmas that diffusers made, with one network, in float64.
"""

import logging
import math
from itertools import pairwise

import diffusers
import pytest
import torch

from gendiff.math import grids
from gendiff.math.schedules import Rectified
from gendiff.sampling import Path, Point
from gendiff.sampling.deis import DEIS
from gendiff.sampling.dpm import DPM, DPMpp
from gendiff.sampling.exponential import moments
from gendiff.sampling.singlestep import SinglestepDPM, SinglestepDPMpp
from gendiff.sampling.unipc import UniPC
from tests.parity.paths import follow

MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
DEIS_, UNIPC = diffusers.DEISMultistepScheduler, diffusers.UniPCMultistepScheduler
STEPS = (1, 2, 3, 10, 16)
DOUBLE, SINGLE_PRECISION = 1e-12, 2e-6  # the multistep scheduler computes in float32


def point(sigma):
    """A ratio sigma/alpha as a variance-preserving level; the ratio stands for the time."""
    return Point(sigma, 1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1))


def path(sigmas):
    return Path(tuple(map(point, sigmas)), lambda log_ratio: point(math.exp(-log_ratio)))


def out(x, sigma):
    return torch.sin(1.3 * x + math.log1p(sigma)) + 0.3 * x.roll(1, -1)


def network(x, at):
    eps = out(x, at.ratio)
    return (x - at.sigma * eps) / at.alpha, eps


def theirs(scheduler, steps, x, noises=(), monkeypatch=None):
    """Their samples after every step, and the table; the noise is what is given."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    left, result = list(noises), []
    if noises:
        monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: left.pop(0))
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(out(x, float(scheduler.sigmas[i])), timestep, x).prev_sample
        result.append(x.double())
    return scheduler.sigmas.tolist(), torch.stack(result)


def made(cls, order, **settings):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return cls(solver_order=order, **betas, **settings)


def gap(solver, scheduler, steps, randn64, monkeypatch=None, noisy=False):
    """The largest relative distance after any step; NaN if either side has one."""
    x = randn64(2, 3, 4, 4)
    noises = [randn64(*x.shape) for _ in range(steps)] if noisy else []
    sigmas, expected = theirs(scheduler, steps, x, noises, monkeypatch)
    mine = torch.stack(follow(solver, path(sigmas), x, network, lambda _: noises.pop(0)))
    return ((mine - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_multistep(order, kind, randn64, monkeypatch) -> None:
    for steps in STEPS:
        for name, of in (("dpmsolver++", DPMpp), ("dpmsolver", DPM)):
            settings = {"solver_type": kind, "final_sigmas_type": "zero" if of is DPMpp else "sigma_min"}
            for euler in (False, True):
                solver = of(order, kind, euler_at_final=euler)
                scheduler = made(MULTI, order, algorithm_type=name, euler_at_final=euler, **settings)
                assert gap(solver, scheduler, steps, randn64) < SINGLE_PRECISION
            scheduler = made(MULTI, order, algorithm_type=f"sde-{name}", **settings)
            solver = of(order, kind, sde=True)
            assert gap(solver, scheduler, steps, randn64, monkeypatch, noisy=True) < SINGLE_PRECISION


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_singlestep_over_the_points_of_the_grid(order, kind, randn64) -> None:
    """Their blocks, with the lower orders of the end, for numbers of steps that do not divide."""
    for steps in STEPS:
        for lower in (True, False):
            for name, of in (("dpmsolver++", SinglestepDPMpp), ("dpmsolver", SinglestepDPM)):
                final = "zero" if of is SinglestepDPMpp else "sigma_min"
                scheduler = made(
                    SINGLE,
                    order,
                    algorithm_type=name,
                    solver_type=kind,
                    lower_order_final=lower,
                    final_sigmas_type=final,
                )
                # they fall back to lower_order_final=True for steps that do not divide, and for sigma = 0
                falls = lower or steps % order > 0 or (final == "zero" and order > 1)
                solver = of(order, kind, blocks=True, lower_order_final=falls)
                assert gap(solver, scheduler, steps, randn64) < DOUBLE


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # they take numpy's log of a tensor
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, randn64) -> None:
    for steps in STEPS:
        for lower in (True, False):
            scheduler = made(DEIS_, order, lower_order_final=lower)
            assert gap(DEIS(order, lower), scheduler, steps, randn64) < DOUBLE


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc(p, predict, variant, randn64) -> None:
    for steps in STEPS:
        for lower, without in ((True, ()), (False, ()), (True, (0, 2))):
            scheduler = made(
                UNIPC,
                p,
                solver_type=variant,
                predict_x0=predict == "x0",
                lower_order_final=lower,
                disable_corrector=list(without),
                final_sigmas_type="sigma_min",
            )
            solver = UniPC(p, variant, predict, disable_corrector=without, lower_order_final=lower)
            assert gap(solver, scheduler, steps, randn64) < DOUBLE
        scheduler = made(UNIPC, p, solver_type="bh2")  # their default: to sigma = 0
        assert gap(UniPC(p, lower_order_final=True), scheduler, steps, randn64) < DOUBLE


@pytest.mark.parametrize(
    ("settings", "solver"),
    [
        ({"solver_type": "bh1"}, UniPC(2, "bh1", lower_order_final=True)),
        ({"predict_x0": False}, UniPC(2, predict="eps", lower_order_final=True)),
    ],
)
def test_unipc_of_diffusers_ends_in_nan_at_sigma_0(settings, solver, randn64) -> None:
    """bh1 multiplies 0 by log(sigma), the noise prediction exp(-log sigma) by 0: at every number of steps."""
    for steps in STEPS:
        sigmas, result = theirs(made(UNIPC, 2, **settings), steps, x := randn64(2, 3, 4, 4))
        assert sigmas[-1] == 0
        assert result[-1].isnan().all()
        mine = follow(solver, path(sigmas), x, network)
        assert mine[-1].isfinite().all()
        assert all(torch.allclose(a, b) for a, b in zip(mine[:-1], result[:-1], strict=True))


def test_unipc_of_diffusers_cannot_end_with_order_3_at_sigma_0(randn64) -> None:
    with pytest.raises(RuntimeError, match="singular"):
        theirs(made(UNIPC, 3, lower_order_final=False), 10, randn64(2, 3, 4, 4))
    mine = follow(UniPC(3), path([3.0, 2.0, 1.0, 0.5, 0.0]), randn64(2, 3, 4, 4), network)
    assert mine[-1].isfinite().all()


def put(monkeypatch, third):
    """Another integral of v² in place of M_2."""

    def wrong(z, count):
        return [third(z) if k == 2 else m for k, m in enumerate(moments(z, count))]

    monkeypatch.setattr("gendiff.sampling.exponential.moments", wrong)


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")
def test_order_3_of_their_multistep_has_half_of_its_second_difference(randn64, monkeypatch) -> None:
    """tests/sampling shows that it has order 2 then; ours agrees with theirs once its integral is halved."""
    for name, of, final in (("dpmsolver++", DPMpp, "zero"), ("dpmsolver", DPM, "sigma_min")):
        scheduler = made(MULTI, 3, algorithm_type=name, final_sigmas_type=final)
        assert gap(of(3), scheduler, 16, randn64) > 1e-3
        with monkeypatch.context() as patch:
            put(patch, lambda z: moments(z, 3)[2] / 2)
            scheduler = made(MULTI, 3, algorithm_type=name, final_sigmas_type=final)
            assert gap(of(3), scheduler, 16, randn64) < SINGLE_PRECISION


def test_order_3_of_their_sde_has_a_wrong_sign(randn64, monkeypatch) -> None:
    """Their second difference counts -1 where it should vanish with the step."""
    scheduler = made(MULTI, 3, algorithm_type="sde-dpmsolver++")
    with monkeypatch.context() as patch:
        put(patch, lambda z: 0.5 - (1 - math.exp(z) + z) / z**2)
        assert gap(DPMpp(3, sde=True), scheduler, 16, randn64, patch, noisy=True) < SINGLE_PRECISION
    assert 0.5 - (1 - math.exp(-1e-3) - 1e-3) / 1e-6 == pytest.approx(1, abs=1e-3)
    assert abs(moments(-1e-3, 3)[2]) < 1e-3


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")
def test_order_3_of_their_noise_sde_does_not_exist(randn64) -> None:
    scheduler = made(MULTI, 3, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")
    with pytest.raises(UnboundLocalError):
        theirs(scheduler, 10, randn64(2, 3, 4, 4))


def test_their_singlestep_sde_draws_the_noise_of_a_block_anew(randn64, monkeypatch) -> None:
    """The second step of a block of theirs forgets what noise the first was given.

    Ours agrees with it in the first step, and given the noise of the whole block that theirs would have.
    """
    x, first, fresh = (randn64(2, 3, 4, 4) for _ in range(3))
    scheduler = made(SINGLE, 2, algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min")
    sigmas, expected = theirs(scheduler, 3, x, [first, fresh, fresh], monkeypatch)
    solver = SinglestepDPMpp(2, blocks=True, sde=True)
    (_,), (second,), _ = solver.plan(path(sigmas))
    of_first, of_second = second.x["w"], second.x["noise"]
    rest = (math.hypot(of_first, of_second) * fresh - of_first * first) / of_second
    noises = [first, rest, fresh]
    mine = torch.stack(follow(solver, path(sigmas), x, network, lambda _: noises.pop(0)))
    assert torch.allclose(mine, expected, rtol=1e-10, atol=1e-10)
    assert min(of_first, of_second) > 0


def test_dpm_solver_sde_of_k_diffusion(randn64) -> None:
    """`sample_dpmpp_sde` of k-diffusion at r = 1/2 and s_noise = 1, written out at alpha = 1."""
    sigmas = [8.0, 3.0, 1.0, 0.3]
    noises = [randn64(2, 3, 4, 4) for _ in range(6)]
    start = x = 8 * randn64(2, 3, 4, 4)
    expected = []
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        middle = math.sqrt(sigma * after)
        z = noises[2 * i]
        # two increments of one motion in the clock of the SDE, in which the variance is 1/sigma^2
        share = (middle**-2 - sigma**-2) / (after**-2 - sigma**-2)
        whole = math.sqrt(share) * z + math.sqrt(1 - share) * noises[2 * i + 1]

        def ancestral(x, denoised, to, noise, sigma=sigma):
            up = min(to, math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
            down = math.sqrt(to**2 - up**2)
            return down / sigma * x + (1 - down / sigma) * denoised + up * noise

        denoised = x - sigma * out(x, sigma)
        inner = ancestral(x, denoised, middle, z)
        x = ancestral(x, inner - middle * out(inner, middle), after, whole)
        expected.append(x)

    def level(sigma):
        return Point(sigma, 1.0, sigma)

    levels = Path(tuple(map(level, sigmas)), lambda log_ratio: level(math.exp(-log_ratio)))
    mine = follow(SinglestepDPMpp(2, sde=True), levels, start, network, lambda _: noises.pop(0))
    assert torch.allclose(torch.stack(mine), torch.stack(expected), rtol=1e-10)


def test_flow_coordinates_are_the_same_method(randn64) -> None:
    """On alpha = 1 - t, sigma = t, where diffusers has `use_flow_sigmas`."""
    scheduler = MULTI(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, flow_shift=3.0)
    scheduler.set_timesteps(10)
    start = x = randn64(2, 3, 4, 4)
    expected = []
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.sin(x) + timestep.double() / 1000, timestep, x).prev_sample
        expected.append(x.double())
    points = Path.of(grids.from_timesteps(Rectified(), scheduler.timesteps)).points
    levels = [
        Point(float(t), 1 - s, s)
        for t, s in zip([*scheduler.timesteps, 0], scheduler.sigmas.tolist(), strict=True)
    ]
    assert points[0].sigma == pytest.approx(levels[0].sigma, abs=1e-3)

    def flow(x, at):
        velocity = torch.sin(x) + at.t / 1000
        return x - at.sigma * velocity, x + at.alpha * velocity

    mine = follow(DPMpp(2), Path(tuple(levels), lambda log_ratio: levels[0]), start, flow)
    assert torch.allclose(torch.stack(mine), torch.stack(expected), rtol=1e-5, atol=1e-5)
