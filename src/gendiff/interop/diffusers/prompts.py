"""Prompts as a pipeline's own method encodes them, by canonical names."""

import copy
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff.condition import Condition
from gendiff.interop.diffusers.family import Prompt

GIVEN = ("prompt", "device", "do_classifier_free_guidance")  # what is not left at its default


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders that a pipeline has, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


@final
class PromptEncoder:
    """Calls the pipeline's own method, with text encoders that are given at the call.

    It works on a shallow copy of the pipeline, so that a codec whose encoders were moved or replaced, as in
    the averaged copy of a trained one, encodes with its own. Copying it, which copies a codec, is sharing it.
    """

    def __init__(self, pipe: Any, prompt: Prompt) -> None:
        self.prompt, self._pipe = prompt, copy.copy(pipe)
        method = getattr(pipe, prompt.method, None)
        if method is None:
            raise ValueError(
                f"{type(pipe).__name__} has no method {prompt.method!r}, by which its family encodes "
                f"prompts: correct it in Prompt(method=…)."
            )
        self._known = signature(method).parameters
        call = signature(type(pipe).__call__).parameters
        self._options = {
            name: call[name].default
            for name in self._known
            if name in call and name not in GIVEN and call[name].default is not Parameter.empty
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptEncoder":
        return self

    def __call__(
        self, captions: Sequence[str], encoders: Mapping[str, nn.Module], device: torch.device
    ) -> dict[str, Tensor]:
        """Texts by canonical name, one row a caption."""
        return self._named(self._results(captions, encoders, device, False), self.prompt.results)

    def null(self, encoders: Mapping[str, nn.Module], device: torch.device) -> dict[str, Tensor]:
        """What the unconditional branch of the pipeline is given, one row."""
        if self.prompt.null == "negative":
            return self._named(self._results([""], encoders, device, True), self.prompt.negatives)
        return self([""], encoders, device)

    def _results(
        self, captions: Sequence[str], encoders: Mapping[str, nn.Module], device: torch.device, guided: bool
    ) -> Sequence[Any]:
        pipe = copy.copy(self._pipe)
        pipe.__dict__.update(encoders)  # setattr would write the pipeline's configuration
        keywords = self._options | {"device": device, "do_classifier_free_guidance": guided}
        keywords = {name: value for name, value in keywords.items() if name in self._known}
        results = getattr(pipe, self.prompt.method)(list(captions), **keywords)
        return results if isinstance(results, tuple) else (results,)

    @staticmethod
    def _named(results: Sequence[Any], names: Sequence[str | None]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in zip(names, results, strict=False):  # what is beyond the names is of no use
            if name is None or value is None:
                continue
            if isinstance(value, list):
                value, mask = padded(value)
                found |= {} if mask is None else {"text_mask": mask}
            found[name] = value
        return found


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Texts [L_i, D] as one tensor [B, L, D], and the mask [B, L] of what is no padding, if any is.

    >>> text, mask = padded([torch.ones(1, 2), torch.ones(3, 2)])
    >>> text.shape, mask.tolist()
    (torch.Size([2, 3, 2]), [[1, 0, 0], [1, 1, 1]])
    """
    lengths = [len(text) for text in texts]
    stacked = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    if min(lengths) == max(lengths):
        return stacked, None
    mask = [[int(i < length) for i in range(max(lengths))] for length in lengths]
    return stacked, torch.tensor(mask, device=stacked.device)


def blended(cond: Condition, null: Condition, gone: Tensor) -> Condition:
    """The rows of `null` where `gone` [B], and those of `cond` elsewhere; texts are padded to one length.

    >>> cond, null = Condition(text=torch.ones(2, 3, 1)), Condition(text=torch.zeros(2, 1, 1))
    >>> mixed = blended(cond, null, torch.tensor([True, False]))
    >>> mixed["text"].squeeze(-1).tolist(), mixed["text_mask"].tolist()
    ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[1, 0, 0], [1, 1, 1]])
    """
    texts = [one["text"].shape[1] for one in (cond, null) if "text" in one]
    masked = "text_mask" in cond or "text_mask" in null
    if len(texts) == 2 and (masked or texts[0] != texts[1]):
        cond, null = (_lengthened(one, max(texts)) for one in (cond, null))

    def rows(name: str) -> Tensor:
        return torch.where(gone.reshape(-1, *[1] * (cond[name].ndim - 1)), null[name], cond[name])

    return Condition({name: rows(name) if name in null else cond[name] for name in cond})


def _lengthened(cond: Condition, length: int) -> Condition:
    """A condition whose text is padded with zeros to a length, with the mask of what is no padding."""
    text, extra = cond["text"], length - cond["text"].shape[1]
    mask = cond["text_mask"] if "text_mask" in cond else text.new_ones(text.shape[:2], dtype=torch.int64)
    pad = torch.nn.functional.pad
    return cond.replace(text=pad(text, (0, 0, 0, extra)), text_mask=pad(mask, (0, extra)))
