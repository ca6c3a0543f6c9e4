"""What gives an epoch its order may keep more than generators: counters, lists, what was drawn.

A sampler is always asked in this process: what it keeps is known when an epoch begins, and brings
the epoch's order back when that is read again.
"""

from __future__ import annotations

import dis
import json
import random
import sys
from array import array
from collections import UserDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, GeneratorType
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from unbroken.data.sources.batch_digests import OR_ALLOW
from unbroken.data.sources.own_generators import (
    is_known,
    is_state,
    new_generator,
    set_state,
    state_of,
)
from unbroken.errors import DataError

_LIBRARIES = ("torch", "torchdata", "datasets", "accelerate", "lightning", "pytorch_lightning")
_STANDARD = frozenset((*sys.stdlib_module_names, "numpy")) - {"__main__"}
_MANY = 1 << 23  # numbers in a list or an array that a sampler keeps
_MANY_INSIDE = 1 << 17  # values of another container, in all that it holds
_MANY_TO_WALK = 1 << 12  # the same, where each look at it has to walk through it
_DEPTH = 4  # objects in objects, functions that functions call
_SAMPLE = 64  # items by which a container is judged that is not stored; objects that one holds
_PACKED_FROM = 1 << 12  # whole numbers in a list that are stored as an array
_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
)
_NOT_THERE = ["not there"]


class OrderState:
    """What samplers of the user's own keep: as it stood when each epoch began, and as it stands.

    A sampler may count its epochs, shuffle a list in place, or draw from a generator that was made
    once. So an epoch that is read again must begin as it began. What training itself changes there
    is put back when the epoch has been read up to its place.

    Args:
        parts: What gives a loader its order, by name.

    Example:
        >>> class Counting(torch.utils.data.Sampler):
        ...     epoch = 0
        ...     def __init__(self):
        ...         self.epoch = 3
        >>> sampler = Counting()
        >>> order = OrderState({"sampler": sampler})
        >>> sampler.epoch = 4
        >>> order.note(1)
        >>> sampler.epoch = 5
        >>> order.moved(1, None)
        {'sampler.epoch': {'built': ['plain', 3], 'began': ['plain', 4], 'now': ['plain', 5]}}
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = parts
        self._known: dict[str, tuple[bytes, list[Any]]] = {}  # what stands for what is large
        self._built = self._values()
        self._epochs: dict[int, dict[str, list[Any]]] = {}

    def note(self, epoch: int) -> None:
        """Take note of what they keep now: an epoch begins."""
        before = {n: values for n, values in self._epochs.items() if epoch - 2 <= n < epoch}
        self._epochs = {**before, epoch: self._values()}

    def state(self, epoch: int, read_in: int | None) -> dict[str, Any]:
        """Return what `check` takes; {}: nothing has moved. The arguments are those of `moved`."""
        moved, lost = self.moved(epoch, read_in), self.lost(epoch, read_in)
        return {"moved": moved, "lost": lost} if moved or lost else {}

    def moved(self, epoch: int, read_in: int | None) -> dict[str, Any]:
        """Return what is no more as it was built: when an epoch began, or now.

        Args:
            epoch: The epoch; one that has yet to begin begins with what is kept now.
            read_in: The epoch that is read from now; None: this one.
        """
        return {
            path: dict(zip(("built", "began", "now"), values, strict=True))
            for path, values in self._each(epoch, read_in).items()
            if not all(map(partial(_is_same, values[0]), values[1:]))
            and not any(map(_is_sign, values))
        }

    def lost(self, epoch: int, read_in: int | None) -> list[str]:
        """Return what of the user's own had moved when an epoch began, and cannot be stored.

        Args:
            epoch: As `moved` takes it.
            read_in: As `moved` takes it.
        """
        names = tuple(f"{name}." for name, part in self._parts.items() if not _is_installed(part))
        return [
            path
            for path, values in self._each(epoch, read_in).items()
            if path.startswith(names) and any(map(_is_sign, values[:2]))
            if not _is_same(values[0], values[1])
        ]

    def _each(self, epoch: int, read_in: int | None) -> dict[str, list[list[Any]]]:
        """Return, by path, what was built, what an epoch began with, and what is kept now."""
        now = self._values() if read_in in (None, epoch) else self._epochs.get(read_in, {})
        began = self._epochs.get(epoch, now)
        each = (self._built, began, now)
        paths = {path: None for one in each for path in one}
        return {path: [one.get(path, _NOT_THERE) for one in each] for path in paths}

    def put(self, moved: Mapping[str, Any]) -> None:
        """Let them begin as an epoch began; what this start was given anew stays as it is."""
        for path, entry in self._same_built(moved):
            self._keep(path, entry["began"])

    def go_on(self, moved: Mapping[str, Any], *, may_put: bool) -> None:
        """Let them stand as they stood, once the epoch was read up to its place.

        Raises:
            DataError: Something else than reading has moved them, and they may not be put back.
        """
        values = self._values()
        for path, entry in self._same_built(moved):
            here = values.get(path, _NOT_THERE)
            if _is_same(here, entry["now"]) or entry["now"][0] == "generator":
                continue
            if not may_put:
                what = "was moved by something else than reading, or batches were read ahead"
                expected, found = _shown(entry["now"]), _shown(here)
                raise DataError(f"data: {path}", what, expected=expected, found=found)
            self._keep(path, entry["now"])

    def _same_built(self, moved: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Return those that this start has built as that one did."""
        built = self._built
        return [
            (n, one) for n, one in moved.items() if _is_same(built.get(n, _NOT_THERE), one["built"])
        ]

    def _keep(self, path: str, value: list[Any]) -> None:
        name, _, key = path.rpartition(".")
        place = next((place for found, place in _places_in(self._parts) if found == name), None)
        if place is not None:
            _keep(place.held, key, value)

    @staticmethod
    def check(stored: Any) -> None:
        """Raise where a stored order could not be put back.

        Args:
            stored: What was `moved`, and what was `lost`; {}: nothing.

        Raises:
            DataError: It is none, or something was lost.
        """
        held: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {"moved": stored}
        moved, lost = held.get("moved", {}), held.get("lost", [])
        entries = moved.values() if isinstance(moved, Mapping) else [moved]
        for entry in entries:
            names = ("built", "began", "now")
            if not isinstance(entry, Mapping) or not all(_is_kept(entry.get(n)) for n in names):
                raise DataError("data.order", "is not what samplers keep", found=repr(entry)[:80])
        if not isinstance(lost, list) or not all(isinstance(one, str) for one in lost):
            raise DataError("data.order", "is not what samplers keep", found=repr(lost)[:80])
        if lost:
            some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            what = "had moved when the epoch began, and is of a kind that is not stored"
            hint = f"keep it in numbers, lists, dicts, arrays or generators. {OR_ALLOW}"
            raise DataError(f"data: {some}", what, hint=hint)

    def _values(self) -> dict[str, list[Any]]:
        return {
            f"{name}.{key}": self._value(f"{name}.{key}", value)
            for name, place in _places_in(self._parts)
            for key, value in place.items()
        }

    def _value(self, path: str, value: Any) -> list[Any]:
        """Return what stands for a value; a large one that is as it was is not walked through."""
        data = _bytes_of(value)
        if data is None:
            return _kept(value, _MANY_TO_WALK) or _sign(value)
        digest, (known, kept) = xxhash.xxh3_128_digest(data), self._known.get(path, (b"", []))
        if known != digest:
            kept = _kept(value, _MANY_INSIDE) or _sign(value)
            self._known[path] = (digest, kept)
        return kept


