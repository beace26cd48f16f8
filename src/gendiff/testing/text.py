"""Tokenizers and text encoders of the real classes, small enough to be made in memory in milliseconds.

A vocabulary is learned from the few sentences below, so that common words about pictures are one token and
everything else falls apart into pieces, as with the real ones. Nothing is downloaded and no file is read.
"""

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from gendiff._checks import unknown

if TYPE_CHECKING:  # importing gendiff.testing must not import transformers, which takes seconds
    import transformers
    from tokenizers import Tokenizer

SENTENCES = (
    "a photo of a red fox in the snow",
    "a photograph of a small brown dog running on the beach at sunset",
    "an oil painting of an old man with a white beard",
    "a watercolor painting of a mountain lake with trees and clouds",
    "a close up portrait of a young woman with blue eyes, soft light, high detail",
    "a black and white drawing of a cat sleeping on a chair",
    "the city at night in the rain, street lights, wide angle",
    "a green car in front of a yellow house under a clear blue sky",
    "a castle on a hill above the sea, digital art, highly detailed, sharp focus",
    "two horses in a field of flowers, golden hour",
    "a bowl of fruit on a wooden table, still life",
    "an astronaut riding a horse on the moon",
    "a low quality, blurry, dark picture of a forest",
    "the picture of a red rose in a glass of water, studio light, white background",
)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORD_END = "</w>"
CLIP_LENGTH = 77
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
T5_SPACE = "▁"
T5_LENGTH = 512
T5_SENTINELS = 100
MERGES = 256


def clip_tokenizer(*, pad: str = CLIP_END, max_length: int = CLIP_LENGTH) -> "transformers.CLIPTokenizer":
    """A CLIPTokenizer whose byte-level BPE vocabulary is laid out as the real one's.

    256 bytes, the same 256 at the end of a word, the merges, then the two special tokens; so "!" is 0 and the
    end of the text is the largest id, which is where the encoder pools.

    Args:
        pad: the padding token: the end of the text (CLIP-L), or "!" (the second tokenizer of SDXL and SD3).
        max_length: `model_max_length`, in tokens.

    Returns:
        The tokenizer, of 770 tokens.

    Raises:
        ValueError: `pad` is another token.

    >>> tokenizer = clip_tokenizer()
    >>> tokenizer.decode(tokenizer("A red Fox").input_ids, skip_special_tokens=True)
    'a red fox'
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    if pad not in (CLIP_END, "!"):
        raise ValueError(unknown("padding token", pad, (CLIP_END, "!")))
    letters = sorted(ByteLevel.alphabet())  # sorted by code point they stand in CLIP's own order
    symbols = [*letters, *(letter + CLIP_WORD_END for letter in letters)]
    # only the normaliser and the splitting into words of this one are used
    untrained = CLIPTokenizer(vocab={CLIP_START: 0, CLIP_END: 1}).backend_tokenizer
    vocab, merges = learn(untrained, symbols, CLIP_WORD_END)
    vocab |= {CLIP_START: len(vocab), CLIP_END: len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=max_length)


def t5_tokenizer(*, max_length: int = T5_LENGTH) -> "transformers.T5Tokenizer":
    """A T5 tokenizer, which UMT5 shares: <pad> 0, </s> 1, <unk> 2, pieces of a unigram model, 100 sentinels.

    It knows the printable characters of Latin-1; others become <unk>, as in the real one.

    Args:
        max_length: `model_max_length`, in tokens.

    Returns:
        The tokenizer, of 548 tokens.

    >>> tokenizer = t5_tokenizer()
    >>> tokenizer.decode(tokenizer("A red Fox").input_ids, skip_special_tokens=True)
    'A red Fox'
    """
    from tokenizers import Tokenizer, models
    from transformers import T5Tokenizer

    letters = [
        chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100)) if code != 0xAD
    ]  # 0xAD: soft hyphen
    untrained = Tokenizer(models.BPE())
    untrained.pre_tokenizer = T5Tokenizer().backend_tokenizer.pre_tokenizer
    # the trainer of unigram models gives other scores at every call, so pieces are learned by merging
    vocab, _ = learn(untrained, [*T5_SPECIAL, T5_SPACE, *letters], "")
    counts = Counter(token for line in SENTENCES for token in untrained.encode(line).tokens)
    total = counts.total() + len(vocab)
    pieces = sorted(vocab, key=vocab.__getitem__)[len(T5_SPECIAL) :]
    scores = [(token, 0.0) for token in T5_SPECIAL]
    scores += [(piece, math.log((counts[piece] + 1) / total)) for piece in pieces]
    scores += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(T5_SENTINELS))]
    return T5Tokenizer(vocab=scores, extra_ids=T5_SENTINELS, model_max_length=max_length)


def clip_encoder(
    tokenizer: "transformers.CLIPTokenizer", *, width: int, projected: bool = False, act: str = "quick_gelu"
) -> "transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection":
    """A two-layer CLIPTextModel of random weights, drawn from torch's generator, that fits the tokenizer.

    Args:
        tokenizer: gives the sizes and the special ids.
        width: width of the hidden states, of the pooled one and of its projection; a multiple of 8.
        projected: a CLIPTextModelWithProjection instead.
        act: activation: "quick_gelu" (CLIP-L) or "gelu" (OpenCLIP bigG).

    Returns:
        The encoder, in training mode.

    >>> clip_encoder(clip_tokenizer(), width=16).config.hidden_size
    16
    """
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": act,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPTextConfig(**settings)
    return (
        transformers.CLIPTextModelWithProjection(config) if projected else transformers.CLIPTextModel(config)
    )


def t5_encoder(
    tokenizer: "transformers.T5Tokenizer", *, width: int, multilingual: bool = False
) -> "transformers.T5EncoderModel | transformers.UMT5EncoderModel":
    """A two-layer T5EncoderModel (v1.1: gated, untied) of random weights, drawn from torch's generator.

    Args:
        tokenizer: gives the size of the vocabulary and the special ids.
        width: width of the hidden states; a multiple of 8.
        multilingual: a UMT5EncoderModel instead, which has relative positions in every layer.

    Returns:
        The encoder, in training mode.

    >>> t5_encoder(t5_tokenizer(), width=16, multilingual=True).config.model_type
    'umt5'
    """
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": width // 8,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    if multilingual:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**settings))
    return transformers.T5EncoderModel(transformers.T5Config(**settings))


def learn(tokenizer: "Tokenizer", symbols: list[str], word_end: str) -> tuple[dict[str, int], Any]:
    """Train a BPE model in place on the sentences; its vocabulary, `symbols` first, and its merges."""
    from tokenizers import models, trainers

    tokenizer.model = models.BPE()
    # symbols given in advance have fixed ids; ids that the trainer hands out follow the order of a hash map
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + MERGES,
        special_tokens=symbols,
        end_of_word_suffix=word_end,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
