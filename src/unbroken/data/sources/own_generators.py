"""Random generators and counters that data hold of their own: their states go with the position.

What is drawn from the global generators is keyed, and needs no state. A generator in a data set or
a collator is moved by reading, so that it is known after each batch where this process reads alone;
worker processes move copies that nobody sees.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch

from unbroken.data.sources.batch_digests import OR_ALLOW, generators_in
from unbroken.errors import DataError

_BIT_GENERATORS = {
    kind.__name__: kind for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937)
}
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
        return self._is_alone and all(map(is_known, self._held.values()))

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
        return {name: state_of(one) for name, one in self._held.items() if is_known(one)}

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
            if name in states and is_known(one) and states[name][0] == state_of(one)[0]:
                set_state(one, states[name])


def is_known(generator: Any) -> bool:
    """Return whether the state of a generator can be stored."""
    if isinstance(generator, torch.Generator):
        return generator.device.type == "cpu"
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator).__name__ in _BIT_GENERATORS
    if type(generator) is np.random.RandomState:
        return bool(generator.get_state(legacy=False)["bit_generator"] == "MT19937")
    return type(generator) is random.Random


def state_of(generator: Any) -> list[Any]:
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


def set_state(generator: Any, state: list[Any]) -> None:
    """Let a generator stand where `state_of` has found it."""
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
    return isinstance(states, Mapping) and all(map(is_state, states.values()))


def is_state(state: Any) -> bool:
    """Return whether a stored value is the state of a generator: one of its kind takes it."""
    if not isinstance(state, list) or len(state) != 2 or not isinstance(state[0], str):
        return False
    try:
        set_state(new_generator(state[0]), state)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, OverflowError):
        return False  # what they say of a state that is none
    return True


def new_generator(kind: str) -> Any:
    """Return a generator of a kind."""
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
