"""New words of a text encoder: rows beside its embedding table, and ids for them in its tokenizer."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEW = ".new_tokens."  # in the names of rows
DEPTH = "_gendiff_words"  # how often words were added to a tokenizer
NUMBERED = re.compile(r"(.+)_\d+")
Places = dict[tuple[nn.Module, str], nn.Module]  # by the module that holds it and its name there, a module


@final
class Words(nn.Module):
    """An embedding that looks old ids up in a frozen table, and new ones in rows that train.

    Neither is copied or grown: an id is looked up in each, at row 0 where it belongs to the other. The weight
    keeps its name and its identity.

    Args:
        table: the embedding.

    >>> words = Words(nn.Embedding(8, 2))
    >>> words.add(first=8, rows=nn.Parameter(torch.ones(1, 2)))
    >>> words(torch.tensor([8, 3]))[0]
    tensor([1., 1.], grad_fn=<SelectBackward0>)
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self.new_tokens = nn.ParameterList()
        self.firsts: list[int] = []
        self._table = (table,)  # hidden from torch in a tuple: its weight has a name here already

    def add(self, first: int, rows: nn.Parameter) -> None:
        """Rows for the ids from `first` on; spare rows of the table that they cover are not read any more."""
        self.new_tokens.append(rows)
        self.firsts.append(first)

    def drop(self) -> None:
        """Take the last rows away."""
        self.new_tokens = nn.ParameterList(list(self.new_tokens)[:-1])
        self.firsts.pop()

    def forward(self, ids: Tensor) -> Tensor:
        groups = list(zip(self.firsts, self.new_tokens, strict=True))
        inside = [(ids >= first) & (ids < first + len(rows)) for first, rows in groups]
        old = ids
        for one in inside:
            old = old.masked_fill(one, 0)
        hidden = self._table[0](old)
        for one, (first, rows) in zip(inside, groups, strict=True):
            new = F.embedding((ids - first).masked_fill(~one, 0), rows)
            hidden = torch.where(one.unsqueeze(-1), new.to(hidden.dtype), hidden)
        return hidden


def table_of(encoder: Any) -> Any:
    """The embedding that a text encoder looks ids up in, or the `Words` in its place.

    Raises:
        ValueError: for an encoder that has none, or one that computes more than a look-up.
    """
    try:
        table: Any = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    what = type(encoder).__name__
    if table is None:
        raise ValueError(
            f"{what} has no embedding table that it tells of; give a text encoder of transformers, such as "
            f"pipe.text_encoder."
        )
    if not isinstance(table, Words) and type(table).forward is not nn.Embedding.forward:
        raise ValueError(
            f"the embedding of {what} is a {type(table).__name__}, which is scaled, quantised or adapted and "
            f"no plain torch.nn.Embedding: new rows beside it would not be computed in the same way. Add "
            f"words before adapters, and to encoders with a plain table, as those of CLIP and T5."
        )
    return table


def places_of(encoder: nn.Module, table: nn.Module) -> Places:
    """Where the table is in an encoder, also under other names and as modules that share its weight."""
    return {
        (parent, name): child
        for parent in encoder.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.Embedding) and child.weight is table.weight
    }


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without what a tokenizer puts round it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def names_of(tokenizer: Any, vectors: Mapping[str, int]) -> list[str]:
    """The names of all vectors of new words; diffusers takes `<toy>_1` for a further vector of `<toy>`.

    Raises:
        ValueError: for words that are known, have spaces, or that diffusers would read as others.
    """
    vocabulary, added = set(tokenizer.get_vocab()), set(tokenizer.get_added_vocab())
    found: list[str] = []
    for word, number in vectors.items():
        if not re.fullmatch(r"\S+", word):
            raise ValueError(f"a word has no spaces and at least one letter, got {word!r}; try '<toy>'.")
        numbered = NUMBERED.fullmatch(word)
        if numbered and numbered[1] in added | set(vectors):
            raise ValueError(
                f"{word!r} would be read as a further vector of {numbered[1]!r}; choose another word, or "
                f"give that one several vectors."
            )
        names = [word, *(f"{word}_{i}" for i in range(1, number))]
        taken = [name for name in (*names, f"{word}_{number}") if name in vocabulary]
        read = ids_of(tokenizer, word)
        if taken or (len(read) == 1 and read[0] != tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer knows {(taken or [word])[0]!r} already, whose meaning would change; choose "
                f"a new word, such as '<{word.strip('<>')}-1>'."
            )
        found += names
    return found


def extend(tokenizer: Any, names: Sequence[str]) -> tuple[int, Callable[[], None]]:
    """Give a tokenizer new words, as `add_tokens` does.

    It works on a copy of its state from then on. The state of before is put back as it was and not rebuilt:
    its scores would lose their last bits on the way through a text.

    Args:
        tokenizer: of transformers, fast or slow.
        names: of the words.

    Returns:
        The id of the first one, on which the others follow, and what takes them away.

    Raises:
        ValueError: for a tokenizer that cannot be copied, or that does not read these words as new ids. It
            is as before then.
    """
    before, known = dict(vars(tokenizer)), set(tokenizer.get_vocab().values())
    try:
        copied = vars(copy.deepcopy(tokenizer))
    except (TypeError, RuntimeError, OSError) as error:
        raise ValueError(
            f"this {type(tokenizer).__name__} cannot be copied ({error}), so that it could not be given back "
            f"as it was; load the fast one."
        ) from error

    def put(state: dict[str, Any]) -> None:
        vars(tokenizer).clear()
        vars(tokenizer).update(state)

    put(copied | {DEPTH: before.get(DEPTH, 0) + 1})
    try:
        tokenizer.add_tokens(list(names))
        ids = tokenizer.convert_tokens_to_ids(list(names))
        if ids != list(range(ids[0], ids[0] + len(ids))) or known & set(ids):
            raise ValueError(
                f"{type(tokenizer).__name__} gives the new words the ids {ids}, which are not in a row or "
                f"are those of other words; its vocabulary has gaps, so that nothing can be added to it."
            )
        for name, number in zip(names, ids, strict=True):
            if number not in (read := ids_of(tokenizer, name)):
                raise ValueError(
                    f"the tokenizer reads {name!r} as {tokenizer.convert_ids_to_tokens(read)}, since it "
                    f"takes no notice of case or knows a part of it; choose another word."
                )
    except BaseException:
        put(before)
        raise
    return ids[0], lambda: put(before)
