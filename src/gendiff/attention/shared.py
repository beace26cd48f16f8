"""Keys and values of one row of the batch for the others of its part: one style, one subject, one scene."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from gendiff._checks import unknown
from gendiff.attention.context import Context
from gendiff.attention.middleware import Middleware
from gendiff.attention.regional import image_tokens, only
from gendiff.attention.site import Site
from gendiff.attention.temperature import moved

MODES = ("append", "replace")
PARTS = ("q", "k", "v")


@final
class SharedKV(Middleware):
    r"""Every row of a part of the batch attends to the image tokens of the part's reference row.

    .. math:: \text{softmax}\left(\tilde q\,[\tilde k; \tilde k_{ref}]^\top \text{scale}\right) [v; v_{ref}]

    for mode="append"; with "replace" it has :math:`k_{ref}, v_{ref}` alone. A tilde means AdaIN of what is
    named in `adain`: :math:`\tilde q = \text{std}(q_{ref}) (q - \text{mean}(q)) / \text{std}(q) +
    \text{mean}(q_{ref})` over the tokens of the image, each head and channel by itself. The reference row
    comes out as it would alone, up to rounding; with "replace", exactly. Text keeps its keys and values.

    * StyleAligned: `SharedKV(adain=("q", "k"))` at all self sites, the reference image first in each part.
    * MasaCtrl: `SharedKV(mode="replace")` with `when=Steps(4, n)` and `on=Kind.SELF & Depth(0.6, 1)`.
    * Reference-only: `SharedKV()`; the reference row is the noised reference image, written into the batch
      before each step.
    * Cross-frame attention (Text2Video-Zero): `SharedKV(mode="replace")`, the frames of a part its rows.

    Args:
        reference: place of the reference among the samples of each part.
        mode: append, or replace. What is appended changes the number of keys, so that the stack refuses to
            limit it to rows or steps.
        adain: which of "q", "k", "v" take over the reference's mean and deviation.
        shift: what is added to the scores of appended keys, a buffer that `set` changes; it costs a mask.
            None is none. StyleAligned's code calls it shared_score_shift.

    Raises:
        ValueError: for unknown modes or names, a shift of what is not appended, cross sites, and a reference
            that a part has not.

    References:
        Hertz et al. 2023, *Style aligned image generation via shared attention*, arXiv 2312.02133;
        Cao et al. 2023, *MasaCtrl*, arXiv 2304.08465.
    """

    exclusive: ClassVar[tuple[str, ...]] = ("kv",)
    needs: ClassVar[tuple[str, ...]] = ("rows",)

    def __init__(
        self,
        reference: int = 0,
        mode: Literal["append", "replace"] | str = "append",
        adain: Sequence[str] = (),
        shift: float | int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(unknown("mode", mode, MODES))
        for name in adain:
            if name not in PARTS:
                raise ValueError(unknown("part for adain", name, PARTS))
        if shift is not None and mode != "append":
            raise ValueError(f"a shift is that of appended keys, and with mode={mode!r} there are none.")
        self.reference, self.mode, self.adain = reference, mode, tuple(adain)
        self.shift = None if shift is None else torch.tensor(float(shift))

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.reference, self.mode, self.adain, self.shift is None

    def set(self, shift: float | int | Tensor) -> None:
        """Write another shift into the buffer.

        Raises:
            ValueError: where it was made without one.
        """
        if self.shift is None:
            raise ValueError("this SharedKV has no shift; make it with one, such as shift=0.0.")
        self.shift.copy_(shift) if isinstance(shift, Tensor) else self.shift.fill_(shift)

    def placed(self, sites: tuple[Site, ...], context: Context) -> None:
        only(self, sites, ("self", "joint", "single", "temporal"))

    def on_qkv(
        self, site: Site, context: Context, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take over statistics, then keys and values."""
        rows, image = own_tokens(site, context, q, k)
        given: dict[str, Tensor] = dict(zip(PARTS, (q, k, v), strict=True))
        for name in self.adain:
            place = rows if name == "q" else image
            given[name] = _put(given[name], place, self._adapted(given[name][..., place, :], context))
        q, k, v = given.values()
        if self.mode == "append":
            k, v = (torch.cat([x, self._reference(x[..., image, :], context)], -2) for x in (k, v))
        else:
            k, v = (from_reference(x, image, context, self.reference) for x in (k, v))
        return q, k, v

    def on_bias(self, site: Site, context: Context, q: Tensor, k: Tensor) -> Tensor | None:
        """The shift of what was appended."""
        if self.shift is None:
            return None
        _, image = image_tokens(site, context, q.shape[-2])
        shift, own = moved(self, "shift", q.device).to(q.dtype), k.shape[-2] - (image.stop - image.start)
        return torch.cat([shift.new_zeros(own), shift.expand(k.shape[-2] - own)])

    def _reference(self, x: Tensor, context: Context) -> Tensor:
        return by_part(x, context, lambda part: _one(part, self.reference))

    def _adapted(self, x: Tensor, context: Context) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(-2, keepdim=True)
        unbiased = min(1, x.shape[-2] - 1)  # as StyleAligned's code, and 1e-5; one token has no deviation
        std = (wide.var(-2, correction=unbiased, keepdim=True) + 1e-5).sqrt()
        new = (wide - mean) / std * self._reference(std, context) + self._reference(mean, context)
        return new.to(x.dtype)


