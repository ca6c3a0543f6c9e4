"""What the user's own classes keep in their objects: attributes that no library manages."""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from unbroken.capture import class_of
from unbroken.fingerprint.introspection import attributes_of
from unbroken.fingerprint.source_code import is_user_code
from unbroken.fingerprint.values import OWN_TO_A_START

_STORE, _MORE = dis.opmap["STORE_ATTR"], dis.opmap["EXTENDED_ARG"]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def keeps_attributes(thing: object) -> bool:
    """Return whether the class of an object is the user's own.

    Example:
        >>> keeps_attributes(nn.Linear(1, 1)), keeps_attributes([])
        (False, False)
    """
    return _is_own(_class_of(thing))


def own_attributes(thing: object) -> dict[str, Any]:
    """Return what an object of the user's own class holds, without what a library manages.

    A name that code of a library's base class sets is the library's, and so is a private name
    that no code of the user's sets.

    Example:
        >>> own_attributes(nn.Linear(1, 1))  # all are those of the library
        {}
    """
    managed, private = _names_of(_class_of(thing))
    return {
        name: value
        for name, value in attributes_of(thing).items()
        if name not in managed and (name[:1] != "_" or name in private)
    }


def changed_by_reading(data: object) -> tuple[frozenset[str], frozenset[str]]:
    """Return which attributes of a data set its own reading counts on, and to which it adds.

    What it only sets, once, is rather made when it is first needed.

    Example:
        >>> changed_by_reading([1, 2])
        (frozenset(), frozenset())
    """
    return _changed_by_reading(_class_of(data))


def names_in_class(thing: object, name: str) -> bool:
    """Return whether code of an object's class names something, such as what ends a run.

    Example:
        >>> class Patience:
        ...     def on_step_end(self, trainer):
        ...         trainer.stop("enough")
        >>> names_in_class(Patience(), "stop"), names_in_class(Patience(), "save")
        (True, False)
    """
    values = (value for base in type(thing).__mro__[:-1] for value in vars(base).values())
    return any(name in code.co_names for value in values for code in _codes(value))


@functools.lru_cache(maxsize=256)
def _changed_by_reading(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    functions: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if _is_own(base)]):
        functions |= vars(base)
    todo, seen = [*_READING], set[str]()
    sets, adds = set[str](), set[str]()
    while todo:
        name = todo.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for code in _codes(functions[name]):
            sets |= {*_counted_by(code)}
            adds |= {*_added_to_by(code)}
            todo += [other for other in code.co_names if other in functions]
    return frozenset(sets), frozenset(adds - sets)


_READING = ("__getitem__", "__getitems__", "__iter__", "__next__", "__call__")
_ADDING = frozenset({"append", "appendleft", "extend", "add", "insert", "update"})


def _counted_by(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes that a line of code computes from what they were."""
    lines: dict[int | None, list[dis.Instruction]] = {}
    for step in dis.get_instructions(code):
        lines.setdefault(step.positions.lineno if step.positions else None, []).append(step)
    for steps in lines.values():
        if any(step.opname == "BINARY_OP" for step in steps):
            loaded = {step.argval for step in steps if step.opname in _LOADS}
            stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}
            yield from loaded & stored


def _added_to_by(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes whose method that adds something code calls."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in _LOADS]
    yield from (one for one, method in itertools.pairwise(names) if method in _ADDING)


_LOADS = ("LOAD_ATTR", "LOAD_METHOD")


def _class_of(thing: object) -> Any:
    return class_of(thing) if isinstance(thing, nn.Module) else type(thing)


@functools.lru_cache(maxsize=1024)
def _is_own(kind: Any) -> bool:
    return is_user_code(kind)


@functools.lru_cache(maxsize=1024)
def _names_of(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that libraries manage in objects of a class, and those that its user sets.

    Where a class has no base of a library but `object`, all is the user's.
    """
    bases = [base for base in kind.__mro__ if base is not object]
    own = [base for base in bases if _is_own(base)]
    others = [base for base in bases if base not in own]
    managed = set(OWN_TO_A_START).union(*map(_names_in, others)) if others else set()
    managed |= _OF_EVERY_MODULE if issubclass(kind, nn.Module) else set()
    private = frozenset().union(*map(_names_in, own))
    if not others:
        private |= {name for one in own for name in vars(one)}
        managed -= private
    return frozenset(managed), private


def _names_in(kind: type) -> frozenset[str]:
    """Return all names of a class, and those of attributes that its code sets."""
    codes = [code for value in vars(kind).values() for code in _codes(value)]
    stored = (name for code in codes for name in _stored_by(code))
    slots = vars(kind).get("__slots__", ())
    return frozenset({*stored, *((slots,) if isinstance(slots, str) else slots)})


def _codes(value: object) -> Iterator[CodeType]:
    if isinstance(value, property):
        parts: list[Any] = [value.fget, value.fset, value.fdel]
    elif isinstance(value, staticmethod | classmethod):
        parts = [value.__func__]
    else:
        parts = [value]
    for function in parts:
        while isinstance(function, FunctionType):
            yield from _with_inner(function.__code__)
            function = vars(function).get("__wrapped__")


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _with_inner(inner)


def _stored_by(code: CodeType) -> Iterator[str]:
    """Yield the names of the attributes that code sets, of whatever object."""
    text, at = code.co_code, 0
    while (at := text.find(_STORE, at)) >= 0:
        if at % 2 == 0:
            more = text[at - 1] << 8 if at and text[at - 2] == _MORE else 0
            yield code.co_names[more | text[at + 1]]
        at += 1
