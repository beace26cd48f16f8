"""Adapters combined, extracted, resized and merged: what they add to the weights, or with which error."""

import contextlib
import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel
from peft.utils import merge_utils
from torch import nn

from gendiff.lora import Adapter, Class, combine, extract, inject, measure, merge, plan, resize
from gendiff.lora.algorithms import ALGORITHMS
from gendiff.lora.factoring import SMALL, change_of, cut, dense, distance, norm, svd, values
from gendiff.testing import tiny_pipeline
from tests.attention.models import SD3, UNET, build, said
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = {
    "lora": {"rank": 3, "lora_alpha": 5},
    "rslora": {"rank": 3, "lora_alpha": 5, "rslora": True},
    "dora": {"rank": 3, "algorithm": "dora"},
    "loha": {"rank": 2, "lora_alpha": 3, "algorithm": "loha"},
    "lokr": {"rank": 1, "lora_alpha": 3, "algorithm": "lokr", "options": {"decompose_both": True}},
    "oft": {"rank": 4, "algorithm": "oft"},
}
ranks = st.integers(1, 6)
weights = st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.01)


def net(out=12, inward=16, conv=False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return nn.Sequential(nn.Linear(inward, out), nn.Conv2d(4, 6, 3) if conv else nn.Linear(out, inward))


def made(model, seed=0, targets="**", **settings) -> Adapter:
    """An adapter for a model with numbers that matter, in every part of it."""
    planned, generator = plan(model, targets, **settings), torch.Generator().manual_seed(seed)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for row in planned.rows:
        shapes = ALGORITHMS[row.algorithm].shapes(row)
        parts = {part: 0.3 * torch.randn(shape, generator=generator) for part, shape in shapes.items()}
        if "magnitude" in parts:  # of a DoRA: about the lengths of the rows
            lengths = model.get_submodule(row.name).weight.detach().flatten(1).norm(dim=1)
            parts["magnitude"] = lengths * (1 + parts["magnitude"])
        tensors[row.name] = parts
    return Adapter(planned, tensors)


def deltas(adapter, model=None) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, as matrices in float64."""
    exact, layers = adapter.to(dtype=torch.float64), dict(model.named_modules()) if model else {}
    weights = {name: layers[name].weight if model else None for name in adapter.tensors}
    return {name: exact.delta(name, weights[name]).flatten(1) for name in adapter.tensors}


def close(found, expected, limit=1e-6) -> bool:
    """Whether all matrices are as expected, relative to their norms."""
    assert found.keys() == expected.keys()
    return all(alike(found[name], expected[name], limit) for name in expected)


def alike(found, expected, limit=1e-3) -> bool:
    return float((found - expected).norm() / expected.norm()) <= limit


def summed(*terms) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for matrices, weight in terms:
        for name, matrix in matrices.items():
            found[name] = found.get(name, 0) + weight * matrix
    return found


def nearest(matrix, rank) -> torch.Tensor:
    """The nearest matrix of a rank, from the decomposition of the whole."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


# ---- products


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_in_factors_is_the_change(kind) -> None:
    model = nn.Sequential(nn.Linear(36, 24)) if kind == "oft" else net(36, 24, conv=True)
    adapter = made(model, **KINDS[kind])
    expected = deltas(adapter, model)
    for row in adapter.plan.rows:
        change = change_of(row, adapter.tensors[row.name], model.get_submodule(row.name).weight)
        matrix = expected[row.name]
        torch.testing.assert_close(dense(change).double(), matrix, rtol=1e-5, atol=1e-6)
        assert norm(change) == pytest.approx(float(matrix.norm()), rel=1e-6)
        singular = torch.linalg.svdvals(matrix)
        found = values(change)
        torch.testing.assert_close(found[: len(singular)], singular[: len(found)], rtol=1e-5, atol=1e-5)
        assert not singular[len(found) :].gt(1e-6).any()
    assert isinstance(change, torch.Tensor) == (kind in ("dora", "oft"))


@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_large_matrices_are_cut_nearly_as_well_as_can_be_and_no_generator_moves(decay) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(n, 300, generator=generator, dtype=torch.float64)).Q for n in (400, 300)
    )
    singular = torch.arange(1, 301, dtype=torch.float64) ** -decay
    matrix = (u * singular @ v.mT).float()
    assert min(matrix.shape) > SMALL
    before = torch.get_rng_state()
    found = svd(matrix, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found.values) < 50
    best = float(singular[20:].norm())
    assert best * (1 - 1e-4) < distance(cut(found, 20), matrix) < best * 1.005
    torch.testing.assert_close(found.values[:5].double(), singular[:5], rtol=1e-4, atol=0)
    assert torch.equal(svd(matrix, 20).values, found.values)