def by_part(x: Tensor, context: Context, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows of each named part of the batch changed; rows without a name stay.

    Args:
        x: [B, *], where a sample may have several rows, such as its frames.
        context: which knows the parts.
        change: what happens to a part [samples, rows of a sample, *].

    Raises:
        ValueError: for layers that do not see the whole batch at once.
    """
    batch = context.batch or len(x)
    if len(x) % batch:
        raise ValueError(
            f"the layer runs on {len(x)} rows, and the batch has {batch}: it sees one by one or some, so "
            f"that none can look at another."
        )
    times = len(x) // batch
    parts = sorted((context.rows_of(name, len(x)) for name in context.rows), key=lambda part: part.start)
    pieces: list[Tensor] = []
    place = 0
    for part in parts:
        new = change(x[part].unflatten(0, (-1, times)))
        pieces += [x[place : part.start], new.flatten(0, 1)]
        place = part.stop
    return torch.cat([*pieces, x[place:]])


def _one(part: Tensor, reference: int) -> Tensor:
    """One sample, for all of its part."""
    if not -len(part) <= reference < len(part):
        raise ValueError(f"the reference is sample {reference}, and a part of the batch has {len(part)}.")
    return part[reference % len(part)].expand_as(part)


def own_tokens(site: Site, context: Context, q: Tensor, k: Tensor) -> tuple[slice, slice]:
    """Where the image is among queries and keys that are of the same tokens.

    Raises:
        ValueError: for a layer whose keys are not those of its queries.
    """
    rows, columns = image_tokens(site, context, q.shape[-2])
    own = q.shape[-2] if rows == columns else q.shape[-2] + (context.text or 0)
    if k.shape[-2] != own:
        raise ValueError(
            f"{site.name} is to share tokens of the image among rows, and has {q.shape[-2]} queries and "
            f"{k.shape[-2]} keys, which are of something else; select other sites."
        )
    return rows, columns


def from_reference(x: Tensor, place: slice, context: Context, reference: int = 0) -> Tensor:
    """Tokens at a place those of the reference of each part of the batch."""
    return _put(x, place, by_part(x[..., place, :], context, lambda part: _one(part, reference)))


def _put(x: Tensor, place: slice, new: Tensor) -> Tensor:
    """Other tokens at a place."""
    return torch.cat([x[..., : place.start, :], new, x[..., place.stop :, :]], -2)
