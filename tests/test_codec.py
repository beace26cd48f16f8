"""PixelCodec: exact to and from [-1, 1], idempotent, drops by sample, refuses what is no image or label."""

import pytest
import torch
from torch import nn

from gendiff.codec import Codec, PixelCodec
from gendiff.condition import Condition
from gendiff.random import Rng

IMAGES = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4) / 95
BATCH = {"image": IMAGES, "label": torch.tensor([3, 7]), "id": ["a", "b"]}


def test_pixels_go_to_the_range_of_the_noise_and_back() -> None:
    codec = PixelCodec(channels=3)
    x0 = codec.latents(IMAGES)
    assert (x0.min(), x0.max()) == (-1, 1)
    torch.testing.assert_close(x0, 2 * IMAGES - 1, rtol=0, atol=0)
    torch.testing.assert_close(codec.decode(x0), IMAGES)
    levels = torch.arange(256).reshape(1, 1, 16, 16) / 255
    back = PixelCodec(channels=1).decode(PixelCodec(channels=1).latents(levels))
    assert torch.equal((255 * back).round(), 255 * levels)
    assert codec.decode(torch.full((1, 3, 1, 1), -3.0)).max() == 0
    assert codec.decode(torch.full((1, 3, 1, 1), 3.0)).min() == 1
    assert codec.shape(4, 6) == (3, 4, 6)


def test_encode_consumes_the_image_and_is_idempotent() -> None:
    codec = PixelCodec(channels=3, classes=10)
    once = codec.encode(BATCH)
    assert set(once) == {"x0", "label", "id"}
    assert set(BATCH) == {"image", "label", "id"}
    twice = codec.encode(once)
    assert twice.keys() == once.keys()
    assert all(twice[key] is once[key] for key in once)
    for batch in (BATCH, once):
        x0, cond = codec.inputs(batch)
        assert torch.equal(x0, 2 * IMAGES - 1)
        assert cond == Condition(label=torch.tensor([3, 7]))


def test_without_classes_there_is_no_condition() -> None:
    assert PixelCodec(channels=3).inputs(BATCH)[1] == Condition()


def test_labels_are_dropped_by_sample_with_the_probability_asked_for() -> None:
    """0.2 of 10,000 within four standard deviations, the same for a sample whatever batch it is in."""
    codec, n = PixelCodec(channels=1, classes=10, drop=0.2), 10_000
    batch = {"x0": torch.zeros(n, 1, 1, 1), "label": torch.full((n,), 4)}
    _, cond = codec.inputs(batch, Rng(0, ids=range(n)))
    dropped = cond["label"] == 10
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / n) ** 0.5)
    assert (cond["label"][~dropped] == 4).all()
    part = {key: value[9000:] for key, value in batch.items()}
    assert torch.equal(codec.inputs(part, Rng(0, ids=range(9000, n)))[1]["label"], cond["label"][9000:])
    assert (codec.inputs(batch)[1]["label"] == 4).all()  # no rng: nothing is dropped
    assert (PixelCodec(1, classes=10).inputs(batch, Rng(0, ids=range(n)))[1]["label"] == 4).all()


def test_the_dropped_label_is_the_null_of_the_unconditional_branch() -> None:
    codec = PixelCodec(channels=1, classes=10, drop=0.999999)
    batch = {"x0": torch.zeros(3, 1, 1, 1), "label": torch.tensor([1, 2, 3])}
    _, cond = codec.inputs(batch, Rng(0, ids=range(3)))
    assert cond == codec.null(codec.cond([1, 2, 3]))
    assert codec.null({"label": torch.tensor([1]), "text": torch.ones(1, 2)})["text"].tolist() == [[1, 1]]
    assert codec.null(codec.cond([1]), "text") == codec.null(codec.cond([1]), group="label")
    with pytest.raises(ValueError, match=r"unknown group 'image'"):
        codec.null(cond, "image")


@pytest.mark.parametrize(
    "labels", [[1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.uint8)]
)
def test_labels_of_any_integer_kind(labels) -> None:
    label = PixelCodec(channels=1, classes=10).cond(labels)["label"]
    assert label.tolist() == [1, 2]
    assert label.dtype == torch.int64


def test_labels_that_are_refused() -> None:
    codec = PixelCodec(channels=1, classes=10)
    with pytest.raises(ValueError, match=r"labels lie in \[0, 10\), got 3 … 10; codec.null gives"):
        codec.cond([10, 3])
    with pytest.raises(ValueError, match=r"labels lie in \[0, 10\)"):
        codec.cond([-1])
    for labels in (torch.tensor([0.5]), torch.tensor([True]), torch.tensor([[1]]), torch.tensor(1)):
        with pytest.raises(TypeError, match=r"labels are integers, one per sample, got"):
            codec.cond(labels)
    with pytest.raises(TypeError, match=r"unknown fact 'size'. Accepted: none"):
        codec.cond([1], size=(8, 8))


def test_images_that_are_refused() -> None:
    codec = PixelCodec(channels=3)
    with pytest.raises(ValueError, match=r"pixels lie in \[0, 1\], got 0 … 255; divide 8-bit values by 255"):
        codec.latents(255 * IMAGES)
    with pytest.raises(ValueError, match=r"pixels lie in \[0, 1\], got -1 … 1"):
        codec.latents(2 * IMAGES - 1)
    with pytest.raises(ValueError, match=r"pixels lie in \[0, 1\], got nan"):
        codec.latents(IMAGES.clone().fill_(torch.nan))
    with pytest.raises(ValueError, match=r"images are \[B, 3, H, W\], got \(2, 4, 4, 3\)"):
        codec.latents(IMAGES.movedim(1, -1))
    with pytest.raises(ValueError, match=r"image has shape \(0, 3, 4, 4\).*at least one sample"):
        codec.latents(IMAGES[:0])
    with pytest.raises(TypeError):  # all black, so that the range says nothing
        codec.encode({"image": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)})


def test_batches_that_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"needs 'image' in \[0, 1\], or 'x0' from encode; got \['id', 'label'\]"
    ):
        PixelCodec(channels=3).inputs({"id": ["a"], "label": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"a codec of 10 classes needs 'label' in the batch; got \['x0'\]"):
        PixelCodec(channels=3, classes=10).inputs({"image": IMAGES})


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 0},
        {"classes": -1},
        {"classes": 10, "drop": 1.0},
        {"classes": 10, "drop": -0.1},
        {"drop": 0.1},
    ],
    ids=str,
)
def test_settings_that_are_refused(settings) -> None:
    with pytest.raises(
        ValueError, match=r"channels >= 1, classes >= 0 and drop in \[0, 1\), 0 where there are no"
    ):
        PixelCodec(**{"channels": 1} | settings)


def test_a_codec_is_a_module_without_weights_and_the_base_is_abstract() -> None:
    assert isinstance(PixelCodec(1), nn.Module)
    assert not PixelCodec(1, classes=3).state_dict()
    with pytest.raises(TypeError, match="abstract"):
        Codec()