def test_of_loras_no_large_matrix_is_decomposed(monkeypatch) -> None:
    seen: list[int] = []
    for name in ("svd", "svdvals", "eigvalsh", "qr"):
        original = getattr(torch.linalg, name)

        def spy(matrix, *args, original=original, **kwargs):
            seen.append(min(matrix.shape))
            return original(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, spy)
    model = net(128, 160)
    one, two = made(model, 0, rank=4), made(model, 1, rank=6)
    for method in ("cat", "svd", "linear"):
        combine([(one, 1), (one if method == "linear" else two, 0.5)], method)
    resize(two, 2)
    measure(two, model)
    assert 0 < max(seen) <= 4 + 6 + 10  # both, and what is made of them


# ---- combine


@settings(deadline=None, max_examples=25)
@given(ranks, ranks, weights, weights, st.booleans(), st.booleans())
def test_cat_is_the_sum_for_any_ranks_scales_and_layers(first, second, w, v, rslora, some) -> None:
    model = net(conv=True)
    one = made(model, 0, rank=first, lora_alpha=2 * first + 1, rules={"1": {"rank": 1}}, rslora=rslora)
    two = made(model, 1, "0" if some else "**", rank=second, lora_alpha=0.5)
    found = combine({"one": (one, w), "two": (two, v)})
    assert close(deltas(found.adapter), summed((deltas(one), w), (deltas(two), v)))
    assert found.errors.total < 1e-6
    assert [row.rank for row in found.adapter.plan.rows] == [first + second, 1 if some else 1 + second]
    assert {row.scale for row in found.adapter.plan.rows} == {1.0}


@settings(deadline=None, max_examples=25)
@given(ranks, ranks, st.integers(1, 14), weights, weights)
def test_svd_is_the_nearest_of_its_rank_and_says_by_how_much(first, second, rank, w, v) -> None:
    model = net(conv=True)
    one, two = made(model, 0, rank=first, lora_alpha=3), made(model, 1, rank=second)
    found = combine([(one, w), (two, v)], "svd", rank=rank)
    goal = summed((deltas(one), w), (deltas(two), v))
    made_of = deltas(found.adapter)
    for row in found.errors.rows:
        best = torch.linalg.svdvals(goal[row.name])[rank:].norm() / goal[row.name].norm()
        lost = (made_of[row.name] - goal[row.name]).norm() / goal[row.name].norm()
        assert row.error == pytest.approx(float(best), abs=1e-6) == pytest.approx(float(lost), abs=1e-6)
        assert row.rank == min(rank, first + second, *goal[row.name].shape)
    whole = math.sqrt(sum(float((made_of[n] - goal[n]).square().sum()) for n in goal))
    whole /= math.sqrt(sum(float(goal[n].square().sum()) for n in goal))
    assert found.errors.total == pytest.approx(whole, abs=1e-6)


def test_errors_of_the_ways_to_halve_two_adapters() -> None:
    """Of independent ones, sums of A and B say nothing of the sum, and half the rank says half of it."""
    model = nn.Sequential(nn.Linear(256, 256))
    one, two = (made(model, seed, rank=4) for seed in (0, 1))
    error = {m: combine([(one, 0.5), (two, 0.5)], m).errors.total for m in ("linear", "svd", "cat")}
    assert error["linear"] == pytest.approx(1.0, abs=0.05)
    assert 0.35 < error["svd"] < 0.65
    assert error["cat"] < 1e-7


