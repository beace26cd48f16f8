"""Captions, facts and their absence through a codec, in sampling and in training."""

import copy
from typing import Any

import pytest
import torch

from gendiff import Condition, Denoiser, Objective
from gendiff.interop.diffusers import codec_of, denoiser_of
from gendiff.random import Rng
from gendiff.testing import TINY_PIPELINES, tiny_pipeline
from gendiff.training.twin import twin
from tests.interop.calls import PIPES, PROMPTS, Pipes, masks, pixels

CAPTIONED = [name for name in TINY_PIPELINES if name != "ddpm"]
TRAINED = ("sdxl", "flux")


@pytest.fixture
def pipes() -> Pipes:
    return PIPES


def facts(name: str, rows: int = 2) -> dict[str, Any]:
    if name == "pix2pix":
        return {"source": pixels(rows)}
    return {"image": pixels(rows), "mask": masks(rows)} if name.endswith("inpaint") else {}


# ------------------------------------------------------------------------------------------------ captions


@torch.no_grad()
@pytest.mark.parametrize("name", CAPTIONED)
def test_captions_in_a_batch_and_in_a_call_are_the_same_condition(pipes, name):
    codec = codec_of(pipes[name])
    raw = {"image": pixels(), "caption": PROMPTS} | {k: v for k, v in facts(name).items() if k != "image"}
    _, cond = codec.inputs(raw)
    assert cond == codec.cond(PROMPTS, **facts(name) | ({"size": (64, 32)} if "sdxl" in name else {}))
    assert set(cond) | {"text_mask"} == codec.accepts | {"text_mask"}
    one = codec.cond(PROMPTS[0], **facts(name, 1))  # a string is one caption
    assert one.rows == 1


@torch.no_grad()
@pytest.mark.parametrize("name", CAPTIONED)
def test_the_null_does_not_depend_on_the_caption_and_keeps_the_rest(pipes, name):
    codec = codec_of(pipes[name])
    cond = codec.cond(PROMPTS, **facts(name))
    null, again = codec.null(cond), codec.null(codec.cond(["snow", "x"], **facts(name)))
    assert null == again
    assert null.rows == 2
    for key in set(cond) - {"text", "text_mask", "text_pooled", "size"}:
        assert null[key] is cond[key]
    if name in ("sdxl", "sdxl-inpaint", "sdxl-inpaint-4"):
        assert bool((null["text"] == 0).all() and (null["text_pooled"] == 0).all())
    else:
        assert bool((null["text"] != 0).any())


def test_texts_of_unequal_length_are_padded_and_masked(pipes):
    for name in ("qwen", "z-image"):
        codec = codec_of(pipes[name])
        both, short, long = (codec.cond(c) for c in (PROMPTS, PROMPTS[:1], PROMPTS[1:]))
        assert "text_mask" not in short
        lengths = [one["text"].shape[1] for one in (short, long)]
        assert lengths[0] < lengths[1] == both["text"].shape[1]
        assert both["text_mask"].sum(1).tolist() == lengths
        torch.testing.assert_close(both["text"][0, : lengths[0]], short["text"][0], rtol=1e-4, atol=1e-5)


