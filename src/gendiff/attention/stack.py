"""A stack of middlewares on a model: added and removed in any order, and then the model is as it was."""

import inspect
import warnings
from types import TracebackType
from typing import Any, final

import torch
from torch import nn

from gendiff._checks import unknown
from gendiff.attention.context import Context
from gendiff.attention.explanation import Explanation
from gendiff.attention.facts import axes_of
from gendiff.attention.handle import Handle, changeable
from gendiff.attention.kernels import Kernel, kernel_of
from gendiff.attention.middleware import Middleware
from gendiff.attention.passes import Passes
from gendiff.attention.project import refuse_fused
from gendiff.attention.run import INSIDE, Attachment, Layer, layer_of, swap_in, swap_out
from gendiff.attention.selectors import On
from gendiff.attention.site import Site
from gendiff.attention.table import Sites, sites, unwrapped
from gendiff.attention.windows import Steps, Window

TRAINED = "attention_middlewares"  # where the trained ones are on the model
STACKS = "_attached"  # as `gendiff.sampling` looks for it


@final
class Stack:
    """Middlewares on the attention layers of a model; see `stack`.

    Attributes:
        model: the network.
        sites: its attention layers.
        context: what the middlewares may know of the call.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        self.model, self.context = unwrapped(model), context
        self.sites: Sites = sites(model)
        self._names = [
            n for n in inspect.signature(self.model.forward).parameters if n not in ("args", "kwargs")
        ]
        self._handles: list[Handle] = []
        self._hooks: list[Any] = []
        self._added, self._passes = 0, Passes()
        self._touched: dict[str, Site] = {}

    # ---- adding

    def add(
        self,
        middleware: Middleware,
        on: On = None,
        *,
        rows: str | None = None,
        when: Window | None = None,
        name: str | None = None,
    ) -> Handle:
        """Plug a middleware into some layers.

        Args:
            middleware: what is plugged in.
            on: the layers: a selector, the pattern of their names, or sites; None is all.
            rows: the part of the batch that it changes, one of the context's rows.
            when: the steps or times at which it is on.
            name: of its weights in the model's `state_dict`, where it has some.

        Returns:
            The handle that takes it off.

        Raises:
            TypeError: for what is no middleware.
            ValueError: where nothing matches, or what is asked cannot work at a layer.
        """
        changeable()
        if not isinstance(middleware, Middleware):
            raise TypeError(
                f"a stack takes middlewares, got {type(middleware).__name__}; a whole processor is set by "
                f"set_processor(model, processor, on=...)."
            )
        found = tuple(map(_known, self.sites.on(on)))
        attachment = Attachment(middleware, self.context, rows, when, self._added)
        self._check(attachment, found)
        middleware.placed(found, self.context)
        trained = self._registered(middleware, name)
        self._added += 1
        self.context.wanted |= {*middleware.needs, *(("step",) if isinstance(when, Steps) else ())}
        _attach(found, attachment)
        self._begin(found)

        def undo() -> None:
            _detach(found, attachment)
            if trained is not None:
                self._unregister(trained)
            self._end()

        return self._kept(Handle(undo, f"{attachment} at {len(found)} sites", middleware))

    def kernel(self, kernel: str | Kernel, on: On = None) -> Handle:
        """Choose the function that computes attention at some layers.

        Raises:
            ValueError: for an unknown one, or a layer that has another chosen already.
        """
        changeable()
        chosen, found = kernel_of(kernel), tuple(self.sites.on(on))
        for site in found:
            layer = layer_of(site.module)
            if layer is not None and layer.kernel is not None:
                raise ValueError(
                    f"{site.name} has the kernel {layer.kernel.name!r} already, and {chosen.name!r} is "
                    f"chosen too."
                )
            if layer is not None and layer.by_hook["on_probs"]:
                raise ValueError(_no_probabilities(chosen, layer.by_hook["on_probs"][0], site))
            _reachable(site, f"the kernel {chosen.name!r}")
        _attach(found, None, chosen)
        self._begin(found)

        def undo() -> None:
            _detach(found, None, chosen)
            self._end()

        return self._kept(Handle(undo, f"kernel {chosen.name} at {len(found)} sites", chosen))

    def _check(self, new: Attachment, found: tuple[Site, ...]) -> None:
        middleware, what = new.middleware, type(new.middleware).__name__
        if new.rows is not None and new.rows not in self.context.rows:
            raise ValueError(
                unknown("rows", new.rows, self.context.rows)
                if self.context.rows
                else f"{what} is to change the rows {new.rows!r}, and the stack was not told what the rows "
                f"of a batch are: stack(model, rows=('uncond', 'cond'))."
            )
        if "rows" in middleware.needs and not self.context.rows:
            raise ValueError(
                f"{what} works on rows of the batch, and the stack was not told what they are: stack(model, "
                f"rows=('uncond', 'cond'))."
            )
        if not middleware.shareable and len(found) > 1:
            raise ValueError(f"one {what} serves one layer, and {len(found)} match; select one.")
        for site in found:
            refuse_fused(site.module, site.name)
            if any(hook in INSIDE for hook in middleware.hooks):
                _reachable(site, what)
            layer = layer_of(site.module)
            if layer is not None and layer.kernel is not None and "on_probs" in middleware.hooks:
                raise ValueError(_no_probabilities(layer.kernel, new, site))
            for old in layer.attachments if layer is not None else ():
                both = set(old.middleware.exclusive) & set(middleware.exclusive)
                apart = old.rows is not None and new.rows is not None and old.rows != new.rows
                if both and not apart:
                    raise ValueError(
                        f"{old} and {new} at {site.name} both claim {' and '.join(sorted(both))}; limit "
                        f"them to different sites or rows."
                    )

    # ---- weights of middlewares

    def _registered(self, middleware: Middleware, name: str | None) -> str | None:
        if not isinstance(middleware, nn.Module) or next(middleware.parameters(), None) is None:
            return None
        held = getattr(self.model, TRAINED, None)
        if held is None:
            held = nn.ModuleDict()
            self.model.add_module(TRAINED, held)
        name = name or f"{type(middleware).__name__.lower()}{len(held) or ''}"
        if name in held:
            raise ValueError(f"the model has a middleware {name!r} with weights already; give another name.")
        held[name] = middleware
        return name

    def _unregister(self, name: str) -> None:
        held = getattr(self.model, TRAINED)
        del held[name]
        if not len(held):
            delattr(self.model, TRAINED)

    # ---- beginning and ending

    def _kept(self, handle: Handle) -> Handle:
        self._handles.append(handle)
        return handle

    def _begin(self, found: tuple[Site, ...]) -> None:
        self._touched |= {site.name: site for site in found}
        if self._hooks:
            return
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._passes.after_forward),
        ]
        self.model.__dict__.setdefault(STACKS, []).append(self)

    def _end(self) -> None:
        if any(handle.attached for handle in self._handles):
            return
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            stacks = self.model.__dict__[STACKS]
            stacks.remove(self)
            if not stacks:
                del self.model.__dict__[STACKS]
        self._hooks, self._touched = [], {}

    def remove(self) -> None:
        """Take everything off: the same objects in their places.

        Raises:
            RuntimeError: where a backward pass is still to come that would compute the layers again, without
                what was attached; it is taken off nevertheless.
        """
        self._remove()
        self._passes.refuse_waiting()

    def _remove(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Stack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.remove()
        else:
            self._passes.waiting = 0
            self._remove()

    # ---- around a call of the model

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.enter({**dict(zip(self._names, args, strict=False)), **kwargs})
        if torch.compiler.is_compiling():
            return
        for site in self._touched.values():
            layer = layer_of(site.module)
            if layer is not None and site.module.processor is not layer.processor:
                raise RuntimeError(
                    f"the processor of {site.name} was replaced by {type(site.module.processor).__name__} "
                    f"while a stack is on it, which therefore has no effect there; use "
                    f"attention.set_processor, or replace it before the stack."
                )

    # ---- what is on

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled or captured step of the model depends on; it changes with what is attached."""
        parts: list[Any] = [self.context.layout]
        for site in self.sites:
            layer = layer_of(site.module)
            if layer is not None:
                ones = [
                    (
                        type(one.middleware).__qualname__,
                        one.key,
                        one.middleware.signature,
                        one.rows,
                        one.window,
                    )
                    for one in layer.attachments
                ]
                parts.append((*site.key, *ones, layer.kernel.name if layer.kernel else None))
        return tuple(parts)

    def explain(self) -> Explanation:
        """What is on at each layer, which kernel runs there, and why."""
        return Explanation(self.sites)


