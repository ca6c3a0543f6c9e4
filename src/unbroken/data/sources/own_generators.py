"""Random generators and counters that data hold of their own: their states go with the position.

What is drawn from the global generators is keyed, and needs no state. A generator in a data set or
a collator is moved by reading, so that it is known after each batch where this process reads alone;
worker processes move copies that nobody sees. A sampler is always asked in this process: what it
keeps is known when an epoch begins, and brings the epoch's order back when that is read again.
"""

from __future__ import annotations

import dis
import random
from collections import UserDict, deque
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.utils.data import Dataset

from unbroken.data.sources.batch_digests import OR_ALLOW, generators_in
from unbroken.errors import DataError

_BIT_GENERATORS = {
    kind.__name__: kind for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937)
}
_LIBRARIES = ("torch", "torchdata", "datasets", "accelerate", "lightning", "pytorch_lightning")
_MANY = 1 << 17  # values in a list that a sampler keeps
_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
)
_AHEAD = 64  # batches that may be read and not used yet


class OwnGenerators:
    """The generators of the objects that are read, and their states after each batch.

    Args:
        holders: What is read, by name.
        is_alone: Whether this process alone reads, so that it sees what moves them.
        without: Generators that are seeded anyway.

    Example:
        >>> class Noisy:
        ...     def __init__(self):
        ...         self.rng = random.Random(0)
        >>> own = OwnGenerators({"data": Noisy()}, is_alone=True)
        >>> own.are_kept, own.state(object())  # nothing has moved them
        (True, None)
    """

    def __init__(
        self, holders: Mapping[str, Any], *, is_alone: bool, without: Collection[Any] = ()
    ) -> None:
        self._holders, self._is_alone = holders, is_alone
        self._without = {id(one) for one in without}
        self._names: Collection[str] | None = None  # none is left out yet
        self._held = self._found()
        self._names = self._held.keys()  # what reading makes first, it makes again
        self._first, self._is_restored = self.states(), False
        self._noted: deque[tuple[object, dict[str, Any]]] = deque(maxlen=_AHEAD)

    @property
    def are_kept(self) -> bool:
        """Whether a position holds all of them."""
        return self._is_alone and all(map(_is_known, self._held.values()))

    @property
    def all(self) -> list[Any]:
        """The generators whose states go with the position."""
        return [*self._held.values()] if self.are_kept else []

    def _found(self) -> dict[str, Any]:
        found = generators_in(self._holders) if self._is_alone else {}
        found = {name: one for name, one in found.items() if id(one) not in self._without}
        return {n: one for n, one in found.items() if self._names is None or n in self._names}

    def _look(self) -> None:
        """See which are held now: others may have taken their places."""
        found = self._found()
        if {n: id(one) for n, one in found.items()} != {n: id(o) for n, o in self._held.items()}:
            self._held = found

    def states(self) -> dict[str, Any]:
        """Return where they stand now, as plain values."""
        return {name: _state_of(one) for name, one in self._held.items() if _is_known(one)}

    def begin(self, position: object) -> None:
        """Take note that reading begins at a position: what was read beyond it is read again."""
        self._look()
        if not self._held:
            return
        self.put(self.at(position))
        self._noted.clear()
        self.note(position)

    def note(self, position: object) -> None:
        """Take note of what they have come to with the batch before a position."""
        if self._held:
            self._held = self._found()  # reading may put another in its place
            self._noted.append((position, self.states()))

    def state(self, position: object) -> dict[str, Any] | None:
        """Return their states at a position; None: nothing has moved them since they were made."""
        self._look()
        now = self.states()
        if not self.are_kept or (now == self._first and not self._is_restored):
            return None
        if not self._noted or self._noted[-1][0] is position:
            return {"states": now, "is_known": True}
        known = self._at(position)
        is_known = bool(known) and not self._others_drew()
        return {"states": known or now, "is_known": is_known}

    def at(self, position: object) -> dict[str, Any]:
        """Return what they had come to at a position; {}: nobody knows."""
        return (None if self._others_drew() else self._at(position)) or {}

    def _at(self, position: object) -> dict[str, Any] | None:
        return next((states for one, states in self._noted if one is position), None)

    def _others_drew(self) -> bool:
        """Return whether something but reading has moved them since the last batch."""
        return bool(self._noted) and self._noted[-1][1] != self.states()

    def check(self, stored: Any) -> None:
        """Raise where stored states cannot be put back; None: there are none.

        Raises:
            DataError: Other generators are here, or the states are not known.
        """
        if stored is None:
            return
        held: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
        states, began = held.get("states"), held.get("epoch", {})
        if not _are_states(states) or not _are_states(began):
            raise DataError("data.generators", "are no states of generators")
        if stored.get("is_known") is not True:
            what = "others drew from them while batches were read ahead: where they stood is lost"
            raise DataError("data.generators", what, hint=OR_ALLOW)
        self._look()
        here = {name: state[0] for name, state in self.states().items()} if self.are_kept else {}
        there = {name: state[0] for name, state in states.items()}
        if here != there:
            what = "the data do not hold the generators that they held"
            names = sorted(there), sorted(here)
            raise DataError(
                "data.generators", what, expected=names[0], found=names[1], hint=OR_ALLOW
            )

    def restore(self, stored: Any) -> None:
        """Put back what `state` returned, as far as such generators are here."""
        self._look()
        self._noted.clear()
        if isinstance(stored, Mapping):
            self._is_restored = True
            self.put(stored["states"])

    def put(self, states: Mapping[str, Any]) -> None:
        """Let them stand there, as far as such generators are here."""
        for name, one in self._held.items():
            if name in states and _is_known(one) and states[name][0] == _state_of(one)[0]:
                _set_state(one, states[name])


