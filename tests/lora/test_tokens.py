"""New words: what they say is what a grown table says; only they train; and nothing of them stays behind."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer

from gendiff.interop.diffusers import codec_of, denoiser_of
from gendiff.lora import inject, plan, tokens
from gendiff.lora.words import Words
from gendiff.testing import tiny_pipeline
from gendiff.testing.text import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from gendiff.training import Trainer
from gendiff.training.saving import load_pretrained, save_pretrained
from tests.training.toy import config
from tests.zoo import QUIET

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

KINDS = ("clip", "projected", "pools at the largest id", "t5", "umt5")
TEXTS = ["a photo of a <toy> in the snow", "a red fox", "<toy> and <cat> <cat>_1 <cat>_2"]
WORDS = {"<toy>": "fox", "<cat>": ("a red cat", 3)}
FRESH: dict[str, tuple] = {}


def made(kind="clip", dtype=torch.float32):
    """A text encoder and its tokenizer, always the same."""
    if kind not in FRESH:
        tokenizer = t5_tokenizer() if "t5" in kind else clip_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if "t5" in kind:
                encoder = t5_encoder(tokenizer, width=16, multilingual=kind == "umt5")
            else:
                encoder = clip_encoder(tokenizer, width=16, projected=kind != "clip")
        FRESH[kind] = encoder.eval(), tokenizer
    encoder, tokenizer = copy.deepcopy(FRESH[kind])
    if kind == "pools at the largest id":
        encoder.config.eos_token_id = encoder.text_model.eos_token_id = 2
    return encoder.to(dtype), tokenizer


def ids_of(tokenizer, texts=TEXTS):
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def said(encoder, ids):
    with torch.no_grad():
        return tuple(encoder(ids).to_tuple())


def grown(kind, dtype, tokenizer, rows):
    """The encoder as diffusers makes it: its table made longer, and the rows written into it."""
    encoder, _ = made(kind, dtype)
    length = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
    encoder.resize_token_embeddings(length, mean_resizing=False)
    names = [f"{word}_{i}" if i else word for word, one in rows.items() for i in range(len(one))]
    encoder.requires_grad_(False)  # torch multiplies in another order where a weight is to be trained
    weight = encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[tokenizer.convert_tokens_to_ids(names)] = torch.cat(list(rows.values())).to(dtype)
    return encoder


def look(encoder, tokenizer):
    """All that is to come back: bits, modules by identity, what trains, and what a tokenizer is."""
    backend = getattr(tokenizer, "_tokenizer", None)
    return SimpleNamespace(
        bits={name: value.clone() for name, value in encoder.state_dict().items()},
        modules={
            (name, key): id(child)
            for name, one in encoder.named_modules()
            for key, child in one._modules.items()
        },
        parameters={name: (id(one), one.requires_grad) for name, one in encoder.named_parameters()},
        modes=[one.training for one in encoder.modules()],
        tokenizer=(
            {key: id(value) for key, value in vars(tokenizer).items()},
            None if backend is None else backend.to_str(),
            tokenizer.get_vocab(),
            tokenizer.get_added_vocab(),
            len(tokenizer),
            tokenizer(TEXTS).input_ids,
        ),
    )


def assert_same(before, after):
    assert before.bits.keys() == after.bits.keys()
    assert all(torch.equal(value, after.bits[name]) for name, value in before.bits.items())
    for name in ("modules", "parameters", "modes", "tokenizer"):
        assert getattr(before, name) == getattr(after, name), name


# ---- what they say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_table_says_the_same(kind, dtype) -> None:
    """Also pooled, and in the gradient of the rows; the words change what is said."""
    encoder, tokenizer = made(kind, dtype)
    plain = said(encoder, ids_of(tokenizer, ["a red fox"]))
    handle = tokens(encoder, tokenizer, WORDS)
    with torch.no_grad():
        for one in handle.parameters():
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
    assert all(one.dtype == torch.float32 for one in handle.parameters())
    ids, other = ids_of(tokenizer), grown(kind, dtype, tokenizer, handle.embeddings())
    outputs, expected = encoder(ids), other(ids)
    for one, two in zip(outputs.to_tuple(), expected.to_tuple(), strict=True):
        assert torch.equal(one, two)
    assert all(map(torch.equal, said(encoder, ids_of(tokenizer, ["a red fox"])), plain))
    with torch.no_grad():
        next(handle.parameters()).add_(1)
    assert not torch.equal(encoder(ids)[0][0], outputs[0][0])
    assert torch.equal(encoder(ids)[0][1], outputs[0][1])  # a caption without the words

    weight = other.get_input_embeddings().weight.requires_grad_(True)
    expected = other(ids)
    with torch.no_grad():
        next(handle.parameters()).sub_(1)
    outputs = encoder(ids)
    outputs[0].float().square().mean().backward()
    expected[0].float().square().mean().backward()
    first = tokenizer.convert_tokens_to_ids("<toy>")
    (rows,) = handle.parameters()
    torch.testing.assert_close(
        rows.grad.to(dtype),
        weight.grad[first : first + 4],
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-7,
    )
    assert [name for name, one in encoder.named_parameters() if one.grad is not None] == [
        name for name, _ in handle.named_parameters()
    ]


@pytest.mark.parametrize("spare", [-3, 0, 2, 4, 9], ids=lambda spare: f"{spare} spare rows")
def test_a_table_that_is_shorter_or_longer_than_the_vocabulary(spare) -> None:
    """New ids may lie in spare rows, across the end of the table, or beyond a gap behind it."""
    tokenizer = t5_tokenizer()
    if spare < 0:
        tokenizer.add_tokens([f"<other-{i}>" for i in range(-spare)])
    with torch.random.fork_rng():
        encoder = t5_encoder(tokenizer, width=16).eval()
        encoder.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
    before = look(encoder, tokenizer)
    table = encoder.get_input_embeddings().weight
    with tokens(encoder, tokenizer, WORDS) as handle:
        assert encoder.get_input_embeddings().weight is table
        rows = torch.cat(list(handle.embeddings().values()))
        first = tokenizer.convert_tokens_to_ids("<toy>")
        assert first == len(tokenizer) - 4
        full = torch.zeros(max(first + 4, len(table)), 16)
        full[: len(table)] = table.detach()
        full[first : first + 4] = rows
        ids = ids_of(tokenizer)
        assert int(ids.max()) == first + 3
        assert torch.equal(encoder.encoder.embed_tokens(ids), F.embedding(ids, full))
    assert_same(before, look(encoder, tokenizer))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_compiled_encoder_is_one_graph(kind) -> None:
    encoder, tokenizer = made(kind)
    with tokens(encoder, tokenizer, WORDS) as handle:
        ids = ids_of(tokenizer)
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids)[0], encoder(ids)[0])
        with torch.no_grad():
            next(handle.parameters()).mul_(2)
        assert torch.equal(compiled(ids)[0], encoder(ids)[0]), "an update is seen"


def test_nothing_is_read_on_the_host() -> None:
    words = Words(nn.Embedding(8, 4, device="meta"))
    words.add(6, nn.Parameter(torch.ones(5, 4, device="meta")))
    assert words(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 4)


# ---- how they begin


def test_they_begin_as_the_mean_of_their_text() -> None:
    encoder, tokenizer = made()
    weight = encoder.get_input_embeddings().weight.detach().clone()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("fox", "toy", "a red toy")]
    assert [len(one) for one in ids] == [1, 3, 5]
    given = torch.randn(2, 16)
    with tokens(
        encoder,
        tokenizer,
        {"<0>": "fox", "<1>": "toy", "<2>": ("a red toy", 2), "<3>": given, "<4>": given[0]},
    ) as handle:
        found = handle.embeddings()
        given.zero_()  # what was given is copied
    for word, one, vectors in zip(("<0>", "<1>", "<2>"), ids, (1, 1, 2), strict=True):
        expected = torch.stack([weight[i] for i in one]).mean(0)
        torch.testing.assert_close(found[word], expected.expand(vectors, 16), rtol=1e-6, atol=1e-7)
    assert bool(found["<3>"].any())
    assert torch.equal(found["<3>"][:1], found["<4>"])
    assert {word: tuple(one.shape) for word, one in found.items()} == {
        "<0>": (1, 16), "<1>": (1, 16), "<2>": (2, 16), "<3>": (2, 16), "<4>": (1, 16)
    }  # fmt: skip


def test_a_word_that_begins_as_another_new_one() -> None:
    encoder, tokenizer = made()
    with tokens(encoder, tokenizer, {"<toy>": "fox"}) as first:
        with torch.no_grad():
            next(first.parameters()).add_(1)
        with tokens(encoder, tokenizer, {"<other>": "<toy>"}) as second:
            assert torch.equal(second.embeddings()["<other>"], first.embeddings()["<toy>"])


# ---- only they train


@pytest.mark.parametrize("kind", ["projected", "t5"])
def test_only_the_rows_move(kind) -> None:
    """By AdamW with weight decay over all that trains, in a bfloat16 encoder."""
    encoder, tokenizer = made(kind, torch.bfloat16)
    encoder.requires_grad_(True)
    before = {name: one.clone() for name, one in encoder.state_dict().items()}
    handle = tokens(encoder, tokenizer, WORDS)
    rows = next(handle.parameters())
    start = rows.detach().clone()
    trained = [one for one in encoder.parameters() if one.requires_grad]
    assert [id(one) for one in trained] == [id(rows)]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        encoder(ids_of(tokenizer))[0].float().square().mean().backward()
        optimizer.step()
    assert bool((rows != start).all(1).all()), "each of the rows was read, and a small update is not lost"
    assert all(torch.equal(encoder.state_dict()[name], one) for name, one in before.items())


def test_param_groups_name_the_rows() -> None:
    encoder, tokenizer = made("t5")
    handle = tokens(encoder, tokenizer, WORDS)
    assert [name for name, _ in handle.named_parameters()] == ["shared.new_tokens.0"]
    (group,) = handle.param_groups(5e-4)
    assert (group.pattern, group.learning_rate, group.weight_decay) == ("**.shared.new_tokens.0", 5e-4, 0.0)


# ---- nothing stays


@pytest.mark.parametrize("raises", [False, True], ids=["", "after an exception"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_before(kind, raises) -> None:
    encoder, tokenizer = made(kind)
    for i, one in enumerate(encoder.parameters()):
        one.requires_grad_(i % 3 > 0)
    before = look(encoder, tokenizer)
    handle = tokens(encoder, tokenizer, WORDS)
    with pytest.raises(RuntimeError, match="on purpose") if raises else nullcontext(), handle:
        assert repr(handle) == "TokensHandle(<toy> [1], <cat> [3])"
        assert tokenizer.tokenize("<cat> <cat>_1") == ["<cat>", "<cat>_1"]
        assert len(tokenizer) == before.tokenizer[4] + 4
        assert encoder.dtype == torch.float32
        tokenizer(TEXTS, padding=True, truncation=True, max_length=5)  # which a fast one remembers
        tokenizer.add_tokens(["<later>"])
        if raises:
            raise RuntimeError("on purpose")
    assert_same(before, look(encoder, tokenizer))
    assert not handle.attached
    assert repr(handle) == "TokensHandle(<toy> [1], <cat> [3], removed)"
    handle.remove()  # a second time changes nothing
    with pytest.raises(RuntimeError, match="<toy>, <cat> were removed from their encoder"):
        handle.embeddings()


def test_a_mode_that_was_changed_meanwhile_stays() -> None:
    encoder, tokenizer = made("t5")
    with tokens(encoder, tokenizer, WORDS):
        encoder.train()
    assert all(one.training for one in encoder.modules())


def test_a_slow_tokenizer() -> None:
    """Of bytes, as Hunyuan's second one; all its state is in Python."""
    tokenizer = ByT5Tokenizer()
    encoder = t5_encoder(tokenizer, width=16).eval()
    before = look(encoder, tokenizer)
    with tokens(encoder, tokenizer, WORDS) as handle:
        assert tokenizer.tokenize("a<toy>") == ["a", "<toy>"]
        ids = tokenizer("<toy>", add_special_tokens=False, return_tensors="pt").input_ids
        assert torch.equal(encoder.encoder.embed_tokens(ids)[0], handle.embeddings()["<toy>"])
    assert_same(before, look(encoder, tokenizer))