def stack(model: nn.Module, rows: Any = None) -> Stack:
    """Open a stack of middlewares on a model; nothing is installed before the first is added.

    Use it as a context manager, or call `remove`. Stacks on the same model add up. A copy of the model has
    none, and another model of the process is untouched.

    Args:
        model: a UNet or transformer of diffusers.
        rows: what the rows of a batch are, as a pipeline with guidance lays them out: ("uncond", "cond"), or
            a slice for each name.

    Returns:
        The `Stack`.
    """
    return Stack(model, Context(rows, axes_of(type(unwrapped(model)).__name__)))


def signature(model: nn.Module) -> tuple[Any, ...]:
    """What a compiled or captured step of a model depends on: the signatures of the stacks on it."""
    return tuple(one.signature for one in unwrapped(model).__dict__.get(STACKS, ()))


def _known(site: Site) -> Site:
    """The object that hooks at a layer are given."""
    layer = layer_of(site.module)
    return site if layer is None else layer.site


def _attach(found: tuple[Site, ...], attachment: Attachment | None, kernel: Kernel | None = None) -> None:
    """Attach at all of the sites, or at none."""
    more = () if attachment is None else (attachment,)
    done: list[Site] = []
    try:
        for site in found:
            layer = layer_of(site.module)
            if layer is None:
                layer = Layer(site)
                swap_in(site.module, layer)
            layer.set((*layer.attachments, *more), kernel or layer.kernel)
            done.append(site)
    except TypeError:
        _detach(tuple(done), attachment, kernel)
        raise


def _detach(found: tuple[Site, ...], attachment: Attachment | None, kernel: Kernel | None = None) -> None:
    for site in found:
        layer = layer_of(site.module)
        if layer is None:
            continue
        left = tuple(one for one in layer.attachments if one is not attachment)
        layer.set(left, None if kernel is not None else layer.kernel)
        if left or layer.kernel is not None:
            continue
        if site.module.processor is not layer.processor:
            warnings.warn(
                f"the processor of {site.name} was replaced by {type(site.module.processor).__name__} while "
                f"a stack was on it; the new one is left in place.",
                RuntimeWarning,
                stacklevel=4,
            )
        swap_out(site.module, layer)


def _no_probabilities(kernel: Kernel, one: Attachment, site: Site) -> str:
    return (
        f"{one} changes the probabilities at {site.name}, which the kernel {kernel.name!r} that is chosen "
        f"there does not have: take one of the two off, or select other sites."
    )


def _reachable(site: Site, what: str) -> None:
    if not site.kernels:
        raise ValueError(
            f"{what} works between the projections and the output, and {site.processor} at {site.name} "
            f"computes its attention in one piece, by none of the functions that a stack reaches; set "
            f"another processor there, or select other sites."
        )
