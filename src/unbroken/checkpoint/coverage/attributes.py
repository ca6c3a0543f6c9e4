"""What training makes of attributes of the user's own objects: saved, and brought back.

Looked at are objects of the user's own classes alone, and of these what no library manages. What
is as it was at the start is not saved: the start makes it again.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from unbroken.capture import (
    Captured,
    capture_unregistered,
    comes_apart,
    is_sharded,
    kind_of,
    load_tensors,
    named_objects,
    restore_unregistered,
    unwrapped,
)
from unbroken.capture.state_tree import children
from unbroken.changes.differences import Difference, brief
from unbroken.changes.rules import rule_of
from unbroken.checkpoint.coverage.attribute_values import (
    TOLD,
    WITH_STATE,
    Look,
    has_state,
    kinds_near,
    look_at,
    value_of,
)
from unbroken.checkpoint.coverage.owners import Known, Owner, is_of_data, owners_in
from unbroken.data import LoaderSource, MapSource
from unbroken.errors import CaptureError, CheckpointError, CorruptCheckpointError
from unbroken.fingerprint import changed_by_reading, keeps_attributes
from unbroken.stored_names import from_stored, to_stored

ATTRIBUTES_KEY = "attributes"
"""Under which they stand in the state of a checkpoint."""

_DEPTH = 4
_MOST_PARTS = 64
_BYTES = 64 << 20
_ABSENT = ""
_FACT = re.compile(r"(?:state\.)?((?:callbacks\.)?[^.]+)\.(?:values|args)\.(.+)")
_SCALAR = 8
_MADE = "training made the object: make it before the run begins"
_GONE = "came or went: whether anything uses it cannot be seen"


@dataclass
class _Stored:
    """Attributes in a checkpoint; each by its path."""

    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Any) -> _Stored:
        """Return what is in the state of a checkpoint; what is of another form is left out."""
        found = tree if isinstance(tree, Mapping) else {}
        groups = {n: dict(found[n]) for n in to_stored(cls()) if isinstance(found.get(n), Mapping)}
        made: _Stored = from_stored(cls, groups)
        return made

    def to_tree(self) -> dict[str, Any]:
        return {n: value for n, value in to_stored(self).items() if value}


class Attributes:
    """The attributes of the registered objects, and of others that training uses.

    Args:
        objects: The registered objects, by name.
        bare: Registered objects whose state is their attributes, by name.
        more: Returns more objects, by name: callbacks, a trainer. What is of data stands under
            "data" and "eval_data".
        reads_ahead: Whether batches are read before they are used.

    Attributes:
        unknown: Of the last save, what could not be judged, and why.
    """

    def __init__(
        self,
        objects: Mapping[str, object],
        bare: dict[str, object] | None = None,
        more: Callable[[], Mapping[str, object]] = dict,
        *,
        reads_ahead: bool = False,
    ) -> None:
        self.bare = {} if bare is None else bare
        self._more, self._reads_ahead = more, reads_ahead
        self.unknown: dict[str, str] = {}
        self._objects = objects
        self._built: dict[str, Look] = {}
        self._before: dict[str, Look] = {}
        self._known: set[str] = set()
        self._stored = _Stored()
        self._of_workers: dict[str, Look] | None = None  # None: no process has copies
        self._noted = False
        self._code: Known = {}
        self._covered: dict[int, Any] = {}
        self._put_back: set[str] = set()
        self._begun: dict[str, Look] = {}
        self._set_anew: set[str] = set()

    def note(self) -> None:
        """Take note of everything as this start has built it, before a resume changes it."""
        self._noted = True
        for _, one in named_objects(self._objects):
            if isinstance(one, MapSource | LoaderSource):
                one.on_workers = self.workers_begin
        self._built, self._before, self._put_back = {}, {}, set()
        registered = self.registered()
        owners = list(self._owners())
        self._known = {owner.path for owner in owners}
        for owner in owners:
            held = owner.held().items()
            self._note_covered(owner, (value for _, value in held))
            looks = {name: look_at(name, value, registered).noted() for name, value in held}
            self._before |= {f"{owner.path}.{name}": look for name, look in looks.items()}
            first = FIRST.of(owner.identity, looks)
            self._built |= {f"{owner.path}.{name}": look for name, look in first.items()}

    @contextmanager
    def initial_values(self) -> Iterator[None]:
        """Give objects the plain attributes of the first start in this process, for a while.

        A second start takes the facts that a fresh process would take.
        """
        put_back: list[tuple[Owner, str, Any]] = []
        for owner in [*self._owners()]:
            for name, value in owner.held().items():
                path = f"{owner.path}.{name}"
                first, now = self._built.get(path), self._before.get(path, TOLD)
                if first is not None and first.kind == "plain" and first.mark != now.mark:
                    owner.bind(name, copy.deepcopy(first.value))
                elif first is not None or not owner.forget(name):
                    continue
                put_back.append((owner, name, value))
        try:
            yield
        finally:
            for owner, name, value in put_back:
                owner.bind(name, value)

    def covers(self, thing: object) -> bool:
        """Return whether an object is looked at, or held by one that is, as of the last look."""
        return self._covered.get(id(thing)) is thing

    def _note_covered(self, owner: Owner, values: Iterable[Any]) -> None:
        self._covered[id(owner.thing)] = owner.thing
        for one in values:
            if isinstance(one, nn.Module):
                self._covered |= {id(part): part for part in one.modules()}
            elif isinstance(one, WITH_STATE):
                self._covered[id(one)] = one

    def state(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is not as it was at the start, for the state of a checkpoint.

        Args:
            tree: What was captured of the registered objects: what the state that an object
                gives itself has under the name of an attribute is not saved twice.
        """
        if not self._noted:
            self.note()
        self.unknown = {}
        found, live = _Stored(), {}
        owners = list(self._owners())
        if not owners:
            return {}
        registered = self.registered() | self._kept_by_sources()
        covered = _names_in_states(tree)
        for owner in owners:
            for name, value in owner.held().items():
                path = f"{owner.path}.{name}"
                if name in covered.get(owner.path, ()):
                    continue
                look, built = look_at(name, value, registered), self._built.get(path)
                if look.kind == "told" or (built is not None and built.mark == look.mark):
                    continue
                if look.kind == "object":
                    live[path] = look.value
                else:
                    self._add(found, owner, path, look, built)
        self._add_objects(found, live)
        self._add_what_workers_lack(found)
        return found.to_tree()

    def _add(self, found: _Stored, owner: Owner, path: str, look: Look, built: Look | None) -> None:
        """Add an attribute that moved, or tell why it cannot be saved."""
        if is_of_data(path) and self._is_of_reading(found, owner, path, look):
            return
        try:
            if look.kind == "plain":
                was = _ABSENT if built is None else built.text()
                begun = self._begun[path].text() if path in self._begun else was
                found.plain[path] = [look.text(), was, *((begun,) if begun != was else ())]
            elif look.kind == "tensors":
                self._add_tensors(found, owner, path, look)
            elif look.kind == "lost" and not is_of_data(path):
                found.lost[path] = look.value
            elif look.kind == "moving" and built is not None and not is_of_data(path):
                found.lost[path] = f"the place of {look.value}; keep a number in its stead"
            else:
                self.unknown[path] = look.value
        except CaptureError as error:
            self.unknown[path] = f"holds {error.found}"
        if owner.path not in self._known:
            self.unknown[owner.path] = _MADE

    def _is_of_reading(self, found: _Stored, owner: Owner, path: str, look: Look) -> bool:
        """Tell of what a data set's own reading changes, which may be ahead of the training."""
        name = path.rpartition(".")[2]
        sets, adds = changed_by_reading(owner.thing)
        if name in adds and look.kind == "plain":
            self.unknown[path] = "a list of what was read, it seems"
            return True
        if name in sets and self._reads_ahead and look.kind in ("plain", "tensors"):
            found.lost[path] = "reading changes it, and batches are read before they are used"
            return True
        return False

    def _add_tensors(self, found: _Stored, owner: Owner, path: str, look: Look) -> None:
        nbytes = _nbytes(look.value)
        most = _BYTES if is_of_data(path) else max(_BYTES, self._registered_bytes())
        if nbytes > most and is_of_data(path):
            self.unknown[path] = f"{nbytes >> 20} MiB of tensors: records that are kept, it seems"
        elif nbytes > most:
            found.lost[path] = f"{nbytes >> 20} MiB of tensors, more than all that is registered"
        else:
            found.tensors[path] = look.value
        if owner.path not in self._known and nbytes > _SCALAR:
            found.lost[owner.path] = _MADE

    def _add_objects(self, found: _Stored, live: Mapping[str, Any]) -> None:
        for path in live:
            if self._built.get(path, TOLD).kind != "object":
                found.lost[path] = _MADE
                continue
            try:
                found.objects[path] = capture_unregistered(self._objects, live, path)
            except CaptureError as error:
                found.lost[path] = error.message

    def _add_what_workers_lack(self, found: _Stored) -> None:
        moved = [path for path in (*found.plain, *found.tensors) if is_of_data(path)]
        if self._of_workers is None or not moved:
            return
        looks, owners = self._looks_at_data(), {one.path: one.thing for one in self._owners()}
        for path in moved:
            was = self._of_workers.get(path)
            if was is None and _is_cached(owners.get(_owner_path(path)), path):
                continue  # each process makes it when it is first asked for
            if path in looks and looks[path].mark != (was or TOLD).mark:
                found.lost[path] = "was changed while worker processes held copies of it"

    def workers_begin(self) -> None:
        """Take note of the attributes of data now: processes that read get a copy of them."""
        self._of_workers = self._looks_at_data()

    def _looks_at_data(self) -> dict[str, Look]:
        owners = (owner for owner in self._owners() if is_of_data(owner.path))
        return self._looks(owners, self.registered())

    def _looks(self, owners: Iterable[Owner], registered: Mapping[int, Any]) -> dict[str, Look]:
        return {
            f"{owner.path}.{name}": look_at(name, value, registered).noted()
            for owner in owners
            for name, value in owner.held().items()
        }

    # What follows is for a resume.

    def differences(
        self, tree: Any, reported: Collection[Difference] = ()
    ) -> tuple[Difference, ...]:
        """Return what of the stored attributes does not come back, and keep the others for it.

        Args:
            tree: What `state` returned.
            reported: What is reported of this start anyway.
        """
        stored = self._stored = _Stored.of(tree)
        owners = {owner.path: owner for owner in self._owners()}
        found = [
            *self._of_plain(stored, owners, reported),
            *self._of_tensors(stored, owners),
            *self._of_objects(stored, owners),
        ]
        return (*found, *(_uncovered(path, str(why)) for path, why in stored.lost.items()))

    def _of_plain(
        self, stored: _Stored, owners: Mapping[str, Owner], reported: Collection[Difference]
    ) -> Iterator[Difference]:
        for path, entry in [*stored.plain.items()]:
            now, was = _pair(entry)
            built = self._built.get(path)
            here = _ABSENT if built is None else built.text()
            if _owner_path(path) not in owners and was != _ABSENT:
                del stored.plain[path]
                yield Difference(path, _shown(now), "not here", _GONE, "equivalent")
            elif here != was and not (here == _ABSENT and _owner_path(path) not in owners):
                del stored.plain[path]
                if here != now and not _is_reported(path, reported):
                    effect = f"the new value counts; training had made {_shown(now)} of the old one"
                    verdict = rule_of(path)[0]
                    yield Difference(path, _shown(was), _shown(here), effect, verdict)

    def _of_tensors(self, stored: _Stored, owners: Mapping[str, Owner]) -> Iterator[Difference]:
        for path in [*stored.tensors]:
            if _owner_path(path) not in owners and _owner_path(path) not in stored.lost:
                del stored.tensors[path]
                yield _uncovered(path, "nothing here has it")

    def _of_objects(self, stored: _Stored, owners: Mapping[str, Owner]) -> Iterator[Difference]:
        live = self._live_objects(owners)
        for path in [*stored.objects]:
            why = "nothing here has it" if path not in live else None
            if why is None:
                found = restore_unregistered(
                    self._objects, live, path, stored.objects[path], check=True
                )
                why = None if found is None else str(found)
            if why is not None:
                del stored.objects[path]
                yield _uncovered(path, why)

    def restore(self, *, data: bool | None = None, again: bool = False) -> None:
        """Put back what training had made, where nothing else has done so meanwhile.

        Args:
            data: True: of data alone; False: of all else; None: of both.
            again: What was put back before, whatever has been done to it since; and what had no
                place then.
        """
        registered = self.registered()
        owners = {owner.path: owner for owner in self._owners()}
        if again:
            self._begun = self._looks(owners.values(), registered)
        for path in (*self._stored.plain, *self._stored.tensors):
            owner, name = owners.get(_owner_path(path)), path.rpartition(".")[2]
            if owner is None or data not in (None, is_of_data(path)):
                continue
            held = owner.held()
            now = look_at(name, held[name], registered) if name in held else TOLD
            fits = self._fits_again(owner, path, now) if again else self._is_untouched(path, now)
            if fits:
                self._put_back.add(path)
                owner.put(name, self._value(owner, path))
        if again:
            self._set_as_built(self._set_anew)
        live = self._live_objects(owners)
        for path, one in self._stored.objects.items():
            if data in (None, is_of_data(path)) and path in live:
                restore_unregistered(self._objects, live, path, one)

    def _is_untouched(self, path: str, now: Look) -> bool:
        return bool(now.mark == self._before.get(path, TOLD).mark)

    def _fits_again(self, owner: Owner, path: str, now: Look) -> bool:
        """Return whether the host's beginning has set an attribute to what it did at the first."""
        if path not in self._put_back and owner.path in self._known:
            return False
        entry = self._stored.plain.get(path)
        if entry is None or now.kind == "told":
            return True
        return now.text() in (entry[0], entry[-1])

    def _value(self, owner: Owner, path: str) -> Any:
        if path in self._stored.tensors:
            return load_tensors(self._stored.tensors[path])
        now, _ = _pair(self._stored.plain[path])
        kinds = kinds_near(owner.thing, owner.held().get(path.rpartition(".")[2]))
        return value_of(now, kinds)

    def take_effect(self, differences: Iterable[Difference]) -> None:
        """Let what the user builds callbacks and objects of the state with now count.

        A state of their own may have brought back what they were built with before.
        """
        found = [_FACT.fullmatch(difference.path) for difference in differences]
        self._set_anew = {f"{one[1]}.{one[2]}" for one in found if one is not None}
        self._set_as_built(self._set_anew)

    def _set_as_built(self, paths: Iterable[str]) -> None:
        owners = {owner.path: owner for owner in self._owners()}
        for path in paths:
            while path not in self._before and "." in path:
                path = _owner_path(path)
            built, owner = self._before.get(path), owners.get(_owner_path(path))
            if built is not None and owner is not None and built.kind == "plain":
                self._stored.plain.pop(path, None)
                value = value_of(built.text(), kinds_near(owner.thing, built.value))
                owner.put(path.rpartition(".")[2], value)

    # What follows looks at live objects.

    def _live_objects(self, owners: Mapping[str, Owner]) -> dict[str, Any]:
        registered = self.registered()
        return {
            f"{path}.{name}": value
            for path, owner in owners.items()
            for name, value in owner.held().items()
            if has_state(value) and look_at(name, value, registered).kind == "object"
        }

    def _owners(self) -> Iterator[Owner]:
        roots = [*named_objects(self._objects), *self.bare.items(), *self._more().items()]
        return owners_in(roots, self._code)

    def registered(self) -> dict[int, Any]:
        """Return by their ids the objects and tensors that are saved anyway; by address, too."""
        found: dict[int, Any] = {}
        for _, one in named_objects(self._objects):
            bare = unwrapped(one) if isinstance(one, nn.Module) else one
            found |= {id(one): one, id(bare): bare}
            tensors: list[Any] = []
            if isinstance(bare, nn.Module):
                found |= {id(part): part for part in bare.modules()}
                tensors = [*bare.parameters(), *bare.buffers()]
            elif isinstance(one, Optimizer):
                tensors = [p for group in one.param_groups for p in group["params"]]
            elif isinstance(one, torch.Tensor):
                tensors = [one]
            found |= {id(t): t for t in tensors}
            found |= {-t.untyped_storage().data_ptr(): t for t in tensors if _has_memory(t)}
        return found

    def _kept_by_sources(self) -> dict[int, Any]:
        """Return the generators of data whose states are saved with the position."""
        kinds = (MapSource, LoaderSource)
        sources = (one for _, one in named_objects(self._objects) if isinstance(one, kinds))
        return {id(own): own for one in sources for own in one.own_generators.all}

    def _registered_bytes(self) -> int:
        tensors = {id(t): t for t in self.registered().values() if isinstance(t, torch.Tensor)}
        return sum(t.nbytes for t in tensors.values())