def test_two_sets_of_words() -> None:
    """They stack, both train, and come off in the order in which a pile does."""
    encoder, tokenizer = made("t5")
    before = look(encoder, tokenizer)
    first = tokens(encoder, tokenizer, {"<toy>": "fox"})
    between = look(encoder, tokenizer)
    second = tokens(encoder, tokenizer, {"<cat>": ("cat", 3)})
    with torch.no_grad():
        for i, one in enumerate((*first.parameters(), *second.parameters())):
            one.add_(i + 1.0)
    assert [name for name, one in encoder.named_parameters() if one.requires_grad] == [
        "shared.new_tokens.0",
        "shared.new_tokens.1",
    ]
    other = grown("t5", torch.float32, tokenizer, first.embeddings() | second.embeddings())
    assert torch.equal(encoder(ids_of(tokenizer))[0], other(ids_of(tokenizer))[0])
    with pytest.raises(RuntimeError, match=r"words were added after <toy>.*remove those first"):
        first.remove()
    second.remove()
    assert between.modules == look(encoder, tokenizer).modules | {
        key: value for key, value in between.modules.items() if key[1] == "new_tokens"
    }
    assert between.tokenizer == look(encoder, tokenizer).tokenizer
    one_word = ids_of(tokenizer, TEXTS[:2])
    assert torch.equal(encoder(one_word)[0], other(one_word)[0])
    first.remove()
    assert_same(before, look(encoder, tokenizer))


