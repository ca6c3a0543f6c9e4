"""Whose code a class or function is, and what it is called."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import sysconfig
from importlib import metadata
from types import CodeType, FunctionType, ModuleType
from typing import Any

_INSTALLED = tuple(
    path
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name))
)
_SITES = ("site-packages", "dist-packages")
_HOSTS = frozenset(
    (
        *("torch", "numpy", "transformers", "accelerate", "trl", "peft", "datasets", "evaluate"),
        *("tokenizers", "safetensors", "huggingface_hub", "lightning", "pytorch_lightning"),
        *("sentence_transformers", "setfit", "diffusers", "timm", "torchvision", "torchaudio"),
        *("torchdata", "torchao", "torchmetrics", "torchtune", "deepspeed", "bitsandbytes"),
        *("xformers", "flash_attn", "triton", "unsloth", "axolotl", "scipy", "sklearn", "pandas"),
    )
)
"""Packages that train for others, and what they train with: whole trees of code, each a version."""
_NAMED_OTHERWISE = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "cv2": "opencv"}


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
    if path is None or path.startswith("<frozen") or _is_installed(path):
        return False
    return not _is_library(str(_own(thing, "__module__")).partition(".")[0])


def is_users_module(thing: object) -> bool:
    """Return whether a module is a file of the user's."""
    path = vars(thing).get("__file__") if isinstance(thing, ModuleType) else None
    if not isinstance(path, str) or str(vars(thing)["__name__"]).startswith("unbroken"):
        return False
    top = str(vars(thing)["__name__"]).partition(".")[0]
    return not _is_installed(path) and not _is_library(top)


@functools.cache
def _is_library(top: str) -> bool:
    """Return whether a package is a library, though it does not lie where packages are installed.

    A host of training and what it needs are never the user's own: its version says what it is,
    and its commit where it is installed from a checkout. A package with the record of an
    installation beside it is none either (`pip install --target`, a folder of packages on
    PYTHONPATH). What the user has installed from his own checkout is his own.
    """
    module = sys.modules.get(top)
    if module is None or top == "__main__":
        return False
    known = vars(module)
    if top in _HOSTS and "__path__" in known and isinstance(_version_of(module), str):
        return True  # a folder of the user's with such a name has no version
    found = _installation(_NAMED_OTHERWISE.get(top, top))
    if found is None:
        return False
    location, is_editable = found
    if str(known.get("__file__") or "").startswith(location):
        return True
    return is_editable and _normal(top) in _needed_by_hosts()


def _version_of(module: ModuleType) -> object:
    try:
        return getattr(module, "__version__", None)  # lazy modules have it in no dictionary
    except Exception:  # a package may answer names by code of its own, which may raise anything
        return None


def _installation(name: str) -> tuple[str, bool] | None:
    """Return where a distribution was installed, and whether it was from a checkout."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if found.read_text("RECORD") is None:  # of a source tree, which nobody has installed
        return None
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        origin = {}
    is_editable = bool(origin.get("dir_info", {}).get("editable"))
    return str(found.locate_file("")), is_editable


@functools.cache
def _needed_by_hosts() -> frozenset[str]:
    """Return the names of all distributions that the hosts here need, without extras."""
    known: set[str] = set()
    waiting = [*_HOSTS]
    while waiting:
        name = _normal(waiting.pop())
        if name in known:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        known.add(name)
        waiting += [
            re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in required if "extra" not in one
        ]
    return frozenset(known)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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
