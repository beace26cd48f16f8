"""GendiffScheduler as an object: made, saved, copied, begun in the middle, used twice; what pipelines ask."""

import copy
import inspect

import diffusers
import pytest
import torch

from gendiff.interop.diffusers.scheduler import GendiffScheduler, Progress
from gendiff.interop.diffusers.tables import ROWS
from gendiff.sampling import DDIM, DDPM, DPM2, TCD, Euler, Heun, LinearSolver, Stage
from gendiff.sampling.churn import Churned
from gendiff.sampling.dpm import DPMpp
from gendiff.sampling.onestep import to

# theirs compute on numpy and torch at once
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
MULTISTEP = "DPMSolverMultistepScheduler"


def network(x, t):
    return torch.sin(1.3 * x + float(t) / 300)


def loop(scheduler, x, timesteps=None, **call):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **call).prev_sample
    return x


def made(name=MULTISTEP, **settings):
    return GendiffScheduler.from_config({"_class_name": name, **settings})


def test_it_is_a_scheduler_of_diffusers() -> None:
    scheduler = made()
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert diffusers.EulerDiscreteScheduler in scheduler.compatibles
    step, begin = (inspect.signature(f).parameters for f in (scheduler.step, scheduler.set_timesteps))
    assert {"eta", "generator", "variance_noise", "return_dict"} <= set(step)
    assert {"timesteps", "sigmas", "mu", "device"} <= set(begin)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000


def test_the_class_of_the_config_decides_and_a_solver_chooses_another() -> None:
    config = diffusers.EulerDiscreteScheduler(beta_start=0.00085).config  # which does not name its class
    assert GendiffScheduler.from_config(config).solver == Euler()
    assert GendiffScheduler.from_config(diffusers.KDPM2DiscreteScheduler()).solver == DPM2()
    assert GendiffScheduler.from_config(config, solver="dpmpp-3").solver == DPMpp(3)
    assert GendiffScheduler.from_config(config, solver=Heun()).order == 2
    with pytest.raises(ValueError, match=r"KDPM2DiscreteScheduler and KDPM2Anc.*give the scheduler itself"):
        GendiffScheduler.from_config(diffusers.KDPM2DiscreteScheduler().config)
    with pytest.raises(ValueError, match=r"unknown solver 'dpmp-2'; did you mean 'dpmpp-2'"):
        GendiffScheduler.from_config(config, solver="dpmp-2")
    with pytest.raises(ValueError, match=r"unknown setting of a scheduler 'use_karas_sigmas'; did you mean"):
        GendiffScheduler.from_config(config, use_karas_sigmas=True)
    with pytest.raises(ValueError, match=r"unknown scheduler 'ScoreSdeVeScheduler'"):
        made("ScoreSdeVeScheduler").set_timesteps(3)


def test_a_setting_that_the_class_lacks_is_kept_and_used() -> None:
    scheduler = made("DDIMScheduler", clip_sample=False)
    plain = GendiffScheduler.from_config(scheduler, use_karras_sigmas=True)
    again = GendiffScheduler.from_config(plain.config)
    for one in (scheduler, plain, again):
        one.set_timesteps(5)
    ratios = plain.sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(ratios.diff(), ratios.diff().mean().expand(4), rtol=1e-4, atol=0)
    assert again.timesteps.tolist() == plain.timesteps.tolist() != scheduler.timesteps.tolist()


def test_saved_and_loaded_with_all_that_the_config_held(tmp_path) -> None:
    theirs = diffusers.PNDMScheduler.from_config(
        {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "steps_offset": 1, "clip_sample": False}
    )
    config = {**theirs.config, "note": "of ours"}
    scheduler = GendiffScheduler.from_config(config, solver=DPMpp(3, "heun"))
    scheduler.save_pretrained(tmp_path)
    again = GendiffScheduler.from_pretrained(tmp_path)
    assert again.solver == DPMpp(3, "heun")
    assert again.settings.name == "PNDMScheduler"
    for key, value in config.items():
        if not key.startswith("_"):
            assert again.config[key] == scheduler.config[key] == value
    assert diffusers.PNDMScheduler.from_config(again.config).config.steps_offset == 1
    assert GendiffScheduler.from_pretrained(tmp_path, solver="heun").solver == Heun()