def test_one_encoder_with_two_tokenizers() -> None:
    encoder, tokenizer = made()
    first, second = tokens(encoder, tokenizer, WORDS), tokens(encoder, made()[1], {"<dog>": "dog"})
    with pytest.raises(RuntimeError, match="remove those first"):
        first.remove()
    second.remove()
    first.remove()


def test_two_encoders_of_one_tokenizer() -> None:
    (one, tokenizer), (two, _) = made(), made("projected")
    first, second = tokens(one, tokenizer, {"<toy>": "fox"}), tokens(two, tokenizer, {"<cat>": "cat"})
    with pytest.raises(RuntimeError, match="remove those first"):
        first.remove()
    second.remove()
    first.remove()
    assert "<toy>" not in tokenizer.get_vocab()


# ---- beside adapters


def test_an_adapter_on_the_same_encoder() -> None:
    encoder, tokenizer = made()
    before = look(encoder, tokenizer)
    adapter = inject(encoder, plan(encoder, "**.q_proj | **.v_proj", rank=2), "style")
    with tokens(encoder, tokenizer, WORDS) as handle:
        ids, trained = ids_of(tokenizer), [*adapter.parameters(), *handle.parameters()]
        assert {id(one) for one in encoder.parameters() if one.requires_grad} == {id(one) for one in trained}
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            encoder(ids)[0].square().mean().backward()
            assert all(one.grad is not None for one in trained)
            optimizer.step()
        other = grown("clip", torch.float32, tokenizer, handle.embeddings())
        with adapter.disabled():
            assert torch.equal(encoder(ids)[0], other(ids)[0])
        inject(other, adapter.adapter(), "style")
        torch.testing.assert_close(encoder(ids)[0], other(ids)[0], rtol=1e-6, atol=1e-6)
    assert all(one.requires_grad for one in adapter.parameters())
    adapter.remove()
    assert_same(before, look(encoder, tokenizer))