def test_sizes_crops_and_the_aesthetic_score(pipes):
    base, refiner = codec_of(pipes["sdxl"]), codec_of(pipes["sdxl-refiner"])
    assert base.cond("x")["size"].tolist() == [[64, 64, 0, 0, 64, 64]]  # what the network was made for
    assert base.cond("x", size=(48, 32))["size"].tolist() == [[48, 32, 0, 0, 48, 32]]
    folder = torch.tensor([[100, 90, 5, 6, 64, 32], [70, 80, 0, 0, 64, 32]])
    assert base.cond(PROMPTS, size=folder)["size"].tolist() == folder.tolist()
    _, cond = base.inputs({"image": pixels(), "caption": PROMPTS, "size": folder})
    assert cond["size"].tolist() == folder.tolist()
    assert refiner.cond("x", size=(48, 32))["size"].tolist() == [[48, 32, 0, 0, 6.0]]
    scores = torch.tensor([5.0, 7.0])
    told = refiner.cond(PROMPTS, size=folder, aesthetic=scores)
    assert told["size"].tolist() == [[100, 90, 5, 6, 5], [70, 80, 0, 0, 7]]
    assert refiner.null(told)["size"].tolist() == [[100, 90, 5, 6, 2.5], [70, 80, 0, 0, 2.5]]
    assert told["size"][0, 4] == 5.0  # and is itself as it was
    batch = {"image": pixels(), "caption": PROMPTS, "size": folder, "aesthetic": scores}
    assert refiner.inputs(batch)[1]["size"].tolist() == told["size"].tolist()
    assert refiner.inputs({**batch, "size": told["size"]})[1]["size"].tolist() == told["size"].tolist()
    with pytest.raises(ValueError, match=r"size is \(height, width\), or the six"):
        base.cond("x", size=(64, 64, 0))
    with pytest.raises(TypeError, match="unknown fact of family 'sdxl' 'aesthetic'"):
        base.cond("x", aesthetic=6.0)


def test_the_guidance_scale_that_a_network_is_told(pipes):
    codec = codec_of(pipes["flux"])
    assert codec.cond(PROMPTS)["guidance"].tolist() == [3.5, 3.5]  # what the pipeline's call has
    assert codec_of(pipes["flux"], guidance=1.0).cond("x")["guidance"].tolist() == [1.0]
    assert codec.cond(PROMPTS, guidance=torch.tensor([2.0, 4.0]))["guidance"].tolist() == [2.0, 4.0]
    batch = {"image": pixels(), "caption": PROMPTS}
    assert codec.inputs(batch)[1]["guidance"].tolist() == [3.5, 3.5]
    assert codec.inputs({**batch, "guidance": torch.tensor([1.0, 2.0])})[1]["guidance"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="told no guidance scale"):
        codec_of(pipes["sd3"], guidance=5.0)
    with pytest.raises(ValueError, match="one number, or one for each of 2 samples"):
        codec.cond(PROMPTS, guidance=torch.ones(3))


def test_embeddings_in_the_place_of_captions():
    pipe = tiny_pipeline("sdxl")
    full = codec_of(pipe).cond(PROMPTS)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        setattr(pipe, part, None)
    codec = codec_of(pipe)
    assert codec.cond(text=full["text"], text_pooled=full["text_pooled"]) == full
    with pytest.raises(ValueError, match="loaded without its text encoders"):
        codec.cond(PROMPTS)
    with pytest.raises(ValueError, match="loaded without its text encoders"):
        codec.null(full)
    with pytest.raises(ValueError, match=r"'text_pooled' is missing .* give captions"):
        codec.cond(text=full["text"])
    with pytest.raises(TypeError, match="captions were given, and text too"):
        codec.cond(PROMPTS, text=full["text"])


def test_a_network_with_classes_and_one_with_nothing():
    import diffusers

    codec = codec_of(tiny_pipeline("ddpm"))
    assert codec.cond() == Condition()
    assert codec.groups == ()
    with pytest.raises(TypeError, match="2 captions were given, but this network reads neither"):
        codec.cond(PROMPTS)
    pipe = tiny_pipeline("ddpm")
    config = {key: value for key, value in pipe.unet.config.items() if key[0] != "_"}
    pipe.unet = diffusers.UNet2DModel(**config | {"num_class_embeds": 10}).eval()
    codec, denoise = codec_of(pipe), denoiser_of(pipe)
    cond = codec.cond([3, 7])
    assert cond["label"].tolist() == [3, 7]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.unet(x, torch.tensor(499), class_labels=torch.tensor([3, 7])).sample
        assert torch.equal(denoise(x, 0.5, cond).out, expected)
    assert codec.inputs({"image": pixels(), "label": torch.tensor([1, 2])})[1]["label"].tolist() == [1, 2]
    with pytest.raises(TypeError, match="labels are integers"):
        codec.cond(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="'label' is missing"):
        codec.inputs({"image": pixels()})


