"""Where a class or function is defined: its node in the syntax tree of its file."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definition_of(thing: Any) -> ast.AST:
    """Return the syntax tree of a class or function; not to be changed.

    A file is parsed once, however many classes are in it: `inspect.getsource` parses it for each.

    Raises:
        OSError: There is no source.
        SyntaxError: The source is of another language.

    Example:
        >>> definition_of(textwrap.dedent).name
        'dedent'
    """
    function = _a_function_of(thing)
    if function is not None:
        code = function.__code__
        for name, node in _definitions(_text_of(code.co_filename, function)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            is_it = first == code.co_firstlineno and node.name == function.__name__
            if name == thing.__qualname__ and (is_it or _holds(node, thing, code.co_firstlineno)):
                return node
    # A function by its code object: a decorated one would show what it decorates.
    text = inspect.getsource(getattr(thing, "__code__", thing))
    return ast.parse(textwrap.dedent(text)).body[0]


def lambdas_of(function: FunctionType) -> list[ast.Lambda]:
    """Return the lambdas that begin in the line of this one.

    Raises:
        OSError: There is no source.
        SyntaxError: The source is of another language.
    """
    code = function.__code__
    tree = _tree(_text_of(code.co_filename, function))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Lambda))
    found = [node for node in nodes if node.lineno == code.co_firstlineno]
    if not found:
        raise OSError(f"no lambda in line {code.co_firstlineno}")
    return found


def _a_function_of(thing: Any) -> FunctionType | None:
    """Return a function itself, or a method that stands in a class: it knows its file."""
    if isinstance(thing, FunctionType):
        return thing
    own = vars(thing).values() if isinstance(thing, type) else ()
    functions = (one for one in own if isinstance(one, FunctionType))
    prefix = f"{getattr(thing, '__qualname__', '')}."
    return next((one for one in functions if one.__qualname__.startswith(prefix)), None)


def _holds(node: Definition, thing: Any, line: int) -> bool:
    is_class = isinstance(thing, type) and isinstance(node, ast.ClassDef)
    return is_class and node.lineno <= line <= (node.end_lineno or 0)


def _text_of(path: str, function: FunctionType) -> str:
    linecache.checkcache(path)
    return "".join(linecache.getlines(path, function.__globals__))


@functools.lru_cache(maxsize=16)
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


@functools.lru_cache(maxsize=16)
def _definitions(text: str) -> list[tuple[str, Definition]]:
    """Return all classes and functions of a file, each with its qualified name."""
    return [*_below(_tree(text), "")]


def _below(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", child
            yield from _below(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
            yield from _below(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _below(child, prefix)