def test_one_of_theirs_is_loaded_from_its_folder(tmp_path) -> None:
    diffusers.KDPM2DiscreteScheduler(beta_start=0.001).save_pretrained(tmp_path)
    scheduler = GendiffScheduler.from_pretrained(tmp_path, solver="euler")
    assert (scheduler.settings.name, scheduler.config.beta_start) == ("KDPM2DiscreteScheduler", 0.001)


class Mine(LinearSolver):
    order = start_order = evaluations = 1

    def plan(self, path):
        pairs = zip(path.points, path.points[1:], strict=False)
        return tuple((Stage(t, to(s)),) for t, s in pairs)


def test_a_solver_of_the_users_runs_and_a_file_refuses_it(tmp_path, randn64) -> None:
    x, results = randn64(2, 4, 8, 8), []
    for solver in (Mine(), "euler"):
        scheduler = GendiffScheduler.from_config(made("DDIMScheduler", clip_sample=False), solver=solver)
        scheduler.set_timesteps(5)
        results.append(loop(scheduler, x))
    assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"is no solver of gendiff.*pass solver= to from_pretrained"):
        GendiffScheduler.from_config(made(), solver=Mine()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unknown method 'os.system'"):
        made(_solver={"method": "os.system"}).set_timesteps(2)


@pytest.mark.parametrize("name", ROWS)
def test_two_batches_and_no_trace_of_the_first(name, randn64) -> None:
    """Also where the first run was left in the middle, and where its length was another."""
    scheduler, x = made(name), randn64(2, 4, 8, 8)
    scheduler.set_timesteps(6)
    expected = loop(scheduler, x, generator=torch.Generator().manual_seed(0))
    for steps, visited in ((6, 9), (4, 3), (6, None)):
        scheduler.set_timesteps(steps)
        loop(scheduler, randn64(2, 4, 8, 8), scheduler.timesteps[:visited])
    scheduler.set_timesteps(6)
    assert (scheduler.step_index, scheduler.begin_index, scheduler.state) == (None, None, scheduler.state)
    assert torch.equal(loop(scheduler, x, generator=torch.Generator().manual_seed(0)), expected)
    assert torch.equal(
        loop(scheduler, x, generator=torch.Generator().manual_seed(0)), expected
    )  # no set_timesteps


def test_state_is_a_value(randn64) -> None:
    """Kept and put back it repeats a step; a copy of the scheduler goes on by itself."""
    scheduler, x = made("UniPCMultistepScheduler", solver_order=3), randn64(2, 4, 8, 8)
    scheduler.set_timesteps(8)
    x = loop(scheduler, x, scheduler.timesteps[:4])
    kept, twin = scheduler.state, copy.deepcopy(scheduler)
    assert isinstance(kept, Progress)
    assert kept.index == 4
    first = loop(scheduler, x, scheduler.timesteps[4:])
    scheduler.state = kept
    assert torch.equal(loop(scheduler, x, scheduler.timesteps[4:]), first)
    assert torch.equal(loop(twin, x, twin.timesteps[4:]), first)
    assert twin.state.registers.keys() == scheduler.state.registers.keys()


@pytest.mark.parametrize("name", [MULTISTEP, "HeunDiscreteScheduler", "DDIMScheduler", "LCMScheduler"])
def test_image_to_image_begins_where_it_is_told(name, randn64) -> None:
    """As pipelines do: by set_begin_index, by the timestep alone, or with timesteps that were copied."""
    scheduler, x = made(name), randn64(2, 4, 8, 8)
    results = []
    for how in ("told", "seen", "copied"):
        scheduler.set_timesteps(10)
        start = 4 * scheduler.order
        timesteps = scheduler.timesteps[start:]
        if how == "told":
            scheduler.set_begin_index(start)
        noisy = scheduler.add_noise(x, randn64(1, 1, 1, 1).expand_as(x) * 0 + 1, timesteps[:1].repeat(2))
        timesteps = timesteps.clone() if how == "copied" else timesteps
        results.append(loop(scheduler, noisy, timesteps, generator=torch.Generator().manual_seed(0)))
        assert scheduler.step_index == len(scheduler.timesteps)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    rest = made(name)
    rest.set_timesteps(timesteps=scheduler.timesteps[start :: scheduler.order].tolist())
    torch.testing.assert_close(
        loop(rest, noisy, generator=torch.Generator().manual_seed(0)), results[0], rtol=1e-5, atol=1e-5
    ) if name != "LCMScheduler" else None


def test_equal_timesteps_are_told_apart(randn64) -> None:
    """Karras at 300 steps visits integers twice; theirs takes the second for the first, and runs out."""
    scheduler, x = made(use_karras_sigmas=True), randn64(2, 4, 8, 8)
    scheduler.set_timesteps(300)
    stamps = scheduler.timesteps.tolist()
    first = next(i for i in range(299) if stamps[i] == stamps[i + 1])
    loop(scheduler, x)
    assert scheduler.step_index == 300
    results = []
    for timesteps in (scheduler.timesteps[first:], stamps[first:]):
        scheduler.set_timesteps(300)
        results.append(loop(scheduler, x, timesteps))
        assert scheduler.step_index == 300
    assert torch.equal(*results)
    results = []
    for told in (True, False):  # the second of the two is also told by its place in memory
        scheduler.set_timesteps(300)
        if told:
            scheduler.set_begin_index(first + 1)
        results.append(loop(scheduler, x, scheduler.timesteps[first + 1 :]))
    assert torch.equal(*results)
    theirs = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    theirs.set_timesteps(300)
    for t in theirs.timesteps[first:-1]:
        theirs.step(x, t, x)
    with pytest.raises(IndexError):
        theirs.step(x, theirs.timesteps[-1], x)


def test_a_run_that_begins_in_the_middle_of_a_step(randn64) -> None:
    scheduler, x = made("HeunDiscreteScheduler"), randn64(2, 4, 8, 8)
    scheduler.set_timesteps(5)
    whole = loop(scheduler, x, scheduler.timesteps[4:])
    scheduler.set_timesteps(5)
    assert torch.equal(loop(scheduler, x, scheduler.timesteps[3:]), whole)  # the same level, and nothing done
    other = made("KDPM2DiscreteScheduler")
    other.set_timesteps(5)
    with pytest.raises(ValueError, match=r"evaluation 3 is the middle of a step .* scheduler.order = 2"):
        loop(other, x, other.timesteps[3:])


def test_what_is_refused_says_what_to_do(randn64) -> None:
    scheduler, x = made(), randn64(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"call set_timesteps before step"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match=r"needs a number of steps, timesteps or sigmas"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match=r"at least one step, got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="1 to 1000 steps, got 1001"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="fall strictly, got"):
        scheduler.set_timesteps(timesteps=[100, 500])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"123 is none of the 4 timesteps of this run"):
        scheduler.step(x, 123, x)
    with pytest.raises(ValueError, match=r"eta=0.5 says how much noise DDIM and TCD add"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    scheduler.step(x, scheduler.timesteps[0], x, eta=0.0)  # which pipelines pass to all
    with pytest.raises(TypeError, match="s_churn"):
        scheduler.step(x, scheduler.timesteps[1], x, s_churn=1.0)
    shifted = made("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="pass mu, the logarithm of the shift"):
        shifted.set_timesteps(4)
    snr = made("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"epsilon prediction does not determine .* timestep 999"):
        snr.set_timesteps(4)


def test_eta_and_noise_of_a_step(randn64) -> None:
    scheduler, x, noise = made("DDIMScheduler", clip_sample=False), randn64(2, 4, 8, 8), randn64(2, 4, 8, 8)
    scheduler.set_timesteps(4)
    t, out = scheduler.timesteps[1], randn64(2, 4, 8, 8)
    plain, given, named = (
        scheduler.step(out, t, x, **call).prev_sample
        for call in ({}, {"eta": 0.7, "variance_noise": noise}, {"eta": 0.7, "noise": noise})
    )
    assert torch.equal(given, named)
    assert not torch.equal(plain, given)
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    theirs.set_timesteps(4)
    other = theirs.step(out, t, x, eta=0.7, variance_noise=noise).prev_sample
    torch.testing.assert_close(given, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one of generator, noise and variance_noise"):
        scheduler.step(out, t, x, eta=0.7, noise=noise, generator=torch.Generator())
    consistent = GendiffScheduler.from_config(made("TCDScheduler"), solver=TCD(gamma=0.0))
    consistent.set_timesteps(4)
    quiet = consistent.step(out, consistent.timesteps[0], x).prev_sample
    assert torch.equal(quiet, consistent.step(out, consistent.timesteps[0], x).prev_sample)


def test_a_solver_that_stirs_needs_the_scaled_input(randn64) -> None:
    """Churn is added where the network sees it; with its own generator it is repeated."""
    stirring = next(kind for kind in [*Churned.__subclasses__(), Churned] if not inspect.isabstract(kind))
    scheduler = GendiffScheduler.from_config(made("EulerDiscreteScheduler"), solver=stirring(churn=2.0))
    scheduler.generator = torch.Generator()
    results = []
    for seed in (0, 0, 1):
        scheduler.generator.manual_seed(seed)
        scheduler.set_timesteps(5)
        results.append(loop(scheduler, torch.ones(2, 4, 8, 8, dtype=torch.float64)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    scheduler.set_timesteps(5)
    x = torch.ones(2, 4, 8, 8)
    with pytest.raises(ValueError, match="call scale_model_input first"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DDIMScheduler", MULTISTEP, "UniPCMultistepScheduler"]
)
def test_half_precision_is_computed_in_single(name) -> None:
    """The sample comes back in the dtype that theirs returns; what is remembered stays in float32."""
    scheduler, theirs = made(name), getattr(diffusers, name)()
    x, out = torch.randn(2, 4, 8, 8).half(), torch.randn(2, 4, 8, 8).half()
    for one in (scheduler, theirs):
        one.set_timesteps(5)
    for sample in (x, x.float()):
        results = []
        for one in (scheduler, theirs):
            t = one.timesteps[0]
            one.scale_model_input(sample, t)
            results.append(one.step(out, t, sample).prev_sample)
            one.set_timesteps(5)
        assert results[0].dtype == results[1].dtype
    scheduler.step(out, scheduler.timesteps[0], x)
    assert {kept.dtype for kept in scheduler.state.registers.values()} <= {torch.float32}


def test_no_tensor_of_a_step_is_read(randn64) -> None:
    """Meta tensors have no values: a step that read one, which on a device is to wait for it, would fail."""
    for name in (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        MULTISTEP,
        "LCMScheduler",
    ):
        scheduler = made(name)
        scheduler.set_timesteps(6, device="meta")
        x = torch.empty(2, 4, 8, 8, device="meta")
        for t in scheduler.timesteps:
            assert t.device.type == "meta"
            given = scheduler.scale_model_input(x, t)
            noise = {"noise": torch.empty_like(x)} if name == "LCMScheduler" else {}
            x = scheduler.step(given, t, x, **noise, return_dict=False)[0]
        assert scheduler.step_index == len(scheduler.timesteps)


def test_noising_and_velocity(randn64) -> None:
    """Any timestep of a table for the classes that train; those of the run for the others."""
    x, noise, t = randn64(3, 4, 8, 8), randn64(3, 4, 8, 8), torch.tensor([0, 400, 999])
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        scheduler, theirs = made(name), getattr(diffusers, name)()
        torch.testing.assert_close(
            scheduler.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(
        made("DDPMScheduler").get_velocity(x, noise, t),
        diffusers.DDPMScheduler().get_velocity(x, noise, t),
        rtol=1e-4,
        atol=1e-4,
    )
    for name in ("EulerDiscreteScheduler", MULTISTEP, "HeunDiscreteScheduler"):
        scheduler, theirs = made(name), getattr(diffusers, name)()
        for one in (scheduler, theirs):
            one.set_timesteps(10)
        at = scheduler.timesteps[[0, 2, 4]]
        torch.testing.assert_close(
            scheduler.add_noise(x, noise, at), theirs.add_noise(x, noise, at), rtol=1e-4, atol=1e-3
        )
    flow, theirs = made("FlowMatchEulerDiscreteScheduler"), diffusers.FlowMatchEulerDiscreteScheduler()
    for one in (flow, theirs):
        one.set_timesteps(10)
    at = flow.timesteps[[1, 5, 9]]
    torch.testing.assert_close(
        flow.scale_noise(x, at, noise), theirs.scale_noise(x, at, noise), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", [name for name in ROWS if name != "DPMSolverSDEScheduler"])
def test_what_pipelines_read(name) -> None:
    """Their attributes: timesteps with their dtype, init_noise_sigma, sigmas, order, tables."""
    theirs = getattr(diffusers, name)()
    scheduler = GendiffScheduler.from_config(theirs)
    assert scheduler.order == theirs.order
    for attribute in ("alphas_cumprod", "betas", "alphas", "final_alpha_cumprod"):
        if hasattr(theirs, attribute):
            torch.testing.assert_close(
                getattr(scheduler, attribute), getattr(theirs, attribute), rtol=1e-5, atol=1e-6
            )
    assert float(scheduler.init_noise_sigma) == pytest.approx(
        float(getattr(theirs, "init_noise_sigma", 1.0)), rel=1e-4
    )
    for one in (scheduler, theirs):
        one.set_timesteps(10)
    assert scheduler.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), rel=1e-3, abs=1e-3)
    assert scheduler.timesteps.dtype == theirs.timesteps.dtype
    assert float(scheduler.init_noise_sigma) == pytest.approx(
        float(getattr(theirs, "init_noise_sigma", 1.0)), rel=1e-4
    )
    if hasattr(theirs, "sigmas") and not name.startswith(("KDPM2", "DEIS")):
        torch.testing.assert_close(scheduler.sigmas, theirs.sigmas.float(), rtol=1e-3, atol=1e-4)


def test_timesteps_and_sigmas_given() -> None:
    """The lists of Sabour et al. 2024, Align your steps, as pipelines pass them."""
    from diffusers.schedulers import AysSchedules

    for name, keyword, values in (
        ("EulerDiscreteScheduler", "sigmas", AysSchedules["StableDiffusionXLSigmas"]),
        ("EulerDiscreteScheduler", "timesteps", AysSchedules["StableDiffusionXLTimesteps"]),
        (MULTISTEP, "timesteps", AysSchedules["StableDiffusionTimesteps"]),
        ("FlowMatchEulerDiscreteScheduler", "sigmas", [1.0, 0.6, 0.2]),
    ):
        theirs = getattr(diffusers, name)()
        scheduler = GendiffScheduler.from_config(theirs)
        for one in (scheduler, theirs):
            one.set_timesteps(**{keyword: values})
        torch.testing.assert_close(scheduler.timesteps, theirs.timesteps, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(scheduler.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-4)


def test_a_pipeline_may_change_the_config(randn64) -> None:
    """Stable Diffusion replaces the config of an outdated scheduler after it was made."""
    scheduler = made("PNDMScheduler", skip_prk_steps=True)
    scheduler._internal_dict = type(scheduler.config)({**scheduler.config, "steps_offset": 1})
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 501, 251, 1]


def test_dtypes_and_values_of_answers(randn64) -> None:
    """`pred_original_sample` is x0; of a latent consistency model, what its function says, as `denoised`."""
    scheduler, theirs = made("LCMScheduler"), diffusers.LCMScheduler()
    x, out = randn64(2, 4, 8, 8), randn64(2, 4, 8, 8)
    for one in (scheduler, theirs):
        one.set_timesteps(4)
    t = theirs.timesteps[1]
    _, denoised = scheduler.step(out, t, x, return_dict=False)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    theirs.set_begin_index(1)
    torch.testing.assert_close(denoised, theirs.step(out, t, x).denoised, rtol=1e-4, atol=1e-4)
    for solver in (DDIM(), DDPM()):
        euler = GendiffScheduler.from_config(made("DDIMScheduler"), solver=solver)
        euler.set_timesteps(4)
        answer = euler.step(out, 500, x, generator=torch.Generator()).pred_original_sample
        assert answer.abs().max() <= 1  # clipped