def test_an_adapter_that_was_put_on_later_goes_first() -> None:
    encoder, tokenizer = made()
    before = look(encoder, tokenizer)
    handle = tokens(encoder, tokenizer, WORDS)
    adapter = inject(encoder, plan(encoder, "**.q_proj", rank=2), "style")
    both = {id(one) for one in (*handle.parameters(), *adapter.parameters())}
    assert {id(one) for one in encoder.parameters() if one.requires_grad} == both
    with pytest.raises(RuntimeError, match=r"'style' was put on after <toy>, <cat>; remove it first"):
        handle.remove()
    adapter.remove()
    assert next(handle.parameters()).requires_grad
    handle.remove()
    assert_same(before, look(encoder, tokenizer))


# ---- files


def embedded(pipe, text):
    with torch.no_grad():
        return pipe.encode_prompt(text, "cpu", 1, False)[0]


def trained_words(pipe):
    handle = tokens(pipe.text_encoder, pipe.tokenizer, WORDS)
    with torch.no_grad():
        next(handle.parameters()).add_(torch.randn(4, pipe.text_encoder.config.hidden_size))
    return handle


def test_a_fresh_pipeline_reads_them(tmp_path) -> None:
    """Every word is a file; the prompts that name them are embedded with the same bits."""
    pipe, text = tiny_pipeline("sd15"), "a <toy> and a <cat>"
    handle = trained_words(pipe)
    expected, rows = embedded(pipe, text), handle.embeddings()
    files = handle.save(tmp_path / "words")
    assert [file.name for file in files] == ["toy.safetensors", "cat.safetensors"]
    assert [list(load_file(file)) for file in files] == [["<toy>"], ["<cat>"]]
    for at in files, [rows]:
        fresh = tiny_pipeline("sd15")
        if at is files:
            fresh.load_textual_inversion(files)
        else:
            tokens(fresh.text_encoder, fresh.tokenizer, load_file(files[0]) | load_file(files[1]))
        assert torch.equal(embedded(fresh, text), expected)
        assert len(fresh.tokenizer.tokenize(fresh.maybe_convert_prompt(text, fresh.tokenizer))) == 7
    handle.remove()
    assert not torch.equal(embedded(pipe, text), expected)
    pipe.load_textual_inversion(files)
    assert torch.equal(embedded(pipe, text), expected)


