"""Numbers and tensors of the user's objects that stand in the frames around a hand-written loop.

A loop that is a method keeps them in `self`, which nobody registers. They are saved and restored as
attributes of registered objects are, and more carefully: nobody asked for it. What a program brings
back by itself, or counts for each process anew, stays as it is.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from unbroken.capture import all_objects, load_tensors, named_modules
from unbroken.capture.state_tree import TreeMap
from unbroken.changes.differences import Difference, brief
from unbroken.checkpoint.coverage.attribute_values import (
    TOLD,
    WITH_STATE,
    Look,
    look_at,
    value_of,
)
from unbroken.checkpoint.coverage.attributes import FIRST, Attributes, tensors_in
from unbroken.checkpoint.coverage.owners import Owner
from unbroken.checkpoint.coverage.replays import replays_in
from unbroken.checkpoint.coverage.schedules import attributes, scopes_around, steers
from unbroken.errors import CaptureError, CheckpointError
from unbroken.fingerprint import (
    is_user_code,
    is_user_module,
    keeps_attributes,
    names_stored_by,
)

AROUND = "around"
"""Where they stand among the attributes in a checkpoint."""

_DEPTH, _MOST_OWNERS, _MOST_PARTS, _MOST_NUMBERS, _BYTES = 3, 256, 64, 4096, 1 << 20
_ABSENT = ""
_CONTAINERS = (list, tuple, dict, set, deque, defaultdict, OrderedDict, Counter)
_NUMBERS = (int, float, complex, np.generic)
_NO_ROOTS = (type, tuple, BaseException, Enum, *WITH_STATE)
_LOOKED_AT = frozenset((*_CONTAINERS, int, float, complex, np.ndarray, torch.Tensor))
_READS = re.compile(r"\w*(next|get|fetch|load|read|sample|draw)_?\w*(batch|sample|item|chunk)\w*")
_GIVES = ("__next__", "__iter__", "__getitem__")


class AroundLoop:
    """What objects in the frames that called `resume` hold, and training changes.

    Args:
        objects: The registered objects, by name.
        attributes: Looks at these, and at what they hold; that is not looked at twice.
    """

    def __init__(self, objects: Mapping[str, object], attributes: Attributes) -> None:
        self._objects, self._attributes = objects, attributes
        self._roots: dict[str, Any] = {}
        self._files: dict[str, None] = {}  # the nearest first
        self._built: dict[str, Look] = {}
        self._before: dict[str, Look] = {}
        self._of_data: dict[int, Any] = {}
        self._stored: dict[str, Any] = {}

    def note(self) -> None:
        """Take note of what stands around the caller, before a resume changes anything."""
        self._roots, self._files = {}, {}
        on_the_stack, scopes = set[str](), [*scopes_around()]
        for scope in scopes:
            self._files.setdefault(scope.file)
            on_the_stack.update(scope.code.co_cellvars)
            for name, value in list(scope.names.items()):
                if name[:2] != "__" and _is_root(value):
                    self._roots.setdefault(f"{scope.name}:{name}", value)
        used = (_file_of(value) for scope in scopes for value in scope.names.values())
        self._files |= dict.fromkeys(path for path in used if path is not None)
        self._roots = {n: v for n, v in self._roots.items() if not _closes_over(v, on_the_stack)}
        self._of_data = dict(self._parts_of_data())
        self._built, self._before = {}, {}
        for owner in self._owners():
            looks = {name: look.noted() for name, look in self._looks(owner)}
            first = FIRST.of(owner.identity, looks)
            self._before |= {f"{owner.path}.{name}": look for name, look in looks.items()}
            self._built |= {f"{owner.path}.{name}": look for name, look in first.items()}

    def end(self) -> None:
        """Look no longer."""
        self._roots, self._of_data, self._stored = {}, {}, {}

    def state(self, values: Any) -> dict[str, Any]:
        """Return what is not as it was at the start, without what the caller saves himself.

        Args:
            values: What he saves beside the registered objects.
        """
        kept = _Kept(values)
        found: dict[str, Any] = {}
        for owner in self._owners():
            if kept.names & {*owner.path.partition(":")[2].split(".")}:
                continue
            for name, look in self._looks(owner):
                path = f"{owner.path}.{name}"
                built = self._built.get(path)
                if (built is not None and built.mark == look.mark) or kept.holds(name, look.value):
                    continue
                try:
                    found[path] = _entry(look, built)
                except CaptureError:
                    continue
        return {AROUND: found} if found else {}

    # What follows is for a resume.

    def differences(self, tree: Any) -> tuple[Difference, ...]:
        """Return what this start was given anew, and keep the others to put them back."""
        stored = tree.get(AROUND) if isinstance(tree, Mapping) else None
        found: list[Difference] = []
        self._stored = {}
        if not isinstance(stored, Mapping) or not self._roots:
            return ()
        replays = replays_in(self._files)
        if replays.any:
            return ()
        owners = {owner.path for owner in self._owners()}
        for path, entry in stored.items():
            name = path.rpartition(".")[2]
            known = self._built.get(path)
            if path.rpartition(".")[0] not in owners or name in replays.counted_from_it:
                continue
            if not isinstance(entry, Mapping) or not {"was", "now"} <= entry.keys():
                continue
            here = _ABSENT if known is None else _text(known)
            if here == entry["was"]:
                self._stored[path] = entry["now"]
            elif here != entry["now"]:
                was, new = _shown(entry["was"]), _shown(here)
                effect = (
                    f"the new value counts; training had made {_shown(entry['now'])} of the old"
                )
                found.append(Difference(path, was, new, effect, "equivalent"))
        return tuple(found)

    def restore(self) -> None:
        """Put back what is as this start has built it, and was never another in this process."""
        owners = {owner.path: owner for owner in self._owners()}
        for path, stored in self._stored.items():
            owner, name = owners.get(path.rpartition(".")[0]), path.rpartition(".")[2]
            marks = {repr(one.get(path, TOLD).mark) for one in (self._built, self._before)}
            if owner is None or len(marks) > 1:
                continue
            held = owner.held()
            if name not in held and path in self._built:
                continue
            value = value_of(stored) if isinstance(stored, str) else load_tensors(stored)
            owner.put(name, value)

    # What follows looks at live objects.

    def _looks(self, owner: Owner) -> Iterator[tuple[str, Look]]:
        """Yield the numbers and the small tensors that an object holds."""
        registered: Mapping[int, Any] | None = None
        read = _set_by_reading(type(owner.thing))
        for name, value in owner.held().items():
            if type(value) not in _LOOKED_AT and not isinstance(value, np.generic):
                continue
            if name in read or _shows_a_clock(value):
                continue
            if type(value) not in (int, float, complex):
                registered = self._attributes.registered() if registered is None else registered
            look = look_at(name, value, registered or {})
            is_plain = look.kind == "plain" and _is_of_numbers(value)
            if is_plain or (look.kind == "tensors" and self._is_small(look.value)):
                yield name, look

    def _is_small(self, value: Any) -> bool:
        """Return whether a value may be saved besides: it is no copy of a model, nor records."""
        tensors = tensors_in(value)
        if sum(one.nbytes for one in tensors) > _BYTES:
            return False
        shapes = [tuple(one.shape) for one in tensors]
        models = (one for one in all_objects(self._objects) if isinstance(one, nn.Module))
        return all(
            len(shapes) < len(own) or shapes[: len(own)] != own
            for own in ([tuple(p.shape) for p in model.parameters()] for model in models)
            if own
        )

    def _owners(self) -> Iterator[Owner]:
        """Yield objects of the user's own that nobody registered, and such objects in them."""
        seen = {id(one) for one in all_objects(self._objects)} | self._of_data.keys()
        seen |= {id(one) for one in self._attributes.bare.values()}
        waiting = deque((f"{AROUND}.{path}", root, 0) for path, root in self._roots.items())
        count = 0
        while waiting and count < _MOST_OWNERS:
            path, thing, depth = waiting.popleft()
            if id(thing) in seen or not _is_root(thing) or self._attributes.covers(thing):
                continue
            seen.add(id(thing))
            count += 1
            owner = Owner(path, thing)
            yield owner
            for name, value in _parts_in(owner) if depth < _DEPTH else ():
                waiting.append((f"{path}.{name}", value, depth + 1))

    def _parts_of_data(self) -> Iterator[tuple[int, Any]]:
        """Yield by their ids what reads data, and all that it holds: reading changes it."""
        waiting = [(one, 0) for one in all_objects(self._objects) if _reads_data(one)]
        todo = [(root, 0) for root in self._roots.values()]
        todo += [(v, 1) for scope in scopes_around() for v in scope.names.values()]
        seen: set[int] = set()
        while todo:
            thing, depth = todo.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if _reads_data(thing):
                waiting.append((thing, 0))
            elif depth <= _DEPTH and keeps_attributes(thing):
                todo += [(value, depth + 1) for value in _flat(attributes(thing).values())]
        found: dict[int, Any] = {}
        while waiting:
            thing, depth = waiting.pop()
            if id(thing) in found or isinstance(thing, torch.Tensor | np.ndarray | type):
                continue
            if depth and isinstance(thing, nn.Module):
                continue
            found[id(thing)] = thing
            if depth < _DEPTH:
                waiting += [(value, depth + 1) for value in _flat(attributes(thing).values())]
        yield from found.items()