@dataclass(frozen=True)
class _Place:
    """Where values are held by name: attributes, globals, what a function closes over.

    Attributes:
        held: The values.
        names: Those that count; None: all.
    """

    held: MutableMapping[str, Any]
    names: frozenset[str] | None = None

    def items(self) -> list[tuple[str, Any]]:
        names = self.held if self.names is None else self.names
        return [(name, self.held[name]) for name in names if name in self.held]


class _Cells(UserDict[str, Any]):
    """The variables that a function closes over."""

    def __init__(self, function: FunctionType) -> None:
        pairs = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._cells = {name: cell for name, cell in pairs if cell != CellType()}  # an empty one
        super().__init__({name: cell.cell_contents for name, cell in self._cells.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._cells[name].cell_contents = value

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents


class _Named(MutableMapping[str, Any]):
    """The values that an object, or a class, has in slots or for all its objects."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self._owner, self._names = owner, [one for one in names if hasattr(owner, one)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _places_in(parts: Mapping[str, Any]) -> Iterator[tuple[str, _Place]]:
    """Yield where parts that give an order may keep something, by name."""
    seen, done = set[int](), set[int]()
    for name, part in parts.items():
        yield from _places_of(name, part, seen, _DEPTH)
        for kind in _users_classes(type(part)):
            yield f"{name}.{kind.__name__}", _Place(_Named(kind, _values_of_class(kind)))
        for function in _functions_of(part):
            yield from _places_of_function(f"{name}.{function.__name__}", function, done, _DEPTH)


def _places_of(name: str, part: Any, seen: set[int], depth: int) -> Iterator[tuple[str, _Place]]:
    """Yield the attributes of a part, and those of small objects that it holds."""
    if id(part) in seen or not depth or not _is_users_own(part) or isinstance(part, FunctionType):
        return
    seen.add(id(part))
    slots = _Named(part, _slots_of(type(part)))
    places = [_Place(vars(part))] if hasattr(part, "__dict__") else []
    for place in (*places, *([_Place(slots)] if slots else [])):
        yield name, place
        for key, value in place.items():
            for at, one in _inside(value):
                if _keeps_values(one):
                    yield from _places_of(f"{name}.{key}{at}", one, seen, depth - 1)


def _inside(value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield a value; of a small container what is in it."""
    if type(value) not in (list, tuple, deque, dict):
        yield "", value
    elif len(value) <= _SAMPLE and depth:
        for at, one in value.items() if type(value) is dict else enumerate(value):
            yield from ((f"[{at!r}]{more}", inner) for more, inner in _inside(one, depth - 1))


def _places_of_function(
    name: str, function: FunctionType, done: set[int], depth: int
) -> Iterator[tuple[str, _Place]]:
    """Yield what a function sets or fills outside of itself, and what those do that it calls."""
    if id(function) in done or not depth:
        return
    done.add(id(function))
    yield f"{name}.globals", _Place(function.__globals__, _globals_of(function))
    yield f"{name}.closure", _Place(_Cells(function))
    defaults = {str(at): one for at, one in enumerate(function.__defaults__ or ())}
    yield f"{name}.defaults", _Place({n: one for n, one in defaults.items() if _is_filled(one)})
    for called in _called_by(function):
        yield from _places_of_function(f"{name}.{called.__name__}", called, done, depth - 1)


def _is_filled(value: Any) -> bool:
    return type(value) in (list, dict)


def _functions_of(part: Any) -> list[FunctionType]:
    if isinstance(part, FunctionType):
        return [part]
    found = (one for kind in _users_classes(type(part)) for one in vars(kind).values())
    return [one for one in found if isinstance(one, FunctionType)]


def _called_by(function: FunctionType) -> list[FunctionType]:
    """Return the functions of the same module that a function may call by their names."""
    found = (function.__globals__.get(name) for name in _names_in(function.__code__, "LOAD_GLOBAL"))
    return [
        one
        for one in found
        if isinstance(one, FunctionType) and one.__module__ == function.__module__
    ]


def _users_classes(kind: type) -> list[type]:
    """Return the classes that the user wrote of those that make up a class."""
    return [one for one in kind.__mro__ if not _is_of_a_library(one)]


def _values_of_class(kind: type) -> list[str]:
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("__")
        and (_is_plain(value) or type(value) in (list, tuple, dict, set))
    ]


def _slots_of(kind: type) -> list[str]:
    slots = (one.__dict__.get("__slots__", ()) for one in _users_classes(kind))
    names = (name for one in slots for name in ((one,) if isinstance(one, str) else one))
    return [name for name in names if name != "__dict__"]


def _keeps_values(thing: Any) -> bool:
    """Return whether an attribute is a small object of the user's own: a counter, say."""
    is_other = isinstance(thing, type | FunctionType | Dataset | torch.nn.Module | torch.Tensor)
    return _is_users_own(thing) and not is_other


def _globals_of(function: FunctionType) -> frozenset[str]:
    """Return the globals that a function sets, and the lists and dicts that it reads."""
    held = function.__globals__
    read = _names_in(function.__code__, "LOAD_GLOBAL")
    filled = {name for name in read if type(held.get(name)) in (list, dict, set, deque)}
    return frozenset(filled | _names_in(function.__code__, "STORE_GLOBAL"))


@lru_cache(maxsize=1024)
def _names_in(code: CodeType, operation: str) -> frozenset[str]:
    """Return the names that an operation has in a function, and in those that are made in it."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname == operation}
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(found.union(*(_names_in(one, operation) for one in inner)))


def _is_installed(part: Any) -> bool:
    """Return whether the class of a part is one of a library: what that keeps is its own affair."""
    kind: Any = part if isinstance(part, FunctionType) else type(part)
    path = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(path).parts)


def _is_of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in (*_LIBRARIES, *_STANDARD)


def _is_users_own(part: Any) -> bool:
    return not _is_of_a_library(type(part))


def _kept(value: Any, most: int) -> list[Any] | None:
    """Return what can be stored of a value; None: nothing that could bring it back.

    Args:
        value: The value.
        most: Items of a container, in all that it holds.
    """
    if _is_plain(value):
        return ["plain", value]
    if isinstance(value, torch.Tensor):
        is_kept = value.dtype in _DTYPES and value.layout is torch.strided and not value.is_meta
        found = _kept_array(value.detach().cpu().numpy()) if is_kept else None
        return None if found is None else ["tensor", *found[1:]]
    if isinstance(value, np.ndarray | np.generic):
        return _kept_array(value)
    if isinstance(value, _GENERATORS):
        return ["generator", state_of(value)] if is_known(value) else None
    if type(value) is list and len(value) > _PACKED_FROM and type(value[0]) in (int, float):
        return _packed(value)
    return _kept_container(value, most)


_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def _kept_array(value: np.ndarray[Any, Any] | np.generic) -> list[Any] | None:
    if value.dtype.kind not in "biuf" or value.size > _MANY:
        return None
    return ["array" if isinstance(value, np.ndarray) else "scalar", np.array(value)]


def _packed(value: list[Any]) -> list[Any] | None:
    """Return numbers of one type as an array, which takes a tenth of the place."""
    kind = type(value[0])
    if len(value) > _MANY or not all(type(one) is kind for one in value):
        return None
    try:
        return ["numbers", np.array(value, dtype=np.int64 if kind is int else np.float64)]
    except OverflowError:
        return None


def _kept_container(value: Any, most: int) -> list[Any] | None:
    """Return a container by what is kept of its items."""
    kind = type(value)
    if kind not in (list, tuple, deque, set, frozenset, dict) or _size_of(value, most) > most:
        return None
    if kind in (set, frozenset):
        # A set that was filled in another order may give its items in another one.
        is_same = all(map(_is_plain, value)) and [*kind([*value])] == [*value]
        return [kind.__name__, [*value]] if is_same else None
    if kind is dict:
        pairs = [[_kept(key, most), _kept(one, most)] for key, one in value.items()]
        return None if any(None in pair for pair in pairs) else ["dict", pairs]
    items = [_kept(one, most) for one in value]
    more = [value.maxlen] if isinstance(value, deque) else []
    return None if None in items else [kind.__name__, items, *more]


def _size_of(value: Any, most: int) -> int:
    """Return how many values a container has in it; more than `most`, where there are more."""
    waiting, size = [value], 0
    while waiting and size <= most:
        one = waiting.pop()
        if isinstance(one, torch.Tensor | np.ndarray):
            size += one.numel() if isinstance(one, torch.Tensor) else one.size
        elif isinstance(one, Mapping):
            size += len(one)
            waiting += one.values()
        elif isinstance(one, list | tuple | deque | set | frozenset):
            size += len(one)
            waiting += [item for item in one if not _is_plain(item)] if len(one) <= most else []
    return size


def _sign(value: Any) -> list[Any]:
    """Return what shows that a value has moved, where nothing can bring it back."""
    return ["sign", xxhash.xxh3_128_hexdigest(_text_of(value, _DEPTH))]


def _is_sign(value: list[Any]) -> bool:
    return bool(value[0] == "sign")


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two stored values are equal, not a number included."""
    if one is other:
        return True
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        is_alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return is_alike and one.tobytes() == other.tobytes()
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and one != one:
        return isinstance(other, float) and other != other
    return type(one) is type(other) and bool(one == other)


def _text_of(value: Any, depth: int) -> bytes:
    """Return bytes that are others when a value has moved, as far as that can be seen."""
    data = _bytes_of(value)
    if data is not None:
        return data
    if _is_plain(value):
        return repr(value).encode()
    if isinstance(value, Iterator):
        return _place_of(value, depth)
    if isinstance(value, torch.Tensor | np.ndarray) or not isinstance(value, Collection):
        return type(value).__name__.encode()
    parts: Iterable[Any] = islice(value, 0, None, max(1, len(value) // _SAMPLE))
    if isinstance(value, Mapping):
        parts = (part for key in parts for part in (key, value[key]))
    texts = (_text_of(one, depth - 1) for one in parts) if depth else ()
    return b"%s %d " % (type(value).__name__.encode(), len(value)) + b"".join(texts)


def _bytes_of(value: Any) -> bytes | None:
    """Return bytes that are others for another value, made quickly; None: there are none."""
    if isinstance(value, torch.Tensor):
        is_plain = value.is_cpu and value.layout is torch.strided
        flat = value.detach().contiguous().view(-1) if is_plain else None
        return None if flat is None else flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else value.tobytes()
    if type(value) is list and value and type(value[0]) is int:
        with suppress(TypeError, OverflowError):
            return array("q", value).tobytes()
    if type(value) in (list, tuple, dict):
        with suppress(TypeError, ValueError, RecursionError):
            return json.dumps(value).encode()
    return None


def _place_of(iterator: Iterator[Any], depth: int) -> bytes:
    """Return where an iterator stands, which nothing can bring back."""
    name = type(iterator).__name__.encode()
    if not depth:
        return name
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        held = () if frame is None else (frame.f_lasti, *frame.f_locals.values())
        return name + b"".join(_text_of(one, depth - 1) for one in held)
    with catch_warnings(), suppress(TypeError):
        simplefilter("ignore")  # from Python 3.12 on the ones of itertools warn
        parts = iterator.__reduce__()
        return name + b"".join(_text_of(one, depth - 1) for one in parts)
    return name


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str, bytes)


def _shown(value: list[Any]) -> str:
    return repr(_filled(None, value))[:80]


def _is_kept(value: Any) -> bool:
    """Return whether a stored value is one that `_kept` has made."""
    match value:
        case ["not there"]:
            return True
        case ["plain", None | bool() | int() | float() | str() | bytes()]:
            return True
        case ["list" | "tuple", list() as items] | ["deque", list() as items, None | int()]:
            return all(map(_is_kept, items))
        case ["set" | "frozenset", list() as items]:
            return all(map(_is_plain, items))
        case ["dict", list() as pairs]:
            are_pairs = all(isinstance(one, list) and len(one) == 2 for one in pairs)
            return are_pairs and all(_is_key(key) and _is_kept(one) for key, one in pairs)
        case ["array" | "tensor" | "numbers" | "scalar", np.ndarray() as numbers]:
            return bool(numbers.dtype.kind in "biuf")
        case ["generator", state]:
            return is_state(state)
    return False


def _is_key(value: Any) -> bool:
    """Return whether a stored value can be the key of a dict."""
    if not _is_kept(value) or value[0] not in ("plain", "tuple", "frozenset"):
        return False
    return value[0] != "tuple" or all(map(_is_key, value[1]))


def _keep(place: MutableMapping[str, Any], name: str, value: list[Any]) -> None:
    """Let a value be what it was, in the object that is held where that can be filled."""
    if value == _NOT_THERE:
        place.pop(name, None)
    else:
        place[name] = _filled(place.get(name), value)


def _filled(held: Any, value: list[Any]) -> Any:
    """Return a stored value, in what is held if it fits: others may hold the same."""
    kind, inside = value[0], value[1]
    match kind:
        case "plain":
            return inside
        case "generator":
            return _generator(held, inside)
        case "array" | "tensor":
            return _filled_array(held, kind, inside)
        case "scalar":
            return inside[()]
        case "numbers":
            new: Any = inside.tolist()
        case "dict":
            new = {_filled(None, key): None for key, _ in inside}
            for (_, one), key in zip(inside, new, strict=True):
                new[key] = _filled(held.get(key) if type(held) is dict else None, one)
        case "set" | "frozenset":
            new = set(inside) if kind == "set" else frozenset(inside)
        case _:
            olds = [*held] if type(held) in (list, tuple, deque) else []
            olds += [None] * (len(inside) - len(olds))
            items = [_filled(old, one) for old, one in zip(olds, inside, strict=False)]
            new = deque(items, value[2]) if kind == "deque" else items
            new = tuple(items) if kind == "tuple" else new
    return _put_into(held, new)


def _put_into(held: Any, new: Any) -> Any:
    """Return what is held, filled with the new items, if it is of the same kind."""
    if type(held) is not type(new) or isinstance(new, tuple | frozenset):
        return new
    if isinstance(new, deque) and held.maxlen != new.maxlen:
        return new
    held.clear()
    held.extend(new) if isinstance(new, list | deque) else held.update(new)
    return held


def _generator(held: Any, state: list[Any]) -> Any:
    is_same = held is not None and is_known(held) and state_of(held)[0] == state[0]
    generator = held if is_same else new_generator(state[0])
    set_state(generator, state)
    return generator


def _filled_array(held: Any, kind: str, stored: np.ndarray[Any, Any]) -> Any:
    if kind == "array":
        fits = isinstance(held, np.ndarray)
        fits = fits and (held.dtype, held.shape) == (stored.dtype, stored.shape)
        if fits and held.flags.writeable:
            held[...] = stored
            return held
        return stored.copy()
    tensor = torch.from_numpy(stored.copy())
    if isinstance(held, torch.Tensor) and (held.dtype, held.shape) == (tensor.dtype, tensor.shape):
        with torch.no_grad():
            return held.copy_(tensor)
    return tensor
