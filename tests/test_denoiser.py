"""The denoiser against exact laws, a diffusers UNet called by hand, and everything it must refuse."""

import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from gendiff.denoiser import Backbone, Denoised, Denoiser, OracleDenoiser
from gendiff.math import (
    CosineBeta,
    GaussianOracle,
    Level,
    LinearBeta,
    Prediction,
    Rectified,
    VarianceExploding,
    ZeroTerminalSNR,
)

LAW = GaussianOracle(torch.tensor([0.5, -0.25]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
SCHEDULES = [LinearBeta(), CosineBeta(), Rectified(), VarianceExploding()]
NAMES = ["x0", "epsilon", "v", "flow", "edm"]


def time_of(schedule, timestep):
    """The inverse of `schedule.timestep`, written down from its definition."""
    if schedule.size is not None:
        return (timestep + 1) / schedule.size
    if isinstance(schedule, Rectified):
        return timestep / 1000
    return schedule.time(-2 * (4 * timestep))  # log(sigma)/4


class Exact:
    """The network that a prediction on a schedule has to become, which knows x and the timestep alone."""

    accepts: frozenset[str] = frozenset()

    def __init__(self, schedule, name) -> None:
        self.schedule, self.name = schedule, name

    def __call__(self, x, timestep, cond):
        alpha, sigma = self.schedule.level(time_of(self.schedule, timestep.double()))
        a, s, data = alpha[:, None], sigma[:, None], 0.5
        if (
            self.name == "edm"
        ):  # Karras et al. 2022, table 1, for alpha other than 1 with x/alpha and sigma/alpha
            x = x * torch.hypot(a * data, s)
        x0, eps = LAW.x0(x, alpha, sigma), LAW.eps(x, alpha, sigma)
        if self.name == "edm":
            ratio = s / a
            skip = data**2 / (ratio**2 + data**2)
            return (x0 - skip * x / a) / (ratio * data / torch.hypot(ratio, torch.full_like(ratio, data)))
        return {"x0": x0, "epsilon": eps, "v": a * eps - s * x0, "flow": eps - x0}[self.name]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        pytest.param(schedule, name, id=f"{type(schedule).__name__}-{name}")
        for schedule in SCHEDULES
        for name in NAMES
        if (schedule, name) != (Rectified(), "epsilon")  # refused when it is built
    ],
)
def test_the_pair_is_the_posterior_mean_whatever_is_predicted(schedule, name, randn64) -> None:
    """Timesteps reach a network in float32: 1e-7 of the time, up to 20 times that of log_snr and x0."""
    t = torch.tensor([0.1, 0.3, 0.6, 0.95], dtype=torch.float64)
    alpha, sigma = schedule.level(t)
    x = alpha[:, None] * randn64(4, 2) + sigma[:, None] * randn64(4, 2)
    denoised = Denoiser(Exact(schedule, name), schedule, name)(x, t)
    torch.testing.assert_close(denoised.x0, LAW.x0(x, alpha, sigma), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(denoised.eps, LAW.eps(x, alpha, sigma), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(alpha[:, None] * denoised.x0 + sigma[:, None] * denoised.eps, x)


@pytest.mark.parametrize("name", ["x0", "v", "edm"])
def test_another_schedule_with_the_same_snr_changes_nothing(name, randn64) -> None:
    """x/alpha and the SNR say all there is to know, so x0-optimal networks of two schedules agree on it."""
    one, t = CosineBeta(), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    first = Denoiser(Exact(one, name), one, name)
    x = randn64(3, 2)
    expected = first(x, t)
    for other in (LinearBeta(), Rectified(), VarianceExploding()):
        there = other.time(one.log_snr(t))
        y = x * (other.alpha(there) / one.alpha(t))[:, None]
        moved = Denoiser(Exact(other, name), other, name)(y, there)
        torch.testing.assert_close(moved.x0, expected.x0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved.eps, expected.eps, rtol=1e-4, atol=1e-4)


def test_the_sign_of_a_family() -> None:
    positive = Denoiser(lambda x, timestep, cond: 0.3 * x, Rectified(), "flow")
    negative = Denoiser(lambda x, timestep, cond: -0.3 * x, Rectified(), Prediction("flow", sign=-1))
    x = torch.ones(2, 3)
    torch.testing.assert_close(negative(x, 0.4).x0, positive(x, 0.4).x0)


def test_edm_scales_its_input_to_unit_variance() -> None:
    seen = []
    denoiser = Denoiser(lambda x, timestep, cond: seen.append(x) or x, VarianceExploding(), "edm")
    sigma = denoiser.schedule.sigma(0.5).item()
    denoiser(torch.full((2, 1), math.hypot(0.5, sigma)), 0.5)
    torch.testing.assert_close(seen[0], torch.ones(2, 1))


class Recorder(nn.Module):
    """Returns what it is given, and remembers it; the weight gives it a dtype."""

    accepts = frozenset({"label", "text"})

    def __init__(self, channels=1, dtype=torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, dtype=dtype))
        self.channels, self.seen = channels, []

    def forward(self, x, timestep, cond):
        self.seen.append((x, timestep, cond))
        return (self.weight * x).repeat(1, self.channels, *[1] * (x.ndim - 2))


def test_scalar_and_batched_times_are_one() -> None:
    network = Recorder()
    denoiser, x = Denoiser(network, LinearBeta(), "epsilon"), torch.ones(3, 2)
    given = [0.25, torch.tensor(0.25), torch.full((3,), 0.25), torch.full((3,), 0.25, dtype=torch.float64)]
    answers = [denoiser(x, t).x0 for t in given]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    for _, timestep, _ in network.seen:
        assert timestep.dtype == torch.float32
        assert timestep.tolist() == [249.0] * 3
    denoiser(x, torch.tensor([0.001, 0.5, 1.0]))
    assert network.seen[-1][1].tolist() == [0.0, 499.0, 999.0]
    assert denoiser(x, 1).x0.shape == x.shape


@pytest.mark.parametrize("network", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_the_network_is_given_its_own_dtype_and_the_pair_is_wide(given, network) -> None:
    backbone = Recorder(channels=2, dtype=network)
    denoiser = Denoiser(backbone, LinearBeta(), "v", learned_variance=True)
    x = torch.linspace(-1, 1, 6, dtype=given).reshape(2, 3)
    denoised = denoiser(x, 0.3)
    assert backbone.seen[0][0].dtype == denoised.out.dtype == network
    wide = torch.promote_types(given, torch.float32)
    assert denoised.x0.dtype == denoised.eps.dtype == denoised.log_var.dtype == wide
    alpha, sigma = (value.item() for value in denoiser.schedule.level(0.3))
    torch.testing.assert_close(denoised.x0, alpha * x.to(wide) - sigma * denoised.out.to(wide))


def test_a_network_without_weights_is_given_x_as_it_is() -> None:
    seen = []
    denoiser = Denoiser(lambda x, timestep, cond: seen.append(x.dtype) or x, LinearBeta(), "v")
    denoiser(torch.ones(1, 1, dtype=torch.bfloat16), 0.5)
    assert seen == [torch.bfloat16]


def test_learned_variance_is_split_off() -> None:
    denoiser = Denoiser(Recorder(channels=2), LinearBeta(), "x0", learned_variance=True)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoised = denoiser(x, 0.5)
    torch.testing.assert_close(denoised.x0, 0.5 * x)
    torch.testing.assert_close(denoised.log_var, 0.5 * x)
    assert denoiser.replace(backbone=Recorder(), learned_variance=False)(x, 0.5).log_var is None


def test_outputs_of_another_shape_are_refused() -> None:
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"\(2, 6, 4, 4\) for x_t of \(2, 3, 4, 4\).*say learned_variance=True"
    ):
        Denoiser(Recorder(channels=2), LinearBeta(), "v")(x, 0.5)
    with pytest.raises(
        ValueError, match=r"returned \(2, 3, 4, 1\) for x_t of \(2, 3, 4, 4\); they must be equal\.$"
    ):
        Denoiser(lambda x, timestep, cond: x[..., :1], LinearBeta(), "v")(x, 0.5)
    with pytest.raises(ValueError, match=r"twice the channels of x_t"):
        Denoiser(Recorder(), LinearBeta(), "v", learned_variance=True)(x, 0.5)
    with pytest.raises(TypeError, match=r"returns a tensor, got tuple; return its `.sample` or first item"):
        Denoiser(lambda x, timestep, cond: (x,), LinearBeta(), "v")(x, 0.5)


def test_conditions_are_checked_against_what_the_network_accepts() -> None:
    network = Recorder()
    denoiser, x = Denoiser(network, LinearBeta(), "v"), torch.ones(2, 1)
    denoiser(x, 0.5, {"label": torch.tensor([1, 2])})
    assert network.seen[-1][2]["label"].tolist() == [1, 2]
    denoiser(x, 0.5)
    assert not network.seen[-1][2]
    with pytest.raises(
        TypeError, match=r"unknown condition 'lable'; did you mean 'label'\? Accepted: 'label', 'text'"
    ):
        denoiser(x, 0.5, {"lable": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"the condition has 3 rows for a batch of 2 samples"):
        denoiser(x, 0.5, {"label": torch.tensor([1, 2, 3])})
    with pytest.raises(TypeError, match=r"unknown condition 'label'. Accepted: none"):
        Denoiser(lambda x, timestep, cond: x, LinearBeta(), "v")(x, 0.5, {"label": torch.tensor([1, 2])})


@pytest.mark.parametrize(
    "schedule", [Rectified(), ZeroTerminalSNR(LinearBeta())], ids=["flow", "zero terminal"]
)
def test_impossible_pairs_are_refused_when_they_are_built(schedule) -> None:
    with pytest.raises(ValueError, match=r"epsilon prediction cannot be used with .* Use 'v' or 'flow'"):
        Denoiser(Recorder(), schedule, "epsilon")
    possible = Denoiser(Recorder(), schedule, "v")
    with pytest.raises(ValueError, match=r"epsilon prediction cannot be used with"):
        possible.replace(prediction="epsilon")
    assert possible(torch.ones(1, 1), 1.0).x0.isfinite().all()


def test_times_and_samples_that_are_refused() -> None:
    denoiser, x = Denoiser(Recorder(), LinearBeta(), "v"), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"t = 0 is exactly the data"):
        denoiser(x, 0.0)
    with pytest.raises(ValueError, match=r"t = 0 is exactly the data"):
        denoiser(x, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"times lie in \[0, 1\].*schedule.timestep"):
        denoiser(x, 500.0)
    with pytest.raises(ValueError, match=r"one value per sample, got \(3,\) for 2 samples"):
        denoiser(x, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"one value per sample, got \(2, 1\) for 2 samples"):
        denoiser(x, torch.full((2, 1), 0.5))
    with pytest.raises(ValueError, match=r"at least one sample"):
        denoiser(torch.ones(0, 1), 0.5)


def test_replace_shares_the_modules() -> None:
    network = Recorder()
    denoiser = Denoiser(network, LinearBeta(), "epsilon")
    other = denoiser.replace(schedule=CosineBeta(), prediction="v")
    assert other.backbone is denoiser.backbone is network
    assert (other.schedule, other.prediction) == (CosineBeta(), Prediction("v"))
    assert (denoiser.schedule, denoiser.prediction) == (LinearBeta(), Prediction("epsilon"))
    with pytest.raises(TypeError, match=r"unknown part of a denoiser 'shedule'; did you mean 'schedule'"):
        denoiser.replace(shedule=CosineBeta())


def test_names_of_weights_and_gradients() -> None:
    denoiser = Denoiser(Recorder(), LinearBeta(), "epsilon")
    assert list(denoiser.state_dict()) == ["backbone.weight"]
    assert isinstance(denoiser.backbone, Backbone)
    x = torch.ones(1, 1, requires_grad=True)
    denoiser(x, 0.5).x0.sum().backward()
    alpha, sigma = (value.item() for value in LinearBeta().level(0.5))
    assert denoiser.backbone.weight.grad.item() == pytest.approx(-sigma / alpha)
    assert x.grad.item() == pytest.approx((1 - sigma / 2) / alpha)


def test_a_changed_pair_loses_its_output() -> None:
    denoised = Denoiser(Recorder(), LinearBeta(), "epsilon")(torch.ones(1, 1), 0.5)
    changed = denoised.replace(x0=torch.zeros(1, 1))
    assert changed.out is None
    assert changed.eps is denoised.eps
    assert denoised.replace(carry=1).out is denoised.out
    assert denoised.replace(x0=changed.x0, out=denoised.out).out is denoised.out
    assert [field.name for field in fields(Denoised)] == [
        "x0",
        "eps",
        "out",
        "prediction",
        "log_var",
        "carry",
    ]


def test_a_unet_of_diffusers_behind_five_lines() -> None:
    """With the same timestep, label and dtype the backbone adds nothing to the model's own call."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=3,
        add_attention=False,
    ).eval()

    class Behind(nn.Module):
        accepts = frozenset({"label"})

        def __init__(self, unet) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x, timestep, cond):
            return self.unet(x, timestep, class_labels=cond["label"]).sample

    denoiser, label = Denoiser(Behind(unet), LinearBeta(), "epsilon"), torch.tensor([0, 2])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7])
    denoised = denoiser(x, t, {"label": label})
    eps = unet(x, torch.tensor([199, 699]), class_labels=label).sample
    assert torch.equal(denoised.out, eps)
    torch.testing.assert_close(denoised.eps, eps, rtol=0, atol=1e-6)
    alpha, sigma = LinearBeta().level(t).like(x, torch.float32)
    torch.testing.assert_close(denoised.x0, (x - sigma * eps) / alpha)
    assert {name.split(".")[0] for name in denoiser.state_dict()} == {"backbone"}


def test_an_oracle_takes_no_condition(randn64) -> None:
    denoise, x = OracleDenoiser(LAW, LinearBeta()), randn64(2, 2)
    with pytest.raises(TypeError, match=r"an oracle takes no condition, got \['label'\]"):
        denoise(x, 0.5, {"label": torch.ones(2)})
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    denoised, level = denoise(x, t), Level(*LinearBeta().level(t))
    alpha, sigma = level.like(x, torch.float64)
    torch.testing.assert_close(alpha * denoised.x0 + sigma * denoised.eps, x)