def test_the_same_as_peft_where_peft_is_right() -> None:
    """And its linear is ours, error and all."""
    model = net()
    settings = {"rank": 4, "lora_alpha": 6}
    theirs = _of_peft(model, two := [made(model, seed, **settings) for seed in (0, 1)], lora_alpha=6)
    for method, kind in (("cat", "cat"), ("svd", "svd"), ("linear", "linear")):
        theirs.add_weighted_adapter(["0", "1"], [0.7, 0.4], method, kind, svd_rank=3)
        rank = {"rank": 3} if method == "svd" else {}
        ours = combine([(two[0], 0.7), (two[1], 0.4)], method, **rank)
        assert close(deltas(ours.adapter), _deltas_of_peft(theirs, method), 1e-5), method


@pytest.mark.parametrize(("rank", "wrong"), [(4, 1.0), (12, 2.46)])
def test_rslora_at_weight_1_is_itself(rank, wrong) -> None:
    """peft scales what is already scaled by the root of the rank once more."""
    model = net()
    adapter = made(model, rank=rank, rslora=True)
    expected = deltas(adapter)
    for method in ("cat", "svd", "linear"):
        assert close(deltas(combine([(adapter, 1)], method).adapter), expected)
    theirs = _of_peft(model, [adapter], use_rslora=True)
    theirs.add_weighted_adapter(["0"], [1.0], "sum", "cat")
    found = _deltas_of_peft(theirs, "sum")
    for name, matrix in expected.items():
        error = float((found[name] - matrix).norm() / matrix.norm())
        assert error == pytest.approx(math.sqrt(rank) - 1, rel=1e-4) == pytest.approx(wrong, rel=0.01)


def test_dora_at_weight_1_is_itself() -> None:
    """peft starts its lengths anew, so that what they had learned is lost."""
    model = net()
    adapter = made(model, rank=4, algorithm="dora")
    for parts in adapter.tensors.values():
        parts["magnitude"].mul_(2)
    expected = deltas(adapter, model)
    found = combine([(adapter, 1)], "svd", rank=12, model=model)
    assert close(deltas(found.adapter), expected, 1e-5)
    assert found.errors.total < 1e-5
    lower = combine([(adapter, 1)], "svd", model=model)
    for name, matrix in expected.items():
        best = float(torch.linalg.svdvals(matrix)[4:].norm() / matrix.norm())
        assert lower.errors[name] == pytest.approx(best, rel=1e-4)
    with inject(model, adapter) as handle:
        assert close(deltas(combine([(handle, 1)], "svd", rank=12).adapter), expected, 1e-5)
    theirs = _of_peft(model, [adapter], use_dora=True)
    theirs.add_weighted_adapter(["0"], [1.0], "sum", "linear")
    wrong = [
        float((matrix - expected[name]).norm() / expected[name].norm())
        for name, matrix in _deltas_of_peft(theirs, "sum").items()
    ]
    assert min(wrong) > 0.7


def test_the_rank_is_the_highest_of_a_layer_where_none_is_said() -> None:
    model = net()
    one, two = made(model, 0, rank=2), made(model, 1, "0", rank=5)
    for method, density in (("svd", None), ("ties", 0.5), ("dare", 0.5)):
        found = combine([(one, 1), (two, 1)], method, density=density)
        assert [row.rank for row in found.adapter.plan.rows] == [5, 2]


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_products_are_loras_of_a_higher_rank(kind) -> None:
    model = net(36, 24)
    one, two = made(model, 0, **KINDS[kind]), made(model, 1, rank=2)
    found = combine([(one, 0.3), (two, 2)])
    assert close(deltas(found.adapter), summed((deltas(one), 0.3), (deltas(two), 2)))
    assert [row.rank for row in found.adapter.plan.rows] == [{"loha": 4, "lokr": 1}[kind] + 2] * 2


def test_a_model_says_with_one_what_it_says_with_both() -> None:
    model = build(UNET).requires_grad_(False)
    plain = said(model, UNET)
    one = made(model, 0, "sd/attention+conv", rank=2, lora_alpha=4)
    two = made(model, 1, "sd/attention+ff", rank=3)
    first, second = inject(model, one, "one"), inject(model, two, "two")
    with first.scaled(0.8), second.scaled(-0.5):
        both = said(model, UNET)
    found = combine({"one": (first, 0.8), "two": (second, -0.5)})
    first.remove()
    second.remove()
    with inject(model, found.adapter):
        assert alike(said(model, UNET), both)
    assert torch.equal(said(model, UNET), plain)
    assert len(found.adapter) == len({*one.tensors, *two.tensors})


