"""Schedules that steer a given optimizer and were not given: found, saved and restored with it."""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture import Captured, all_objects, capture, load_tensors, named_objects, restore
from unbroken.changes.differences import Difference
from unbroken.changes.rules import fingerprint_differences
from unbroken.errors import StateMismatchError
from unbroken.fingerprint import is_user_code, qualified_name, scheduler_facts
from unbroken.introspection import variables_of
from unbroken.store import Json
from unbroken.stored_names import stored_class_name

# What stands around a call in the user's own code: the objects that his frames hold, by name.


_MOST_FRAMES = 40
_MOST_ITEMS = 64
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type)
_GROUPS = (list, tuple, dict, set, frozenset)


def things_around() -> Iterator[tuple[str, object]]:
    """Yield what the callers of unbroken hold, each once: "scheduler", or "self.scheduler".

    These are the variables of the user's frames up the stack, of the functions in them that are
    closures, and of their modules; what is in lists and dictionaries; and the attributes of
    objects of the user's own classes. Nothing is called, and no property is asked.
    """
    seen: set[int] = set()
    for scope in scopes_around():
        for name, value in list(scope.names.items()):
            yield from _within(name, value, seen, depth=0)


@dataclass(frozen=True)
class Scope:
    """The variables of one frame of the user's own code, or of its module."""

    name: str
    names: Mapping[str, Any]
    code: CodeType

    @property
    def file(self) -> str:
        """Where the code stands."""
        return self.code.co_filename


def scopes_around() -> Iterator[Scope]:
    """Yield the variables of frames of the user's own code, and then of their modules."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 (has no public name)
    modules: dict[int, Scope] = {}
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        code, module = frame.f_code, frame.f_globals
        if _is_users(code, module):
            if frame.f_locals is not module:
                yield Scope(code.co_qualname, variables_of(frame), code)
            modules.setdefault(id(module), Scope(str(module.get("__name__")), module, code))
        frame = frame.f_back
    yield from modules.values()


_KNOWN: dict[CodeType, bool] = {}


def _is_users(code: CodeType, module: Mapping[str, Any]) -> bool:
    if code not in _KNOWN:
        cells = tuple(CellType() for _ in code.co_freevars)
        named = {"__name__": module.get("__name__")}
        _KNOWN[code] = is_user_code(FunctionType(code, named, closure=cells))
    return _KNOWN[code]


_KNOWN_KINDS: dict[int, tuple[ref[type], bool]] = {}  # by identity: a class may have no hash


def _is_users_kind(kind: type) -> bool:
    """Return whether a class is the user's own: asked for hundreds of things, of few classes."""
    known = _KNOWN_KINDS.get(id(kind))
    if known is None or known[0]() is not kind:
        known = _KNOWN_KINDS[id(kind)] = (ref(kind), is_user_code(kind))
    return known[1]


def _within(name: str, value: object, seen: set[int], *, depth: int) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if kind in _PLAIN or isinstance(value, type) or name.startswith("__") or id(value) in seen:
        return
    seen.add(id(value))
    if kind in _GROUPS:
        for key, item in _items(value):
            yield from _within(f"{name}[{key!r}]", item, seen, depth=depth)
    elif kind is FunctionType:
        for key, item in _closed_over(value):  # type: ignore[arg-type]
            yield from _within(key, item, seen, depth=depth + 1)
    else:
        yield name, value
        if depth < _DEEPEST and _is_users_kind(kind):
            for key, item in attributes(value).items():
                yield from _within(f"{name}.{key}", item, seen, depth=depth + 1)


_DEEPEST = 3