# ------------------------------------------------------------------------------------------------ dropping


@torch.no_grad()
@pytest.mark.parametrize("captions", [PROMPTS, PROMPTS[:1]], ids=["two", "one"])
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner", "flux", "qwen", "z-image", "sana", "pix2pix"])
def test_dropped_rows_are_the_null_and_the_others_are_as_they_were(pipes, name, captions):
    codec = codec_of(pipes[name], drop={"text": 0.5})
    rows, ids = 8, [str(i) for i in range(8)]
    batch = codec.encode(
        {"image": pixels(rows), "caption": [captions[i % len(captions)] for i in range(rows)]}
        | ({"source": pixels(rows)} if name == "pix2pix" else {})
    )
    _, kept = codec.inputs(batch)
    _, cond = codec.inputs(batch, Rng(0, ids=ids))
    gone = Rng(0, ids=ids).uniform("drop text", (rows,)) < 0.5
    assert 0 < int(gone.sum()) < rows
    null = codec.null(kept)
    if null["text"].shape != kept["text"].shape:  # then some are padded, and which has to be said
        assert "text_mask" in cond
    for key, value in cond.items():
        for row in range(rows):
            expected = (null if gone[row] else kept).get(key)
            if key == "text_mask":
                length = (
                    (null if gone[row] else kept)["text"].shape[1]
                    if expected is None
                    else int(expected[row].sum())
                )
                assert int(value[row].sum()) == length
            else:
                expected = expected[row]
                found = value[row][: len(expected)] if key == "text" else value[row]
                assert torch.equal(found, expected)


@torch.no_grad()
def test_groups_are_dropped_on_their_own(pipes):
    codec = codec_of(pipes["pix2pix"], drop={"text": 0.4, "channels": 0.4})
    rows = 64
    one = codec.encode({"image": pixels(1), "caption": PROMPTS[:1], "source": pixels(1)})
    batch = {key: value.expand(rows, *value.shape[1:]) for key, value in one.items()}
    _, cond = codec.inputs(batch, Rng(0, ids=range(rows)))
    null = codec.null(Condition(text=one["text"]))["text"]
    no_text = (cond["text"] == null).flatten(1).all(1)
    no_source = (cond["channels"] == 0).flatten(1).all(1)
    share = [float(x.float().mean()) for x in (no_text, no_source, no_text & no_source)]
    assert share == pytest.approx([0.4, 0.4, 0.16], abs=0.15)
    for bad, text in (({"label": 0.1}, "unknown group to drop 'label'"), ({"text": 1.0}, "probability in")):
        with pytest.raises(ValueError, match=text):
            codec_of(pipes["pix2pix"], drop=bad)
    with pytest.raises(ValueError, match="unknown group to drop 'channels'"):
        codec_of(pipes["sd15"], drop={"channels": 0.1})


def test_the_null_follows_a_text_encoder_that_changes():
    pipe = tiny_pipeline("sd15")
    codec, calls = codec_of(pipe), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    cond = codec.cond(PROMPTS)
    first = codec.null(cond)
    assert codec.null(cond) == first
    assert len(calls) == 3  # the captions; and "a", "" of the pipeline's guided encoding, once
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2.0)
    assert codec.null(cond) != first


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_gradient_descent_through_denoiser_and_codec(name):
    pipe = tiny_pipeline(name)
    denoise, codec, objective = denoiser_of(pipe), codec_of(pipe, drop={"text": 0.25}), Objective()
    ids = [0, 1]
    batch = {"image": pixels(), "caption": PROMPTS}

    def loss() -> torch.Tensor:
        rng = Rng(0, ids=ids)
        x0, cond = codec.inputs(batch, rng)
        return objective(denoise, x0, cond, rng=rng).loss.mean()

    before = loss()
    before.backward()
    assert not any(p.requires_grad for p in codec.parameters())
    trained = {key: p for key, p in denoise.named_parameters() if p.grad is not None}
    assert len(trained) > 0.9 * len(list(denoise.parameters()))
    with torch.no_grad():
        scale = sum(p.grad.square().sum() for p in trained.values()).sqrt()
        for p in trained.values():
            p -= 1e-2 * p.grad / scale
    assert loss().item() < before.item()


