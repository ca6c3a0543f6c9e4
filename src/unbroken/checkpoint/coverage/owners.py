"""The user's own objects that hold attributes, and what functions of the user's keep around them.

A function has what its closure holds, attributes of its own, and the globals that it names; a
class has what code sets on it.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler

from unbroken.capture import named_modules
from unbroken.fingerprint import (
    ON_MODULES,
    ON_OPTIMIZERS,
    ON_PARAMETERS,
    functions_of,
    hooks_on,
    is_user_code,
    is_user_module,
    keeps_attributes,
    names_in,
    names_stored_by,
    own_attributes,
    reached,
)

_DEPTH = 4
_MOST_PARTS = 64
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_CLOSED_OVER = frozenset({"__class__"})


@dataclass(frozen=True)
class Owner:
    """An object whose attributes are looked at.

    Attributes:
        path: "model.block.0", "callbacks.Patience", "globals.__main__".
        thing: The object; a function or a class counts by what is around it.
        holder: The object that it is an attribute of, and its name there; None: it has another.
    """

    path: str
    thing: Any
    holder: tuple[Any, str] | None = None

    def held(self) -> dict[str, Any]:
        """Return its attributes by name."""
        thing = self.thing
        if isinstance(thing, Shared):
            return thing.held()
        if isinstance(thing, FunctionType):
            own = {n: v for n, v in vars(thing).items() if n != "__wrapped__"}
            return {**own, **_cells(thing)}
        if not isinstance(thing, nn.Module):
            return own_attributes(thing)
        numbers = _numbers_of(thing)
        return {**numbers, **own_attributes(thing)} if keeps_attributes(thing) else numbers

    def put(self, name: str, value: Any) -> None:
        """Set an attribute, past any code of its class; a container or a tensor stays the same."""
        if not _put_into(self.held().get(name), value):
            self.bind(name, value)

    def forget(self, name: str) -> bool:
        """Take an attribute away, if it is in an object alone; return whether."""
        held = {} if isinstance(self.thing, Shared) else getattr(self.thing, "__dict__", {})
        return held.pop(name, held) is not held

    @property
    def identity(self) -> Any:
        """What stays the same object as long as the attributes are there."""
        return self.thing.space if isinstance(self.thing, Shared) else self.thing

    def bind(self, name: str, value: Any) -> None:
        """Set an attribute to this object."""
        thing = self.thing
        if isinstance(thing, Shared):
            thing.bind(name, value)
        elif isinstance(thing, FunctionType) and name in thing.__code__.co_freevars:
            (thing.__closure__ or ())[thing.__code__.co_freevars.index(name)].cell_contents = value
        else:
            if _is_frozen(thing) and self.holder is not None:
                thing = copy.copy(thing)
                object.__setattr__(*self.holder, thing)
            object.__setattr__(thing, name, value)


@dataclass
class Shared:
    """Values that functions share: globals of a module, or what a class holds for its objects.

    Attributes:
        space: All globals, or the class.
        names: Which count, if they can change where they are.
        stored: Which code binds anew.
    """

    space: dict[str, Any] | type
    names: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)

    def held(self) -> dict[str, Any]:
        """Return what code may change."""
        space = vars(self.space) if isinstance(self.space, type) else self.space
        found = {n: space[n] for n in sorted((self.names | self.stored) & space.keys())}
        return {n: v for n, v in found.items() if self._may_change(n, v)}

    def _may_change(self, name: str, value: object) -> bool:
        if name not in self.stored:
            return not _is_constant(value)
        return not (isinstance(self.space, type) and hasattr(type(value), "__get__"))

    def bind(self, name: str, value: Any) -> None:
        """Set one of the values."""
        if isinstance(self.space, type):
            type.__setattr__(self.space, name, value)
        else:
            self.space[name] = value


Known = dict[Any, tuple[Any, ...]]
"""The functions and classes that code runs: what follows from the code alone, to be kept."""


def owners_in(roots: Iterable[tuple[str, object]], known: Known) -> Iterator[Owner]:
    """Yield what holds attributes, from these objects by their names on: each once."""
    walk = _Walk(known)
    for path, root in roots:
        for prefix, one in _parts_of(path, root):
            yield from walk.within(Owner(prefix, one), 0)
            for name, hook in _hooks_of(one):
                yield from walk.within(Owner(f"{prefix}.{name}", hook), 1)
    yield from walk.around()


def is_of_data(path: str) -> bool:
    """Return whether an object is of what reads data."""
    return path.partition(".")[0] in ("data", "eval_data", "collate_fn")


class _Walk:
    """One way through live objects."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._seen: set[int] = set()
        self._code: dict[Any, None] = {}

    def within(self, owner: Owner, depth: int) -> Iterator[Owner]:
        """Yield an object, if it is of the user's own class, and such objects in it."""
        owner = _bare(owner)
        if id(owner.thing) in self._seen or not is_owner(owner.thing):
            return
        self._seen.add(id(owner.thing))
        is_function = isinstance(owner.thing, FunctionType)
        if not is_of_data(owner.path):
            self._code |= dict.fromkeys(
                self._run_by(owner.thing if is_function else type(owner.thing))
            )
        if not is_function or owner.held():
            yield owner
        is_library = isinstance(owner.thing, nn.Module) and not keeps_attributes(owner.thing)
        if depth < _DEPTH and not is_library:  # of which numbers alone are looked at
            yield from self._below(owner, depth)

    def _below(self, owner: Owner, depth: int) -> Iterator[Owner]:
        for name, value in owner.held().items():
            for path, part in _within(name, value):
                holder = (owner.thing, name) if part is value else None
                yield from self.within(Owner(f"{owner.path}.{path}", part, holder), depth + 1)

    def around(self) -> Iterator[Owner]:
        """Yield what is around the code that the objects run: last, for others may hold it, too."""
        functions = [one for one in self._code if isinstance(one, FunctionType)]
        stored = set[str]().union(*map(names_stored_by, functions))
        paths: Counter[str] = Counter()
        spaces: dict[int, Shared] = {}
        for one in [*self._code]:
            path = f"around.{one.__module__}.{one.__qualname__}"
            paths[path] += 1
            number = f"[{paths[path]}]" if paths[path] > 1 else ""
            thing = Shared(one, stored=stored) if isinstance(one, type) else one
            yield from self._around(Owner(f"{path}{number}", thing))
        for function in functions:
            _add_globals(spaces, function)
        for space in spaces.values():
            name = space.space.get("__name__") if isinstance(space.space, dict) else None
            yield from self._around(Owner(f"globals.{name}", space))

    def _around(self, owner: Owner) -> Iterator[Owner]:
        if id(owner.identity) not in self._seen and owner.held():
            self._seen.add(id(owner.identity))
            yield owner
            yield from self._below(owner, 1)

    def _run_by(self, code: Any) -> tuple[Any, ...]:
        """Return the user's own functions and classes that a class or function runs."""
        if code not in self._known:
            found = reached(code)
            methods = (method for one in found for method in functions_of(one))
            self._known[code] = tuple(dict.fromkeys((*found, *methods)))
        return self._known[code]


