"""Where schedulers of diffusers differ from ours, as in docs/schedulers.md: oracles say who is right."""

import math

import diffusers
import pytest
import torch

from benchmarks.parity import class_of, wide
from gendiff.interop.diffusers.scheduler import GendiffScheduler
from gendiff.math import GaussianOracle, LinearBeta, Prediction
from gendiff.math.schedules import Level

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)
# one point: eps is one and the same all the way, so that every method is exact for steps of any size
POINT = GaussianOracle.isotropic(torch.tensor([0.7], dtype=torch.float64), 0.0)
LAW = GaussianOracle.isotropic(torch.tensor([0.7], dtype=torch.float64), 0.5)
UNIT = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # two samples of standard deviation 1
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def both(name, steps=10, begin=None, **settings):
    """Theirs, in float64, and ours, ready to run."""
    kind = class_of(name)
    with wide(__import__(kind.__module__, fromlist=["x"])):
        theirs = kind(**settings)
        theirs.set_timesteps(**(begin or {"num_inference_steps": steps}))
    mine = GendiffScheduler.from_config({"_class_name": name, **settings})
    mine.set_timesteps(**(begin or {"num_inference_steps": steps}))
    return theirs, mine


def level_of(scheduler, i, timestep):
    """The level that the network is asked at: the timestep's for classes without sigmas, else the sigma's."""
    name = getattr(scheduler, "settings", None)
    name = name.name if name else type(scheduler).__name__
    if name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"):
        table = LinearBeta(scheduler.config["beta_start"], scheduler.config["beta_end"])
        return tuple(map(float, table.level((float(timestep) + 1) / 1000)))
    if hasattr(scheduler, "run"):
        return scheduler.run.moves()[i].at[1:]
    sigma = float(scheduler.sigmas[i])
    if "Euler" in name or "LMS" in name or "Heun" in name:
        return 1.0, sigma
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def run(scheduler, oracle, x, kind="epsilon", begin=0, **call):
    """The loop with an exact network: the samples after every evaluation."""
    kind, result = Prediction(kind), []
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    with wide(module):
        if hasattr(scheduler, "begin_index"):
            scheduler.set_begin_index(begin)
        for i, t in list(enumerate(scheduler.timesteps))[begin:]:
            alpha, sigma = torch.tensor(level_of(scheduler, i, t), dtype=torch.float64)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            native = torch.hypot(alpha, sigma)
            out = kind.output(
                oracle.x0(x, alpha, sigma), oracle.eps(x, alpha, sigma), Level(alpha / native, sigma / native)
            )
            x = scheduler.step(out, t, x, **call, return_dict=False)[0]
            result.append(x)
    return result


def begun(scheduler, mean=0.7, index=0):
    """Noised samples of a point at an evaluation."""
    alpha, sigma = level_of(scheduler, index, scheduler.timesteps[index])
    return alpha * mean + sigma * UNIT


def spread(x) -> float:
    return float(x.std(correction=0))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_1_one_step_of_linspace_starts_at_the_noise(name) -> None:
    """`linspace(0, 999, 1)` is timestep 0, where noise passes for data."""
    theirs, mine = both(name, 1)
    assert theirs.timesteps.tolist() == [0]
    assert mine.timesteps.tolist() == [999]
    x = UNIT * float(theirs.init_noise_sigma)
    torch.testing.assert_close(run(theirs, LAW, x)[-1], x, rtol=0.1, atol=1e-3)
    ends = run(mine, LAW, UNIT * mine.init_noise_sigma)[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "spacing", "steps", "settings"),
    [
        ("DDIMScheduler", "linspace", 10, {"clip_sample": False}),
        ("DDIMScheduler", "trailing", 7, {"clip_sample": False}),
        ("PNDMScheduler", "linspace", 10, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ],
)
def test_2_the_next_level_is_that_of_the_timestep_visited_next(name, spacing, steps, settings) -> None:
    theirs, mine = both(name, steps, timestep_spacing=spacing, **settings)
    assert theirs.timesteps.tolist() == mine.timesteps.tolist()
    wanted = [level_of(mine, i, t)[1] for i, t in enumerate(mine.timesteps)][1:]
    found = [[spread(x) for x in run(one, POINT, begun(mine))][:-1] for one in (theirs, mine)]
    assert found[1] == pytest.approx(wanted, rel=1e-9)
    assert max(a / b for a, b in zip(found[0], wanted, strict=True)) > 1.005


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ],
)
def test_3_a_last_step_of_no_length_throws_an_evaluation_away(name, settings) -> None:
    """They stay at their level and leave its noise in; ours uses the answer, and ends at the data."""
    theirs, mine = both(name, 10, **settings)
    *_, before, other = run(theirs, POINT, begun(mine))
    torch.testing.assert_close(other, before, rtol=1e-9, atol=1e-12)
    assert spread(other) == pytest.approx(0.01, rel=0.01)
    ends = run(mine, POINT, begun(mine))[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=1e-9)


