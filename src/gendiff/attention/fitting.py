"""Whether a layer can call a processor, seen before it does."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from gendiff.attention.rebinding import method_of
from gendiff.attention.site import Site

OFFERED = ("encoder_hidden_states", "attention_mask")  # what `Attention` of diffusers always passes


def refuse_misfit(processor: Any, site: Site) -> None:
    """Raise a TypeError unless a layer can call a processor: its keywords, and what it reads of the layer."""
    what = getattr(processor, "__name__", type(processor).__name__)
    function = processor if isinstance(processor, FunctionType) else _function(type(processor))
    names, open_ended = _keywords(processor)
    present, _ = _keywords(site.module.processor)
    asked = present if site.family == "transformer" else list(OFFERED)
    lost = [name for name in asked if name not in names and not open_ended]
    if lost:
        raise TypeError(
            f"{what} at {site.name} would lose {', '.join(lost)}, which {type(site.module).__name__} passes: "
            f"name {'it' if len(lost) == 1 else 'them'} in its call, after (attn, hidden_states)."
        )
    read, called = _read(function) if function else (set[str](), set[str]())
    lacking = sorted(name for name in read if not hasattr(site.module, name))
    lacking += sorted(name for name in called - set(lacking) if getattr(site.module, name) is None)
    if lacking:
        raise TypeError(
            f"{what} is of another family: it reads {', '.join(f'attn.{name}' for name in lacking)}, which "
            f"{type(site.module).__name__} at {site.name} does not have; write one for it, or change "
            f"attention there by a middleware, which works for any family."
        )


def _function(kind: type) -> FunctionType | None:
    _, function = method_of(kind)
    return function


def _keywords(processor: Any) -> tuple[list[str], bool]:
    """The names that a processor's call takes behind the layer and its tokens, and whether it takes any."""
    if isinstance(processor, FunctionType):
        parameters = list(inspect.signature(processor).parameters.values())
    else:
        method, _ = method_of(type(processor))
        parameters = list(inspect.signature(getattr(processor, method)).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters[2:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named, open_ended


def _read(function: FunctionType) -> tuple[set[str], set[str]]:
    """What a processor reads of its layer in any case, and what it calls; not what a condition guards."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # no source to look at, as in an interactive session
        return set(), set()
    definition = next(iter(tree.body))
    if not isinstance(definition, ast.FunctionDef):
        return set(), set()
    names = [argument.arg for argument in definition.args.args]
    layer = next((name for name in names if name != "self"), None)
    read: set[str] = set()
    called: set[str] = set()
    for node in _unconditional(definition.body):
        if isinstance(node, ast.Call) and _is_part(node.func, layer):
            called.add(node.func.attr)  # pyright: ignore[reportAttributeAccessIssue]
        if _is_part(node, layer):
            read.add(node.attr)  # pyright: ignore[reportAttributeAccessIssue]
    return read, called


def _is_part(node: ast.AST, layer: str | None) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == layer


def _unconditional(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of statements that run in any case: of an `if`, a loop or a try the head only."""
    for statement in body:
        inner = ("body", "orelse", "handlers")
        heads = [value for name, value in ast.iter_fields(statement) if name not in inner]
        if isinstance(statement, ast.With):
            yield from _unconditional(statement.body)
        for head in heads:
            for one in head if isinstance(head, list) else [head]:
                if isinstance(one, ast.AST):
                    yield from _evaluated(one)
        if isinstance(statement, ast.Return):
            return


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """An expression's nodes that are evaluated in any case."""
    yield node
    if isinstance(node, ast.IfExp):
        yield from _evaluated(node.test)
    elif isinstance(node, ast.BoolOp):
        yield from _evaluated(node.values[0])
    elif not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _evaluated(child)