def test_one_word_is_one_file_and_never_half_of_it(tmp_path, monkeypatch) -> None:
    encoder, tokenizer = made()
    file = tmp_path / "deep" / "toy.safetensors"
    with tokens(encoder, tokenizer, {"<toy>": "fox"}) as handle:
        assert handle.save(file) == [file]
        first = file.read_bytes()
        with torch.no_grad():
            next(handle.parameters()).add_(1)

        def half(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", half)
            with pytest.raises(OSError, match="the disk is full"):
                handle.save(file)
        assert file.read_bytes() == first
        assert list(file.parent.iterdir()) == [file]
        handle.save(file)
        assert torch.equal(load_file(file)["<toy>"], handle.embeddings()["<toy>"])
        with torch.no_grad():
            next(handle.parameters())[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"'<toy>' hold NaN or infinity, and nothing was saved"):
            handle.save(tmp_path / "other.safetensors")
    with tokens(encoder, tokenizer, {"<toy>": "fox", "[toy]": "cat"}) as handle:
        with pytest.raises(ValueError, match=r"one word a file.*give a folder: save\('.*toy'\)"):
            handle.save(tmp_path / "toy.safetensors")
        with pytest.raises(ValueError, match=r"the files of <toy>, \[toy\] would have the same names"):
            handle.save(tmp_path / "toys")
    assert [one.name for one in tmp_path.iterdir()] == ["deep"]


# ---- in a run


class Photos:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i):
        noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"image": noise, "caption": ("a photo of a <toy>", "the <toy> at night")[i % 2]}