def _is_known(generator: Any) -> bool:
    if isinstance(generator, torch.Generator):
        return generator.device.type == "cpu"
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator).__name__ in _BIT_GENERATORS
    if type(generator) is np.random.RandomState:
        return bool(generator.get_state(legacy=False)["bit_generator"] == "MT19937")
    return type(generator) is random.Random


def _state_of(generator: Any) -> list[Any]:
    """Return the kind of a generator, and its state."""
    if isinstance(generator, torch.Generator):
        return ["torch", generator.get_state().numpy().tobytes()]
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return [f"numpy {state['bit_generator']}", _listed(state)]
    if isinstance(generator, np.random.RandomState):
        return ["numpy RandomState", _listed(generator.get_state(legacy=False))]
    version, numbers, normal = generator.getstate()
    return ["random", [version, list(numbers), normal]]


def _set_state(generator: Any, state: list[Any]) -> None:
    held = state[1]
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(held), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = held
    elif isinstance(generator, np.random.RandomState):
        key = np.array(held["state"]["key"], dtype=np.uint32)
        generator.set_state({**held, "state": {**held["state"], "key": key}})
    else:
        generator.setstate((held[0], tuple(held[1]), held[2]))


def _are_states(states: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(states, Mapping) and all(map(_is_state, states.values()))


def _is_state(state: Any) -> bool:
    """Return whether a stored value is the state of a generator: one of its kind takes it."""
    if not isinstance(state, list) or len(state) != 2 or not isinstance(state[0], str):
        return False
    try:
        _set_state(_new(state[0]), state)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, OverflowError):
        return False  # what they say of a state that is none
    return True


def _new(kind: str) -> Any:
    if kind == "torch":
        return torch.Generator()
    if kind == "random":
        return random.Random()  # noqa: S311
    if kind == "numpy RandomState":
        return np.random.RandomState()
    return np.random.Generator(_BIT_GENERATORS[kind.removeprefix("numpy ")]())