def _add_globals(spaces: dict[int, Shared], function: FunctionType) -> None:
    """Add the globals that a function names, and those of modules of the user's that it has."""
    names, stored = names_in(function), names_stored_by(function)
    waiting, seen = [function.__globals__], set[int]()
    while waiting:
        space = waiting.pop()
        if id(space) in seen:
            continue
        seen.add(id(space))
        here = spaces.setdefault(id(space), Shared(space))
        here.names |= names & space.keys()
        here.stored |= stored & space.keys()
        waiting += [vars(space[n]) for n in names & space.keys() if is_user_module(space[n])]


def _is_constant(value: object) -> bool:
    plain = value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum)
    return plain or isinstance(value, type | FunctionType | ModuleType | torch.dtype)


def _numbers_of(thing: nn.Module) -> dict[str, Any]:
    """Return the numbers that a module of a library was built with, such as a dropout's `p`."""
    return {
        name: value
        for name, value in vars(thing).items()
        if type(value) is float and name[:1] != "_" and name not in _OF_EVERY_MODULE
    }


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _cells(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet: a function that names itself
            continue
    return {name: value for name, value in found.items() if name not in _CLOSED_OVER}


def _hooks_of(thing: object) -> Iterator[tuple[str, object]]:
    """Yield the hooks on a module, its parameters, or an optimizer, each with a name."""
    places: list[tuple[str, Any, tuple[str, ...]]] = []
    if isinstance(thing, nn.Module):
        parameters = thing.named_parameters(recurse=False)
        places = [("", thing, ON_MODULES), *((f"{n}.", p, ON_PARAMETERS) for n, p in parameters)]
    elif isinstance(thing, Optimizer):
        places = [("", thing, ON_OPTIMIZERS)]
    for prefix, one, kinds in places:
        if not any(getattr(one, kind, None) for kind in kinds):
            continue  # nearly all have none
        for kind, hooks in hooks_on(one, kinds).items():
            yield from ((f"{prefix}{kind}.{at}", hook) for at, hook in enumerate(hooks))


def _bare(owner: Owner) -> Owner:
    """Return the object behind a bound method, and the function behind a partial one."""
    thing = owner.thing
    while isinstance(thing, functools.partial):
        thing = thing.func
    if isinstance(thing, MethodType):
        thing = thing.__self__
    return owner if thing is owner.thing else Owner(owner.path, thing)


def is_owner(thing: object) -> bool:
    """Return whether attributes of an object are looked at: of the user's own class, mostly."""
    if isinstance(thing, FunctionType):
        return is_user_code(thing)
    if type(thing) in _NAMESPACES or isinstance(thing, nn.Module):
        return True
    if isinstance(thing, Enum | tuple | type | DataLoader) or not keeps_attributes(thing):
        return False
    if isinstance(thing, IterableDataset | Sampler):
        return False  # what is read again from its beginning comes to be what it was
    if not isinstance(thing, LRScheduler):
        return True
    return type(thing).state_dict is not LRScheduler.state_dict  # which holds all attributes


def _parts_of(path: str, root: object) -> Iterator[tuple[str, object]]:
    """Yield a registered object, and what it consists of where that is not of the user's class."""
    if isinstance(root, nn.Module):
        for name, module in named_modules(root):
            yield (f"{path}.{name}" if name else path), module
        return
    yield path, root
    if isinstance(root, LRScheduler):
        yield from _parts_of_schedule(path, root)
    if not type(root).__module__.startswith(_OF_DATA):
        return
    held = vars(root)
    for name, suffix in _PARTS_OF_DATA.items():
        if held.get(name) is not None:
            yield from _parts_of(f"{path}{suffix}", held[name])
    if isinstance(root, ConcatDataset):
        for place, part in enumerate(root.datasets):
            yield from _parts_of(f"{path}.{place}", part)


def _parts_of_schedule(path: str, schedule: LRScheduler) -> Iterator[tuple[str, object]]:
    """Yield the functions that a schedule calls, which its state leaves out."""
    held = vars(schedule)
    for name in ("lr_lambdas", "_schedulers"):
        parts = held.get(name)
        for at, part in enumerate(parts if isinstance(parts, list | tuple) else ()):
            yield from _parts_of(f"{path}.{name}.{at}", part)


_OF_DATA = ("unbroken.data", "torch.utils.data")
_PARTS_OF_DATA = {
    **dict.fromkeys(("dataset", "_batches", "_loader", "loader"), ""),
    **dict.fromkeys(("collate_fn", "_collate"), ".collate_fn"),
}


def _within(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the objects that an attribute holds: itself, or those in a short list or dict."""
    yield name, value
    parts: Iterable[tuple[Any, Any]] = ()
    if type(value) is dict and len(value) <= _MOST_PARTS:
        parts = value.items()
    elif type(value) in (list, tuple) and len(value) <= _MOST_PARTS:  # type: ignore[arg-type]
        parts = enumerate(value)  # type: ignore[arg-type]
    for key, part in parts:
        if hasattr(part, "__dict__"):
            yield f"{name}.{key}", part
    if isinstance(value, nn.Module):
        for inner, module in named_modules(value):
            if inner:
                yield f"{name}.{inner}", module


def _put_into(live: Any, value: Any) -> bool:
    """Fill a container or a tensor where it is, if it can take the value; return whether."""
    if isinstance(live, torch.Tensor) and _fits(live, value):
        with torch.no_grad():
            live.copy_(value)
        return True
    if isinstance(live, dict) and isinstance(value, Mapping) and type(value) in (dict, type(live)):
        live.clear()
        live.update(value)
        return True
    if type(live) is type(value) and isinstance(live, list):
        live[:] = value
        return True
    return False


def _fits(live: torch.Tensor, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (live.dtype, live.shape, live.requires_grad) == (
        value.dtype,
        value.shape,
        value.requires_grad,
    )


def _is_frozen(thing: object) -> bool:
    parameters = getattr(type(thing), "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
