"""Hostile and broken files: each refused with the file, the key and what to do, and the model as it was."""

import json
import os
import pickle
import struct
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gendiff.lora import inject, load, plan, read, save
from gendiff.lora.files.settings import HEADER_KEY, Settings
from tests.attention.models import FLUX, UNET, build
from tests.lora.adapters import adapter, numbers
from tests.lora.test_inject import digest
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
Q, K = "block.attn.to_q", "block.attn.to_k"
STEM, CONV = f"unet.{Q}", "unet.conv"


@pytest.fixture(scope="module")
def unet():
    """A small network in the place of a UNet, whose layers have no names of an original release."""
    attention = nn.ModuleDict({"to_q": nn.Linear(32, 32), "to_k": nn.Linear(32, 32)})
    net = nn.ModuleDict({"block": nn.ModuleDict({"attn": attention}), "conv": nn.Conv2d(32, 32, 3)})
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def good():
    """Tensors of a file that is in order, with alphas."""
    tensors = {}
    for layer in (Q, K):
        tensors[f"unet.{layer}.lora_A.weight"] = torch.ones(2, 32)
        tensors[f"unet.{layer}.lora_B.weight"] = torch.ones(32, 2)
        tensors[f"unet.{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def refused(model, path, text):
    """The error for a file, which leaves the model as it was and says which file it is about."""
    before = digest(model)
    with pytest.raises(ValueError, match=text) as caught:
        load(path, {"unet": model})
    assert str(caught.value).startswith(f"{path.name}: ")
    assert digest(model) == before
    assert not hasattr(model, "peft_config")


def without(*keys):
    return lambda good: {key: one for key, one in good.items() if key not in keys}


def changed(**given):
    """The file with some tensors of to_q others, by part, or more of them by whole key."""
    names = {"A": f"{STEM}.lora_A.weight", "B": f"{STEM}.lora_B.weight", "alpha": f"{STEM}.alpha"}
    return lambda good: {**good, **{names.get(name, name): one for name, one in given.items()}}


def also(key, *shape):
    return lambda good: {**good, key: torch.ones(shape)}


def without_all(**given):
    """Other tensors altogether."""
    return lambda good: given


NAN = torch.full((2, 32), torch.nan)
TENSORS = {
    "shape": (
        changed(A=torch.ones(2, 5)),
        r"to_q.lora_A.weight' is of shape \(2, 5\), and \(2, 32\) fits the weight .*another model",
    ),
    "rank of A": (changed(A=torch.ones(3, 32)), r"lora_A.weight' is of shape \(3, 32\), and \(2, 32\) fits"),
    "three axes": (changed(A=torch.ones(2, 32, 3)), r"lora_A.weight' is of shape \(2, 32, 3\)"),
    "one axis": (changed(B=torch.ones(32)), r"lora_B.weight' is of shape \(32,\)"),
    "no axis": (changed(B=torch.tensor(1.0)), r"lora_B.weight' is of shape \(\)"),
    "rank 0": (
        changed(A=torch.ones(0, 32), B=torch.ones(32, 0)),
        r"is of shape \(.*0.*\): it holds nothing, where the rank is 1 at least",
    ),
    "NaN": (changed(A=NAN), r"to_q.lora_A.weight' has numbers that are not finite"),
    "infinity": (
        changed(B=torch.full((32, 2), torch.inf)),
        r"to_q.lora_B.weight' has numbers that are not finite",
    ),
    "too large": (
        changed(B=torch.full((32, 2), 1e300, dtype=torch.float64)),
        r"to_q.lora_B.weight' has numbers that are not finite",
    ),
    "NaN as alpha": (changed(alpha=torch.tensor(torch.nan)), r"to_q.alpha' has numbers that are not finite"),
    "alpha 0": (changed(alpha=torch.tensor(0.0)), r"to_q.alpha' is 0, and strengths are numbers above 0"),
    "alpha below 0": (
        changed(alpha=torch.tensor(-4.0)),
        r"to_q.alpha' is -4, and strengths are numbers above 0",
    ),
    "alpha of two": (changed(alpha=torch.ones(2)), r"to_q.alpha' is of shape \(2,\), and no number"),
    "integers": (
        changed(A=torch.ones(2, 32, dtype=torch.int32)),
        r"to_q.lora_A.weight' holds I32: weights are one of F64",
    ),
    "half": (
        without(f"{STEM}.lora_B.weight"),
        r"beside 'unet.*to_q.lora_A.weight' lora_B is missing: the file is not whole",
    ),
    "alpha alone": (
        without(f"{STEM}.lora_B.weight", f"{STEM}.lora_A.weight"),
        r"to_q.alpha'.*beside no lora_A and lora_B",
    ),
    "no alpha": (
        without(f"{STEM}.alpha"),
        r"says no alpha for 1 of 2 layers, 'unet.*to_q.lora_A.weight', so that .* pass missing_alpha='rank'",
    ),
    "unknown key": (
        also("unet.block.nothing.lora_A.weight", 2, 2),
        r"1 of 7 keys are for no layer of unet: 'unet.block.nothing.lora_A.weight' \(nearest is 'unet.block",
    ),
    "no adapter": (also("unet.conv.weight", 2, 2), r"'unet.conv.weight' \(nearest is 'unet.conv'\)"),
    "bias": (
        also(f"{STEM}.lora_B.bias", 32),
        r"lora_B.bias' \(a bias that is added too, which adapters here have not\)",
    ),
    "difference": (
        also("lora_unet_conv.diff", 4, 4),
        r"'lora_unet_conv.diff' \(the whole difference of a weight",
    ),
    "path": (also("../../etc/passwd.lora_A.weight", 2, 2), r"'../../etc/passwd.lora_A.weight'"),
    "absolute path": (also("/etc/passwd.lora_A.weight", 2, 2), r"'/etc/passwd.lora_A.weight'"),
    "attributes": (
        also("unet.__class__.__init__.lora_A.weight", 2, 2),
        r"'unet.__class__.__init__.lora_A.weight'",
    ),
    "odd letters": (also("unet.\x1b[2J\n.lora_A.weight", 2, 2), r"'unet.\\x1b\[2J\\n.lora_A.weight'"),
    "long": (also("unet." + 5000 * "a" + ".lora_A.weight", 2, 2), r"'unet\.a{100,120}\.\.\."),
    "text encoder": (
        also("text_encoder.layer.lora_A.weight", 2, 2),
        r"Give the network that they are for, .* or a pattern of keys to go without, as ignore='text_enc",
    ),
    "two names for one layer": (
        also("lora_unet_block_attn_to_q.lora_down.weight", 2, 32),
        r"'.*' and '.*' are both lora_A of .*to_q: a layer has one",
    ),
    "two adapters of one layer": (
        also(f"{STEM}.lora_A.other.weight", 2, 32),
        r"are both lora_A of .*to_q",
    ),
    "two algorithms in a layer": (
        also(f"{STEM}.hada_w1_a", 32, 2),
        r"are parts of hada and lora: a layer has the parts of one algorithm",
    ),
    "two algorithms": (
        changed(
            **{
                f"{CONV}.hada_w1_a": torch.ones(32, 1),
                f"{CONV}.hada_w1_b": torch.ones(1, 288),
                f"{CONV}.hada_w2_a": torch.ones(32, 1),
                f"{CONV}.hada_w2_b": torch.ones(1, 288),
                f"{CONV}.alpha": torch.tensor(1.0),
            }
        ),
        r"is of (loha|lora) and .* of (loha|lora): an adapter of peft is of one algorithm",
    ),
    "two magnitudes": (
        changed(**{f"{STEM}.dora_scale": torch.ones(32, 1), f"{STEM}.lora_magnitude_vector": torch.ones(32)}),
        r"has no meaning beside lora: DoRA here is of lora_A and lora_B, with one magnitude",
    ),
    "lengths of inputs": (
        also(f"{STEM}.dora_scale", 1, 32),
        r"dora_scale' is of shape \(1, 32\), a length for each input \(wd_on_out=False",
    ),
    "a first factor that does not divide": (
        without_all(**{f"{STEM}.lokr_w1": torch.ones(5, 5), f"{STEM}.lokr_w2": torch.ones(6, 6)}),
        r"of shape \(5, 5\), which does not divide the weight of shape \(32, 32\)",
    ),
    "factors of no setting": (
        without_all(
            **{f"{STEM}.lokr_w1": torch.ones(16, 2), f"{STEM}.lokr_w2": torch.ones(2, 16)},
            **{f"{STEM}.alpha": torch.tensor(1.0)},
        ),
        r"factors a weight of shape \(32, 32\) by .*, and there is no decompose_factor for which peft",
    ),
    "blocks that do not divide": (
        without_all(**{f"{STEM}.oft_R.weight": torch.ones(5, 3)}),
        r"of 5 blocks does not",
    ),
    "rotations of no configuration": (
        without_all(**{f"{STEM}.oft_R.weight": torch.ones(8, 6)}),
        r"no configuration says whether its rotations are exact",
    ),
    "kohya's oft": (
        also("lora_unet_block_attn_to_q.oft_blocks", 2, 4, 4),
        r"OFT as kohya's tools and LyCORIS write it",
    ),
    "lengths of another": (
        also(f"{STEM}.lora_magnitude_vector", 31),
        r"is of shape \(31,\), and one length for each of 32 outputs",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case, good, unet, tmp_path) -> None:
    change, text = TENSORS[case]
    save_file(change(good), tmp_path / "bad.safetensors")
    refused(unet, tmp_path / "bad.safetensors", text)


def test_the_good_one_is_loaded(good, unet, tmp_path) -> None:
    save_file(good, tmp_path / "a.safetensors")
    with load(tmp_path / "a.safetensors", {"unet": unet}).handles["unet"] as handle:
        assert float(handle.delta(Q)[0, 0]) == 4 / 2 * 2


def test_an_adapter_of_another_model(unet, tmp_path) -> None:
    flux, diffusion = build(FLUX), build(UNET)
    path = save(adapter(flux, "flux/attention", rank=2), tmp_path / "a.safetensors", "kohya", model=flux)
    refused(diffusion, path, r"keys are for no layer of unet: 'lora_unet_double_blocks_0_img_attn_")
    wide = nn.ModuleDict({"block": nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(64, 32)})})})
    path = save({"unet": adapter(wide, Q, rank=2)}, tmp_path / "b.safetensors", model={"unet": wide})
    refused(unet, path, r"is of shape \(2, 64\), and \(2, 32\) fits the weight of shape \(32, 32\)")