def _listed(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _listed(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


# What gives an epoch its order may keep more than generators.


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
        self._places = dict(_places_in(parts))
        self._built = self._values()
        self._epochs: dict[int, dict[str, list[Any]]] = {}

    def note(self, epoch: int) -> None:
        """Take note of what they keep now: an epoch begins."""
        before = {n: values for n, values in self._epochs.items() if epoch - 2 <= n < epoch}
        self._epochs = {**before, epoch: self._values()}

    def moved(self, epoch: int, read_in: int | None) -> dict[str, Any]:
        """Return what is no more as it was built: when an epoch began, or now.

        Args:
            epoch: The epoch; one that has yet to begin begins with what is kept now.
            read_in: The epoch that is read from now; None: this one.
        """
        now = self._values() if read_in in (None, epoch) else self._epochs.get(read_in, {})
        began = self._epochs.get(epoch, now)
        paths = {**self._built, **began, **now}
        each = {n: [one.get(n, _NOT_THERE) for one in (self._built, began, now)] for n in paths}
        return {
            path: dict(zip(("built", "began", "now"), values, strict=True))
            for path, values in each.items()
            if not values[0] == values[1] == values[2]
        }

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
            if here == entry["now"] or entry["now"][0] == "generator":
                continue
            if not may_put:
                what = "was moved by something else than reading, or batches were read ahead"
                expected, found = _shown(entry["now"]), _shown(here)
                raise DataError(f"data: {path}", what, expected=expected, found=found)
            self._keep(path, entry["now"])

    def _same_built(self, moved: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Return those that this start has built as that one did."""
        built = self._built
        return [(n, one) for n, one in moved.items() if built.get(n, _NOT_THERE) == one["built"]]

    def _keep(self, path: str, value: list[Any]) -> None:
        name, _, key = path.rpartition(".")
        _keep(self._places[name].held, key, value)

    @staticmethod
    def check(moved: Any) -> None:
        """Raise where `put` could not take a stored value.

        Raises:
            DataError: It is none of `moved`.
        """
        entries = moved.values() if isinstance(moved, Mapping) else [moved]
        for entry in entries:
            names = ("built", "began", "now")
            if not isinstance(entry, Mapping) or not all(_is_kept(entry.get(n)) for n in names):
                raise DataError("data.order", "is not what samplers keep", found=repr(entry)[:80])

    def _values(self) -> dict[str, list[Any]]:
        found = {
            f"{name}.{key}": _kept(value)
            for name, place in self._places.items()
            for key, value in place.items()
        }
        return {path: value for path, value in found.items() if value is not None}


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


def _places_in(parts: Mapping[str, Any]) -> Iterator[tuple[str, _Place]]:
    """Yield where parts that give an order may keep something, by name."""
    for name, part in parts.items():
        functions = [part]
        if _is_users_own(part) and not isinstance(part, FunctionType):
            yield name, _Place(vars(part))
            inner = ((n, one) for n, one in vars(part).items() if _keeps_values(one))
            yield from ((f"{name}.{n}", _Place(vars(one))) for n, one in inner)
            functions = [getattr(type(part), method, None) for method in _READS]
        for function in functions:
            if isinstance(function, FunctionType):
                place = f"{name}.{function.__name__}"
                yield f"{place}.globals", _Place(function.__globals__, _globals_of(function))
                yield f"{place}.closure", _Place(_Cells(function))


_READS = ("__iter__", "__next__", "__getitem__")


def _keeps_values(thing: Any) -> bool:
    """Return whether an attribute is a small object of the user's own: a counter, say."""
    is_other = isinstance(thing, type | FunctionType | Dataset | torch.nn.Module | torch.Tensor)
    return _is_users_own(thing) and not is_other


def _globals_of(function: FunctionType) -> frozenset[str]:
    """Return the globals that a function sets, and the lists and dicts that it reads."""
    instructions = [*dis.get_instructions(function)]
    found = {one.argval for one in instructions if one.opname == "STORE_GLOBAL"}
    read = {one.argval for one in instructions if one.opname == "LOAD_GLOBAL"}
    held = function.__globals__
    return frozenset(found | {n for n in read if type(held.get(n)) in (list, dict)})


def _is_users_own(part: Any) -> bool:
    library = type(part).__module__.partition(".")[0]
    return library not in (*_LIBRARIES, "builtins") and hasattr(part, "__dict__")


def _kept(value: Any) -> list[Any] | None:
    """Return a plain value, a list of them, a small tensor or a generator; None: something else."""
    if _is_plain(value):
        return ["plain", value]
    if type(value) in (list, tuple) and len(value) <= _MANY:
        is_plain = all(map(_is_plain, value))
        return [type(value).__name__, list(value)] if is_plain else None
    if type(value) is dict and len(value) <= _MANY:
        pairs = [[key, one] for key, one in value.items()]
        is_plain = all(_is_plain(key) and _is_plain(one) for key, one in pairs)
        return ["dict", pairs] if is_plain else None
    if isinstance(value, torch.Tensor):
        is_kept = value.dtype in _DTYPES and value.layout is torch.strided and not value.is_meta
        array = _kept(value.detach().cpu().numpy()) if is_kept else None
        return None if array is None else ["tensor", *array[1:]]
    if isinstance(value, np.ndarray):
        is_small = value.dtype.kind in "biuf" and value.size <= _MANY
        return ["array", value.dtype.str, value.tolist()] if is_small else None
    is_generator = isinstance(
        value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState
    )
    return ["generator", _state_of(value)] if is_generator and _is_known(value) else None


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _shown(value: list[Any]) -> str:
    return repr(value[-1])[:80]


def _is_kept(value: Any) -> bool:
    match value:
        case ["not there"]:
            return True
        case ["plain", None | bool() | int() | float() | str()] | ["list" | "tuple", list()]:
            return True
        case ["dict", list() as pairs]:
            return all(isinstance(one, list) and len(one) == 2 for one in pairs)
        case ["array" | "tensor", str(), bool() | int() | float() | list()]:
            return _array_of(value) is not None
        case ["generator", state]:
            return _is_state(state)
    return False


def _array_of(value: list[Any]) -> np.ndarray[Any, Any] | None:
    """Return the array that a stored value is; None: it is none."""
    _, kind, values = value
    try:
        array = np.array(values, dtype=kind)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _keep(place: MutableMapping[str, Any], name: str, value: list[Any]) -> None:
    """Let a value be what it was, in the object that is held where that can be filled."""
    held = place.get(name)
    if value == _NOT_THERE:
        place.pop(name, None)
    elif value[0] == "list" and type(held) is list:
        held[:] = value[1]  # others may hold the same list
    elif value[0] == "dict" and type(held) is dict:
        held.clear()
        held.update(value[1])
    elif value[0] == "generator":
        generator = held if _is_known(held) and _state_of(held)[0] == value[1][0] else None
        place[name] = _new(value[1][0]) if generator is None else generator
        _set_state(place[name], value[1])
    else:
        place[name] = _filled(held, value)


def _filled(held: Any, value: list[Any]) -> Any:
    """Return a stored value, in the tensor or array that is held if it fits."""
    if value[0] in ("plain", "list", "tuple"):
        return tuple(value[1]) if value[0] == "tuple" else value[1]
    if value[0] == "dict":
        return dict(value[1])
    array = _array_of(value)
    if array is not None and value[0] == "array":
        if isinstance(held, np.ndarray) and (held.dtype, held.shape) == (array.dtype, array.shape):
            held[...] = array
            return held
        return array
    tensor = torch.from_numpy(array)
    if isinstance(held, torch.Tensor) and (held.dtype, held.shape) == (tensor.dtype, tensor.shape):
        with torch.no_grad():
            return held.copy_(tensor)
    return tensor