def _ties(matrices, weights, density):
    """The paper's three steps, entry by entry."""
    trimmed = []
    for matrix, weight in zip(matrices, weights, strict=True):
        flat = matrix.flatten().tolist()
        kept = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: round(density * len(flat))]
        trimmed.append([weight * flat[i] if i in set(kept) else 0.0 for i in range(len(flat))])
    found = []
    for entries in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(entries))
        agree = [entry for entry in entries if entry * sign > 0]
        found.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(found, dtype=torch.float64).view_as(matrices[0])


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([0.1, 0.25, 0.5, 1.0]), weights, weights)
def test_ties_is_the_three_steps_of_the_paper(density, w, v) -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    adapters = [made(model, seed, rank=2) for seed in range(3)]
    given = [(adapters[0], w), (adapters[1], v), (adapters[2], 1.0)]
    matrices = [deltas(one)["0"] for one in adapters]
    expected = _ties(matrices, (w, v, 1.0), density)
    found = combine(given, "ties", density=density, rank=12)
    assert close(deltas(found.adapter), {"0": expected}, 1e-5)
    goal = w * matrices[0] + v * matrices[1] + matrices[2]
    (row,) = found.errors.rows
    assert row.error == pytest.approx(float((expected - goal).norm() / goal.norm()), rel=1e-4)
    assert row.lost_by_rank < 1e-5 * row.norm
    cut_off = combine(given, "ties", density=density, rank=2)
    lost = float(torch.linalg.svdvals(expected)[2:].norm())
    assert cut_off.errors.rows[0].lost_by_rank == pytest.approx(lost, rel=1e-4, abs=1e-6)


