"""Textual inversion: new words of a text encoder, whose rows are all that trains."""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff._groups import ParamGroup
from gendiff.attention.handle import changeable
from gendiff.attention.table import unwrapped
from gendiff.lora.handle import HELD
from gendiff.lora.layers import MARKS
from gendiff.lora.words import DEPTH, NEW, Places, Words, extend, ids_of, names_of, places_of, table_of

SUFFIX = ".safetensors"
Initial = str | tuple[str, int] | Tensor


@final
class TokensHandle:
    """New words of a text encoder; see `tokens`.

    Attributes:
        encoder: the text encoder.
        tokenizer: its tokenizer.
        words: by word, how many vectors it has.
        attached: whether they still are there.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        words: dict[str, int],
        table: Words,
        undo: Callable[[], None],
    ) -> None:
        self.encoder, self.tokenizer, self.words, self.attached = encoder, tokenizer, words, True
        self._table, self._undo = table, undo
        self._depth, self._key = vars(tokenizer)[DEPTH], str(len(table.firsts) - 1)
        self._rows = table.new_tokens[int(self._key)]
        self._adapters = list(vars(encoder).get(HELD, {}).values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The rows of the words."""
        yield from (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The rows of the words, under the name that they have in the encoder."""
        self._check()
        yield from ((name, one) for name, one in self.encoder.named_parameters() if one is self._rows)

    def param_groups(self, learning_rate: float | int, weight_decay: float | int = 0.0) -> list[ParamGroup]:
        """The settings of the rows, for `TrainConfig(param_groups=...)`.

        Args:
            learning_rate: of the rows.
            weight_decay: pulls rows towards zero, which is no word's place.
        """
        return [ParamGroup(f"**.{name}", learning_rate, weight_decay) for name, _ in self.named_parameters()]

    def embeddings(self) -> dict[str, Tensor]:
        """A copy of the rows by word, [vectors, dim]; `tokens` takes them too."""
        self._check()
        rows = self._rows.detach().clone().split(list(self.words.values()))
        return dict(zip(self.words, rows, strict=True))

    def save(self, path: str | Path) -> list[Path]:
        """Write each word to a file that `pipe.load_textual_inversion` reads; there is never half a file.

        Args:
            path: for one word, a file that ends in .safetensors; or a folder, for a file a word.

        Returns:
            The files; a pipeline takes the list too.

        Raises:
            ValueError: for several words and one file, words whose files would have one name, and rows that
                are not finite. Nothing is written then.
        """
        from safetensors.torch import save_file

        path, rows = Path(path), self.embeddings()
        if path.suffix == SUFFIX and len(rows) > 1:
            raise ValueError(
                f"diffusers reads one word a file, and these are {len(rows)}, {', '.join(rows)}; give a "
                f"folder: save({str(path.with_suffix(''))!r})."
            )
        plain = {word: re.sub(r"\W+", "", word) or "word" for word in rows}
        if len(set(plain.values())) < len(plain):
            raise ValueError(f"the files of {', '.join(rows)} would have the same names; add them apart.")
        for word, value in rows.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"the rows of {word!r} hold NaN or infinity, and nothing was saved.")
        files = {word: path if path.suffix == SUFFIX else path / f"{plain[word]}{SUFFIX}" for word in rows}
        for word, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
            try:
                save_file({word: rows[word].cpu().contiguous()}, aside, metadata={"format": "pt"})
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)
        return list(files.values())

    def remove(self) -> None:
        """Take the words away: the encoder and the tokenizer are as before, and what trained trains again.

        Raises:
            RuntimeError: while there are words or adapters that were added later.
        """
        if self.attached:
            changeable()
            if self._table.new_tokens[-1] is not self._rows or vars(self.tokenizer).get(DEPTH) != self._depth:
                raise RuntimeError(
                    f"words were added after {', '.join(self.words)}, whose ids follow on theirs; remove "
                    f"those first."
                )
            held = vars(self.encoder).get(HELD, {})
            if later := [name for name, one in held.items() if one not in self._adapters]:
                raise RuntimeError(
                    f"the adapter {later[0]!r} was put on after {', '.join(self.words)}; remove it first."
                )
            self.attached = False
            self._undo()

    def __enter__(self) -> "TokensHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        words = ", ".join(f"{word} [{vectors}]" for word, vectors in self.words.items())
        return f"TokensHandle({words}{'' if self.attached else ', removed'})"

    def _check(self) -> None:
        if not self.attached:
            raise RuntimeError(f"the words {', '.join(self.words)} were removed from their encoder.")


def tokens(encoder: nn.Module, tokenizer: Any, words: Mapping[str, Initial]) -> TokensHandle:
    """Teach a text encoder new words: rows of their own beside its embedding table, which stays as it is.

    Only these rows train from then on, in float32, beside adapters and earlier words. A word of several
    vectors is read as `<toy> <toy>_1 <toy>_2`. Pipelines that have `load_textual_inversion` make that of
    `<toy>` themselves; for others, such as SD3's, write it into captions. Train with
    `codec_of(pipe, train=("text_encoder",))`: a codec freezes the encoders that it is not told of.

    Args:
        encoder: a text encoder of transformers.
        tokenizer: its tokenizer.
        words: what each new word begins as: a text, of whose tokens it is the mean; (text, vectors) for
            several vectors, which begin alike; or rows [vectors, dim] that were trained, as files have them.

    Returns:
        The `TokensHandle`, which is a context manager too.

    Raises:
        TypeError: for what is no encoder, no tokenizer, or no text and no rows.
        ValueError: for a word that is known or has spaces, a text that the tokenizer cannot read, and an
            encoder without a plain table. Nothing has changed then.

    Where the configuration of a CLIP encoder says `eos_token_id=2`, as early ones do, transformers pools at
    the largest id, which is then a new word's; it does so as well once the word is loaded by diffusers.

    Gal et al. 2022, *An Image is Worth One Word*, arXiv 2208.01618, section 4.

    >>> from gendiff.testing.text import clip_encoder, clip_tokenizer
    >>> tokenizer = clip_tokenizer()
    >>> encoder = clip_encoder(tokenizer, width=8)
    >>> with tokens(encoder, tokenizer, {"<toy>": "red fox"}) as handle:
    ...     handle, tokenizer.tokenize("a <toy>")
    (TokensHandle(<toy> [1]), ['a</w>', '<toy>'])
    """
    from transformers import PreTrainedTokenizerBase

    changeable()
    if not isinstance(encoder, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"an encoder is a module, such as pipe.text_encoder, got {type(encoder).__name__}.")
    root = unwrapped(encoder)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"a tokenizer is one of transformers, such as pipe.tokenizer, got {type(tokenizer)}.")
    if not words:
        raise ValueError('there is no word to add; give some, such as {"<toy>": "toy"}.')
    table = table_of(root)
    rows = {word: _rows(table, tokenizer, word, initial) for word, initial in words.items()}
    names = names_of(tokenizer, {word: len(value) for word, value in rows.items()})
    before: Places = {}
    frozen = [
        parameter
        for name, parameter in root.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in (*MARKS, NEW))
    ]
    first, shorten = extend(tokenizer, names)
    if not isinstance(table, Words):
        before = places_of(root, table)
        table = Words(table).train(table.training)
    table.add(first, nn.Parameter(torch.cat(list(rows.values()))))
    for parent, name in before:
        parent._modules[name] = table
    for parameter in frozen:
        parameter.requires_grad_(False)

    def undo() -> None:
        table.drop()
        for (parent, name), one in before.items():
            parent._modules[name] = one.train(table.training)
        for parameter in frozen:
            parameter.requires_grad_(True)
        shorten()

    return TokensHandle(root, tokenizer, {word: len(value) for word, value in rows.items()}, table, undo)


def _rows(table: Any, tokenizer: Any, word: str, initial: Initial) -> Tensor:
    """What a word begins as, [vectors, dim] in float32."""
    weight = table.weight
    if isinstance(initial, Tensor):
        rows = initial.detach().to(weight.device, torch.float32)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != weight.shape[1]:
            raise ValueError(
                f"the rows of {word!r} are [vectors, {weight.shape[1]}] for this encoder, got "
                f"{tuple(initial.shape)}; are they another encoder's?"
            )
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the rows of {word!r} hold NaN or infinity.")
        return rows
    text, vectors = initial if isinstance(initial, tuple) else (initial, 1)
    if not isinstance(text, str) or type(vectors) is not int:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{word!r} begins as a text, (text, vectors) or rows, got {initial!r}.")
    if vectors < 1:
        raise ValueError(f"{word!r} has one vector or more, got {vectors}.")
    ids = ids_of(tokenizer, text)
    if not ids or tokenizer.unk_token_id in ids:
        what = f"reads {tokenizer.convert_ids_to_tokens(ids)}" if ids else "reads nothing"
        raise ValueError(
            f"the tokenizer {what} where {word!r} is to begin as {text!r}; give words that it knows."
        )
    with torch.no_grad():
        return table(torch.tensor(ids, device=weight.device)).float().mean(0).repeat(vectors, 1)