def test_4_the_step_to_the_data_adds_no_noise() -> None:
    theirs, mine = both(
        "DDPMScheduler", 8, variance_type="fixed_large", timestep_spacing="trailing", clip_sample=False
    )
    x = torch.zeros(4000, 1, dtype=torch.float64)
    assert spread(run(theirs, POINT, x, generator=torch.Generator().manual_seed(0))[-1]) > 0.3
    ends = run(mine, POINT, x, generator=torch.Generator().manual_seed(0))[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_5_a_flow_is_shifted_once(name) -> None:
    """The constructor shifts the ends, set_timesteps all between them: the last sigma is shifted twice."""
    theirs, mine = both(name, 8, shift=3.0)

    def shifted(t):
        return 3 * t / (1 + 2 * t)

    times = torch.linspace(1, 1e-3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        mine.sigmas[:-1].unique().flip(0).double(), shifted(times), rtol=1e-6, atol=1e-7
    )
    assert float(theirs.sigmas[-2]) == pytest.approx(shifted(shifted(1e-3)), rel=1e-5)


def errors(schedulers, steps=None, **call) -> list[float]:
    """Distances to the exact flow of a Gaussian law, at the end or after some steps."""
    result = []
    for one in schedulers:
        last = last_level(one) if steps is None else level_of(one, steps, None)
        levels = [level_of(one, 0, one.timesteps[0]), last]
        ends = [torch.tensor(value, dtype=torch.float64) for level in levels for value in level]
        x = ends[0] * 0.7 + torch.hypot(0.5 * ends[0], ends[1]) * UNIT
        after = run(one, LAW, x, **call)[-1 if steps is None else steps - 1]
        result.append(float((after - LAW.flow(x, *ends)).abs().max()))
    return result


def last_level(scheduler):
    if hasattr(scheduler, "points"):
        return scheduler.points[-1][1:]
    if type(scheduler).__name__ == "PNDMScheduler":
        return 1.0, 0.0
    sigma = float(scheduler.sigmas[-1])
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def test_6_plms_of_v_is_no_method_of_first_order() -> None:
    """PNDM mixes v of different times and turns the mean into noise at one of them."""
    settings = {"skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}
    found = [errors(both("PNDMScheduler", n, **settings), kind="v") for n in (25, 50)]
    assert math.log2(found[0][0] / found[1][0]) == pytest.approx(1, abs=0.1)
    assert found[1][1] < found[1][0] / 50


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_7_pndm_with_few_steps(steps) -> None:
    """Theirs crashes unless there are four; with odd strides its halves are of another time."""
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        diffusers.PNDMScheduler().set_timesteps(steps)
    mine = GendiffScheduler.from_config({"_class_name": "PNDMScheduler", "set_alpha_to_one": True})
    mine.set_timesteps(steps)
    ends = run(mine, POINT, begun(mine))[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_8_multistep_of_order_three_is_of_order_three(algorithm) -> None:
    """Of its parabola the second difference counts half, so that it converges with order 2."""
    settings = {"algorithm_type": algorithm, "solver_order": 3, "final_sigmas_type": "sigma_min", **SD}
    found = [
        errors(both("DPMSolverMultistepScheduler", n, use_lu_lambdas=True, **settings), steps=n - 1)
        for n in (40, 80)
    ]
    assert math.log2(found[0][0] / found[1][0]) == pytest.approx(2, abs=0.15)
    assert found[1][1] < found[1][0] / 20


def test_9_variance_channels_of_four_channel_latents() -> None:
    theirs, mine = both("DPMSolverMultistepScheduler", 4, variance_type="learned_range")
    x, out = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    with pytest.raises(RuntimeError, match="must match"):
        theirs.step(out, theirs.timesteps[0], x)
    plain = GendiffScheduler.from_config(mine, variance_type=None)
    plain.set_timesteps(4)
    moved = [one.step(o, 999, x).prev_sample for one, o in ((mine, out), (plain, out[:, :4]))]
    assert torch.equal(*moved)


@pytest.mark.parametrize("settings", [{"solver_type": "bh1"}, {"predict_x0": False}])
def test_10_unipc_reaches_the_data(settings) -> None:
    """At sigma = 0 theirs multiplies infinity by zero."""
    theirs, mine = both("UniPCMultistepScheduler", 6, **settings)
    assert run(theirs, POINT, begun(mine))[-1].isnan().all()
    ends = run(mine, POINT, begun(mine))[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=1e-9)


def test_11_log_linear_timesteps_belong_to_their_sigmas() -> None:
    theirs, mine = both(
        "EulerDiscreteScheduler", 6, interpolation_type="log_linear", timestep_spacing="leading"
    )
    table = LinearBeta()
    for one, agrees in ((theirs, False), (mine, True)):
        times = (one.timesteps.double() + 1) / 1000
        levels = (-table.log_snr(times) / 2).exp()
        ratios = one.sigmas[:6].double() / levels
        assert (float((ratios - 1).abs().max()) < 1e-3) is agrees
    assert spread(run(theirs, POINT, begun(theirs))[-1]) == pytest.approx(0.01, rel=0.01)  # not at 0 yet
    assert spread(run(mine, POINT, begun(mine))[-1]) < 1e-9


def test_12_two_noises_of_a_step_are_parts_of_one() -> None:
    """Theirs draws independent ones for the middle and the end of a step, and ends with another variance."""
    settings = {
        "algorithm_type": "sde-dpmsolver++",
        "final_sigmas_type": "sigma_min",
        "lower_order_final": False,
    }
    theirs, mine = both("DPMSolverSinglestepScheduler", 80, use_karras_sigmas=True, **settings)
    alpha, sigma = level_of(mine, 0, 999)
    draws = torch.randn(50_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = alpha * 0.7 + math.hypot(0.5 * alpha, sigma) * draws
    alpha, sigma = last_level(mine)
    found = [
        float(run(one, LAW, x, generator=torch.Generator().manual_seed(4))[-1].var())
        / (0.25 * alpha**2 + sigma**2)
        for one in (theirs, mine)
    ]
    assert abs(found[1] - 1) < abs(found[0] - 1) / 3, found


def test_13_one_step_of_a_stretched_shift() -> None:
    """0/0 in theirs: the one sigma is 1, and no stretching makes it another."""
    theirs, mine = both("FlowMatchEulerDiscreteScheduler", 1, shift_terminal=0.1)
    assert theirs.sigmas[0].isnan()
    assert mine.sigmas.tolist() == [1.0, 0.0]


def test_14_tcd_ends_where_set_alpha_to_one_says() -> None:
    theirs, mine = both("TCDScheduler", 4, **{**SD, "beta_schedule": "linear"})
    assert spread(run(theirs, POINT, begun(mine), eta=0.0)[-1]) > 0.02
    assert spread(run(mine, POINT, begun(mine), eta=0.0)[-1]) < 1e-9


def test_15_levels_of_zero_terminal_snr_fall() -> None:
    """2⁻²⁴ in place of 0 is more signal than the entry before it has, on Ho's table."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs, mine = both("EulerDiscreteScheduler", 1000, prediction_type="v_prediction", **settings)
    assert float(theirs.sigmas[0]) < float(theirs.sigmas[1])
    assert bool((mine.sigmas.diff() < 0).all())


def test_16_no_timestep_is_visited_twice() -> None:
    settings = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    theirs, mine = both("DPMSolverMultistepScheduler", 999, **settings)
    assert len(set(theirs.timesteps.tolist())) < 999
    assert len(set(mine.timesteps.tolist())) == len(mine.timesteps)
    assert bool((mine.sigmas.diff() < 0).all())


def test_17_an_integer_but_for_rounding_is_that_integer() -> None:
    theirs, mine = both(
        "UniPCMultistepScheduler", 999, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    exact = (mine.sigmas[:-1].double() * 1000).round()
    near = (mine.sigmas[:-1].double() * 1000 - exact).abs() < 1e-4
    assert torch.equal(mine.timesteps[near].double(), exact[near])
    assert not torch.equal(theirs.timesteps[near].double(), exact[near])


def test_18_an_offset_does_not_leave_the_table() -> None:
    theirs, mine = both("DPMSolverMultistepScheduler", 999, steps_offset=1, timestep_spacing="leading")
    assert (theirs.timesteps[0], mine.timesteps[0]) == (1000, 999)
    assert theirs.sigmas[0] == theirs.sigmas[1]  # a step of no length, by which the next is divided
    assert bool((mine.sigmas.diff() < 0).all())


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_19_more_steps_than_the_distillation_had(name) -> None:
    with pytest.raises(ValueError, match="is smaller than `num_inference_steps`"):
        getattr(diffusers, name)().set_timesteps(60)
    mine = GendiffScheduler.from_config({"_class_name": name})
    mine.set_timesteps(60)
    assert len(set(mine.timesteps.tolist())) == 60


def test_20_a_clip_needs_eps_recomputed() -> None:
    """A network that says 3, clipped to 1: the pair still stands for the sample."""
    theirs, mine = both("DDIMScheduler", 10)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    alpha, sigma = level_of(mine, 4, mine.timesteps[4])
    out = (x - alpha * 3.0) / sigma
    after, before = level_of(mine, 5, mine.timesteps[5]), (alpha, sigma)
    t = mine.timesteps[4]
    moved = mine.step(out, t, x).prev_sample
    torch.testing.assert_close(moved, after[0] * 1 + after[1] * (x - before[0]) / before[1])
    told = theirs.step(out, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(moved, told, rtol=1e-9, atol=1e-9)
    untold = theirs.step(out, t, x).prev_sample
    assert (untold - moved).abs().max() > 0.5
    torch.testing.assert_close(
        mine.step(out, t, x, use_clipped_model_output=False).prev_sample, untold, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [("LMSDiscreteScheduler", {}), ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True})],
)
def test_21_a_method_with_a_memory_begins_without_one(name, settings) -> None:
    """Begun at the fifth step, LMS has weights for answers that are not there, and PNDM loses its place."""
    theirs, mine = both(name, 10, **settings)
    other = run(theirs, POINT, begun(mine, index=5), begin=5)[-1]
    assert (other - 0.7).abs().max() > 1e-3
    ends = run(mine, POINT, begun(mine, index=5), begin=5)[-1]
    torch.testing.assert_close(ends, torch.full_like(ends, 0.7), rtol=0, atol=1e-9)


def test_23_sigmas_given_to_edm_are_sigmas() -> None:
    """Theirs takes them for places on its ramp from 0 to 1."""
    given = torch.tensor([80.0, 5.0, 0.5], dtype=torch.float64)
    theirs, mine = both("EDMEulerScheduler", begin={"sigmas": given})
    assert not torch.allclose(theirs.sigmas[:3].double(), given)
    assert mine.sigmas.tolist() == pytest.approx([80.0, 5.0, 0.5, 0.0])


def test_24_the_velocity_of_a_timestep() -> None:
    """Theirs looks up the table of 1000 with the number of the step."""
    theirs, mine = both("EulerDiscreteScheduler", 10, timestep_spacing="leading")
    x0, eps = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    t = mine.timesteps[3:4]
    _, sigma = LinearBeta().level((float(t) + 1) / 1000)
    torch.testing.assert_close(mine.get_velocity(x0, eps, t), -float(sigma) * x0, rtol=1e-6, atol=0)
    assert (theirs.get_velocity(x0, eps, t) + float(sigma) * x0).abs().max() > 0.5


def test_25_noising_with_inverted_sigmas() -> None:
    """Their sigma is then that of the data: pure noise comes out as data."""
    theirs, mine = both("FlowMatchEulerDiscreteScheduler", 4, invert_sigmas=True)
    x0, eps = torch.ones(1, 3), torch.zeros(1, 3)
    first = mine.timesteps[:1]
    assert torch.equal(theirs.scale_noise(x0, first, eps), x0)
    assert torch.equal(mine.scale_noise(x0, first, eps), eps)
