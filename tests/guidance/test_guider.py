"""The guider is the rule applied to branches called by hand, in as few calls as can be."""

from functools import partial

import pytest
import torch

from gendiff.condition import Condition
from gendiff.denoiser import Denoised, Denoiser, OracleDenoiser
from gendiff.guidance import Guider, cfg
from gendiff.math import CosineBeta, GaussianOracle, LinearBeta, grids
from gendiff.sampling import Heun, sample

BETAS = LinearBeta()
CFG = partial(cfg, scale=3.0)


class Net:
    """x times the label, plus the mean of the text where there is one; it counts its calls and their rows."""

    accepts = frozenset({"label", "text"})

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x, timestep, cond):
        self.rows.append(len(x))
        label = cond["label"] if "label" in cond else torch.zeros(len(x), dtype=x.dtype)
        text = cond["text"].mean(1) if "text" in cond else torch.zeros(len(x), dtype=x.dtype)
        wide = [1] * (x.ndim - 1)
        return x * label.reshape(-1, *wide) + text.reshape(-1, *wide) + timestep.reshape(-1, *wide) / 1000


def denoiser(net=None, schedule=BETAS):
    return Denoiser(net or Net(), schedule, "v")


def label(*values):
    return {"label": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize(
    "t", [0.4, torch.tensor(0.4), torch.tensor([0.2, 0.5, 0.9])], ids=["number", "[]", "[B]"]
)
def test_together_separate_and_by_hand_are_one(t, randn64) -> None:
    """Also for conditions of one row, and for times of each sample."""
    x, branches = randn64(3, 2, 2), {"cond": label(1.0, 2.0, 3.0), "uncond": label(0.5)}
    nets = {batching: Net() for batching in ("together", "separate", "auto")}
    answers = {
        batching: Guider(denoiser(net), branches, CFG, batching=batching)(x, t)
        for batching, net in nets.items()
    }
    by_hand = denoiser()
    expected = cfg(by_hand(x, t, branches["cond"]), by_hand(x, t, label(0.5, 0.5, 0.5)), 3.0)
    for answer in answers.values():
        for name in ("x0", "eps", "out"):
            torch.testing.assert_close(getattr(answer, name), getattr(expected, name), rtol=1e-14, atol=1e-14)
        assert answer.prediction == expected.prediction
    assert (nets["together"].rows, nets["separate"].rows, nets["auto"].rows) == ([6], [3, 3], [6])


def test_the_names_decide_not_the_order(randn64) -> None:
    x = randn64(2, 2)
    one = Guider(denoiser(), {"cond": label(1.0), "uncond": label(0.5)}, CFG)(x, 0.5)
    other = Guider(denoiser(), {"uncond": label(0.5), "cond": label(1.0)}, CFG)(x, 0.5)
    assert torch.equal(one.x0, other.x0)


def test_conditions_that_do_not_join_are_called_apart(randn64) -> None:
    """`auto` groups what fits: here two of three branches, which are not neighbours."""
    net, x = Net(), randn64(2, 2)

    def combine(a, b, c):
        return a.replace(x0=a.x0 + 10 * b.x0 + 100 * c.x0)

    long, short = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    branches = {"a": {"text": long}, "b": {"text": 2 * short}, "c": {"text": 3 * long}}
    answer = Guider(denoiser(net), branches, combine)(x, 0.5)
    assert net.rows == [4, 2]
    single = [
        denoiser()(x, 0.5, {"text": value * torch.ones(2, 4, dtype=torch.float64)}).x0 for value in (1, 2, 3)
    ]
    torch.testing.assert_close(answer.x0, single[0] + 10 * single[1] + 100 * single[2])
    with pytest.raises(
        ValueError, match=r"branches 'a' .*\[1, 4\].* and 'b' .*\[1, 2\].* cannot be one batch"
    ):
        Guider(denoiser(), branches, combine, batching="together")


def test_a_branch_without_a_condition(randn64) -> None:
    net, x = Net(), randn64(2, 2)
    Guider(denoiser(net), {"cond": label(1.0), "uncond": None}, CFG)(x, 0.5)
    assert net.rows == [2, 2]
    net.rows.clear()
    Guider(denoiser(net), {"cond": None, "uncond": {}}, CFG)(x, 0.5)
    assert net.rows == [4]


def test_branches_with_denoisers_of_their_own(randn64) -> None:
    """A weaker network as the negative branch (Karras et al. 2024): each is called once, by itself."""
    strong, weak, x = Net(), Net(), randn64(3, 2)
    branches = {"cond": label(2.0), "uncond": (denoiser(weak), label(0.5))}
    answer = Guider(denoiser(strong), branches, CFG, batching="together")(x, 0.5)
    assert (strong.rows, weak.rows) == ([3], [3])
    expected = cfg(denoiser()(x, 0.5, label(2.0, 2.0, 2.0)), denoiser()(x, 0.5, label(0.5, 0.5, 0.5)), 3.0)
    torch.testing.assert_close(answer.x0, expected.x0)


def test_a_guider_is_a_denoiser_of_exact_laws(randn64) -> None:
    """Gaussians of one covariance: guidance moves the mean, so that samples are those of a third Gaussian."""
    cond, uncond, guided = (
        GaussianOracle.isotropic(torch.tensor([mean], dtype=torch.float64), 0.5) for mean in (1.0, 0.5, 2.0)
    )
    exact = OracleDenoiser(cond, BETAS)
    guider = Guider(exact, {"cond": None, "uncond": (OracleDenoiser(uncond, BETAS), None)}, CFG)
    x, grid = randn64(5, 1), grids.trailing(BETAS, 6)
    assert guider.schedule == BETAS
    mine = sample(guider, x, grid, Heun())
    torch.testing.assert_close(mine, sample(OracleDenoiser(guided, BETAS), x, grid, Heun()))


def test_guiders_nest(randn64) -> None:
    x = randn64(2, 2)
    inner = Guider(denoiser(), {"cond": label(2.0), "uncond": label(1.0)}, CFG)
    outer = Guider(denoiser(), {"cond": (inner, None), "uncond": label(0.5)}, CFG)(x, 0.5)
    a, b, c = (denoiser()(x, 0.5, label(value, value)) for value in (2.0, 1.0, 0.5))
    torch.testing.assert_close(outer.x0, cfg(cfg(a, b, 3.0), c, 3.0).x0)


def test_what_each_group_carries_comes_back_to_it() -> None:
    class Carries:
        schedule = BETAS

        def __init__(self, step) -> None:
            self.step, self.seen = step, []

        def __call__(self, x_t, t, cond=None, carry=None):
            self.seen.append(carry)
            return Denoised(x_t, x_t, carry=(carry or 0) + self.step)

    one, ten = Carries(1), Carries(10)
    guider = Guider(one, {"cond": None, "uncond": (ten, None)}, CFG)
    sample(guider, torch.ones(2, 1), grids.trailing(BETAS, 3), Heun())
    assert one.seen == [None, 1, 2, 3, 4]
    assert ten.seen == [None, 10, 20, 30, 40]
    answer = Guider(denoiser(), {"cond": label(1.0), "uncond": label(0.5)}, CFG)(torch.ones(2, 1), 0.5)
    assert answer.carry is None


def test_learned_variances_are_those_of_the_first_argument_of_the_rule() -> None:
    def net(x, timestep, cond):
        return torch.cat([x, cond["label"][:, None] * torch.ones_like(x)], 1)

    net.accepts = frozenset({"label"})
    denoise = Denoiser(net, BETAS, "v", learned_variance=True)
    for branches in ({"cond": label(1.0), "uncond": label(0.5)}, {"uncond": label(0.5), "cond": label(1.0)}):
        answer = Guider(denoise, branches, CFG)(torch.ones(2, 3), 0.5)
        assert torch.equal(answer.log_var, torch.ones(2, 3))


def test_branches_are_the_arguments_of_the_rule() -> None:
    for branches in (
        {"cond": label(1.0)},
        {"cond": None, "uncond": None, "third": None},
        {"cond": None, "null": None},
    ):
        with pytest.raises(
            TypeError, match=r"branches \[.*\] must be the arguments of combine\(cond, uncond, scale\): "
        ):
            Guider(denoiser(), branches, CFG)


def test_what_does_not_fit_is_refused() -> None:
    branches = {"cond": label(1.0, 2.0), "uncond": label(0.5)}
    guider = Guider(denoiser(), branches, CFG)
    with pytest.raises(ValueError, match=r"branch 'cond' has 2 rows for a batch of 3 samples; give 3, or 1"):
        guider(torch.ones(3, 1), 0.5)
    with pytest.raises(TypeError, match=r"the branches of a guider hold its conditions.*Condition\(label="):
        guider(torch.ones(2, 1), 0.5, Condition(label=torch.ones(2)))
    with pytest.raises(ValueError, match=r"branch 'uncond' is on CosineBeta.*the guider on LinearBeta"):
        Guider(denoiser(), {"cond": None, "uncond": (denoiser(schedule=CosineBeta()), None)}, CFG)
    with pytest.raises((ValueError, TypeError), match="toghether"):
        Guider(denoiser(), branches, CFG, batching="toghether")
    with pytest.raises(TypeError, match=r"unknown condition 'size'"):
        Guider(denoiser(), {"cond": {"size": torch.ones(1)}, "uncond": None}, CFG)(torch.ones(2, 1), 0.5)


def test_a_branch_with_an_interval_is_evaluated_in_it_alone() -> None:
    calls = []

    def network(x, timestep, cond):
        calls.append(cond["label"].tolist())
        return cond["label"].float()[:, None] * x

    network.accepts = frozenset({"label"})
    denoise = Denoiser(network, LinearBeta(), "x0")
    branches = {"cond": {"label": torch.tensor([3])}, "uncond": {"label": torch.tensor([1])}}
    guider = Guider(denoise, branches, partial(cfg, scale=2.0), when={"uncond": (0.3, 0.7)})
    x = torch.ones(1, 2)
    for t, answer, labels in [(0.2, 3.0, [3]), (0.3, 5.0, [3, 1]), (0.7, 5.0, [3, 1]), (0.71, 3.0, [3])]:
        calls.clear()
        assert guider(x, t).x0[0, 0].item() == pytest.approx(answer)
        assert calls == [labels]
        assert guider.active(t) == (("cond", "uncond") if len(labels) == 2 else ("cond",))
    with pytest.raises(ValueError, match=r"one time that the host knows.*not for training"):
        guider(x, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ({"uncnd": (0.0, 0.5)}, r"unknown branch in `when` 'uncnd'; did you mean 'uncond'"),
        ({"uncond": (0.5, 0.5)}, r"gives 'uncond' the times \[0.5, 0.5\].*low first"),
        ({"uncond": (0.0, 0.5), "cond": (0.0, 0.5)}, r"every branch has an interval"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(when, says) -> None:
    denoise = Denoiser(lambda x, timestep, cond: x, LinearBeta(), "x0")
    with pytest.raises(ValueError, match=says):
        Guider(denoise, {"cond": {}, "uncond": {}}, partial(cfg, scale=2.0), when=when)