class _First:
    """What objects were when this process began with them: a second start is none from anew."""

    def __init__(self) -> None:
        self._looks: dict[int, tuple[Callable[[], Any], dict[str, Look]]] = {}

    def of(self, thing: Any, looks: dict[str, Look]) -> dict[str, Look]:
        """Return the looks at an object of the first start with it; these, if it is the first."""
        key = id(thing)
        known = self._looks.get(key)
        if known is not None and known[0]() is thing:
            return {**looks, **known[1]} if type(thing) is dict else known[1]
        try:
            reference = weakref.ref(thing, lambda _: self._looks.pop(key, None))
        except TypeError:
            if type(thing) is not dict:  # a class with slots and no place for it
                return looks
            self._looks[key] = ((lambda: thing), looks)  # a module's globals stay
            return looks
        self._looks[key] = (reference, looks)
        return looks


FIRST = _First()
"""Of this process."""


def is_bare(value: object) -> bool:
    """Return whether an object is of the user's own class, and all its state is in attributes.

    Example:
        >>> is_bare(nn.Linear(1, 1)), is_bare([])
        (False, False)
    """
    if isinstance(value, list | tuple | dict) or not keeps_attributes(value):
        return False
    try:
        kind_of(value, "")
    except CaptureError:
        return True
    return False