def test_a_run_trains_the_rows_and_nothing_else(tmp_path) -> None:
    """Captions are encoded live; averages, checkpoints and files know the rows."""
    pipe = tiny_pipeline("sd15")
    pipe.unet.requires_grad_(False)
    before = {
        (part, name): one.clone()
        for part in ("text_encoder", "unet", "vae")
        for name, one in getattr(pipe, part).state_dict().items()
    }
    handle = tokens(pipe.text_encoder, pipe.tokenizer, {"<toy>": ("fox", 2)})
    start = handle.embeddings()["<toy>"]
    codec = codec_of(pipe, train=("text_encoder",))
    groups = handle.param_groups(1e-2)
    settings = config(
        tmp_path / "run", max_steps=3, per_device_batch_size=2, param_groups=groups, weight_decay=0.5
    )
    run = Trainer(denoiser_of(pipe), Photos(), codec=codec, config=settings)
    (name,) = run.parameters
    assert name == "codec.text_encoder." + next(iter(handle.named_parameters()))[0]
    run.train()
    rows = handle.embeddings()["<toy>"]
    assert bool(((rows - start).abs().amax(1) > 1e-3).all()), "both vectors were in the captions"
    (average,) = run.ema.averages.weights().values()
    assert not any(torch.equal(average, one) for one in (start, rows))
    for (part, key), value in before.items():
        assert torch.equal(getattr(pipe, part).state_dict()[key], value), (part, key)

    run.save_pretrained(tmp_path / "final", weights="live")
    files = {str(file.relative_to(tmp_path / "final")) for file in (tmp_path / "final").rglob("*.*")}
    assert files == {"README.md", "codec.safetensors", "gendiff.json"}, (
        "the encoder is not saved: it is frozen"
    )
    again = tiny_pipeline("sd15")
    again.unet.requires_grad_(False)
    other = tokens(again.text_encoder, again.tokenizer, {"<toy>": ("dog", 2)})
    load_pretrained(
        {"model": denoiser_of(again), "codec": codec_of(again, train=("text_encoder",))}, tmp_path / "final"
    )
    assert torch.equal(other.embeddings()["<toy>"], rows)


def test_a_codec_that_encodes_without_gradients_is_refused(tmp_path) -> None:
    pipe = tiny_pipeline("sd15")
    pipe.unet.requires_grad_(False)
    codec = codec_of(pipe)
    tokens(pipe.text_encoder, pipe.tokenizer, {"<toy>": "fox"})
    run = Trainer(
        denoiser_of(pipe), Photos(), codec=codec, config=config(tmp_path, max_steps=2, param_groups=[])
    )
    with pytest.raises(ValueError, match="does not depend on any trained parameter"):
        run.train()


