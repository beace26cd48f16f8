"""The codec of a pipeline of any family: pixels and captions to (x0, cond), and back."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gendiff._checks import unknown
from gendiff.codec import Codec
from gendiff.condition import Condition
from gendiff.interop.diffusers.arguments import drops, frozen, guidance_of
from gendiff.interop.diffusers.backbone import accepted, config_of
from gendiff.interop.diffusers.beside import Beside
from gendiff.interop.diffusers.facts import AESTHETIC, NEGATIVE_AESTHETIC, Size, per_sample, size_facts
from gendiff.interop.diffusers.family import TEXT, Family
from gendiff.interop.diffusers.pixels import Pixels
from gendiff.interop.diffusers.prompts import PromptEncoder, blended, encoders_of
from gendiff.interop.diffusers.registry import family_for
from gendiff.random import Randomness

MADE = ("size", "guidance", "channels")  # conditions that are not passed on just as they are


@final
class PipelineCodec(Codec):
    """What a pipeline does to images and prompts, by its own autoencoder and text encoders; see `codec_of`.

    A batch may have `image` [B, 3, H, W] in [0, 1], `caption`, a list of strings, `mask` [B, 1, H, W], 1
    where is to be painted, and `source` [B, 3, H, W], a picture to be edited. `encode` makes of them what can
    be cached: `moments` (or `x0`), `text`, `text_mask`, `text_pooled` and `channels`. Raw keys that the
    network has no use for are left in the batch, and so are captions where a text encoder trains. `inputs`
    also reads `size` [B, 6], `aesthetic`, `guidance` and `label`.

    Attributes:
        family: the row of facts.
        accepts: canonical names of the conditions that the network reads.
        pixels: the autoencoder.
        trains: names of the text encoders that train.
        drop: probability with which `inputs` drops each group of conditions.
        guidance: guidance scale that a network is told which reads one.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        *,
        train: Sequence[str] = (),
        drop: Mapping[str, float | int] | None = None,
        guidance: float | int | None = None,
    ) -> None:
        super().__init__()
        network = getattr(pipe, family.network.component)
        self.family, self.accepts = family, accepted(network, family.network)
        self.pixels = Pixels.of(pipe, family)
        self.beside = Beside(self.pixels, family.network.beside if "channels" in self.accepts else None)
        encoders = encoders_of(pipe) if family.prompt is not None else {}
        for name, encoder in encoders.items():
            setattr(self, name, encoder)
        self._encoders = tuple(encoders)
        self._prompts = None if family.prompt is None else PromptEncoder(pipe, family.prompt)
        self.trains = frozen(self.pixels, encoders, train)
        self._scored = bool(pipe.config.get("requires_aesthetics_score"))
        self.drop = drops(drop or {}, self.groups)
        self.guidance = guidance_of(pipe, guidance, "guidance" in self.accepts)
        side = config_of(network).get("sample_size")
        self._side = side * self.pixels.factor if isinstance(side, int) else None
        self._null: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """What can be dropped: "text", and "channels" where there are any."""
        return ("text",) * (self._prompts is not None) + ("channels",) * ("channels" in self.accepts)

    @property
    def facts(self) -> tuple[str, ...]:
        """Names that `cond` knows besides captions."""
        scored = ("aesthetic",) * ("size" in self.accepts and self._scored)
        return (*sorted(self.accepts), *scored, *self.beside.raw)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        encoded = self.beside.encode(batch)
        if "caption" in encoded and self._prompts is not None and not self.trains:
            encoded |= self._texts(encoded.pop("caption"))
        if "image" in encoded:
            encoded |= self.pixels.encode(encoded.pop("image"))
        return encoded

    def inputs(self, batch: Mapping[str, Any], rng: Randomness | None = None) -> tuple[Tensor, Condition]:
        encoded = self.encode(batch)
        if not {"x0", "moments"} & set(encoded):
            raise ValueError(
                f"a batch needs 'image' in [0, 1], or what encode makes of it; got {sorted(encoded)}."
            )
        x0 = self.pixels.x0(encoded, rng)
        if self.trains and "caption" in encoded:
            encoded |= self._texts(encoded["caption"])
        sides = tuple(side * self.pixels.factor for side in x0.shape[-2:])
        cond = self._condition(encoded, len(x0), x0.device, sides)
        for group, probability in self.drop.items() if rng is not None else ():
            assert rng is not None
            gone = rng.uniform(f"drop {group}", (len(x0),), device=x0.device) < probability
            cond = blended(cond, self.null(cond, group), gone)
        return x0, cond

    def cond(self, captions: Sequence[Any] | Tensor | None = None, **facts: Any) -> Condition:
        """The condition of captions.

        Args:
            captions: strings, or one; for a network with classes, integers. None where the text is given as
                facts, `text`, `text_mask` and `text_pooled`, or there is none.
            facts: by name, what `codec.facts` lists: `size`, (height, width) or the six facts of `Folder`, by
                default the size of `image` or what the network was made for; `aesthetic`, 6 by default;
                `guidance`; `image` and `mask`, of a network that inpaints; `source`, of one that edits; and
                any condition, ready made.

        Raises:
            TypeError: for a fact that this network does not know.
            ValueError: for one that is missing, or numbers of rows that do not fit.
        """
        for name in facts:
            if name not in self.facts:
                raise TypeError(unknown(f"fact of family {self.family.name!r}", name, self.facts))
        encoded = self.beside.encode(facts)
        if captions is not None:
            if both := sorted({*TEXT, "label"} & set(facts)):
                raise TypeError(f"captions were given, and {', '.join(both)} too; give one of them.")
            encoded |= self._texts(captions) if self._prompts is not None else self._labels(captions)
        rows = max(
            (len(encoded[name]) for name in (*TEXT, "label", "channels") if name in encoded), default=0
        )
        sides = tuple(facts["image"].shape[-2:]) if "image" in facts else (self._side, self._side)
        if rows == 0:
            if self.accepts:
                raise ValueError(f"captions are missing; this network reads {sorted(self.accepts)}.")
            return Condition()
        return self._condition(encoded, rows, self._device, sides)

    def null(self, cond: Mapping[str, Tensor], group: str = "text") -> Condition:
        """The condition with its text, or its `channels`, replaced by what stands for none.

        The refiner of SDXL is told an aesthetic score of 2.5 beside no text, as by its pipeline. No picture
        to be edited is zeros; no picture to be completed is a grey one, all of it masked.
        """
        if group not in self.groups:
            raise ValueError(unknown("group", group, self.groups))
        cond = Condition.of(cond)
        if group not in cond or cond.rows is None:
            raise ValueError(f"the condition has no {group!r} that could be replaced, but {sorted(cond)}.")
        if group == "channels":
            return cond.replace(channels=self.beside.null(cond["channels"]))
        assert self.family.prompt is not None
        if self.family.prompt.null == "zeros":
            return cond.replace(
                **{n: torch.zeros_like(cond[n]) for n in ("text", "text_pooled") if n in cond}
            )
        kept = {name: value for name, value in cond.items() if name not in TEXT}
        if self._scored and "size" in kept:
            kept["size"] = kept["size"].clone()
            kept["size"][:, 4] = NEGATIVE_AESTHETIC
        for name, value in self._null_text().items():
            kept[name] = value.to(cond["text"].device).expand(cond.rows, *value.shape[1:])
        return Condition(kept)

    def latents(self, images: Float[Tensor, "B C *dims"]) -> Float[Tensor, "B c *places"]:
        """Images in [0, 1], or clips [B, C, F, H, W] for video, as x0: the mean of the latents."""
        return self.pixels.x0(self.pixels.encode(images))

    def decode(self, x0: Float[Tensor, "B c *places"]) -> Float[Tensor, "B C *dims"]:
        """x0 as images in [0, 1], [B, C, H, W], or several frames as clips, [B, C, F, H, W]."""
        return self.pixels.decode(x0)

    def mask(self, masks: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 *places"]:
        """Masks of pixels as masks of places of x0: the part of each place that is masked."""
        return self.pixels.mask(masks)

    def shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """The shape of one x0 of an image, or of a clip, without the batch dimension."""
        return self.pixels.shape(height, width, frames)

    def _condition(
        self, given: Mapping[str, Any], rows: int, device: torch.device, sides: tuple[Any, ...]
    ) -> Condition:
        """What the network reads, from encoded keys and facts."""
        values = {name: given[name] for name in self.accepts - {"size", "guidance"} if name in given}
        if "size" in self.accepts:
            size: Size = given.get("size", sides)
            score = given.get("aesthetic", AESTHETIC) if self._scored else None
            values["size"] = size_facts(size, rows, score, device)
        if "guidance" in self.accepts:
            scale = given.get("guidance", self.guidance)
            if scale is None:
                raise ValueError(
                    "this network is told a guidance scale, for which its pipeline has no default; give "
                    "guidance=… to codec_of or to cond."
                )
            values["guidance"] = per_sample(scale, rows, device)
        for name in sorted(self.accepts - {"text_mask"} - set(values)):
            raise ValueError(
                f"{name!r} is missing for a network of family {self.family.name!r}: give "
                f"{_source_of(name, self.beside.raw)}; got {sorted(given)}."
            )
        rows_of = {name: len(value) for name, value in values.items()}
        return Condition(
            {n: v.expand(rows, *v.shape[1:]) if rows_of[n] == 1 else v for n, v in values.items()}
        )

    @property
    def _device(self) -> torch.device:
        for parameter in self.parameters():
            return parameter.device
        return torch.device("cpu")

    def _texts(self, captions: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        captions = [captions] if isinstance(captions, str) else list(captions)
        if wrong := [caption for caption in captions if not isinstance(caption, str)]:
            raise TypeError(f"captions are strings, got {type(wrong[0]).__name__} {wrong[0]!r:.40}.")
        if not captions:
            raise ValueError('there is no caption; give at least one, "" for none.')
        assert self._prompts is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trains)):
            return self._prompts(captions, self._loaded(), self._device)

    def _labels(self, labels: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        if "label" not in self.accepts:
            raise TypeError(
                f"{len(labels)} captions were given, but this network reads neither text nor labels."
            )
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels are integers, one a sample, got {tuple(labels.shape)} of {labels.dtype}."
            )
        return {"label": labels.long()}

    def _loaded(self) -> dict[str, nn.Module]:
        if not self._encoders:
            raise ValueError(
                "the pipeline was loaded without its text encoders, which encode captions and the empty "
                "prompt; load them, or give ready embeddings: codec.cond(text=…), and in place of codec.null "
                "cond.replace(text=…)."
            )
        return {name: getattr(self, name) for name in self._encoders}

    def _null_text(self) -> dict[str, Tensor]:
        """The text of no prompt, one row, kept for as long as no text encoder changes."""
        assert self._prompts is not None
        encoders = self._loaded()
        if self.trains:
            return self._prompts.null(encoders, self._device)
        state = [(p.data_ptr(), p._version) for encoder in encoders.values() for p in encoder.parameters()]
        if self._null is None or self._null[0] != state:
            with torch.no_grad():
                self._null = state, self._prompts.null(encoders, self._device)
        return self._null[1]