def _names_in_states(tree: Mapping[str, Any]) -> dict[str, Collection[Any]]:
    """Return the names in the states that objects give themselves, by the paths of the objects."""
    found: dict[str, Any] = {}
    for path, one in named_objects(tree):
        if not isinstance(one, Captured):
            continue
        if one.kind == "module":
            extra = one.facts.get("extra_state", {}).items()
            found |= {f"{path}.{name}" if name else path: state for name, state in extra}
        else:
            found[path] = one.facts.get("more") if one.kind == "optimizer" else one.state
    states = {path: state for path, state in found.items() if isinstance(state, Mapping)}
    return {path: {*state, *_of_loader(state)} for path, state in states.items()}


def _of_loader(state: Mapping[str, Any]) -> Collection[Any]:
    """Return the names in the state that the loader behind a source of batches gives itself."""
    ranks = state.get("ranks")
    first = ranks[0] if isinstance(ranks, list) and ranks else state
    inner = first.get("loader_state") if isinstance(first, Mapping) else None
    return inner.keys() if isinstance(inner, Mapping) else ()


def _is_cached(thing: object, path: str) -> bool:
    return isinstance(getattr(type(thing), path.rpartition(".")[2], None), cached_property)


def _owner_path(path: str) -> str:
    return path.rpartition(".")[0]