# ---- errors


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({}, ValueError, "there is no word to add"),
        ({"<a toy>": "fox"}, ValueError, r"a word has no spaces.*'<a toy>'"),
        ({"": "fox"}, ValueError, r"at least one letter, got ''"),
        ({"fox": "fox"}, ValueError, r"knows 'fox' already.*such as '<fox-1>'"),
        ({"fox</w>": "fox"}, ValueError, r"knows 'fox</w>' already"),
        ({"<|endoftext|>": "fox"}, ValueError, "already"),
        ({"<toy>": ""}, ValueError, r"reads nothing where '<toy>' is to begin as ''"),
        ({"<toy>": "  "}, ValueError, "reads nothing"),
        ({"<toy>": "<|endoftext|>"}, ValueError, r"reads \['<\|endoftext\|>'\] where '<toy>'"),
        ({"<toy>": ("fox", 0)}, ValueError, r"'<toy>' has one vector or more, got 0"),
        ({"<toy>": ("fox", True)}, TypeError, r"begins as a text, \(text, vectors\) or rows"),
        ({"<toy>": 3}, TypeError, r"begins as a text, \(text, vectors\) or rows, got 3|Type-check"),
        ({"<toy>": torch.ones(1, 7)}, ValueError, r"\[vectors, 16\] for this encoder, got \(1, 7\)"),
        ({"<toy>": torch.ones(0, 16)}, ValueError, r"got \(0, 16\)"),
        ({"<toy>": torch.full((16,), torch.inf)}, ValueError, "hold NaN or infinity"),
        ({"<toy>": "fox", "<TOY>": "cat"}, ValueError, r"reads '<(toy|TOY)>' as .* no notice of case"),
        ({"<toy>": ("fox", 2), "<toy>_1": "cat"}, ValueError, r"a further vector of '<toy>'"),
        ({"<toy>_1": "cat", "<toy>": "fox"}, ValueError, r"a further vector of '<toy>'"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_added(words, error, message) -> None:
    encoder, tokenizer = made()
    before = look(encoder, tokenizer)
    with pytest.raises(error, match=message):
        tokens(encoder, tokenizer, words)
    assert_same(before, look(encoder, tokenizer))


def test_words_that_are_there() -> None:
    encoder, tokenizer = made()
    with tokens(encoder, tokenizer, {"<toy>": ("fox", 2), "<cat>": "cat"}):
        for word, message in {
            "<toy>": "knows '<toy>' already",
            "<cat>_1": "a further vector of '<cat>'",
            "<toy>_1": "a further vector of '<toy>'",
        }.items():
            with pytest.raises(ValueError, match=message):
                tokens(encoder, tokenizer, {word: "fox"})
    tokenizer.add_tokens(["<dog>_1"])
    with pytest.raises(ValueError, match="knows '<dog>_1' already"):  # diffusers would read it after <dog>
        tokens(encoder, tokenizer, {"<dog>": "fox"})


def test_an_unknown_text() -> None:
    encoder, tokenizer = made("t5")
    with pytest.raises(ValueError, match=r"reads \['▁', '<unk>'\] where '<toy>' is to begin as '漢'"):
        tokens(encoder, tokenizer, {"<toy>": "漢"})


def test_encoders_and_tokenizers_that_do_not_do() -> None:
    encoder, tokenizer = made()
    pipe = SimpleNamespace(text_encoder=encoder)
    with pytest.raises(TypeError, match=r"such as pipe\.text_encoder, got SimpleNamespace|Type-check"):
        tokens(pipe, tokenizer, WORDS)
    with pytest.raises(TypeError, match=r"such as pipe\.tokenizer, got .*dict"):
        tokens(encoder, {}, WORDS)
    for model in (nn.Linear(1, 1), tiny_pipeline("sd15").unet):
        with pytest.raises(ValueError, match="has no embedding table that it tells of"):
            tokens(model, tokenizer, WORDS)

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 4

    encoder.set_input_embeddings(Scaled(len(tokenizer), 16))
    with pytest.raises(ValueError, match=r"is a Scaled, which is scaled.*no plain torch\.nn\.Embedding"):
        tokens(encoder, tokenizer, WORDS)


class Locked(ByT5Tokenizer):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


class Gaps(ByT5Tokenizer):
    def convert_tokens_to_ids(self, tokens):
        found = super().convert_tokens_to_ids(tokens)
        return found if isinstance(found, int) else [5, *found[1:]]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Locked, r"cannot be copied \(cannot pickle a lock\).*the fast one"),
        (Gaps, r"the ids \[5, 385, 386, 387\]"),
    ],
)
def test_a_tokenizer_that_could_not_be_given_back(kind, message) -> None:
    tokenizer = kind()
    encoder = t5_encoder(tokenizer, width=16)
    before = look(encoder, tokenizer)
    with pytest.raises(ValueError, match=message):
        tokens(encoder, tokenizer, WORDS)
    assert_same(before, look(encoder, tokenizer))


def test_a_pipeline_with_words_on_is_not_saved_whole(tmp_path) -> None:
    """Its tokenizer would know them, and its table would not."""
    pipe = tiny_pipeline("sd15")
    with tokens(pipe.text_encoder, pipe.tokenizer, {"<toy>": "toy"}):
        with pytest.raises(ValueError, match=r"text_encoder has new words on.*handle\.save\(path\)"):
            save_pretrained({"unet": pipe.unet}, tmp_path / "whole", pipeline=pipe)
        assert not (tmp_path / "whole").exists()
    save_pretrained({"unet": pipe.unet}, tmp_path / "whole", pipeline=pipe)
    assert (tmp_path / "whole" / "tokenizer").exists()
