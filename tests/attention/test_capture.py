"""Captured maps: those of a plain computation, beside a layer that is not disturbed, whatever runs it."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from gendiff.attention import Call, Grid, Kind, Steps, sites, stack
from gendiff.attention.capture import Capture, seen
from gendiff.attention.kernels import probabilities
from gendiff.attention.words import words_of
from tests.attention.models import FLUX, SD3, UNET, Kept, build, run, said, state
from tests.zoo import QUIET, ZOO
from tests.zoo.core import noise

THREE = (UNET, SD3, FLUX)
TEXT = Kind.CROSS | Kind.JOINT | Kind.SINGLE
FIRST = {SD3: False, FLUX: True}  # whether the text is before the image
ROWS = ("uncond", "cond")


@pytest.fixture(scope="module", params=THREE)
def three(request):
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def unet():
    return build(UNET)


def heads_of(layer, linear, norm, x) -> Tensor:
    split = getattr(layer, linear)(x).unflatten(-1, (layer.heads, -1))
    made = getattr(layer, norm, None)
    return split if made is None else made(split)


def plain_map(layer, kind, first, x, text, rotary) -> Tensor:
    """Probabilities [B, heads, image tokens, text tokens] by the layer's own weights, all at once."""
    given = text if kind == "cross" else x
    q, k = heads_of(layer, "to_q", "norm_q", x), heads_of(layer, "to_k", "norm_k", given)
    if kind == "joint":
        more = [heads_of(layer, f"add_{p}_proj", f"norm_added_{p}", text) for p in "qk"]
        q, k = (torch.cat([b, a] if first else [a, b], 1) for a, b in zip((q, k), more, strict=True))
    if rotary is not None:
        from diffusers.models.embeddings import apply_rotary_emb

        q, k = (apply_rotary_emb(one, rotary, sequence_dim=1) for one in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    probs = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if kind == "cross":
        return probs
    return probs[:, :, 5:, :5] if first else probs[:, :, :-5, -5:]


def plain_maps(model, name, **changes) -> dict[str, Tensor]:
    """What `plain_map` says at every site with text, from what the layers are called with."""
    found: dict[str, Tensor] = {}
    handles = []
    for site in sites(model).on(TEXT):

        def note(layer, args, kwargs, site=site):
            x = args[0] if args else kwargs["hidden_states"]
            text, rotary = kwargs.get("encoder_hidden_states"), kwargs.get("image_rotary_emb")
            found[site.name] = plain_map(layer, site.kind, FIRST.get(name), x, text, rotary)

        handles.append(site.module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        run(model, name, **changes)
    for handle in handles:
        handle.remove()
    return found


def as_map(probs: Tensor) -> Tensor:
    """[tokens, H, W] of probabilities, of the zoo's images, which are 2 to 3."""
    side = int((probs.shape[2] / 6) ** 0.5)
    return probs.mean((0, 1)).T.unflatten(1, (2 * side, 3 * side))


def brought(maps: Tensor, size) -> Tensor:
    return functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def captured(model, name, calls=1, parts=None, on=TEXT, when=None, only=None, **settings) -> Capture:
    capture = Capture(**settings)
    with stack(model, rows=parts) as one:
        one.add(capture, on=on, when=when, rows=only)
        for _ in range(calls):
            said(model, name)
    return capture


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- what is gathered


def test_maps_are_those_of_a_plain_computation(three) -> None:
    name, model = three
    capture, truth = captured(model, name), plain_maps(model, name)
    assert set(capture.sites) == set(truth)
    assert all(close(capture.of(site), as_map(probs)) for site, probs in truth.items())
    size = max((as_map(probs).shape[1:] for probs in truth.values()), key=lambda one: one.numel())
    assert close(capture.maps(), torch.stack([brought(as_map(one), size) for one in truth.values()]).mean(0))
    assert close(
        capture.maps((5, 7)), torch.stack([brought(as_map(one), (5, 7)) for one in truth.values()]).mean(0)
    )


def test_the_output_is_bit_equal_and_nothing_is_left(three) -> None:
    name, model = three
    plain, before = said(model, name), state(model)
    with stack(model) as one:
        one.add(Capture(), on=TEXT)
        assert torch.equal(said(model, name), plain)
        assert "eager" not in repr(one.explain())
    assert state(model) == before


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pieces_of_the_queries_change_nothing(three, chunk: int) -> None:
    name, model = three
    assert close(captured(model, name, chunk=chunk).maps(), captured(model, name).maps())


def test_tokens_are_columns_and_words_the_mean_of_theirs(three) -> None:
    name, model = three
    every = captured(model, name).maps()
    assert close(captured(model, name, tokens=[3, 0]).maps(), every[[3, 0]])
    words = captured(model, name, tokens={"hat": [1, 4], "cat": [2]})
    assert words.words == ("hat", "cat")
    assert close(words.maps(), torch.stack([every[[1, 4]].mean(0), every[2]]))
    single = captured(model, name, tokens=[2, 1, 4]).of(words.sites[0])
    assert close(words.of(words.sites[0]), torch.stack([single[1:].mean(0), single[0]]))


@pytest.mark.parametrize("by", ["rows", "only"])
def test_rows_are_those_of_the_context(three, by: str) -> None:
    name, model = three
    truth = plain_maps(model, name)
    for row, part in enumerate(ROWS):
        capture = captured(model, name, parts=ROWS, **{by: part})
        assert all(close(capture.of(site), as_map(probs[row : row + 1])) for site, probs in truth.items())
    assert close(capture.maps(), captured(model, name, parts={"b": slice(1, 2)}, only="b").maps())


def test_steps_add_up_to_their_mean_or_their_sum(unet) -> None:
    truths = []
    capture, total = Capture(), Capture(reduce="sum")
    with stack(unet) as one, torch.no_grad():
        one.add(capture, on=Kind.CROSS)
        one.add(total, on=Kind.CROSS)
        for seed in range(3):
            run(unet, UNET, sample=noise(2, 4, 8, 12, seed=seed))
    for seed in range(3):
        truths.append(plain_maps(unet, UNET, sample=noise(2, 4, 8, 12, seed=seed)))
    for site in capture.sites:
        three = torch.stack([as_map(truth[site]) for truth in truths])
        heads = truths[0][site].shape[1]
        assert close(capture.of(site), three.mean(0))
        assert close(total.of(site), heads * three.sum(0))
    assert close(total.maps(), sum(brought(total.of(site), (8, 12)) for site in total.sites))


def test_a_window_of_the_stack_is_kept(unet) -> None:
    inside = Capture()
    with stack(unet) as one, torch.no_grad():
        one.add(inside, on=Kind.CROSS, when=Steps(1, 2))
        for seed in range(3):
            run(unet, UNET, sample=noise(2, 4, 8, 12, seed=seed))
    truth = plain_maps(unet, UNET, sample=noise(2, 4, 8, 12, seed=1))
    assert all(close(inside.of(site), as_map(probs)) for site, probs in truth.items())
    with pytest.raises(ValueError, match="nothing was gathered"):
        captured(unet, UNET, on=Kind.CROSS, when=Steps(7, 8)).maps()


def test_another_size_needs_a_reset_or_a_common_size(unet) -> None:
    large = noise(2, 4, 16, 24)
    capture, common = Capture(), Capture(size=(6, 9))
    with stack(unet) as one, torch.no_grad():
        handle = one.add(capture, on=Kind.CROSS)
        run(unet, UNET)
        with pytest.raises(ValueError, match=r"reset\(\)"):
            run(unet, UNET, sample=large)
        capture.reset()
        run(unet, UNET, sample=large)
        handle.remove()
        one.add(common, on=Kind.CROSS)
        run(unet, UNET)
        run(unet, UNET, sample=large)
    assert close(capture.maps(), captured_at(unet, large).maps())
    assert capture.maps().shape == (5, 16, 24)
    site = common.sites[0]
    both = captured(unet, UNET).of(site), captured_at(unet, large).of(site)
    assert close(common.of(site), sum(brought(one, (6, 9)) for one in both) / 2)


def captured_at(model, sample) -> Capture:
    capture = Capture()
    with stack(model) as one, torch.no_grad():
        one.add(capture, on=Kind.CROSS)
        run(model, UNET, sample=sample)
    return capture


def test_a_mask_a_scale_and_grouped_heads_are_honoured() -> None:
    q, k = noise(2, 4, 6, 8), noise(2, 2, 5, 8)
    keep = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[..., 0] = True
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
    truth = scores.masked_fill(~keep, -torch.inf).softmax(-1).mean((0, 1))
    for chunk in (1, 4, 6):
        assert close(seen(q, k, Call(mask=keep, scale=0.3), slice(1, 3), chunk), truth[:, 1:3])
    padding = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    truth = scores.masked_fill(~padding[:, None, None], -torch.inf).softmax(-1).mean((0, 1))
    assert close(seen(q, k, Call(mask=padding, scale=0.3, padding=True), slice(None), 4), truth)


# ---- where it runs


@pytest.mark.filterwarnings(*QUIET)
def test_every_class_whose_text_is_known_gives_maps_and_the_rest_say_why() -> None:
    gathered, refused = [], []
    for name in ZOO:
        model = build(name)
        found = [site for site in sites(model) if site.kernels and site.kind in ("cross", "joint", "single")]
        if not found:
            continue
        plain = said(model, name)
        try:
            capture = captured(model, name, on=found)
        except ValueError as error:
            refused.append(name)
            if not any(word in str(error) for word in ("no grid", "whose length says")):
                raise
            continue
        for site in capture.sites:
            one = capture.of(site)
            assert 0 < one.mean() <= 1, name
            assert one.isfinite().all(), name
            if all(site.kind == "cross" for site in found):
                assert close(one.sum(0), torch.ones(one.shape[1:])), name
        assert torch.equal(said(model, name), plain), name
        gathered.append(name)
    assert len(gathered) >= 50, refused


def graphs(model, name, with_capture: bool, whole: bool) -> tuple[int, Capture]:
    torch._dynamo.reset()
    counter, capture = CompileCounter(), Capture()
    called = torch.compile(model, fullgraph=True, backend=counter) if whole else model
    blocks = [one for one in model.modules() if hasattr(one, "attn2") or hasattr(one, "norm1_context")]
    for block in blocks if not whole else ():
        block.compile(fullgraph=True, backend=counter)
    with stack(model) as one, torch.no_grad():
        one.context.size = Grid(1, 4, 6)  # of Flux, whose packed tokens do not say it
        if with_capture:
            one.add(capture, on=TEXT)
        for _ in range(3):
            run(called, name)
    for block in blocks:
        block._compiled_call_impl = None
    return counter.frame_count, capture


@pytest.mark.parametrize(("name", "whole"), [(SD3, True), (FLUX, False), (UNET, False)])
def test_compiled_it_gathers_the_same_in_no_more_graphs(name: str, whole: bool) -> None:
    model = build(name)
    stock = 1 if whole else graphs(model, name, False, whole)[0]
    ours, capture = graphs(model, name, True, whole)
    assert 0 < ours == stock
    assert close(capture.maps(), captured(model, name, calls=3).maps())
    assert {float(one.count) for one in capture._sums.values()} == {3.0}


def test_memory_stays_where_it_is(unet) -> None:
    capture = Capture()
    with stack(unet) as one:
        one.add(capture, on=Kind.CROSS)
        said(unet, UNET)
        places = [(a.total.data_ptr(), a.count.data_ptr()) for a in capture._sums.values()]
        said(unet, UNET)
        capture.reset()
        assert all(float(a.count) == 0 and not a.total.any() for a in capture._sums.values())
        said(unet, UNET)
        assert places == [(a.total.data_ptr(), a.count.data_ptr()) for a in capture._sums.values()]
    assert close(capture.maps(), captured(unet, UNET).maps())


def test_no_gradient_passes_through_it(unet) -> None:
    capture = Capture()
    with stack(unet) as one:
        one.add(capture, on=Kind.CROSS)
        run(unet, UNET).sum().backward()
    assert not capture.maps().requires_grad
    unet.zero_grad(set_to_none=True)


def test_two_stacks_and_two_captures_do_not_meet(unet) -> None:
    first, second = Capture(tokens=[0]), Capture(tokens=[1])
    with stack(unet) as one, stack(unet) as other:
        handle = one.add(first, on=Kind.CROSS)
        other.add(second, on=Kind.CROSS)
        said(unet, UNET)
        handle.remove()
        said(unet, UNET)
    every = captured(unet, UNET).maps()
    assert close(torch.cat([first.maps(), second.maps()]), every[:2])
    counts = [{float(a.count) for a in capture._sums.values()} for capture in (first, second)]
    assert counts == [{1.0}, {2.0}]


# ---- words and refusals


class Slow:
    """A tokenizer without offsets, of pieces of three letters."""

    padding_side, model_max_length, is_fast = "right", 9, False

    def __call__(self, text, add_special_tokens=True):
        parts = [word[i : i + 3] for word in text.lower().split() for i in range(0, len(word), 3)]
        ids = [sum(ord(c) * 7**i for i, c in enumerate(part)) for part in parts]
        return type("Out", (), {"input_ids": [1, *ids, 2] if add_special_tokens else ids})


def fast():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"a": 1, "cat": 2, "s": 3, "wearing": 4, "red": 5, "hat": 6, ".": 7, "?": 0}
    made = Tokenizer(models.WordLevel(words, "?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"cat|\w+?(?=s\b)|\w+|\."), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_words_are_found_by_their_tokens() -> None:
    prompt = "a cat wearing a red hat"
    found = words_of(Slow(), prompt, ["a", "cat", "wearing", "a red"])
    assert found == {"a": [1, 6], "cat": [2], "wearing": [3, 4, 5], "a red": [6, 7]}
    assert words_of(fast(), "a cat wearing a red hat. Cats", ["a", "cat", "red hat", "cats"]) == {
        "a": [0, 3],
        "cat": [1],
        "red hat": [4, 5],
        "cats": [7, 8],
    }


@pytest.mark.parametrize(
    ("word", "says"), [("dog", "did you mean|Accepted: 'a', 'cat'"), ("hat", "behind the 9")]
)
def test_words_that_are_not_there_are_named(word: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        words_of(Slow(), "a cat wearing a very red hat", [word])


def test_what_is_wrong_is_named(unet) -> None:
    left = Slow()
    left.padding_side = "left"
    with pytest.raises(ValueError, match="pads in front"):
        words_of(left, "a cat", ["cat"])
    for wrong in ([], {}, [-1], {"cat": []}):
        with pytest.raises(ValueError, match="places >= 0"):
            Capture(wrong)
    with pytest.raises(ValueError, match="chunk"):
        Capture(chunk=0)
    with pytest.raises(ValueError, match="nothing was gathered"):
        Capture().maps()
    with stack(unet, rows=ROWS) as one:
        with pytest.raises(ValueError, match="none of 8 sites has text"):
            one.add(Capture(), on=Kind.SELF)
        with pytest.raises(ValueError, match="did you mean 'cond'"):
            one.add(Capture(rows="con"), on=Kind.CROSS)
        capture = Capture(rows="cond", tokens=[7])
        one.add(capture)
        with pytest.raises(ValueError, match="already"):
            one.add(capture, on="mid_block.**.attn2")
        with pytest.raises(IndexError, match=r"5 tokens at .*token 7"):
            said(unet, UNET)
    with stack(unet, rows=ROWS) as one:
        one.add(Capture(rows="cond"), on=Kind.CROSS, rows="uncond")
        with pytest.raises(ValueError, match="'cond' was added"):
            said(unet, UNET)
    with pytest.raises(ValueError, match="unknown site"):
        captured(unet, UNET).of("mid")


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "QwenImageTransformer2DModel"])
def test_what_the_layer_masks_is_not_seen(name, chunk) -> None:
    """Where the padding of the text is masked: what the slow kernel says, text columns, image rows."""
    model = build(name)
    on = Kind.CROSS if "PixArt" in name else Kind.JOINT
    with stack(model) as one:
        kept, capture = Kept(), Capture(chunk=chunk)
        one.add(kept, on=on)
        one.add(capture, on=on)
        said(model, name)
    for site in one.sites.on(on):
        probs, text = kept.probs[site.name], one.context.text
        part = probs if site.kind == "cross" else probs[:, :, text:, :text]
        assert (part == 0).any(), "nothing is masked here"
        assert close(capture.of(site.name), as_map(part))


def test_a_causal_order_is_honoured(randn64) -> None:
    q, k = randn64(1, 2, 6, 4), randn64(1, 2, 6, 4)
    truth = probabilities(q, k, Call(causal=True)).mean((0, 1))
    for chunk in (1, 4, 9):
        assert close(seen(q, k, Call(causal=True), slice(None), chunk), truth)
