"""Whose code a class or function is, and what it is called."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from types import CodeType, FunctionType, ModuleType
from typing import Any

_INSTALLED = tuple(
    path
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name))
)
_SITES = ("site-packages", "dist-packages")


def qualified_name(thing: object) -> str:
    """Return the module and name of a class or function, or of the class of an object.

    Code of the user's own has its name alone: it may move from a script to a module.

    Example:
        >>> import textwrap
        >>> qualified_name(textwrap.dedent), qualified_name(3)
        ('textwrap.dedent', 'builtins.int')
    """
    is_named = isinstance(thing, type) or isinstance(_own(thing, "__qualname__"), str)
    named: Any = thing if is_named else type(thing)
    if is_users_own(named):
        return str(named.__qualname__)
    return f"{named.__module__}.{named.__qualname__}"


def is_users_own(thing: object) -> bool:
    """Return whether the code of a class or function is neither installed nor built in.

    Example:
        >>> import ast
        >>> is_users_own(ast.AST), is_users_own(list)
        (False, False)
    """
    if str(_own(thing, "__module__")).partition(".")[0] == "unbroken":
        return False  # its version tells, though it may be installed from its sources
    code = _own(thing, "__code__")
    path = _path(code, thing) if isinstance(code, CodeType) else _file_of_class(thing)
    return path is not None and not path.startswith("<frozen") and not _is_installed(path)


def is_users_module(thing: object) -> bool:
    """Return whether a module is a file of the user's."""
    path = vars(thing).get("__file__") if isinstance(thing, ModuleType) else None
    if not isinstance(path, str) or str(vars(thing)["__name__"]).startswith("unbroken"):
        return False
    return not _is_installed(path)


def _is_installed(path: str) -> bool:
    return path.startswith(_INSTALLED) or any(site in path for site in _SITES)


def _own(thing: object, name: str) -> Any:
    """Return a name of a class or function; objects could answer anything."""
    known = isinstance(thing, type | FunctionType) or inspect.isroutine(thing)
    return getattr(thing, name, None) if known else None


def _file_of_class(thing: object) -> str | None:
    """Return where a class stands: by its methods, which know it even in a notebook."""
    if not isinstance(thing, type):
        return None
    for value in vars(thing).values():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        function = vars(function).get("__wrapped__", function) if _is_function(function) else None
        if isinstance(function, FunctionType) and function.__module__ == thing.__module__:
            return _path(function.__code__, thing)
    return _file_of_module(thing)


def _is_function(thing: object) -> bool:
    return isinstance(thing, FunctionType)


def _path(code: CodeType, thing: Any) -> str | None:
    if code.co_filename != "<string>":
        return code.co_filename
    return _file_of_module(thing) or code.co_filename  # of a dataclass: written by Python


def _file_of_module(thing: Any) -> str | None:
    name = thing.__module__
    module = sys.modules.get(name) if isinstance(name, str) else None
    path = getattr(module, "__file__", None)
    if path is None and name == "__main__":
        return "<prompt>"
    return path if isinstance(path, str) else None
