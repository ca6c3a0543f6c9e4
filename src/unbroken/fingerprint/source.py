"""The source of functions and classes as digests: what a run does, as far as code tells.

Comments, docstrings and layout do not count: the digest is that of the syntax tree. Installed
packages do not count either: their version, which the environment holds, says what they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import xxhash

from unbroken.fingerprint.plain import Plain, plain_attributes, plain_items

_INSTALLED = tuple(
    path
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name))
)
_SITES = ("site-packages", "dist-packages")


def qualified_name(thing: object) -> str:
    """Return the module and name of a class or function, or of the class of an object.

    Example:
        >>> qualified_name(textwrap.dedent), qualified_name(3)
        ('textwrap.dedent', 'builtins.int')
    """
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def callable_facts(thing: Callable[..., Any]) -> dict[str, Plain]:
    """Return what a function, or an object that is called, is and does.

    Returns:
        `name`; `source`, the digest of its own code and of the code of the user's own functions
        that it calls by their global names, or None for installed code; `values`: the numbers it
        takes from defaults, closures and globals, the arguments of a partial, and the plain
        attributes of an object.

    Example:
        >>> def schedule(warmup):
        ...     return lambda step: min(1.0, step / warmup)
        >>> callable_facts(schedule(10))["values"]
        {'warmup': 10}
    """
    function, given = _unwrapped(thing)
    values: dict[str, Plain] = {}
    for part in _functions_of(function):
        values |= _values_of(part)
    if not isinstance(function, type | FunctionType):
        values |= plain_attributes(function)
    values |= given
    return {
        "name": qualified_name(function),
        "source": source_digest(function),
        "values": dict(sorted(values.items())),
    }


def source_digest(thing: object, *, leave_out: str | None = None) -> str | None:
    """Return a digest of the code of a class or function, and of what it calls by global names.

    Args:
        thing: A class, a function, or an object, whose class counts.
        leave_out: A method of classes that does not count.

    Returns:
        32 hexadecimal digits (xxh3-128), or None where the code is installed or built in.

    Example:
        >>> source_digest(ast.parse) is None
        True
    """
    texts: dict[str, str] = {}
    _gather(_owner(thing), texts, leave_out)
    if not texts:
        return None
    joined = "\0".join(f"{name}\0{text}" for name, text in sorted(texts.items()))
    return xxhash.xxh3_128(joined.encode()).hexdigest()


def is_users_own(thing: object) -> bool:
    """Return whether the code of a class or function is neither installed nor built in.

    Example:
        >>> is_users_own(ast.AST), is_users_own(list)
        (False, False)
    """
    if str(getattr(thing, "__module__", "")).partition(".")[0] == "unbroken":
        return False  # its version tells, though it may be installed from its sources
    code = getattr(thing, "__code__", None)
    path = code.co_filename if isinstance(code, CodeType) else _file_of_class(thing)
    if path is None or path.startswith("<frozen"):
        return False
    return not path.startswith(_INSTALLED) and not any(site in path for site in _SITES)


def _file_of_class(thing: object) -> str | None:
    """Return where a class stands: by its methods, which know it even in a notebook."""
    for value in vars(thing).values() if isinstance(thing, type) else ():
        function = inspect.unwrap(value) if callable(value) else value
        if isinstance(function, FunctionType) and function.__module__ == thing.__module__:
            return function.__code__.co_filename
    return None


def _owner(thing: object) -> object:
    """Return the class or function whose code counts for a thing."""
    function, _ = _unwrapped(thing)
    return function if isinstance(function, type | FunctionType) else type(function)


def _unwrapped(thing: Any) -> tuple[Any, dict[str, Plain]]:
    """Return what a partial or a method calls, and the plain arguments of the partial."""
    values: dict[str, Plain] = {}
    while True:
        if isinstance(thing, functools.partial):
            given = {**{str(i): v for i, v in enumerate(thing.args)}, **thing.keywords}
            values = {**plain_items(given), **values}
            thing = thing.func
        elif inspect.ismethod(thing):
            thing = thing.__func__
        elif hasattr(thing, "__wrapped__"):
            thing = thing.__wrapped__
        else:
            return thing, values


def _gather(thing: object, texts: dict[str, str], leave_out: str | None) -> None:
    """Add the code of a thing, of its bases, and of the user's functions that it names."""
    name = qualified_name(thing)
    if name in texts or not is_users_own(thing):
        return
    texts[name] = _syntax(thing, leave_out)
    if isinstance(thing, type):
        for base in thing.__mro__[1:]:
            _gather(base, texts, leave_out)
    for function in _functions_of(thing):
        if function.__name__ != leave_out:
            for value in _globals_of(function).values():
                if isinstance(value, FunctionType | type):
                    _gather(value, texts, leave_out)


def _functions_of(thing: object) -> list[FunctionType]:
    """Return the functions whose code a thing runs: itself, or the methods of its class."""
    if isinstance(thing, FunctionType):
        return [thing]
    owner = thing if isinstance(thing, type) else type(thing)
    if not is_users_own(owner):
        return []
    methods = (getattr(value, "__func__", value) for value in vars(owner).values())
    return [method for method in methods if isinstance(method, FunctionType)]


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, its inner functions' included; no modules."""
    space = function.__globals__
    names = (name for code in _nested(function.__code__) for name in code.co_names)
    found = {name: space[name] for name in names if name in space}
    return {name: value for name, value in found.items() if not isinstance(value, ModuleType)}


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _values_of(function: FunctionType) -> dict[str, Plain]:
    """Return the numbers that a function depends on: defaults, closures, globals.

    Texts among the globals are left out: they are names and paths more often than settings.
    """
    numbers = {
        name: value
        for name, value in _globals_of(function).items()
        if isinstance(value, bool | int | float)
    }
    arguments = inspect.signature(function).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: _content(cell) for name, cell in cells}
    return plain_items({**numbers, **defaults, **closed})


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet: a function that names itself
        return ...


def _syntax(thing: Any, leave_out: str | None) -> str:
    """Return the code of a class or function in one spelling, without docstrings and comments."""
    if getattr(thing, "__name__", None) == "<lambda>":
        return _syntax_of_lambda(thing)
    try:
        text = textwrap.dedent(inspect.getsource(thing))
        return ast.unparse(_only_what_runs(ast.parse(text), leave_out))
    except (OSError, TypeError, SyntaxError):  # no source: typed at a prompt, or `python -c`
        return _bytecode(thing, leave_out)


def _syntax_of_lambda(function: FunctionType) -> str:
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return _bytecode(function)
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Lambda))
    found = [ast.unparse(node) for node in nodes if node.lineno == code.co_firstlineno]
    return "\n".join(found) if found else _bytecode(function)


def _only_what_runs(tree: ast.AST, leave_out: str | None) -> ast.AST:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        kept = [part for part in node.body if getattr(part, "name", "") != (leave_out or "-")]
        node.body = kept or [ast.Pass()]
    return tree


def _bytecode(thing: object, leave_out: str | None = None) -> str:
    functions = (f for f in _functions_of(thing) if f.__name__ != leave_out)
    codes = (code for function in functions for code in _nested(function.__code__))
    parts = [
        (
            code.co_code.hex(),
            code.co_names,
            [repr(c) for c in code.co_consts if type(c) is not CodeType],
        )
        for code in codes
    ]
    return f"bytecode {parts}"
