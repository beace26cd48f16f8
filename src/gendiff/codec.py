"""Codecs: what turns a raw sample into (x0, cond) and back, one meaning for training and sampling."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gendiff._checks import positive_batch, unknown
from gendiff.condition import Condition
from gendiff.random import Randomness


class Codec(nn.Module, ABC):
    """Between raw samples (images in [0, 1], captions, labels) and what a denoiser is given.

    Encoding is split in two. `encode` is deterministic, so that its result can be cached by sample id; it
    consumes the raw keys present and leaves the others, so that encoding twice is encoding once. `inputs` is
    cheap and random: it samples what is drawn anew in every visit, such as dropped conditions.
    """

    @abstractmethod
    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with every raw key that is present replaced by its encoding."""

    @abstractmethod
    def inputs(self, batch: Mapping[str, Any], rng: Randomness | None = None) -> tuple[Tensor, Condition]:
        """(x0, cond) of an encoded or raw batch; without an rng nothing is drawn and nothing dropped."""

    @abstractmethod
    def cond(self, captions: Sequence[Any] | Tensor, **facts: Any) -> Condition:
        """The condition of captions (or labels), with further facts by name."""

    @abstractmethod
    def null(self, cond: Mapping[str, Tensor], group: str = "text") -> Condition:
        """The condition with a group of its values replaced by what training gives where it drops them."""

    @abstractmethod
    def latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Images in [0, 1] as x0."""

    @abstractmethod
    def decode(self, x0: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """x0 as images in [0, 1]."""

    @abstractmethod
    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one x0 of an image of that size, without the batch dimension."""


@final
class PixelCodec(Codec):
    """Pixels as they are, from [0, 1] to [-1, 1], with a class label as the condition.

    The batch has `image` [B, C, H, W] in [0, 1] and, where there are classes, `label` [B] of integers. Label
    `classes` is the null: what a dropped label becomes in training and the unconditional branch is given.

    Args:
        channels: number C of channels.
        classes: number of classes; 0 for unconditional images.
        drop: probability with which a label is dropped in training, in [0, 1).

    >>> codec = PixelCodec(channels=1, classes=10)
    >>> x0, cond = codec.inputs({"image": torch.ones(2, 1, 8, 8), "label": torch.tensor([3, 7])})
    >>> x0.max(), codec.null(cond)["label"]
    (tensor(1.), tensor([10, 10]))
    """

    def __init__(self, channels: int, classes: int = 0, drop: float = 0.0) -> None:
        super().__init__()
        if channels < 1 or classes < 0 or not 0 <= drop < 1 or (drop and not classes):
            raise ValueError(
                f"PixelCodec needs channels >= 1, classes >= 0 and drop in [0, 1), 0 where there are no "
                f"classes to drop, got channels={channels}, classes={classes}, drop={drop}."
            )
        self.channels, self.classes, self.drop = channels, classes, drop

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = {key: value for key, value in batch.items() if key != "image"}
        if "image" in batch:
            encoded["x0"] = self.latents(batch["image"])
        return encoded

    def inputs(self, batch: Mapping[str, Any], rng: Randomness | None = None) -> tuple[Tensor, Condition]:
        batch = self.encode(batch)
        if "x0" not in batch:
            raise ValueError(f"a batch needs 'image' in [0, 1], or 'x0' from encode; got {sorted(batch)}.")
        x0 = batch["x0"]
        if not self.classes:
            return x0, Condition()
        if "label" not in batch:
            raise ValueError(
                f"a codec of {self.classes} classes needs 'label' in the batch; got {sorted(batch)}."
            )
        cond = self.cond(batch["label"])
        if rng is None or not self.drop:
            return x0, cond
        dropped = rng.uniform("drop", (len(x0),), device=x0.device) < self.drop
        return x0, Condition(label=torch.where(dropped, self.classes, cond["label"]))

    def cond(self, captions: Sequence[Any] | Tensor, **facts: Any) -> Condition:
        for name in facts:
            raise TypeError(unknown("fact", name, []))
        labels = torch.as_tensor(captions)
        if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise TypeError(
                f"labels are integers, one per sample, got {tuple(labels.shape)} of {labels.dtype}."
            )
        if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= self.classes)).any()):
            raise ValueError(
                f"labels lie in [0, {self.classes}), got {labels.min()} … {labels.max()}; codec.null gives "
                f"the condition of no label."
            )
        return Condition(label=labels.long())

    def null(self, cond: Mapping[str, Tensor], group: str = "label") -> Condition:
        if group not in ("label", "text"):
            raise ValueError(unknown("group", group, ["label"]))
        return Condition.of(cond).replace(label=torch.full_like(cond["label"], self.classes))

    def latents(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        positive_batch(images, "image")
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images are [B, {self.channels}, H, W], got {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise TypeError(
                f"images are floating-point in [0, 1], got {images.dtype}; divide 8-bit values by 255."
            )
        if images.device.type == "cpu" and not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"pixels lie in [0, 1], got {images.min():g} … {images.max():g}; divide 8-bit values by 255."
            )
        return 2 * images - 1

    def decode(self, x0: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return ((x0 + 1) / 2).clamp(0, 1)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.channels, height, width