def test_a_bias_is_refused_where_peft_loses_it() -> None:
    """peft makes a sum at weight 1 without the bias of B, so that all that it said is missing."""
    net = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], lora_bias=True)
    theirs = LoraModel(copy.deepcopy(net), config, "one")
    layer = theirs.model[0]
    with torch.no_grad():
        layer.lora_B["one"].bias.fill_(1.0)
    theirs.add_weighted_adapter(["one"], [1.0], "sum", combination_type="cat")
    zero = torch.zeros(1, 6)
    base, said = layer.base_layer(zero), {}
    for name in ("one", "sum"):
        theirs.set_adapter(name)
        said[name] = (theirs(zero) - base).detach()
    torch.testing.assert_close(said["one"], torch.ones(1, 5))
    assert float((said["sum"] - said["one"]).norm() / said["one"].norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sets lora_bias=True, which adapters here have not"):
        plan(net, config)


def test_ties_is_peft_s_at_equal_weights() -> None:
    model = nn.Sequential(nn.Linear(20, 12))
    adapters = [made(model, seed, rank=2) for seed in range(3)]
    matrices = [deltas(one)["0"] for one in adapters]
    expected = merge_utils.ties(matrices, torch.tensor([0.7] * 3, dtype=torch.float64), 0.4)
    found = combine([(one, 0.7) for one in adapters], "ties", density=0.4, rank=12)
    assert close(deltas(found.adapter), {"0": expected}, 1e-5)


def test_dare_keeps_a_share_made_larger_by_names_and_seed() -> None:
    model = net(55, 55)
    one, two = made(model, 0, rank=2), made(model, 1, rank=2)
    before = torch.get_rng_state()

    def found(terms, seed=0):
        return deltas(combine(terms, "dare", density=0.25, rank=55, seed=seed).adapter)

    alone = found({"one": (one, 0.5)})
    for name, matrix in deltas(one).items():
        ratio = alone[name] / matrix
        kept = ratio.abs() > 1
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 0.5 / 0.25), rtol=1e-2, atol=0)
        assert float(alone[name][~kept].abs().max()) < 1e-5
        assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.03)
    twin = Adapter(one.plan, dict.fromkeys(one.tensors, one.tensors["0"]))
    choices = found({"one": (twin, 1.0)})
    assert not close(choices, dict.fromkeys(choices, choices["0"]), 0.1), "another choice in each layer"
    names = (found({name: (twin, 1.0)}) for name in ("one", "two"))
    assert not close(next(names), next(names), 0.1), "and for each adapter"
    both = found({"two": (two, 1.0), "one": (one, 0.5)})
    assert close(both, summed((alone, 1), (found({"two": (two, 1.0)}), 1)), 1e-5)
    assert close(found({"one": (one, 0.5)}), alone)
    assert not close(found({"one": (one, 0.5)}, seed=1), alone, 0.1)
    mean = summed(*((found({"one": (one, 0.5)}, seed=seed), 1 / 200) for seed in range(200)))
    assert close(mean, summed((deltas(one), 0.5)), 0.2), "right on the average: sqrt(3 / 200) is 0.12"
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_combined_is_refused() -> None:
    model = net(36, 24)
    one = made(model, rank=2)
    dora = made(model, rank=2, algorithm="dora")
    wide = {"one": (one, 1.0), "dora": (dora, 1.0)}
    full = made(model, rank=6, algorithm="loha")
    for call, says in (
        (lambda: combine({}), "there is nothing to combine"),
        (lambda: combine([(one, 1)], "sum"), "unknown method 'sum'"),
        (lambda: combine([(one, 1)], rank=2), 'the rank of "cat" follows from the adapters'),
        (lambda: combine([(one, 1)], "svd", rank=0), "1 or more, got 0"),
        (lambda: combine([(one, 1)], "ties"), 'density is the share .* got None for "ties"'),
        (lambda: combine([(one, 1)], "svd", density=0.5), 'got 0.5 for "svd"'),
        (lambda: combine([(one, 1)], "dare", density=1.5), r"a share in \(0, 1\], got 1.5"),
        (lambda: combine([(one, math.nan)]), "the weight of '0' is a finite number, got nan"),
        (lambda: combine(wide), "dora of 'dora' changes 0 in all directions.*take \"svd\" with a rank"),
        (lambda: combine([(full, 1)]), "loha of '0' changes 0 in all directions"),
        (lambda: combine(wide, "svd"), "what dora adds to 0 depends on the weight of the layer: pass model="),
        (lambda: combine(wide, "svd", model=net()), r"0 is of shape \(36, 24\), and has \(12, 16\) in this"),
        (
            lambda: combine([(one, 1), (made(model, rank=3), 1)], "linear"),
            "of one rank, and 0 has lora of rank 3",
        ),
        (lambda: combine([(one, 1), (made(net(), rank=2), 1)]), "these adapters are for different models"),
        (lambda: combine([(made(model, rank=4, algorithm="oft"), 1)], "svd", model=model), "give rank"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


# ---- extract and resize


@pytest.mark.parametrize("name", [UNET, SD3])
def test_what_was_merged_is_extracted(name) -> None:
    base, tuned = build(name), build(name)
    targets = "sd/attention+conv" if name == UNET else "sd3/attention"
    adapter = made(base, 0, targets, rank=2, lora_alpha=3)
    merge(tuned, adapter, 0.5)
    found = extract(tuned, base, rank=2)
    assert list(found.adapter.tensors) == list(adapter.tensors)
    assert close(deltas(found.adapter), summed((deltas(adapter), 0.5)), 1e-5)
    assert found.errors.total < 1e-5
    assert found.others == ()
    least = extract(tuned.state_dict(), base, energy=0.99999)
    assert max(row.rank for row in least.adapter.plan.rows) == 2
    with inject(base.requires_grad_(False), found.adapter):
        assert alike(said(base, name), said(tuned, name))


def _differing(singular, out=40, inward=30):
    """Two models whose weights differ by a matrix of these singular values."""
    base = nn.Sequential(nn.Linear(inward, out), nn.LayerNorm(out), nn.Linear(out, 2))
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, len(singular), generator=generator)).Q for n in (out, inward))
    with torch.no_grad():
        tuned[0].weight += u * torch.tensor(singular) @ v.mT
    return tuned, base


