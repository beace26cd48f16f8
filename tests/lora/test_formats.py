"""Every format, algorithm, family and kind of adapter: what a file adds is what was saved, in every cell."""

from functools import cache

import pytest
import torch

from gendiff.lora import load, plan, read, save
from tests.attention.models import FLUX, SD3, UNET, WAN, build
from tests.lora.adapters import drawn, error, weights
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
FORMATS = ("diffusers", "peft", "kohya", "original")
ALGORITHMS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"algorithm": "dora"},
    "loha": {"algorithm": "loha"},
    "lokr": {"algorithm": "lokr"},
    "oft": {"algorithm": "oft"},
}
# attention with all of q, k and v; what the parts are; and layers of other kinds
LAYERS = {
    UNET: (
        "mid_block.attentions.0.transformer_blocks.0.attn[12]",
        ("**.conv1", "**.ff.net.*.proj", "**.ff.net.2"),
    ),
    SD3: (
        "transformer_blocks.[01].attn",
        ("**.ff.net.0.proj", "transformer_blocks.*.norm1.linear", "norm_out.linear"),
    ),
    FLUX: ("**.attn", ("single_transformer_blocks.*.proj_mlp", "**.ff.net.2", "norm_out.linear")),
    WAN: ("blocks.0.attn[12]", ("**.ffn.net.2", "patch_embedding")),
}
VARIANTS = ("strength", "ranks", "partly")
REFUSED = {  # by format, algorithm and family, what a format has no names for, and the error that says so
    **{(form, "oft", family): "carries oft, which turns inputs" for form in FORMATS[2:] for family in LAYERS},
    **{("original", "lokr", family): "a Kronecker product cannot be a part" for family in (SD3, FLUX)},
}
REFUSED_RANKS = {  # of mixed ranks besides
    ("peft", "oft", family): "peft says one size for all layers" for family in LAYERS
}


@cache
def model_of(family):
    return build(family).requires_grad_(False)


def planned(family, algorithm, variant):
    model, (attention, others) = model_of(family), LAYERS[family]
    settings = dict(ALGORITHMS[algorithm])
    convolves = algorithm in ("lora", "rslora", "dora")
    if algorithm == "oft" or (family == WAN and not convolves):
        others = tuple(one for one in others if one not in ("**.conv1", "patch_embedding"))
    targets = [f"{attention}.to_[qkv]", f"{attention}.to_out.0"]
    if family == FLUX:  # of which single blocks have no output of their own
        targets[1] = "transformer_blocks.*.attn.to_out.0"
    rank = 4 if algorithm == "oft" else 2
    if algorithm != "oft":
        settings["lora_alpha"] = 6
    rules = {}
    if variant == "ranks":
        change = {"rank": 2} if algorithm == "oft" else {"rank": 1, "lora_alpha": 5}
        rules = {"**.to_k": change, others[-1]: change}
    elif variant == "partly":
        rules = {"**.to_k": None}
    return plan(model, [*targets, *others], rank=rank, rules=rules, **settings)


def saved_in(form, family, algorithm, variant, folder):
    """An adapter and the file of it, or None where the format refuses it, as it should."""
    saved = drawn(planned(family, algorithm, variant))
    path = folder / f"{form}-{variant}{'' if form == 'peft' else '.safetensors'}"
    reason = REFUSED.get((form, algorithm, family))
    if variant == "ranks" and reason is None:
        reason = REFUSED_RANKS.get((form, algorithm, family))
    if reason is None:
        return saved, save(saved, path, form, model=model_of(family))
    with pytest.raises(ValueError, match=reason):
        save(saved, path, form, model=model_of(family))
    assert not path.exists()
    return saved, None


def check(saved, model, found, delta):
    held = weights(model)
    assert set(found) == {row.name for row in saved.plan.rows}
    for name in found:
        assert error(delta(name, held[name]), saved.delta(name, held[name])) <= 1e-6, name


def read_back(form, family, algorithm, variant, folder) -> None:
    saved, path = saved_in(form, family, algorithm, variant, folder)
    if path is not None:
        (adapter,) = read(path, model_of(family)).adapters.values()
        check(saved, model_of(family), adapter.tensors, adapter.delta)


def put_on(form, family, algorithm, variant, folder) -> None:
    model = build(family).requires_grad_(False)
    saved, path = saved_in(form, family, algorithm, variant, folder)
    if path is not None:
        (handle,) = load(path, model).handles.values()
        check(saved, model, handle.layers, lambda name, _: handle.delta(name))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", LAYERS)
def test_what_is_read_adds_what_was_saved(family, algorithm, tmp_path) -> None:
    """A third of the cells, in which each format and algorithm meets each variant."""
    place = list(LAYERS).index(family) + list(ALGORITHMS).index(algorithm)
    for number, form in enumerate(FORMATS):
        read_back(form, family, algorithm, VARIANTS[(place + number) % 3], tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_put_on_adds_what_was_saved(form, tmp_path) -> None:
    family = dict(zip(FORMATS, LAYERS, strict=True))[form]
    put_on(form, family, "dora", "ranks", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", LAYERS)
def test_what_is_put_on_adds_what_was_saved_in_every_cell(family, algorithm, variant, tmp_path) -> None:
    for form in FORMATS:
        put_on(form, family, algorithm, variant, tmp_path)


def test_every_cell_is_tested_and_some_are_refused() -> None:
    """The tables above say which are refused: where another one is, or one is not, the test of it fails."""
    cells = len(FORMATS) * len(ALGORITHMS) * len(LAYERS) * len(VARIANTS)
    refused = len(REFUSED) * len(VARIANTS) + len(REFUSED_RANKS)
    assert (cells, refused) == (288, 34)


def test_bfloat16_is_rounded_once(tmp_path) -> None:
    """Where ranks and scales of stacked layers agree nothing is rounded, whatever the dtype."""
    model = model_of(FLUX)
    saved = drawn(plan(model, "flux/attention", rank=2, lora_alpha=6), dtype=torch.bfloat16)
    for form in FORMATS:
        path = save(saved, tmp_path / (form if form == "peft" else f"{form}.safetensors"), form, model=model)
        with load(path, model, dtype=torch.bfloat16).handles["transformer"] as handle:
            back = handle.adapter()
        for name, parts in saved.tensors.items():
            assert all(torch.equal(parts[part], back.tensors[name][part]) for part in parts)
        assert back.plan.rows == saved.plan.rows