class _Kept:
    """What the caller saves himself: the names in it, and the values."""

    def __init__(self, values: Any) -> None:
        self.names: set[str] = set()
        self._values: dict[int, Any] = {}
        todo = [values]
        while todo:
            one = todo.pop()
            self._values[id(one)] = one
            if isinstance(one, Mapping):
                self.names |= {str(key) for key in one}
                todo += one.values()
            elif isinstance(one, list | tuple):
                todo += one[:_MOST_PARTS]

    def holds(self, name: str, value: Any) -> bool:
        """Return whether an attribute is among it; whole numbers have no identity."""
        is_same = type(value) is not int and self._values.get(id(value)) is value
        return is_same or bool({name, name.strip("_")} & self.names)


def _is_root(thing: object) -> bool:
    """Return whether attributes of an object in a frame are looked at."""
    if isinstance(thing, FunctionType):
        return is_user_code(thing) and bool(thing.__dict__ or thing.__closure__)
    if not keeps_attributes(thing) or issubclass(type(thing), _NO_ROOTS):
        return False
    return not _reads_data(thing) and not steers(thing)


def _file_of(thing: object) -> str | None:
    """Return where a module of the user's own stands, or that of a function or class."""
    if isinstance(thing, ModuleType):
        found = thing if is_user_module(thing) else None
    elif isinstance(thing, FunctionType | type):
        found = sys.modules.get(thing.__module__) if is_user_code(thing) else None
    else:
        return None
    return getattr(found, "__file__", None)