def test_the_least_rank_that_keeps_the_energy() -> None:
    tuned, base = _differing([4.0, 2.0, 1.0, 1.0, 0.5])
    energy = torch.tensor([16, 4, 1, 1, 0.25]).cumsum(0) / 22.25
    for rank in range(1, 5):
        found = extract(tuned, base, energy=float(energy[rank - 1]) - 1e-4)
        assert [row.rank for row in found.adapter.plan.rows] == [rank]
        assert found.errors.total == pytest.approx(math.sqrt(1 - float(energy[rank - 1])), rel=1e-4)
    assert extract(tuned, base).adapter.plan.rows[0].rank == 4
    assert extract(tuned, base, energy=0.98, max_rank=2).adapter.plan.rows[0].rank == 2
    assert extract(tuned, base, rank=3).adapter.plan.rows[0].rank == 3


def test_of_a_large_difference_too() -> None:
    tuned, base = _differing([1 / n for n in range(1, 270)], out=300, inward=280)
    found = extract(tuned, base, energy=0.9)
    energy = torch.tensor([n**-2 for n in range(1, 270)]).cumsum(0)
    assert found.adapter.plan.rows[0].rank == int((energy / energy[-1] < 0.9).sum()) + 1
    assert found.errors.total == pytest.approx(math.sqrt(1 - 0.9), rel=0.1)


def test_what_else_differs_is_named() -> None:
    tuned, base = _differing([1.0])
    with torch.no_grad():
        tuned[0].bias += 1
        tuned[1].weight += 1
        tuned[2].weight += 1
    found = extract(tuned, base, "0", rank=1)
    assert list(found.adapter.tensors) == ["0"]
    assert found.others == ("0.bias", "1.weight", "2.weight")
    assert "3 other weights differ" in repr(found)
    inject(base, plan(base, "0", rank=1))
    again = extract(tuned, base, "0", rank=1)
    assert (list(again.adapter.tensors), again.others) == (["0"], found.others)


def test_models_that_cannot_be_compared() -> None:
    tuned, base = _differing([1.0])
    for call, kind, says in (
        (lambda: extract(base, base), ValueError, "the models do not differ in any of 2 layers"),
        (
            lambda: extract(base.state_dict(), base.state_dict()),
            TypeError,
            "one of the two has to be a module",
        ),
        (
            lambda: extract({"1.weight": tuned[1].weight}, base),
            ValueError,
            "the tuned model has no '0.weight'",
        ),
        (lambda: extract(net(), base, "0"), ValueError, r"0 is of shape \(40, 30\), and has \(12, 16\)"),
        (
            lambda: extract(tuned.to("meta"), base, "0"),
            ValueError,
            "has no numbers, being on the meta device",
        ),
        (lambda: extract(tuned, base, rank=2, energy=0.5), ValueError, "not both"),
        (lambda: extract(tuned, base, rank=0), ValueError, "1 or more, got 0"),
        (lambda: extract(tuned, base, energy=1.5), ValueError, r"a share in \(0, 1\], such as 0.98, got 1.5"),
        (lambda: extract(tuned, base, "9"), ValueError, "'9' matches none of 2 layers"),
    ):
        with pytest.raises(kind, match=says):
            call()


@settings(deadline=None, max_examples=15)
@given(ranks, st.integers(1, 8), st.booleans())
def test_resized_it_is_the_nearest_at_the_scale_of_before(rank, lower, rslora) -> None:
    model = net(conv=True)
    rules = {"1": {"learning_rate": 1e-4, "rank": 2}}
    adapter = made(model, rank=rank, lora_alpha=7, rslora=rslora, rules=rules)
    found = resize(adapter, lower)
    expected = {name: nearest(matrix, lower) for name, matrix in deltas(adapter).items()}
    assert close(deltas(found.adapter), expected, 1e-5)
    for before, after in zip(adapter.plan.rows, found.adapter.plan.rows, strict=True):
        assert (after.rank, after.rslora) == (min(lower, before.rank), rslora)
        assert after.scale == pytest.approx(before.scale)
        assert after.learning_rate == before.learning_rate
    if lower >= max(rank, 2):
        assert close(deltas(found.adapter), deltas(adapter))
        assert found.errors.total < 1e-6


