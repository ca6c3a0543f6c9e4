"""The source of functions and classes as digests: what a run does, as far as code tells.

Comments, docstrings, type hints and layout do not count: the digest is that of the syntax tree.
Installed packages do not count either: their version, which the environment holds, says what
they are.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import xxhash

from unbroken.fingerprint.asking import attributes_of
from unbroken.fingerprint.definitions import definition_of, lambdas_of
from unbroken.fingerprint.owners import is_users_module, is_users_own, qualified_name


def source_digest(thing: object, *, leave_out: frozenset[str] = frozenset()) -> str | None:
    """Return a digest of the code of a class or function, and of what it calls by global names.

    Args:
        thing: A class, a function, or an object, whose class counts.
        leave_out: Methods of classes that do not count.

    Returns:
        32 hexadecimal digits (xxh3-128), or None where the code is installed or built in.

    Example:
        >>> source_digest(ast.parse) is None
        True
    """
    texts = [
        f"{qualified_name(one)}\0{_syntax(one, leave_out)}" for one in reached(thing, leave_out)
    ]
    return xxhash.xxh3_128("\0".join(sorted(texts)).encode()).hexdigest() if texts else None


def reached(thing: object, leave_out: frozenset[str] = frozenset()) -> list[Any]:
    """Return the user's own functions and classes that a thing runs: itself, and what it names."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [owner_of(thing)]
    while waiting:
        one = waiting.pop(0)
        if id(one) in found or not is_users_own(one):
            continue
        if len(found) >= MAX_REACHED:
            cut_off.add(qualified_name(owner_of(thing)))
            break
        found[id(one)] = one
        waiting += one.__mro__[1:] if isinstance(one, type) else ()
        for function in functions_of(one, leave_out):
            if isinstance(one, type) and not function.__qualname__.startswith(one.__qualname__):
                waiting.append(function)  # put into the class from elsewhere
            named = (called_by(value)[0] for value in globals_of(function).values())
            waiting += [value for value in named if isinstance(value, FunctionType | type)]
    return [*found.values()]


MAX_REACHED = 2000
cut_off: set[str] = set()
"""The names of what runs more of the user's own functions and classes than are followed."""


def owner_of(thing: object) -> Any:
    """Return the class or function whose code counts for a thing."""
    function, _ = called_by(thing)
    return function if isinstance(function, type | FunctionType) else type(function)


def called_by(thing: Any) -> tuple[Any, dict[str, Any]]:
    """Return what a partial, a method or an installed decorator calls, and given arguments."""
    given: dict[str, Any] = {}
    for _ in range(_MAX_WRAPPERS):
        if isinstance(thing, functools.partial):
            given = {**{str(i): v for i, v in enumerate(thing.args)}, **thing.keywords, **given}
            thing = thing.func
        elif inspect.ismethod(thing):
            thing = thing.__func__
        elif not is_users_own(thing) and not isinstance(thing, type | ModuleType):
            inner = attributes_of(thing).get("__wrapped__")
            if inner is None:
                break
            thing = inner
        else:
            break
    return thing, given


_MAX_WRAPPERS = 16


def functions_of(thing: object, leave_out: frozenset[str] = frozenset()) -> list[FunctionType]:
    """Return the functions whose code a thing runs: itself, or the methods of its class."""
    if isinstance(thing, FunctionType):
        return [thing]
    owner = thing if isinstance(thing, type) else type(thing)
    if not is_users_own(owner):
        return []
    members = (_function_in(value) for value in vars(owner).values())
    own = [member for member in members if isinstance(member, FunctionType)]
    return [function for function in own if function.__name__ not in leave_out]


def _function_in(member: Any) -> Any:
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    return called_by(member)[0]


def globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, its inner functions' included.

    Of a module of the user's own, those of its names that the function has too; no others.
    """
    names = names_in(function)
    found: dict[str, Any] = {}
    modules: list[tuple[str, dict[str, Any]]] = [("", function.__globals__)]
    seen: set[int] = set()
    while modules:
        prefix, space = modules.pop()
        if id(space) in seen:
            continue
        seen.add(id(space))
        for name in names & space.keys():
            value = space[name]
            if is_users_module(value):
                modules.append((f"{prefix}{name}.", vars(value)))
            elif not isinstance(value, ModuleType):
                found[f"{prefix}{name}"] = value
    return dict(sorted(found.items()))


def names_in(function: FunctionType) -> set[str]:
    """Return the names of globals and attributes in a function, its inner functions' included."""
    return {name for code in _nested(function.__code__) for name in code.co_names}


def texts_in(function: FunctionType) -> set[str]:
    """Return the short texts in a function: keys, and names of attributes that it asks for."""
    constants = (one for code in _nested(function.__code__) for one in code.co_consts)
    return {one for one in constants if isinstance(one, str) and len(one) < _LONG}


_LONG = 64


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


@functools.lru_cache(maxsize=512)  # of a class that is many times in a list or a model
def _syntax(thing: Any, leave_out: frozenset[str]) -> str:
    """Return the code of a class or function in one spelling, without docstrings and comments."""
    try:
        if getattr(thing, "__name__", None) == "<lambda>":
            found: list[ast.AST] = [*lambdas_of(thing)]
        else:
            found = [_only_what_runs(copy.deepcopy(definition_of(thing)), leave_out)]
        return "\n".join(ast.unparse(node) for node in found)
    except (
        OSError,
        TypeError,
        ValueError,
        IndexError,
        SyntaxError,
        RecursionError,
    ):  # no source: typed at a prompt, or `python -c`
        return _bytecode(thing, leave_out)


def _only_what_runs(tree: ast.AST, leave_out: frozenset[str]) -> ast.AST:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        kept = [part for part in node.body if getattr(part, "name", "") not in leave_out]
        node.body = kept or [ast.Pass()]
    _WithoutHints().visit(tree)
    return tree


class _WithoutHints(ast.NodeTransformer):
    """Takes type hints away; in a class they stay as dots, for there they may make fields."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = [self._without_hint(part) for part in node.body]
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        node.body = [self._without_hint(part) for part in node.body]
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(...)
        return self.generic_visit(node)

    def _without_hint(self, part: ast.stmt) -> ast.stmt:
        if not isinstance(part, ast.AnnAssign):
            return part
        if part.value is None:
            return ast.Pass()
        return ast.Assign([part.target], part.value, lineno=part.lineno)


def _bytecode(thing: object, leave_out: frozenset[str] = frozenset()) -> str:
    """Return the instructions: they change with Python, but so they do for everybody."""
    functions = functions_of(thing, leave_out)
    codes = (code for function in functions for code in _nested(function.__code__))
    parts = [(code.co_code.hex(), code.co_names, _spelled(code.co_consts)) for code in codes]
    return f"bytecode {parts}"


def _spelled(constant: Any) -> str:
    """Return a constant in a spelling that is the same in each process: sets have no order."""
    if isinstance(constant, CodeType):
        return "code"
    if isinstance(constant, tuple):
        return f"({','.join(_spelled(one) for one in constant)})"
    if isinstance(constant, frozenset):
        return f"{{{','.join(sorted(_spelled(one) for one in constant))}}}"
    return repr(constant)
