"""A processor's class with another kernel: same code, same state, but its attention goes where we say.

Processors of diffusers compute attention by one of two functions, which they know as global names of their
module. A copy of the method with other globals calls ours in their place; the module, and with it every other
model of the process, keeps its own. The copy has no module name, so that torch.compile looks names up in its
globals and not in the module.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn
from torch.nn import functional

KERNELS = ("scaled_dot_product_attention", "dispatch_attention_fn")
Method = Callable[..., Any]


class Running(threading.local):
    """What runs in this thread: the layer, and how many kernels it has called."""

    def __init__(self) -> None:
        self.layer: Any = None
        self.calls = 0


running = Running()


class Stacked:
    """A mark of the classes that `rebound` makes."""


def plain(kind: type) -> type:
    """The class that a stacked one was made of, or the class itself."""
    return kind.__mro__[1] if issubclass(kind, Stacked) else kind


def method_of(kind: type) -> tuple[str, FunctionType | None]:
    """The method of a processor that computes, and its function where it is a plain one."""
    name = "__call__"
    if issubclass(kind, nn.Module) and kind.__call__ is nn.Module.__call__:
        name = "forward"
    found = inspect.getattr_static(kind, name, None)
    return name, found if isinstance(found, FunctionType) else None


@functools.cache
def kernels_of(kind: type) -> tuple[str, ...]:
    """The names of the kernels that a processor class calls, by itself, in its methods or in functions."""
    kind = plain(kind)
    _, function = method_of(kind)
    return () if function is None else tuple(sorted(_kernels(function, kind, frozenset())))


def _kernels(function: FunctionType, kind: type, seen: frozenset[FunctionType]) -> set[str]:
    names = _names(function.__code__)
    found = {name for name in KERNELS if name in names}
    for helper in (*_helpers(function, names).values(), *_methods(kind, names).values()):
        if helper not in seen:
            found |= _kernels(helper, kind, seen | {function})
    return found


def _names(code: CodeType) -> set[str]:
    """All global and attribute names of a function's code, nested functions included."""
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _helpers(function: FunctionType, names: set[str]) -> dict[str, FunctionType]:
    """Functions that a function knows by a global name; not torch's, which are no processor's."""
    known = ((name, function.__globals__.get(name)) for name in sorted(names) if name not in KERNELS)
    return {
        name: value
        for name, value in known
        if isinstance(value, FunctionType)
        and value is not function
        and not value.__module__.startswith("torch.")
    }


def _methods(kind: type, names: set[str]) -> dict[str, FunctionType]:
    """Methods of a class that are called by one of the names; not what every object or module has."""
    known = ((name, inspect.getattr_static(kind, name, None)) for name in sorted(names))
    return {
        name: value
        for name, value in known
        if isinstance(value, FunctionType) and name[:2] != "__" and not hasattr(nn.Module, name)
    }


@functools.cache
def rebound(kind: type, through: Callable[[str, Method], Method], enter: Method) -> type:
    """A subclass of a processor class whose kernels are `through(name, kernel)`, run by `enter`.

    Args:
        kind: the class.
        through: makes the function that stands for a kernel.
        enter: `enter(run, plain, processor, layer, args, kwargs)` does the call: `run` is the method with our
            kernels, `plain` the class's own, both of the processor's unbound.
    """
    name, own = method_of(kind)
    assert own is not None
    run = _copied(own, kind, through)
    inner = {
        key: _copied(method, kind, through)
        for key, method in inspect.getmembers_static(kind, lambda one: isinstance(one, FunctionType))
        if method is not own and key[:2] != "__" and _kernels(method, kind, frozenset())
    }

    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return enter(run, own, self, attn, args, kwargs)

    functools.update_wrapper(call, own)
    call.__signature__ = inspect.signature(own)  # layers ask for it at every call
    body = {
        **inner,
        name: call,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind, Stacked), body)


def _copied(function: FunctionType, kind: type, through: Callable[[str, Method], Method]) -> FunctionType:
    """A function whose kernels are others, and so are those of the functions it calls."""
    names = _names(function.__code__)
    own = {key: value for key, value in function.__globals__.items() if key != "__name__"}
    for key in names & own.keys():
        value = own[key]
        if key in KERNELS:
            own[key] = through(key, value)
        elif isinstance(value, ModuleType):
            own[key] = _with_kernels(value, names, through)
    for key, helper in _helpers(function, names).items():
        if _kernels(helper, kind, frozenset({function})):
            own[key] = _copied(helper, kind, through)
    copy = FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _with_kernels(
    module: ModuleType, names: set[str], through: Callable[[str, Method], Method]
) -> ModuleType:
    """torch.nn.functional, or torch on the way to it, with another kernel; any other module as it is."""
    if module is functional:
        kernel = KERNELS[0]
        return _module(module, **{kernel: through(kernel, getattr(functional, kernel))})
    inside = {"torch": "nn", "torch.nn": "functional"}.get(module.__name__)
    if inside is None or not {inside, "functional", KERNELS[0]} <= names:
        return module
    return _module(module, **{inside: _with_kernels(getattr(module, inside), names, through)})


def _module(module: ModuleType, **changes: Any) -> ModuleType:
    copy = ModuleType(module.__name__, module.__doc__)
    own = {
        key: value for key, value in vars(module).items() if not key.startswith("__") or key == "__getattr__"
    }
    vars(copy).update(own, **changes)
    return copy
