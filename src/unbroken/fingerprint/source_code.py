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
import json
import linecache
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import xxhash

from unbroken.introspection import attributes_of
from unbroken.stored_names import given_path, stored_path

# Where a class or function is defined: its node in the syntax tree of its file.


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


# Whose code a class or function is, and what it is called.


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
    if is_user_code(named):
        return str(named.__qualname__)
    return stored_path(named)


def is_user_code(thing: object) -> bool:
    """Return whether the code of a class or function is neither installed nor built in.

    Example:
        >>> import ast
        >>> is_user_code(ast.AST), is_user_code(list)
        (False, False)
    """
    if is_of_unbroken(thing):
        return False  # its version tells, though it may be installed from its sources
    code = _own(thing, "__code__")
    path = _path(code, thing) if isinstance(code, CodeType) else _file_of_class(thing)
    if path is None or path.startswith("<frozen") or _is_installed(path):
        return False
    return not _is_library(str(_own(thing, "__module__")).partition(".")[0])


def is_of_unbroken(thing: object) -> bool:
    """Return whether a class or function is one of this library."""
    is_here = str(_own(thing, "__module__")).partition(".")[0] == "unbroken"
    return is_here or given_path(thing) is not None


def is_user_module(thing: object) -> bool:
    """Return whether a module is a file of the user's."""
    known = _names_in_module(thing)
    path, top = known.get("__file__"), str(known.get("__name__")).partition(".")[0]
    if not isinstance(path, str) or top == "unbroken":
        return False
    return not _is_installed(path) and not _is_library(top)


def _names_in_module(thing: object) -> dict[str, Any]:
    """Return the names in a module, without loading one that waits for its first use."""
    is_one = isinstance(thing, ModuleType)
    return object.__getattribute__(thing, "__dict__") if is_one else {}


def user_module_digests() -> dict[str, str]:
    """Return digests of the files of the user's own modules that are loaded, by name.

    Not of the script: it is told by itself. What was compiled says so in front of its digest.

    Example:
        >>> "ast" in user_module_digests()
        False
    """
    script = _names_in_module(sys.modules.get("__main__")).get("__file__")
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.copy().items()):
        if name in ("__main__", "__mp_main__") or not is_user_module(module):
            continue
        path = _names_in_module(module)["__file__"]
        if len(found) >= MAX_REACHED:
            cut_off.add(MODULES)
            break
        if path != script and (content := _content_of(path)) is not None:
            digest = xxhash.xxh3_128_hexdigest(content)
            found[name] = digest if path.endswith(".py") else f"{COMPILED}{digest}"
    return found


COMPILED, MODULES = "compiled: ", "modules"
"""What stands before the digest of a file without source; which modules were too many."""


def _content_of(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, ValueError):  # it is gone, or in an archive
        return None


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
    known = _names_in_module(module)
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
        if id(one) in found or not is_user_code(one):
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
        elif not is_user_code(thing) and not isinstance(thing, type | ModuleType):
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
    if not is_user_code(owner):
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
            if is_user_module(value):
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


def variables_in(function: FunctionType) -> set[str]:
    """Return the names of the environment variables that a function may read, inner ones included.

    Those are the names among the texts of code that asks the environment; not what a scheduler, a
    launcher or a shell sets anew at each start, nor what is secret.

    Example:
        >>> import os
        >>> variables_in(lambda: os.environ.get("SCALE", "1") + os.environ["RANK"])
        {'SCALE'}
    """
    asking = (code for code in _nested(function.__code__) if _ASKS & {*code.co_names})
    texts = (one for code in asking for one in code.co_consts if isinstance(one, str))
    return {one for one in texts if one.isidentifier() and not _OF_A_START.fullmatch(one)}


_ASKS = {"environ", "environb", "getenv"}
_OF_A_START = re.compile(
    r"(local_|group_|node_|role_|global_)?rank|(local_|group_|role_)?world_size|(ROLE|NODE)_.*"
    r"|(MASTER|SLURM|PBS|LSB|OMPI|PMI|PMIX|TORCHELASTIC|KUBERNETES|SAGEMAKER|WANDB|HF|COMET)_.*"
    r"|(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|(\w+_)?(PORT|ADDR|HOST|HOSTNAME|ID|PID|TOKEN)"
    r"|(\w+_)?((API|ACCESS|SECRET)_?KEY|SECRET|PASSWORD|DIR|PATH|CACHE|URL|URI)|TMP|TEMP|TMPDIR|HOME|PWD|USER|LOGNAME"
    r"|PYTHON\w+|SHELL|TERM|LANG|LC_\w+|DISPLAY",
    re.IGNORECASE,
)


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