def _is_reported(path: str, reported: Collection[Difference]) -> bool:
    """Return whether a difference of facts says already that a setting is another one."""
    group, name = path.partition(".")[0], path.rpartition(".")[2]
    paths = (difference.path.split(".") for difference in reported)
    return any(group in parts[:2] and name in parts for parts in paths)


def _pair(entry: Any) -> tuple[str, str]:
    if isinstance(entry, list) and {*map(type, entry)} == {str} and len(entry) in (2, 3):
        return entry[0], entry[1]
    raise CorruptCheckpointError(
        ATTRIBUTES_KEY, "is not the state of an attribute", found=brief(entry)
    )


def _shown(text: str) -> str:
    """Return a stored value for a message."""
    if text == _ABSENT:
        return "nothing"
    try:
        return brief(repr(value_of(text)))
    except CheckpointError:
        return brief(text)


def _uncovered(path: str, why: str) -> Difference:
    effect = f"training changed it, and it does not come back: {why}"
    return Difference(path, None, None, effect, "not covered")


def _has_memory(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or tensor.layout is not torch.strided or is_sharded(tensor):
        return False
    return not is_lazy(tensor) and not comes_apart(tensor) and tensor.numel() > 0


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors and arrays in a value."""
    todo, found = [value], []
    while todo:
        one = todo.pop()
        if isinstance(one, torch.Tensor | np.ndarray):
            found.append(one)
        todo += children(one)
    return found


def _nbytes(value: Any) -> int:
    return sum(one.nbytes for one in tensors_in(value))