def _reads_data(thing: object) -> bool:
    """Return whether an object gives data, or draws its order: a resume may read it again."""
    if issubclass(type(thing), Dataset | Sampler | DataLoader):
        return True
    if isinstance(thing, nn.Module) or not keeps_attributes(thing) or isinstance(thing, type):
        return False
    kind = type(thing)
    if any(hasattr(kind, name) for name in _GIVES):
        return True
    return bool(_set_by_reading(kind)) and not _holds_a_model(thing)


def _holds_a_model(thing: object) -> bool:
    return any(isinstance(value, nn.Module) for value in attributes(thing).values())


_SET_BY_READING: dict[int, tuple[type, frozenset[str]]] = {}


def _set_by_reading(kind: type) -> frozenset[str]:
    """Return the attributes that methods set which give batches: a resume may call them again."""
    known = _SET_BY_READING.get(id(kind))
    if known is None or known[0] is not kind:
        methods = (
            method
            for base in kind.__mro__
            for name, method in vars(base).items()
            if isinstance(method, FunctionType) and _READS.fullmatch(name)
        )
        found = frozenset(name for method in methods for name in names_stored_by(method))
        known = _SET_BY_READING[id(kind)] = (kind, found)
    return known[1]


def _closes_over(thing: Any, names: set[str]) -> bool:
    """Return whether a function closes over variables of the frames themselves."""
    return isinstance(thing, FunctionType) and bool(names & {*thing.__code__.co_freevars})


def _parts_in(owner: Owner) -> Iterator[tuple[str, Any]]:
    if isinstance(owner.thing, nn.Module):
        yield from ((name, module) for name, module in named_modules(owner.thing) if name)
    for name, value in owner.held().items():
        yield name, value
        if type(value) in (list, tuple, dict) and len(value) <= _MOST_PARTS:
            items = value.items() if type(value) is dict else enumerate(value)
            yield from ((f"{name}.{key}", part) for key, part in items)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield value
        if type(value) in (list, tuple, dict) and len(value) <= _MOST_PARTS:
            yield from value.values() if type(value) is dict else value


def _is_of_numbers(value: Any) -> bool:
    """Return whether there are numbers alone: a flag or a name may be of this process alone."""
    todo, count = [value], 0
    while todo:
        one = todo.pop()
        count += 1
        if count > _MOST_NUMBERS:
            return False
        if type(one) in _CONTAINERS:
            if len(one) > _MOST_NUMBERS:
                return False
            todo += one.values() if isinstance(one, dict) else one
        elif isinstance(one, bool | np.bool_) or not (one is None or isinstance(one, _NUMBERS)):
            return False
    return True


_CLOCKS: tuple[Callable[[], float], ...] = (time.perf_counter, time.monotonic, time.time)
_NOTED = tuple(clock() for clock in _CLOCKS)
_RAN = 120.0  # seconds that this process may have run before


def _shows_a_clock(value: Any) -> bool:
    """Return whether a number is one that a clock has shown to this process."""
    if type(value) is int and value > 10**10:
        value = value / 1e9
    elif type(value) is not float or value % 1 == 0 or value < _RAN:
        return False
    return any(
        noted - _RAN <= value <= clock() for noted, clock in zip(_NOTED, _CLOCKS, strict=True)
    )


def _entry(look: Look, built: Look | None) -> dict[str, Any]:
    """Return what a checkpoint holds of an attribute: what it is, and what it was as built."""
    was = _ABSENT if built is None else _text(built)
    if look.kind == "plain":
        return {"now": look.text(), "was": was}
    copied = TreeMap(lambda one: one.detach().clone() if isinstance(one, torch.Tensor) else one)
    return {"now": copied(look.value), "was": was}


def _text(look: Look) -> str:
    return look.text() if look.kind == "plain" else repr(look.mark)


def _shown(stored: Any) -> str:
    if stored == _ABSENT:
        return "nothing"
    try:
        return brief(repr(value_of(stored))) if isinstance(stored, str) else "a tensor"
    except CheckpointError:
        return "a tensor"
