"""The codec: images as they are, captions as one embedding a token."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from emoji_encoder import encode
from torch import Tensor
from torch.nn.functional import pad

from gendiff import Codec, Condition
from gendiff.random import Randomness


@final
class TextCodec(Codec):
    """Images as x0 in [-1, 1], captions as `text` [B, T, 384] with `text_mask` [B, T]; the null is "".

    Args:
        table: embeddings [T, 384] by caption, "" included; others are encoded when they are asked for.
        drop: probability with which a caption is dropped in training, in [0, 1).
    """

    texts: Tensor
    masks: Tensor

    def __init__(self, table: Mapping[str, Tensor], drop: float = 0.0) -> None:
        super().__init__()
        self.drop, self.place = drop, {caption: place for place, caption in enumerate(table)}
        self.length = max(len(text) for text in table.values())
        texts, masks = zip(*map(self.padded, table.values()), strict=True)
        self.register_buffer("texts", torch.stack(texts), persistent=False)
        self.register_buffer("masks", torch.stack(masks), persistent=False)

    def padded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding [T, 384] and mask [T] of one caption, cut or padded to the longest of the table."""
        tokens = tokens[: self.length].float()
        return pad(tokens, (0, 0, 0, self.length - len(tokens))), torch.arange(self.length) < len(tokens)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        x0 = {"x0": self.latents(batch["image"])} if "image" in batch else {}
        text = dict(self.cond(batch["caption"])) if "caption" in batch else {}
        return text | x0 | {key: value for key, value in batch.items() if key not in ("image", "caption")}

    def inputs(self, batch: Mapping[str, Any], rng: Randomness | None = None) -> tuple[Tensor, Condition]:
        batch = self.encode(batch)
        x0, cond = batch["x0"], Condition(text=batch["text"], text_mask=batch["text_mask"])
        if rng is None or not self.drop:
            return x0, cond
        gone, null = (rng.uniform("drop", (len(x0),), device=x0.device) < self.drop)[:, None], self.null(cond)
        text = torch.where(gone[..., None], null["text"], cond["text"])
        return x0, Condition(text=text, text_mask=torch.where(gone, null["text_mask"], cond["text_mask"]))

    def cond(self, captions: Sequence[Any] | Tensor, **facts: Any) -> Condition:
        if facts:
            raise TypeError(f"captions are all that this codec knows of, got {sorted(facts)}.")
        names = [str(caption) for caption in captions]
        for caption, tokens in encode([name for name in names if name not in self.place]).items():
            self.place[caption], (text, mask) = len(self.place), self.padded(tokens)
            self.texts = torch.cat([self.texts, text[None].to(self.texts)])
            self.masks = torch.cat([self.masks, mask[None].to(self.masks)])
        places = torch.tensor([self.place[name] for name in names], pin_memory=self.texts.is_cuda)
        rows = places.to(self.texts.device, non_blocking=True)  # training does not wait for the device
        return Condition(text=self.texts[rows], text_mask=self.masks[rows])

    def null(self, cond: Mapping[str, Tensor], group: str = "text") -> Condition:
        if group != "text":
            raise ValueError(f"the group of a null is 'text', got {group!r}.")
        null = {"text": self.texts[self.place[""]], "text_mask": self.masks[self.place[""]]}
        return Condition({name: value.expand_as(cond[name]) for name, value in null.items()})

    def latents(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def decode(self, x0: Tensor) -> Tensor:
        return ((x0 + 1) / 2).clamp(0, 1)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return 3, height, width