def test_resized_by_energy_from_other_products_and_refused() -> None:
    model = net(36, 24)
    adapter = made(model, rank=6)
    adapter = type(adapter)(adapter.plan, adapter.tensors, {"trigger": "zwx"})
    found = resize(adapter, energy=0.8)
    assert found.adapter.metadata == {"trigger": "zwx"}
    for row in found.adapter.plan.rows:
        singular = torch.linalg.svdvals(deltas(adapter)[row.name]).square()
        kept = singular.cumsum(0) / singular.sum()
        assert kept[row.rank - 1] >= 0.8 > (kept[row.rank - 2] if row.rank > 1 else 0)
        assert found.errors[row.name] == pytest.approx(math.sqrt(1 - float(kept[row.rank - 1])), rel=1e-4)
    assert {row.rank for row in resize(adapter, energy=0.99, max_rank=2).adapter.plan.rows} == {2}
    for rank in (2, 6):  # a product of rank 4, and a matrix of full rank
        loha = made(model, rank=rank, algorithm="loha")
        small = resize(loha, 3)
        assert {(row.algorithm, row.rank) for row in small.adapter.plan.rows} == {("lora", 3)}
        assert close(deltas(small.adapter), {n: nearest(m, 3) for n, m in deltas(loha).items()}, 1e-5)
    for call, says in (
        (lambda: resize(adapter), "give a rank, or the share of energy"),
        (lambda: resize(adapter, 2, energy=0.5), "give a rank, or the share of energy"),
        (lambda: resize(made(model, rank=2, algorithm="dora"), 1), "dora at 0 depends on the weight"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


# ---- merge


def bits(model) -> list[torch.Tensor]:
    return [value.clone().contiguous().view(torch.uint8) for value in model.state_dict().values()]


def same(model, before) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_says_what_it_says_with_the_adapter(kind) -> None:
    model = build(UNET).requires_grad_(False)
    before = bits(model)
    adapter = made(model, 0, Class("Linear"), **KINDS[kind])
    with inject(model, adapter):
        expected = said(model, UNET)
    assert not alike(said(model, UNET), expected, 0.05)
    with merge(model, adapter) as merged:
        assert alike(said(model, UNET), expected)
        assert len(merged.layers) == len(adapter)
    assert same(model, before)


def test_a_bf16_base_has_its_bits_back_after_ten_merges_and_in_diffusers_it_drifts() -> None:
    pipe = tiny_pipeline("sd15")
    unet = pipe.unet.to(torch.bfloat16)
    adapter = made(unet, 0, "sd/attention", rank=2).to(dtype=torch.bfloat16)
    before, weights = bits(unet), {n: v.clone().float() for n, v in unet.state_dict().items()}
    for _ in range(10):
        merged = merge(unet, adapter, 0.7)
        name = adapter.plan.rows[0].name
        exact = weights[f"{name}.weight"] + 0.7 * adapter.delta(name)
        assert torch.equal(unet.get_submodule(name).weight, exact.bfloat16()), "rounded once"
        assert not same(unet, before)
        merged.undo()
    assert same(unet, before)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(adapter.tensors)), "style")
    layers = {name: unet.get_submodule(name) for name in adapter.tensors}
    for name, layer in layers.items():
        layer.lora_A["style"].weight.data = adapter.tensors[name]["lora_A"]
        layer.lora_B["style"].weight.data = adapter.tensors[name]["lora_B"]
    for _ in range(10):
        unet.fuse_lora(adapter_names=["style"])
        unet.unfuse_lora()
    drift = max(
        float((layer.get_base_layer().weight.float() - weights[f"{name}.weight"]).abs().max())
        for name, layer in layers.items()
    )
    assert drift > 1e-3


def test_merges_are_undone_from_the_last() -> None:
    model = net()
    before, one, two = bits(model), made(model, 0, rank=2), made(model, 1, rank=3)
    attributes = sorted(vars(model))
    first, second = merge(model, one), merge(model, two, -0.5)
    with pytest.raises(RuntimeError, match="another adapter was merged after this one"):
        first.undo()
    with torch.no_grad():
        model[0].weight.zero_()
    second.undo()
    expected = nn.Parameter(net()[0].weight + one.delta("0"))
    assert torch.equal(model[0].weight, expected)
    first.undo()
    first.undo()
    assert (first.undone, first.bytes) == (True, 0)
    assert same(model, before)
    assert sorted(vars(model)) == attributes


