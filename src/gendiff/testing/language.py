"""Tokenizers and text encoders of language models, of the real classes, made in memory in milliseconds.

The vocabularies are learned from the sentences of `gendiff.testing.text`. What image models put round a
prompt, an instruction or a chat, falls into more tokens than with the real vocabularies.
"""

from typing import TYPE_CHECKING, Any

from gendiff.testing.text import learn

if TYPE_CHECKING:  # importing gendiff.testing must not import transformers, which takes seconds
    import transformers

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def qwen_tokenizer() -> "transformers.Qwen2Tokenizer":
    """A Qwen2Tokenizer: 256 bytes, the merges, then the special tokens of a chat, with a template for one.

    Returns:
        The tokenizer, of 515 tokens.

    >>> tokenizer = qwen_tokenizer()
    >>> tokenizer.decode(tokenizer("A red Fox 雪").input_ids)
    'A red Fox 雪'
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab, merges = learn(Qwen2Tokenizer().backend_tokenizer, sorted(ByteLevel.alphabet()), "")
    vocab |= {token: len(vocab) + i for i, token in enumerate(("<|endoftext|>", *CHAT_TOKENS))}
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, chat_template=CHAT, extra_special_tokens=list(CHAT_TOKENS)
    )


def gemma_tokenizer() -> "transformers.GemmaTokenizer":
    """A GemmaTokenizer: <pad> 0, <eos> 1, <bos> 2 in front of a text, bytes for unknown letters, the merges.

    Returns:
        The tokenizer, of 612 tokens.

    >>> tokenizer = gemma_tokenizer()
    >>> tokenizer.decode(tokenizer("A red Fox 雪").input_ids, skip_special_tokens=True)
    'A red Fox 雪'
    """
    from transformers import GemmaTokenizer

    symbols = [*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    symbols += [chr(code) for code in range(0x21, 0x7F)]
    vocab, merges = learn(GemmaTokenizer().backend_tokenizer, symbols, "")
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def qwen3_encoder(tokenizer: "transformers.Qwen2Tokenizer", *, width: int) -> "transformers.Qwen3Model":
    """A two-layer Qwen3Model of random weights, drawn from torch's generator; `width` a multiple of 8."""
    import transformers

    return transformers.Qwen3Model(transformers.Qwen3Config(**_layers(tokenizer, width), head_dim=8))


def qwen_vl_encoder(
    tokenizer: "transformers.Qwen2Tokenizer", *, width: int
) -> "transformers.Qwen2_5_VLForConditionalGeneration":
    """A Qwen2_5_VLForConditionalGeneration of two layers, and one for pictures, of random weights."""
    import transformers

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.Qwen2_5_VLConfig(
        **ends,  # pyright: ignore[reportArgumentType]  (it takes what every configuration takes)
        text_config=_layers(tokenizer, width)
        | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        | {"out_hidden_size": width},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma2_encoder(tokenizer: "transformers.GemmaTokenizer", *, width: int) -> "transformers.Gemma2Model":
    """A two-layer Gemma2Model of random weights, drawn from torch's generator; `width` a multiple of 8."""
    import transformers

    return transformers.Gemma2Model(transformers.Gemma2Config(**_layers(tokenizer, width), head_dim=8))


def mistral3_encoder(
    tokenizer: "transformers.Qwen2Tokenizer", *, width: int, layers: int = 30
) -> "transformers.Mistral3ForConditionalGeneration":
    """A Mistral3ForConditionalGeneration of random weights; FLUX.2 reads its 10th, 20th and 30th layer."""
    import transformers

    text = _layers(tokenizer, width) | {"model_type": "mistral", "head_dim": 8, "num_hidden_layers": layers}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )


def _layers(tokenizer: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
