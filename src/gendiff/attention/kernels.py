"""The functions that compute attention, and which of them can serve what is asked at a layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from gendiff._checks import unknown

Masks = Literal["none", "dense"]


@final
@dataclass(frozen=True, eq=False)
class Call:
    """What a layer asks of its kernel beside queries, keys and values.

    Attributes:
        mask: booleans (True takes part) or numbers to add, of a shape that spreads to [B, heads, S, K].
        dropout: share of the probabilities that is dropped.
        causal: whether a query sees no key behind its own place.
        scale: factor of the scores; None is 1/sqrt(head_dim).
        grouped: whether several heads of queries share one of keys.
        padding: whether a mask of two dimensions is one of keys [B, K], as diffusers' dispatch has it, in
            place of one of queries and keys [S, K].
    """

    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    padding: bool = False

    @property
    def dense(self) -> Tensor | None:
        """The mask, of a shape that spreads to [B, heads, S, K].

        Raises:
            ValueError: for a mask that is no tensor, such as one of blocks.
        """
        mask = self.mask
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the layer masks by a {type(mask).__name__}, which only its own kernel can read; "
                f"middlewares that add a bias or look at probabilities cannot be on this layer."
            )
        return mask[:, None, None] if self.padding and mask.ndim == 2 else mask

    def beside(self, bias: Tensor) -> "Call":
        """The same call with numbers added to its scores."""
        mask = self.dense
        return self.replace(mask=bias if mask is None else additive(mask, bias.dtype) + bias, padding=False)

    def part(self, rows: slice, queries: slice, q: Tensor, k: Tensor) -> "Call":
        """What the same call asks for some rows of the batch and some of all queries."""
        mask = self.dense
        if self.causal:
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            mask = seen if mask is None else additive(mask, torch.float32) + additive(seen, torch.float32)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
            mask = mask[rows] if mask.shape[0] > 1 else mask
            mask = mask[..., queries, :] if mask.shape[-2] > 1 else mask
        return self.replace(mask=mask, causal=False, padding=False)

    def longer(self, keys: int) -> "Call":
        """The same call for more keys, of which those beyond the mask's all take part."""
        mask = self.dense
        if mask is None or mask.shape[-1] in (1, keys):
            return self
        more = keys - mask.shape[-1]
        if more < 0:
            raise ValueError(
                f"the layer masks {mask.shape[-1]} keys and a middleware leaves {keys} of them: which, the "
                f"mask does not know; select layers without a mask."
            )
        value = True if mask.dtype == torch.bool else 0.0
        return self.replace(mask=functional.pad(mask, (0, more), value=value), padding=False)

    def replace(self, **changes: object) -> "Call":
        """The same call with some of it changed."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


Attend = Callable[[Tensor, Tensor, Tensor, Call], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Kernel:
    """A function that computes attention, and what it can do.

    Attributes:
        name: how it is chosen.
        attend: `attend(q, k, v, call)` with [B, heads, tokens, head_dim].
        masks: "dense" where it honours any mask, "none" where it takes none.
        causal: whether it honours `causal`.
        dropout: whether it honours `dropout`.
        scale: whether it honours another scale.
    """

    name: str
    attend: Attend
    masks: Masks = "dense"
    causal: bool = True
    dropout: bool = True
    scale: bool = True

    def lacks(self, call: Call) -> list[str]:
        """What a call asks for and it would drop."""
        asked = {
            "a mask or bias": call.mask is not None and self.masks == "none",
            "causal order": call.causal and not self.causal,
            "dropout": call.dropout > 0 and not self.dropout,
            "a scale of its own": call.scale is not None and not self.scale,
        }
        return [what for what, lacking in asked.items() if lacking]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attend, or refuse what the function would drop."""
        lacking = self.lacks(call)
        if lacking:
            raise ValueError(
                f"the kernel {self.name!r} has no {' and no '.join(lacking)}, which this layer asks for; "
                f"choose another kernel for it, such as 'sdpa'."
            )
        return self.attend(q, k, v, call)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    mask = call.dense
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return functional.scaled_dot_product_attention(
        q, k, v, mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.grouped
    )


def probabilities(q: Tensor, k: Tensor, call: Call) -> Tensor:
    r"""The probabilities :math:`\text{softmax}(q k^\top \cdot \text{scale} + \text{mask})`, [B, heads, S, K].

    Computed in float32 at least; a query that may see no key has zeros.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if call.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    mask = call.dense
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    probs = scores.softmax(-1)
    if call.causal or mask is not None:
        probs = probs.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
    return probs


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def together(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries."""
    if not call.grouped:
        return k, v
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


def _eager(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    k, v = together(q, k, v, call)
    probs = functional.dropout(probabilities(q, k, call), call.dropout)
    return probs.to(v.dtype) @ v


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel("sdpa", _sdpa),
    "eager": Kernel("eager", _eager),
}


def register_kernel(
    name: str,
    attend: Attend,
    *,
    masks: Masks = "dense",
    causal: bool = True,
    dropout: bool = True,
    scale: bool = True,
) -> Kernel:
    """Make a function choosable as a kernel; it is used where a stack is told to, and nowhere else.

    Args:
        name: how it is chosen; a name that is taken is refused.
        attend: `attend(q, k, v, call)`, all [B, heads, tokens, head_dim]; see `Call`.
        masks: "dense" where it honours any mask, "none" where it takes none.
        causal: whether it honours `call.causal`.
        dropout: whether it honours `call.dropout`.
        scale: whether it honours `call.scale`.

    Raises:
        ValueError: for a name that is taken.
    """
    if name in KERNELS:
        raise ValueError(f"there is a kernel {name!r} already; choose another name.")
    KERNELS[name] = Kernel(name, attend, masks, causal, dropout, scale)
    return KERNELS[name]


def kernel_of(kernel: str | Kernel) -> Kernel:
    """A kernel by name."""
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in KERNELS:
        raise ValueError(unknown("kernel", kernel, KERNELS))
    return KERNELS[kernel]