def test_merged_for_good_frees_the_copies() -> None:
    model = net()
    before, one, two = bits(model), made(model, 0, rank=2), made(model, 1, rank=3)
    first, second = merge(model, one), merge(model, two)
    assert first.bytes == sum(4 * layer.weight.numel() for layer in model)
    gone = weakref.ref(second)
    merged = bits(model)
    del second
    gc.collect()
    assert gone() is None
    assert same(model, merged)
    first.undo()
    assert same(model, before)


def test_beside_adapters_and_for_weights_that_layers_share() -> None:
    model = net(16, 16)
    model[1].weight = model[0].weight
    before, adapter = bits(model), made(model, rank=2)
    weight = model[0].weight.detach().clone()
    with merge(model, adapter):
        torch.testing.assert_close(model[0].weight, weight + adapter.delta("0") + adapter.delta("1"))
    assert same(model, before)
    handle = inject(model, plan(model, "**", rank=2))
    with merge(model, adapter):
        assert torch.equal(handle.layers["0"].get_base_layer().weight, model[1].weight)
    handle.remove()
    assert same(model, before)


def test_merges_that_cannot_be_leave_the_model_alone() -> None:
    model = net()
    before = bits(model)
    other = made(nn.Sequential(*net(), nn.Linear(4, 4)), rank=2)
    with pytest.raises(ValueError, match="the adapter is for another model: unknown layer '2'"):
        merge(model, other)
    with pytest.raises(ValueError, match=r"0 is of shape \(12, 16\), and has \(3, 16\) in this model"):
        merge(net(3), made(model, rank=2))
    half = net().half()
    kept = bits(half)
    huge = made(model, rank=2, rules={"1": {"lora_alpha": 1e6}})
    with pytest.raises(ValueError, match=r"the weight of 1 is beyond what torch.float16 can hold"):
        merge(half, huge)
    assert same(half, kept)
    first, second = merge(half, made(model, rank=2)), merge(half, made(model, 1, rank=2))
    with pytest.raises(ValueError, match=r"the weight of 1 is beyond"):
        merge(half, huge)
    with pytest.raises(RuntimeError, match="undo that one first"):
        first.undo()
    second.undo()
    first.undo()
    assert same(half, kept)
    with pytest.raises(ArithmeticError), merge(model, made(model, rank=2)):
        raise ArithmeticError("on purpose")
    assert same(model, before)


# ---- peft's


def _of_peft(model, adapters, **settings):
    """A copy of a model with adapters in peft's own tuner, by their places."""
    rank = adapters[0].plan.rows[0].rank
    config = LoraConfig(r=rank, target_modules=list(adapters[0].tensors), **{"lora_alpha": rank, **settings})
    theirs = LoraModel(copy.deepcopy(model), {"0": config}, "0")
    for i, adapter in enumerate(adapters):
        if i:
            theirs.peft_config[str(i)] = copy.deepcopy(config)
            theirs.inject_adapter(theirs.model, str(i))
        for name, parts in adapter.tensors.items():
            layer = theirs.model.get_submodule(name)
            layer.lora_A[str(i)].weight.data = parts["lora_A"]
            layer.lora_B[str(i)].weight.data = parts["lora_B"]
            if "magnitude" in parts:
                layer.lora_magnitude_vector[str(i)].weight.data = parts["magnitude"]
    return theirs


def _deltas_of_peft(theirs, name) -> dict[str, torch.Tensor]:
    """What merging one of peft's adapters adds to each weight."""
    found = {}
    for path, layer in theirs.model.named_modules():
        if hasattr(layer, "lora_A") and name in layer.lora_A:
            layer = copy.deepcopy(layer)
            before = layer.get_base_layer().weight.detach().double()
            with contextlib.suppress(AttributeError):
                layer.double()
            layer.merge(adapter_names=[name])
            found[path] = (layer.get_base_layer().weight.detach() - before).flatten(1)
    return found