def _items(value: Any) -> Iterable[tuple[object, object]]:
    if len(value) > _MOST_ITEMS:
        return ()
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def _closed_over(function: FunctionType) -> Iterator[tuple[str, object]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it has no value yet
            continue


def attributes(thing: object) -> dict[str, Any]:
    """Return the attributes that an object itself holds; none of its code runs.

    Example:
        >>> class Ema:
        ...     def __init__(self) -> None:
        ...         self.decay = 0.9
        >>> attributes(Ema()), attributes(3)
        ({'decay': 0.9}, {})
    """
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        own = {}
    return dict(own) if isinstance(own, dict) else {}


_MARK = "_wrapped_by_lr_sched"  # torch's own, on the `step` of an optimizer under a schedule


@dataclass
class Found:
    """A schedule that was not given.

    Attributes:
        schedule: It.
        optimizer: The name of the optimizer that it steers.
        built_at: Where it stood when it was found.
        facts: Its settings, as they were then: some classes have their state beside them.
        ahead: How far it had moved at the first step of the run: 1 where a loop steps it first.
        restored: Its state just after a resume.
    """

    schedule: Any
    optimizer: str
    built_at: int | None
    facts: dict[str, Any]
    ahead: int = 0
    restored: Captured | None = None


class FoundSchedules:
    """The schedules on given optimizers that were not given, as if they had been.

    Args:
        objects: The registered objects; what is found is added to them.
    """

    def __init__(self, objects: dict[str, object]) -> None:
        self.found: dict[str, Found] = {}
        self._objects = objects
        self._waiting: dict[str, tuple[Captured, Mapping[str, Any]]] = {}
        self._has_resumed = False
        self.is_checked = False  # before the first step of this start
        self._look_again = 0.0

    def forget(self) -> None:
        """Begin anew, before a resume: nothing was found yet."""
        for name in self.found:
            self._objects.pop(name, None)
        self.found, self._look_again = {}, 0.0

    def looked_just_now(self) -> bool:
        """Return whether looking again would cost more than a hundredth of the time since then."""
        return time.perf_counter() < self._look_again

    def look(self) -> list[str]:
        """Add what is found to the objects; return a line for each."""
        began = time.perf_counter()
        steered = dict(_optimizers(self._objects))
        if not steered:
            return []
        covered = set(_covered(self._objects))
        others = [one for one in all_objects(self._objects) if not isinstance(one, Optimizer)]
        known = {id(attributes(one).get("optimizer")) for one in others}
        schedules = [one for one in _schedules(steered, known) if id(one) not in covered]
        inner = {id(part) for one in schedules for part in _parts(one)}
        lines = [self._add(one, steered) for one in schedules if id(one) not in inner]
        now = time.perf_counter()
        self._look_again = now + 100 * (now - began)
        return lines

    def _add(self, schedule: Any, steered: Mapping[int, tuple[str, Any]]) -> str:
        optimizer, _ = steered[id(schedule.optimizer)]
        is_one = optimizer == "optimizer"
        name = self._free_name("scheduler" if is_one else f"{optimizer}_scheduler")
        self._objects[name] = schedule
        self.found[name] = Found(schedule, optimizer, step_count_of(schedule), _facts(schedule))
        where = "the optimizer" if is_one else f"the optimizer {optimizer!r}"
        kind = type(schedule).__name__
        return f"{name} ({kind}) was found on {where}: it is saved and restored with it"

    def _free_name(self, requested: str) -> str:
        names = (requested if number == 1 else f"{requested}_{number}" for number in range(1, 100))
        return next(name for name in names if name not in self._objects)

    def facts(self) -> dict[str, Any]:
        """Return what the next start needs to know of what was found."""
        return {
            name: {
                "class": qualified_name(type(one.schedule)),
                "optimizer": one.optimizer,
                "ahead": one.ahead,
                "facts": one.facts,
            }
            for name, one in self.found.items()
        }

    def fit(
        self, tree: Mapping[str, Any], stored: Mapping[str, Any], skipped: Collection[str] = ()
    ) -> tuple[dict[str, Any], dict[str, object], tuple[Difference, ...]]:
        """Return the tree and the objects that are to be loaded now, and what differs in them.

        What is stored and is not here yet waits until the first step: it may be built later. What
        is here and was not stored, by an older version say, keeps the state that it has.

        Args:
            tree: The stored state.
            stored: What `facts` returned when it was saved.
            skipped: Names of what is not loaded, and need not be here either.
        """
        self._waiting, self._has_resumed = {}, True
        objects, rest = dict(self._objects), dict(tree)
        reported: list[Difference] = []
        for name, facts in stored.items():
            if name in skipped:
                continue
            if name in rest and name not in objects:
                self._waiting[name] = (_in_memory(rest.pop(name)), facts)
            elif name in rest:
                reported += _changed(facts, objects[name])
            if name in self.found:
                self.found[name].ahead = facts.get("ahead", 0)
        for name in self.found:
            if name not in rest:
                del objects[name]
                reported += [] if name in skipped else [_not_stored(name, self.found[name])]
        return rest, objects, tuple(reported)

    def note_resumed(self) -> None:
        """Take note of where all stand after a resume."""
        self.is_checked = False
        for name, one in self.found.items():
            state = capture({name: one.schedule})[name] if self._has_resumed else None
            one.restored = None if state is None else copy.deepcopy(state)

    def before_step(self, optimizer: Optimizer) -> list[str]:
        """See, at the first step, that what is here stands where the checkpoint has it.

        Returns:
            Lines about what is found now.

        Raises:
            StateMismatchError: It stands elsewhere, or is not here.
        """
        if self.is_checked or id(optimizer) not in dict(_optimizers(self._objects)):
            return []
        self.is_checked = True
        known = set(self.found)
        lines = self.look()
        for name, (stored, facts) in self._waiting.items():
            self._take_place(name, stored, facts)
        for name, one in self.found.items():
            if not self._has_resumed:
                built_at = one.built_at if name in known else 0
                one.ahead = min(1, max(0, (step_count_of(one.schedule) or 0) - (built_at or 0)))
            elif one.restored is not None:
                _require_place(name, one, one.restored)
        self._waiting = {}
        return lines

    def _take_place(self, name: str, stored: Captured, facts: Mapping[str, Any]) -> None:
        """Bring one that was built after the resume to the bits that it had."""
        if name not in self._objects:
            raise StateMismatchError(
                name,
                "the checkpoint has a schedule, and none is on the optimizer at the first step",
                expected=stored.class_name,
                hint=f"build it before resume(); to go on without it: skip=[{name!r}]",
            )
        live: Any = self._objects[name]
        changed = _changed(facts, live)
        here, there = step_count_of(live), count_in_state(stored.state)
        if changed or stored_class_name(type(live)) != stored.class_name or here != there:
            raise StateMismatchError(
                name,
                "was built after resume(), and stands elsewhere than in the checkpoint",
                expected=f"{stored.class_name} at {there}",
                found="; ".join(map(str, changed)) or f"{type(live).__name__} at {here}",
                hint="build it before resume(), which then restores it; or give it: "
                f"Checkpointer(..., {name}={name})",
            )
        self.found[name].ahead = facts.get("ahead", 0)
        restore({name: live}, {name: stored})


def _require_place(name: str, found: Found, restored: Captured) -> None:
    """Raise unless a schedule stands where the resume has put it, or the caller puts it himself."""
    here, there = step_count_of(found.schedule), count_in_state(restored.state)
    if here is None or there is None:
        return
    expected = {there, there + found.ahead}
    if here in expected:
        return
    if here - there + (found.built_at or 0) in expected:  # it was stepped to its place once more
        restore({name: found.schedule}, {name: restored})
        return
    raise StateMismatchError(
        name,
        "was restored by resume(), and stands elsewhere at the first step",
        expected=there,
        found=here,
        hint="leave out what moves it after resume(); or give it: "
        f"Checkpointer(..., {name}={name})",
    )


def _changed(stored: Mapping[str, Any], live: object) -> tuple[Difference, ...]:
    """Return what is another setting of a schedule than it was."""
    sides = ({"scheduler": facts} for facts in (stored.get("facts") or {}, _facts(live)))
    return fingerprint_differences(*sides)


def _not_stored(name: str, found: Found) -> Difference:
    kind = type(found.schedule).__name__
    effect = (
        f"the checkpoint does not hold this {kind}: it goes on from where it stands here "
        f"({found.built_at}); the next checkpoint holds it"
    )
    return Difference(name, None, None, effect, "not covered")


def _in_memory(stored: Captured) -> Captured:
    """Return what was captured without the checkpoint that it was read from."""
    return Captured(
        stored.kind, stored.class_name, load_tensors(stored.state), load_tensors(stored.facts)
    )


def _optimizers(objects: Mapping[str, object]) -> Iterator[tuple[int, tuple[str, Optimizer]]]:
    """Yield the given optimizers, and those that they wrap, by identity."""
    for name, value in named_objects(objects):
        if isinstance(value, Optimizer):
            for one in (value, *attributes(value).values()):
                if isinstance(one, Optimizer):
                    yield id(one), (name, one)


def _covered(objects: Mapping[str, object]) -> Iterator[int]:
    """Yield all that is saved with the registered objects, by identity."""
    for _, value in named_objects(objects):
        yield id(value)
        yield from (id(part) for part in _parts(value))


def _parts(value: object) -> Iterator[object]:
    """Yield the objects that another one holds: schedules of schedules, what a wrapper wraps."""
    for held in attributes(value).values():
        for part in held if type(held) in (list, tuple) else (held,):
            if isinstance(part, LRScheduler) or steers(part):
                yield part
                yield from _parts(part)


def covers(objects: Mapping[str, object], found: Collection[str]) -> dict[str, Json]:
    """Return the objects that a checkpoint holds, each with its class; `found` are schedules."""
    kinds = {path: stored_class_name(type(one)) for path, one in named_objects(objects)}
    return {**kinds, **{name: f"{kinds[name]}, found" for name in found if name in kinds}}


def steers(thing: object) -> bool:
    """Return whether an object of the user's own is a schedule: it has an optimizer and steps.

    One that has modules, too, is the loop itself.
    """
    own = attributes(thing)
    if not isinstance(own.get("optimizer"), Optimizer) or isinstance(thing, Optimizer | nn.Module):
        return False
    kind = type(thing)
    if not is_user_code(kind) or not callable(getattr(kind, "step", None)):
        return False
    return not any(isinstance(value, nn.Module) for value in own.values())


def _schedules(steered: Mapping[int, tuple[str, Optimizer]], known: set[int]) -> list[Any]:
    """Return the schedules around the caller that steer these optimizers.

    Of those that are known, a schedule is registered.

    All of Python's objects are asked only where an optimizer bears the mark of a schedule that is
    nowhere to be seen.
    """
    around: Iterable[Any] = (one for _, one in things_around())
    found = [one for one in around if _is_on(one, steered) and _is_savable(one)]
    seen = known | {id(one.optimizer) for one in found}
    seen |= {id(part) for _, one in steered.values() for part in _faces(one) if id(one) in seen}
    hidden = [one for _, one in steered.values() if _is_marked(one) and id(one) not in seen]
    if hidden:
        everyone = [one for _, one in steered.values()]  # a wrapper may stand in its place
        schedules = [one for one in _referrers(everyone) if isinstance(one, LRScheduler)]
        found += [one for one in schedules if _is_on(one, steered)]
    return list({id(one): one for one in found}.values())


def _faces(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizers that one wraps."""
    return (part for part in attributes(optimizer).values() if isinstance(part, Optimizer))


def _is_on(thing: object, steered: Mapping[int, Any]) -> bool:
    if not isinstance(thing, LRScheduler) and not steers(thing):
        return False
    return id(attributes(thing).get("optimizer")) in steered


def _is_savable(schedule: object) -> bool:
    return hasattr(type(schedule), "state_dict") and hasattr(type(schedule), "load_state_dict")


def _is_marked(optimizer: object) -> bool:
    return hasattr(attributes(optimizer).get("step"), _MARK)


def _referrers(things: Iterable[object]) -> Iterator[object]:
    """Yield the objects that hold others as attributes."""
    found = gc.get_referrers(*things)
    for one in found:
        yield from gc.get_referrers(one) if type(one) is dict else (one,)


def _facts(schedule: Any) -> dict[str, Any]:
    return scheduler_facts(schedule) if isinstance(schedule, LRScheduler) else {}


def step_count_of(schedule: Any) -> int | None:
    """Return how often a schedule was stepped; None where it does not say.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> step_count_of(torch.optim.lr_scheduler.StepLR(optimizer, 5))
        0
    """
    return count_in_state(schedule.state_dict())


def count_in_state(state: Any) -> int | None:
    """Return how often a schedule with this state was stepped; one made of others, as they were."""
    if not isinstance(state, Mapping):
        return None
    if isinstance(state.get("last_epoch"), int):
        return int(state["last_epoch"])
    inner = state.get("_schedulers")
    counts = [count_in_state(one) for one in inner] if isinstance(inner, list | tuple) else []
    known = [count for count in counts if count is not None]
    return max(known, default=None)