def test_two_names_that_lead_to_one_layer(tmp_path) -> None:
    """One as a part of a stacked layer, and one by itself."""
    flux = build(FLUX)
    mine = adapter(flux, "transformer_blocks.0.attn.to_[qkv]", rank=2)
    tensors = load_file(save(mine, tmp_path / "a.safetensors", "kohya", model=flux))
    tensors |= load_file(save(mine, tmp_path / "b.safetensors", model=flux))
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError, match=r"are both for transformer_blocks\.0\.attn\.to_.: a layer has one adapter"
    ):
        read(tmp_path / "bad.safetensors", flux)


def test_a_name_that_two_networks_have(good, unet, tmp_path) -> None:
    save_file({key.removeprefix("unet."): one for key, one in good.items()}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"may be of 'text_encoder' or 'text_encoder_2': give only the one that"
    ):
        read(tmp_path / "a.safetensors", {"text_encoder": unet, "text_encoder_2": unet})
    assert read(tmp_path / "a.safetensors", {"text_encoder": unet})["text_encoder"].plan[Q].rank == 2


def test_a_layer_of_which_a_file_has_a_part(good, unet, tmp_path, monkeypatch) -> None:
    """As of projections that are fused in the live network, and apart in the file."""
    from gendiff.lora.files import names
    from gendiff.lora.naming import Original, Rows

    monkeypatch.setattr(names, "original_names", lambda model: {"q": Original("q", (Rows(Q, 0, 16),))})
    monkeypatch.setattr(names, "kohya_names", lambda model: {})
    save_file({"diffusion_model.q.lora_A.weight": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    refused(
        unet,
        tmp_path / "a.safetensors",
        r"is for 16 of the 32 outputs of block\.attn\.to_q, which is stacked",
    )


# ---- files


class Boom:
    """What would leave a mark if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOOM"],)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.ckpt", "a.pth", "a.pkl"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "old pickle"])
def test_pickles_are_never_read(name, kind, unet, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BOOM", str(tmp_path / "boom"))
    path = tmp_path / name
    if kind == "zip":
        torch.save({"a": Boom()}, path)
    else:
        path.write_bytes(pickle.dumps(Boom(), protocol=4 if kind == "pickle" else 2))
    refused(unet, path, r"it is a pickle, which runs code when it is read, whatever its name is: convert it")
    assert not (tmp_path / "boom").exists()
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "adapter_model.bin")
    (tmp_path / "folder" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(
        unet, tmp_path / "folder", r"adapter_model.safetensors, beside .*: other files of weights are pickles"
    )
    assert not (tmp_path / "boom").exists()


def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


ONE = {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]}
FILES = {
    "empty": (b"", "damaged one"),
    "short": (b"abc", "damaged one"),
    "text": (b"<!DOCTYPE html><html>not found</html>", "damaged one: it begins by a header of"),
    "endless header": (
        raw(b"{}", length=2**63),
        "damaged one: it begins by a header of 9,223,372,036,854,775,808",
    ),
    "header past the end": (raw(b"{}", length=1000), "damaged one"),
    "no JSON": (raw(b"{nonsense}"), "its header is damaged"),
    "deep JSON": (raw(b'{"a":' + 100_000 * b"[" + 100_000 * b"]" + b"}"), "its header is damaged"),
    "a list": (raw(b"[]"), "damaged one"),
    "nothing": (raw({}), "there are no tensors in it"),
    "offsets past the end": (raw({STEM: {**ONE, "data_offsets": [0, 2**40]}}, bytes(256)), "damaged one"),
    "shape that lies": (raw({STEM: {**ONE, "shape": [2**31, 2**31]}}, bytes(256)), "damaged one"),
    "shape below 0": (raw({STEM: {**ONE, "shape": [-2, 32]}}, bytes(256)), "damaged one"),
    "offsets over each other": (raw({STEM: ONE, "b": ONE}, bytes(256)), "damaged one"),
    "a hole": (raw({STEM: {**ONE, "data_offsets": [256, 512]}}, bytes(512)), "damaged one"),
    "more than it says": (raw({STEM: ONE}, bytes(300)), "damaged one"),
    "unknown dtype": (raw({STEM: {**ONE, "dtype": "F7"}}, bytes(256)), "damaged one"),
    "a name twice": (
        raw(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", bytes(256)),
        "the name 'a' stands twice",
    ),
    "words that are no text": (raw({"__metadata__": {"a": 1}, STEM: ONE}, bytes(256)), "damaged one"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(case, unet, tmp_path) -> None:
    content, text = FILES[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    refused(unet, tmp_path / "bad.safetensors", text)


def test_a_file_that_begins_as_a_pickle_does_is_read(good, unet, tmp_path) -> None:
    """The first bytes are the length of the header, of which 0x480 looks like a pickle's."""
    path = tmp_path / "a.safetensors"
    save_file(good, path, metadata={"a": ""})
    (plain,) = struct.unpack("<Q", path.read_bytes()[:8])
    for length in (0x480, 0x580):
        save_file(good, path, metadata={"a": (length - plain) * "x"})
        assert path.read_bytes()[:2] == length.to_bytes(2, "little")
        assert read(path, {"unet": unet})["unet"].plan[Q].rank == 2


def test_odd_paths(good, unet, tmp_path) -> None:
    refused(unet, tmp_path / "none.safetensors", "there is no such file")
    (tmp_path / "folder").mkdir()
    refused(
        unet,
        tmp_path / "folder",
        r"a folder of an adapter has adapter_config.json and .* and this one has nothing",
    )
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(unet, tmp_path / "pipe.safetensors", "is no regular file")
    os.symlink("/dev/zero", tmp_path / "zero.safetensors")
    refused(unet, tmp_path / "zero.safetensors", "is no regular file")
    os.symlink("loop.safetensors", tmp_path / "loop.safetensors")
    refused(unet, tmp_path / "loop.safetensors", "there is no such file")
    save_file(good, tmp_path / "a.safetensors")
    os.symlink("a.safetensors", tmp_path / "link.safetensors")  # as the cache of the hub has them
    assert read(tmp_path / "link.safetensors", {"unet": unet})["unet"].plan[Q].rank == 2


# ---- configurations


def folder_of(good, path, config, name=None):
    """A folder of peft with a configuration."""
    folder = path / name if name else path
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{key.removeprefix('unet.')}": one
        for key, one in good.items()
        if not key.endswith("alpha")
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    text = (
        config
        if isinstance(config, str)
        else json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config})
    )
    (folder / "adapter_config.json").write_text(text)
    return path