def codec_of(
    pipe: Any,
    family: Family | str | None = None,
    train: Sequence[str] = (),
    drop: Mapping[str, float | int] | None = None,
    guidance: float | int | None = None,
) -> PipelineCodec:
    """A pipeline's autoencoder and text encoders as a codec.

    The modules are the pipeline's own. They are frozen (`requires_grad` False), but for those that train.

    Args:
        pipe: a diffusers pipeline.
        family: the row that describes it, or its name; None is the one known for its class.
        train: names of text encoders that train; in them, what requires a gradient stays as it is.
        drop: probability in [0, 1) with which `inputs` drops "text" or "channels", each on its own.
        guidance: scale that a guidance-distilled network is told; by default what the pipeline's call has.

    Raises:
        ValueError: for a pipeline of no known family, and for names and numbers that do not fit it.

    >>> from gendiff.testing import tiny_pipeline
    >>> codec = codec_of(tiny_pipeline("flux"), drop={"text": 0.1}, guidance=3.5)
    >>> cond = codec.cond(["a red fox", "a dog"])
    >>> cond["guidance"], codec.shape(64, 32)
    (tensor([3.5000, 3.5000]), (16, 8, 4))
    """
    row = family_for(pipe, family)
    if getattr(pipe, row.network.component, None) is None:
        raise ValueError(
            f"{type(pipe).__name__} was loaded without its {row.network.component}, whose configuration says "
            f"what conditions it reads; load it."
        )
    return PipelineCodec(pipe, row, train=train, drop=drop, guidance=guidance)


def _source_of(name: str, raw: Sequence[str]) -> str:
    if name in TEXT:
        return "captions ('caption' in a batch)"
    return " and ".join(map(repr, raw)) if name == "channels" else repr(name)