def test_a_text_encoder_that_trains_encodes_when_it_is_asked_for():
    pipe = tiny_pipeline("sdxl")
    codec = codec_of(pipe, train=("text_encoder_2",), drop={"text": 0.5})
    batch = {"image": pixels(), "caption": PROMPTS}
    encoded = codec.encode(batch)
    assert encoded["caption"] == PROMPTS
    assert set(encoded) == {"moments", "caption"}
    _, cond = codec.inputs(encoded, Rng(0, ids=[0, 1]))
    cond["text_pooled"].sum().backward()
    assert not any(p.requires_grad for p in (*pipe.vae.parameters(), *pipe.text_encoder.parameters()))
    assert pipe.text_encoder_2.text_projection.weight.grad is not None
    with pytest.raises(ValueError, match="nothing in text_encoder requires a gradient"):
        codec_of(pipe, train=("text_encoder",))
    with pytest.raises(ValueError, match="unknown text encoder to train 'unet'"):
        codec_of(pipe, train=("unet",))
    with pytest.raises(TypeError, match="train is a sequence of names"):
        codec_of(pipe, train="text_encoder")


@torch.no_grad()
def test_a_copy_encodes_with_its_own_text_encoder():
    pipe = tiny_pipeline("sd15")
    codec = codec_of(pipe, train=("text_encoder",))
    weights = {f"codec.text_encoder.{k}": p.detach() * 1.5 for k, p in pipe.text_encoder.named_parameters()}
    averaged: Any = twin({"codec": codec}, weights)["codec"]
    other = copy.deepcopy(pipe.text_encoder)
    for key, p in other.named_parameters():
        p.copy_(weights[f"codec.text_encoder.{key}"])
    live = codec.cond(PROMPTS)["text"]
    pipe.text_encoder = other
    expected = codec_of(pipe).cond(PROMPTS)["text"]
    assert torch.equal(averaged.cond(PROMPTS)["text"], expected)
    assert not torch.equal(live, expected)


# ------------------------------------------------------------------------------------------------- errors


def test_bad_captions_facts_and_groups(pipes):
    codec = codec_of(pipes["sd15"])
    with pytest.raises(TypeError, match=r"captions are strings, got int 3"):
        codec.cond([3])
    with pytest.raises(ValueError, match="there is no caption"):
        codec.cond([])
    with pytest.raises(ValueError, match=r"captions are missing; this network reads \['text'\]"):
        codec.cond()
    with pytest.raises(TypeError, match="unknown fact of family 'sd' 'size'"):
        codec.cond(PROMPTS, size=(64, 64))
    with pytest.raises(ValueError, match=r"unknown group 'label'. Accepted: 'text'"):
        codec.null(codec.cond(PROMPTS), "label")
    with pytest.raises(ValueError, match="the condition has no 'text' that could be replaced"):
        codec.null(Condition())
    with pytest.raises(ValueError, match=r"one row per sample|1 row"):
        codec_of(pipes["pix2pix"]).cond(PROMPTS, source=pixels(3))


def test_a_condition_fits_a_network_of_another_dtype():
    pipe = tiny_pipeline("flux")
    codec, denoise = codec_of(pipe), denoiser_of(pipe)
    assert isinstance(denoise, Denoiser)
    pipe.transformer.to(torch.bfloat16)
    x = torch.randn(2, *codec.shape(64, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoised = denoise(x, 0.5, codec.cond(PROMPTS))
    assert denoised.out is not None
    assert (denoised.out.dtype, denoised.x0.dtype) == (torch.bfloat16, torch.float32)