CONFIGS = {
    "broken": ("{", "adapter_config.json is damaged"),
    "a list": ("[]", "adapter_config.json is damaged: it holds list"),
    "deep": (100_000 * '{"a":', "adapter_config.json is damaged"),
    "too large": ('{"a": "' + 5_000_000 * "x" + '"}', "adapter_config.json is larger than 4,194,304 bytes"),
    "a name twice": ('{"r": 1, "r": 2}', "the name 'r' stands twice in it"),
    "a class": (
        {"_class_name": "os.system"},
        r"its config sets '_class_name' to 'os.system', which is not read here",
    ),
    "unknown setting": (
        {"new_config": {"a": 1}},
        r"sets 'new_config' to .* if it does not, name it in ignore=",
    ),
    "qalora": ({"use_qalora": True}, "sets 'use_qalora' to True"),
    "biases": ({"bias": "all"}, "sets 'bias' to 'all'"),
    "other kind": ({"peft_type": "VERA"}, "says it is 'VERA': adapters here are of LORA, LOHA, LOKR, OFT"),
    "kind of no text": ({"peft_type": ["LORA"]}, "says it is"),
    "pissa": ({"init_lora_weights": "pissa"}, "began by 'pissa', which changed the weights of the model too"),
    "rotations of a series": (
        {"peft_type": "OFT", "use_cayley_neumann": True},
        "use_cayley_neumann to false",
    ),
    "rotations of a series, as usual": ({"peft_type": "OFT"}, "does not set use_cayley_neumann to false"),
    "magnitude missing": (
        {"use_dora": True},
        "is of lora, and the config of the file says dora: the file is not whole",
    ),
    "of another algorithm": (
        {"peft_type": "LOHA", "alpha": 4},
        "is of lora, and the config of the file says loha",
    ),
    "alpha of no number": ({"lora_alpha": "4"}, "sets lora_alpha of .* to '4', no number"),
    "alpha true": ({"lora_alpha": True}, "no number"),
    "alpha without end": ({"lora_alpha": 10**400}, "no number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "no number"),
    "alpha 0": ({"lora_alpha": 0}, "is 0, and strengths are numbers above 0"),
    "no alpha": ({"lora_alpha": None}, "says no alpha for 2 of 2 layers"),
    "patterns of no mapping": ({"alpha_pattern": [1]}, "sets alpha_pattern to .*no mapping"),
    "a slow pattern": (
        {"alpha_pattern": {"(a+)+$": 1}},
        r"has a pattern '\(a\+\)\+\$': patterns are names of layers here",
    ),
    "many stars": ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "has a pattern"),
    "a broken pattern": ({"alpha_pattern": {"*": 1}}, "has a pattern '\\*', which is none"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(case, good, unet, tmp_path) -> None:
    config, text = CONFIGS[case]
    refused(unet, folder_of(good, tmp_path / "folder", config), text)


def test_classes_that_a_configuration_names_are_not_imported(good, unet, tmp_path) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    mapping = {"base_model_class": "Evil", "parent_library": "hostile_module"}
    path = folder_of(
        good, tmp_path / "folder", {"auto_mapping": mapping, "base_model_name_or_path": "../evil"}
    )
    sys.path.insert(0, str(tmp_path))
    try:
        found = read(path, {"unet": unet})
    finally:
        sys.path.remove(str(tmp_path))
    assert "hostile_module" not in sys.modules
    assert found["unet"].plan[Q].scale == 2
    assert set(found.alpha_source["unet"].values()) == {"config"}


def test_settings_of_a_newer_peft(good, unet, tmp_path) -> None:
    """What is not set changes nothing; what is set is named to be ignored, or refused."""
    new = {
        "future_config": None,
        "use_future": False,
        "future_list": [],
        "lora_dropout": 0.1,
        "peft_version": "9",
    }
    new |= {"alpha_pattern": {r"^block\.at.*to_k": 8}, "use_rslora": True}
    found = read(folder_of(good, tmp_path / "a", new), {"unet": unet})["unet"].plan
    assert [round(row.scale, 6) for row in found.rows] == [round(4 / 2**0.5, 6), round(8 / 2**0.5, 6)]
    path = folder_of(good, tmp_path / "b", {"future_list": [1]})
    refused(unet, path, "sets 'future_list'")
    assert read(path, {"unet": unet}, ignore="future_list")["unet"].plan[Q].scale == 2


@pytest.mark.parametrize(
    "pattern",
    [
        "to_k",
        "o_k",
        "attn.to_k",
        r"attn\.to_k",
        "^block.attn.to_k",
        "^to_k",
        "attn",
        "to_[kq]",
        r"b.*\.to_k$",
    ],
)
def test_patterns_are_read_as_peft_reads_them(pattern) -> None:
    from peft.utils.other import get_pattern_key

    found = Settings({"lora_alpha": 1, "alpha_pattern": {pattern: 2}}, "config")
    for name in (K, Q, "to_k", "other.block.attn.to_k", "blockxattnxto_k"):
        assert found.alpha(name) == (2 if get_pattern_key([pattern], name) == pattern else 1), name


def test_words_of_a_header(good, unet, tmp_path) -> None:
    """Settings in the header are read as those beside a file, and refused as they are."""
    bare = {key: one for key, one in good.items() if not key.endswith("alpha")}
    path = tmp_path / "a.safetensors"
    for words, text in (
        ("{", "is damaged"),
        ('{"unet.lora_alpha": "x"}', "no number"),
        ('{"unet.use_qalora": true}', "use_qalora"),
    ):
        save_file(bare, path, metadata={HEADER_KEY: words})
        refused(unet, path, text)
    for words in ('{"unet.lora_alpha": 6}', '{"lora_alpha": 6}', '{"transformer.lora_alpha": 6}'):
        save_file(bare, path, metadata={HEADER_KEY: words})
        assert read(path, {"unet": unet})["unet"].plan[Q].scale == 3
    save_file(good, path, metadata={HEADER_KEY: '{"unet.lora_alpha": 6}'})
    refused(unet, path, r"to_k.alpha' is 4, and the metadata of the file says 6: take one of them out")
    save_file(good, path, metadata={HEADER_KEY: '{"unet.lora_alpha": 4}'})
    assert set(read(path, {"unet": unet}).alpha_source["unet"].values()) == {"tensor"}


def test_folders_of_networks_that_are_not_given(good, unet, tmp_path) -> None:
    folder_of(good, tmp_path / "folder", {}, "unet")
    folder_of(good, tmp_path / "folder", {}, "..evil")
    refused(
        unet, tmp_path / "folder", r"4 of 8 keys are for no layer of unet: '..evil.base_model.model.block"
    )
    (tmp_path / "folder" / "..evil").rename(tmp_path / "folder" / "vae")
    found = read(tmp_path / "folder", {"unet": unet}, ignore="vae.**")
    assert (len(found["unet"]), len(found.unmatched)) == (2, 4)


# ---- on several networks, all or none


def test_nothing_is_put_on_where_one_network_refuses(tmp_path) -> None:
    models = {"transformer": build(FLUX), "unet": build(UNET)}
    made = {
        "transformer": adapter(models["transformer"], "flux/attention", rank=2),
        "unet": adapter(models["unet"], "sd/attention", rank=2),
    }
    path = save(made, tmp_path / "a.safetensors", model=models)
    inject(models["unet"], plan(models["unet"], "sd/attention", rank=2), "style")
    before = {name: numbers(model) for name, model in models.items()}
    with pytest.raises(ValueError, match="the model has an adapter 'style' already"):
        load(path, models, "style")
    assert {name: numbers(model) for name, model in models.items()} == before
    assert not hasattr(models["transformer"], "peft_config")
    flux = build(FLUX)
    flux.fuse_qkv_projections()
    with pytest.raises(ValueError, match="are fused, and an adapter in their parts has no effect"):
        load(path, {"transformer": flux}, ignore="unet.**")


def test_arguments_that_are_refused(good, unet, tmp_path) -> None:
    path, models = tmp_path / "a.safetensors", {"unet": unet}
    save_file(good, path)
    mine = adapter(unet, Q, rank=2)
    for missing in ("ranks", 0, -1, True, float("nan")):
        with pytest.raises(ValueError, match="missing_alpha is 'rank', which kohya's tools assume, a number"):
            read(path, models, missing_alpha=missing)
    with pytest.raises(ValueError, match="an empty segment"):
        read(path, models, ignore="a..b")
    with pytest.raises(TypeError, match="a model is a module, a mapping of components such as"):
        read(path, "unet")
    with pytest.raises(TypeError, match="a component is a torch module, got str for 'unet'"):
        read(path, {"unet": "x"})
    with pytest.raises(ValueError, match="unknown format 'koya'; did you mean 'kohya'"):
        save({"unet": mine}, path, "koya", model=models)
    with pytest.raises(ValueError, match="the adapter of 'model' is by itself: pass model=, the network"):
        save(mine, path)
    with pytest.raises(
        ValueError, match=r"by itself: pass model=, the network that it is for, or \{'unet': "
    ):
        save({"unet": mine}, path)
    with pytest.raises(ValueError, match=r"the adapter may be of 'unet', 'text_encoder': give it as"):
        save(mine, path, model={**models, "text_encoder": unet})
    with pytest.raises(
        ValueError, match=r"a component has the name that a pipeline calls it by, .*'../unet'"
    ):
        save({"../unet": mine}, path, model=models)
    with pytest.raises(ValueError, match="no adapter is given"):
        save({}, path, model=models)
    with pytest.raises(ValueError, match="dtype is a floating-point dtype"):
        save({"unet": mine}, path, model=models, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"a file that ends with \.safetensors, got 'a'"):
        save({"unet": mine}, tmp_path / "a", model=models)
    with pytest.raises(ValueError, match=r"the peft format is a folder, got 'a\.safetensors'"):
        save({"unet": mine}, path, "peft", model=models)
    with pytest.raises(ValueError, match=r"is a folder with something else in it, such as 'a\.safetensors'"):
        save({"unet": mine}, tmp_path, "peft", model=models)
    with pytest.raises(ValueError, match=r"unknown model with names of an original release 'ModuleDict'"):
        save({"unet": mine}, path, "kohya", model=models)
    with pytest.raises(ValueError, match="names the layers of one denoiser, and not those of text_encoder"):
        save({"text_encoder": mine}, path, "original", model={"text_encoder": unet})
    with pytest.raises(ValueError, match=r"'block.attn.to_q' of shape \(32, 32\), which the model has not"):
        save({"unet": mine}, path, "kohya", model={"unet": build(UNET)})
    both = {name: adapter(build(UNET), "mid_block.**.to_q", rank=2) for name in ("unet", "transformer")}
    with pytest.raises(ValueError, match="two networks would both write 'lora_unet_"):
        save(both, path, "kohya", model=dict.fromkeys(both, build(UNET)))
    nowhere = replace(mine, tensors={Q: {part: one.to("meta") for part, one in mine.tensors[Q].items()}})
    with pytest.raises(ValueError, match="has no numbers, being on the meta device"):
        save({"unet": nowhere}, path, model=models)
    two = adapter(unet, f"{Q} | {K}", algorithm="oft", rank=4, rules={Q: {"rank": 8}})
    with pytest.raises(
        ValueError, match="oft has blocks of 4, 8 channels, and a configuration of peft says one"
    ):
        save({"unet": two}, tmp_path / "folder", "peft", model=models)
    assert load_file(path).keys() == good.keys(), "the file that was there"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors"]
