"""What runs at a layer: the layer's own work, with middlewares between the projections and the output."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, final

import torch
from torch import Tensor, nn

from gendiff.attention.context import Context
from gendiff.attention.facts import fact_at
from gendiff.attention.kernels import Call, Kernel, kernel_of, probabilities, together
from gendiff.attention.middleware import HOOKS, Middleware
from gendiff.attention.rebinding import Stacked, method_of, plain, rebound, running
from gendiff.attention.site import Site, present
from gendiff.attention.windows import Window

COUNTER = count()
MARK = "_gendiff_layer"
COUNT = "_gendiff_layers"
ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")
INSIDE = ("on_qkv", "extra_kv", "on_bias", "on_probs", "on_heads")
DENSE = ("native", "_native_cudnn", "_native_efficient", "_native_math", "_native_npu", "flex", "xformers")
Plain = Callable[[Tensor, Tensor, Tensor, Call], Tensor]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Attachment:
    """A middleware of a stack, with the rows and the window it is limited to.

    Attributes:
        middleware: what is plugged in.
        context: the stack's.
        rows: the part of the batch it changes; None is all.
        window: when it is on; None is always.
        number: how many were added to the stack before.
        key: a number that no other attachment of the process has.
    """

    middleware: Middleware
    context: Context
    rows: str | None = None
    window: Window | None = None
    number: int = 0
    key: int = field(default_factory=COUNTER.__next__)

    @property
    def place(self) -> tuple[int, int]:
        """Its place at a layer."""
        return self.middleware.order, self.number

    def __str__(self) -> str:
        limits = [f"rows {self.rows}"] if self.rows else []
        limits += [str(self.window)] if self.window else []
        return type(self.middleware).__name__ + (f" ({', '.join(limits)})" if limits else "")

    def blend(self, old: Tensor, new: Tensor) -> Tensor:
        """The new where and when it is on, else the old."""
        if new is old or (self.rows is None and self.window is None):
            return new
        if new.shape != old.shape:
            raise ValueError(
                f"{self} makes a tensor of shape {tuple(old.shape)} one of {tuple(new.shape)}, so that it "
                f"cannot be limited to some rows or steps: add it without `rows` and `when`."
            )
        if self.window is not None:
            new = torch.where(self.window.open(self.context), new, old)
        if self.rows is not None:
            part = self.context.rows_of(self.rows, len(old))
            new = torch.cat([old[: part.start], new[part], old[part.stop :]])
        return new

    def weighed(self, new: Tensor) -> Tensor:
        """What is to be added, zero where and when it is off."""
        limited = self.rows is not None or self.window is not None
        return self.blend(torch.zeros_like(new), new) if limited else new


@final
class Layer:
    """What is attached to a layer; kept on the layer itself, and gone when nothing is.

    Args:
        site: the layer.
    """

    # a compiled call checks what it reads, and of an object with a dictionary that as well
    __slots__ = (
        *("attachments", "by_hook", "call", "contexts", "inside", "joint", "kernel", "main", "other"),
        *("processor", "site", "used"),
    )

    def __init__(self, site: Site) -> None:
        self.site, self.processor = site, site.module.processor
        self.attachments: tuple[Attachment, ...] = ()
        self.kernel: Kernel | None = None
        self.call: Call | None = None  # what the kernel was asked for, while `on_heads` runs
        self.main = 0  # which call of a kernel is the attention itself
        self.by_hook: dict[str, tuple[Attachment, ...]] = dict.fromkeys(HOOKS, ())
        self.used: tuple[str, ...] = ()  # the hooks that anything is attached to
        self.contexts: tuple[Context, ...] = ()
        self.inside, self.joint = False, site.kind == "joint"
        self.other: int | None = None  # where the other stream stands in a call

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model has no stack."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def set(self, attachments: tuple[Attachment, ...], kernel: Kernel | None) -> None:
        """Attach these, in their order, and no others."""
        self.attachments = tuple(sorted(attachments, key=lambda one: one.place))
        self.kernel = kernel
        for name in HOOKS:
            having = tuple(one for one in self.attachments if name in one.middleware.hooks)
            self.by_hook[name] = having[::-1] if name in ("on_heads", "on_output") else having
        self.used = tuple(name for name in HOOKS if self.by_hook[name])
        self.contexts = tuple(dict.fromkeys(one.context for one in self.attachments))
        self.inside = kernel is not None or any(name in INSIDE for name in self.used)

    def hook(self, name: str) -> tuple[Attachment, ...]:
        """What is attached to a hook; a compiled call checks those that are used, and no others."""
        return self.by_hook[name] if name in self.used else ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, own: Plain) -> Tensor:
        """Attention with all that is attached."""
        site = self.site
        keys = k.shape[-2]
        for one in self.hook("on_qkv"):
            new = one.middleware.on_qkv(site, one.context, q, k, v)
            q, k, v = one.blend(q, new[0]), one.blend(k, new[1]), one.blend(v, new[2])
        if k.shape[-2] != keys and call.mask is not None:
            call = call.longer(k.shape[-2])
        for one in self.hook("on_bias"):
            bias = one.middleware.on_bias(site, one.context, q, k)
            if bias is not None:
                bias = bias[(None,) * (4 - bias.ndim)]
                if one.rows is not None:
                    bias = bias.expand(len(q), -1, -1, -1)
                call = call.beside(one.weighed(bias))
        if self.hook("on_probs"):
            k_all, v_all = together(q, k, v, call)
            probs = probabilities(q, k_all, call)
            for one in self.hook("on_probs"):
                probs = one.blend(probs, one.middleware.on_probs(site, one.context, probs))
            out = nn.functional.dropout(probs, call.dropout).to(v.dtype) @ v_all
        else:
            out = own(q, k, v, call) if self.kernel is None else self.kernel(q, k, v, call)
        for one in self.hook("extra_kv"):
            for k_more, v_more, weight, mask in one.middleware.extra_kv(site, one.context, q):
                more = kernel_of("sdpa")(q, k_more, v_more, Call(mask=mask, scale=call.scale))
                out = out + one.weighed(weight * more).to(out.dtype)
        self.call = call
        try:
            for one in self.hook("on_heads"):
                out = one.blend(out, one.middleware.on_heads(site, one.context, out, q, k, v))
        finally:
            self.call = None
        return out


def layer_of(module: nn.Module) -> Layer | None:
    """What is attached to a layer."""
    return getattr(module, MARK, None)


def through(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a kernel of diffusers: the same, with what is attached to the running layer."""
    swaps = name == "dispatch_attention_fn"  # which takes tokens before heads

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, number = running.layer, running.calls
        running.calls = number + 1
        if layer is None or not layer.inside or number != layer.main:
            return kernel(query, key, value, *args, **kwargs)
        asked = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}

        def own(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
            given = asked
            if call.mask is not asked.get("attn_mask"):
                _takes_bias(layer.site, asked, kernel)
                given = {**asked, "attn_mask": call.mask if call.mask is None else call.mask.to(q.dtype)}
            if swaps:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = kernel(q, k, v, **given)
            return out.transpose(1, 2) if swaps else out

        if swaps:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = layer.attend(query, key, value, _call_of(asked, padding=swaps), own)
        return out.transpose(1, 2) if swaps else out

    return attend


def _call_of(asked: dict[str, Any], padding: bool) -> Call:
    return Call(
        mask=asked.get("attn_mask"),
        dropout=asked.get("dropout_p", 0.0),
        causal=asked.get("is_causal", False),
        scale=asked.get("scale"),
        grouped=asked.get("enable_gqa", False),
        padding=padding,
    )


def enter(
    run: Callable[..., Any],
    own: Callable[..., Any],
    processor: Any,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A call of a processor, announced to the kernels inside of it."""
    layer = layer_of(module)
    if layer is None:
        return own(processor, module, *args, **kwargs)
    for one in layer.hook("on_inputs"):
        args, kwargs = _changed_inputs(one, layer, args, kwargs)
    if layer.joint:  # networks may put tokens of their own before the text
        text = _other(layer, args, kwargs)
        if text is not None:
            for context in layer.contexts:
                context.text = text.shape[1]
    before, calls = running.layer, running.calls
    running.layer, running.calls = layer, 0
    try:
        out = run(processor, module, *args, **kwargs)
        called = running.calls
    finally:
        running.layer, running.calls = before, calls
    if layer.inside and called <= layer.main:
        raise RuntimeError(
            f"{type(processor).__name__} at {layer.site.name} called {called} kernels, and what is stacked "
            f"there works inside of number {layer.main + 1}: it had no effect. Select other sites."
        )
    for one in layer.hook("on_output"):
        out = _changed_output(one, layer, out)
    return out


def _other(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The second stream of a call."""
    place = layer.other
    return args[place] if place is not None and place < len(args) else kwargs.get("encoder_hidden_states")


def _changed_inputs(
    one: Attachment, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first = next(iter(kwargs)) if not args else None
    hidden = args[0] if args else kwargs[first]  # pyright: ignore[reportArgumentType]
    place, other = layer.other, _other(layer, args, kwargs)
    new, new_other = one.middleware.on_inputs(layer.site, one.context, hidden, other)
    new = one.blend(hidden, new)
    if args:
        args = (new, *args[1:])
    else:
        kwargs = {**kwargs, first: new}  # pyright: ignore[reportAssignmentType]
    if new_other is not other:
        new_other = new_other if other is None or new_other is None else one.blend(other, new_other)
        if place is not None and place < len(args):
            args = (*args[:place], new_other, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "encoder_hidden_states": new_other}
    return args, kwargs


def _changed_output(one: Attachment, layer: Layer, out: Any) -> Any:
    new = one.middleware.on_output(layer.site, one.context, out)
    if isinstance(out, tuple):
        return tuple(b if a is None or b is None else one.blend(a, b) for a, b in zip(out, new, strict=True))
    return one.blend(out, new)


def _place_of(kind: type, name: str) -> int | None:
    """Where an argument stands behind the layer in a processor's call."""
    method, _ = method_of(kind)
    names = list(inspect.signature(getattr(kind, method)).parameters)[2:]
    return names.index(name) if name in names else None


def _takes_bias(site: Site, asked: dict[str, Any], kernel: Callable[..., Any]) -> None:
    """Refuse a back-end of diffusers that would drop the bias a middleware adds."""
    if "backend" not in asked and "parallel_config" not in asked:
        return  # torch's own function, which honours any
    backend = asked.get("backend")
    if backend is None:
        registry: Any = vars(sys.modules[kernel.__module__])["_AttentionBackendRegistry"]  # beside the kernel
        backend, _ = registry.get_active_backend()
    name = str(getattr(backend, "value", backend))
    if name not in DENSE:
        raise ValueError(
            f"the attention back-end {name!r} at {site.name} drops masks, and a middleware adds one there: "
            f"choose stack.kernel('sdpa') for it, or the back-end 'native'."
        )


def swap_in(module: nn.Module, layer: Layer) -> None:
    """Let a layer's processor go through what is attached."""
    processor = module.processor
    kind = type(processor)
    layer.processor = processor
    layer.main = fact_at(module, plain(kind)).main if present(module, "add_k_proj") else 0
    layer.other = _place_of(kind, "encoder_hidden_states")
    if not issubclass(kind, Stacked):
        try:
            processor.__class__ = rebound(kind, through, enter)
        except TypeError as error:
            raise TypeError(
                f"the processor {kind.__name__} of {layer.site.name} cannot be stacked on: {error}."
            ) from None
    setattr(processor, COUNT, getattr(processor, COUNT, 0) + 1)
    setattr(module, MARK, layer)


def swap_out(module: nn.Module, layer: Layer) -> None:
    """Take it off again: the processor is of its own class, and the layer as before."""
    processor = layer.processor
    left = getattr(processor, COUNT) - 1
    if left:
        setattr(processor, COUNT, left)
    else:
        delattr(processor, COUNT)
        processor.__class__ = plain(type(processor))
    delattr(module, MARK)
