"""Live objects <-> state tree: one table says how each kind of object is captured and restored."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture.codec.leaves import FileOf, file_layout, own_file
from unbroken.capture.kinds import modules, optimizers, random_state
from unbroken.capture.kinds.optimizers import ParameterNames
from unbroken.capture.state_taken_back import NotTakenBack, give_back
from unbroken.capture.state_tree import (
    Captured,
    Mismatch,
    State,
    children,
    raise_all,
    refuse_sharded,
)
from unbroken.capture.stored_tensor import Filling, StoredSubclass, StoredTensor, home, load_tensors
from unbroken.capture.tensors import settle
from unbroken.errors import CaptureError, StateMismatchError, UnbrokenError
from unbroken.stored_names import stored_class_name


@dataclass(frozen=True)
class Kind:
    """How objects of one type are captured, checked and restored."""

    name: str
    type: type
    capture: Callable[[Any, str, ParameterNames], State]
    check: Callable[[Any, Captured, str, ParameterNames], Iterator[Mismatch]]
    restore: Callable[[Any, Captured, ParameterNames, Filling], list[NotTakenBack] | None]
    class_name: Callable[[Any], str] = lambda value: stored_class_name(type(value))


@runtime_checkable
class Stateful(Protocol):
    """Any object that gives its state and takes it back."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take the state back."""


def _capture_stateful(value: Stateful, path: str, _names: object) -> State:
    state = value.state_dict()
    refuse_sharded(state, path)
    return state, {}


def _check_stateful(
    value: Stateful, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Let an object that can look at a state before it takes one raise what it finds wrong."""
    look = getattr(value, "check_state_dict", None)
    without_device = list(_without_device(stored.state, path))
    if callable(look) and not without_device:
        with _named(value, stored):
            look(load_tensors(stored.state))
    return iter(())


def _without_device(tree: Any, path: str) -> Iterator[Mismatch]:
    """Yield tensors that will be put on a device of a kind that is not here."""
    for tensor in _stored_in(tree):
        try:
            home(tensor)
        except StateMismatchError as error:
            yield Mismatch(path, error.what, error.expected, error.found)
            return


def _stored_in(tree: Any) -> Iterator[StoredTensor | StoredSubclass]:
    todo, seen = [tree], set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, StoredTensor | StoredSubclass):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            todo.extend(children(value))


def _restore_stateful(value: Stateful, stored: Captured, *_: object) -> list[NotTakenBack]:
    given = load_tensors(stored.state)
    if hasattr(type(value), "__iter__"):  # of data the batches tell, and a loader may do it later
        value.load_state_dict(given)
        return []
    return give_back(value, given, value.load_state_dict, value.state_dict)


def _capture_tensor(value: torch.Tensor, _path: str, _names: object) -> State:
    return value, {}


def _check_tensor(
    value: torch.Tensor, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    yield from modules.check_tensor_fits(value, stored.state, path)


def _restore_tensor(value: torch.Tensor, stored: Captured, _names: object, later: Filling) -> None:
    stored.state.copy_into(value, later)
    if value.is_leaf:
        value.requires_grad_(stored.state.requires_grad)


KINDS = (
    Kind(
        "module",
        nn.Module,
        modules.capture_module,
        modules.check_module,
        modules.restore_module,
        modules.class_name,
    ),
    Kind(
        "optimizer",
        Optimizer,
        optimizers.capture_optimizer,
        optimizers.check_optimizer,
        optimizers.restore_optimizer,
    ),
    Kind(
        "scheduler",
        LRScheduler,
        optimizers.capture_scheduler,
        optimizers.check_scheduler,
        optimizers.restore_scheduler,
    ),
    Kind(
        "grad_scaler",
        GradScaler,
        optimizers.capture_scaler,
        optimizers.check_scaler,
        optimizers.restore_scaler,
    ),
    Kind("tensor", torch.Tensor, _capture_tensor, _check_tensor, _restore_tensor),
    Kind(
        "torch_generator",
        torch.Generator,
        random_state.capture_torch,
        random_state.check_torch,
        random_state.restore_torch,
    ),
    Kind(
        "numpy_generator",
        np.random.Generator,
        random_state.capture_numpy,
        random_state.check_numpy,
        random_state.restore_numpy,
        random_state.bit_generator_name,
    ),
    Kind(
        "numpy_random_state",
        np.random.RandomState,
        random_state.capture_legacy,
        random_state.check_legacy,
        random_state.restore_legacy,
        random_state.legacy_name,
    ),
    Kind(
        "python_random",
        random.Random,
        random_state.capture_python,
        random_state.check_python,
        random_state.restore_python,
    ),
    Kind("stateful", Stateful, _capture_stateful, _check_stateful, _restore_stateful),
)
"""The kinds of objects, the first that fits counts."""


_FILLED_LATER = (nn.Module, Optimizer, torch.Tensor)


def capture(objects: Mapping[str, object], *, call_state_dict: bool = True) -> dict[str, Any]:
    """Return the whole state of live objects as a tree for `encode`.

    Covered by kind: modules (parameters, all buffers, ties, modes, `requires_grad`, extra state),
    optimizers (by parameter name), schedulers, loss scalers, tensors, random generators, whatever
    has `state_dict` and `load_state_dict`, and lists, tuples and dicts of these.

    Args:
        objects: The objects by name. The parameters of the one called "model" go by bare names.
        call_state_dict: Whether `state_dict` of objects of none of the kinds above is called;
            else each of them is None in the result.

    Returns:
        By name, what was captured. Tensors are the live ones, not copies.

    Raises:
        CaptureError: An object, or a value in its state, cannot be stored; names it.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> tree = capture({"model": model, "optimizer": torch.optim.AdamW(model.parameters())})
        >>> tree["model"].state["weight"] is model.weight
        True
        >>> tree["optimizer"].state["param_groups"][0]["params"]
        ['weight', 'bias']
    """
    settle(objects)
    names = ParameterNames(objects)
    return {
        name: _capture(value, name, names, call_state_dict=call_state_dict)
        for name, value in objects.items()
    }


def check(
    objects: Mapping[str, object], tree: Mapping[str, Any], *, of: Collection[str] | None = None
) -> None:
    """Raise unless `restore` could bring the whole state back; nothing is changed.

    Args:
        objects: The live objects by name.
        tree: What `capture` returned, decoded with `lazy=True`.
        of: Names of the objects that are looked at; None: all.

    Raises:
        StateMismatchError: Something is missing, unexpected, or of another class, shape, dtype,
            memory format or tie; the error lists the first mismatches and counts all.
    """
    settle(objects)
    names = ParameterNames(objects)
    hint = (
        "build the objects as they were when the checkpoint was saved, "
        'or name what is not to be loaded: skip=["name of an object", "pattern.of.parameters.*"]; '
        "a module that grows in training can have a method prepare_to_load(self, stored)"
    )
    if of is not None:
        objects = {name: value for name, value in objects.items() if name in of}
        tree = {name: value for name, value in tree.items() if name in of}
    raise_all(_check_all(objects, tree, "", names), hint)


def restore(objects: Mapping[str, object], tree: Mapping[str, Any]) -> None:
    """Bring live objects into exactly the state that was captured.

    Parameters and buffers are filled in place, so ties, identities and references to them stay.
    One tensor at a time is held twice at most.

    Args:
        objects: The live objects by name.
        tree: What `capture` returned, decoded with `lazy=True`.

    Raises:
        StateMismatchError: The tree does not fit the objects; nothing was changed.
        CorruptCheckpointError: The bytes of a tensor are damaged; some objects were changed.
    """
    check(objects, tree)
    fill(objects, tree)


def fill(objects: Mapping[str, object], tree: Mapping[str, Any]) -> list[NotTakenBack]:
    """Do what `restore` does, of a tree that was checked.

    Returns:
        What objects of the user's own did not take back, though their `load_state_dict` was given
        it.
    """
    names = ParameterNames(objects)
    called = {id(value): name for name, value in named_objects(objects)}
    lost: list[NotTakenBack] = []
    found = list(_pairs(objects, tree))
    found.sort(key=lambda pair: isinstance(pair[0], Optimizer))  # their learning rates come last
    later = Filling()
    for value, stored in found:
        kind = kind_of(value, "")
        if kind.type not in _FILLED_LATER:
            later.finish()  # what it does with its state may depend on the tensors before it
        with _named(value, stored):
            forgotten = kind.restore(value, stored, names, later) or ()
        lost += [replace(one, path=f"{called[id(value)]}{one.path}") for one in forgotten]
    later.finish()
    return lost


def capture_unregistered(
    objects: Mapping[str, object], unregistered: Mapping[str, object], path: str
) -> Any:
    """Return the state of an object, or a group of them, in the training but not registered.

    Args:
        objects: The registered objects by name.
        unregistered: Other objects by their paths; an optimizer may train what these hold, too.
        path: That of the one to capture.

    Raises:
        CaptureError: It, or a value in its state, cannot be stored.

    Example:
        >>> capture_unregistered({}, {"trainer.teacher": nn.Linear(1, 1)}, "trainer.teacher").kind
        'module'
    """
    return _capture(unregistered[path], path, _names_with(objects, unregistered))


def restore_unregistered(
    objects: Mapping[str, object],
    unregistered: Mapping[str, object],
    path: str,
    stored: Any,
    *,
    check: bool = False,
) -> Mismatch | None:
    """Bring such an object back; or, with `check`, only look whether the state would fit.

    Args:
        objects: As `capture_unregistered` takes them.
        unregistered: As `capture_unregistered` takes them.
        path: That of the object.
        stored: What was captured of it, decoded with `lazy=True`.
        check: Change nothing.

    Returns:
        Why it does not fit, if it does not; then nothing is changed.
    """
    names = _names_with(objects, unregistered)
    problem = next(_check(unregistered[path], stored, path, names), None)
    if problem is None and not check:
        later = Filling()
        for one, saved in _pairs({path: unregistered[path]}, {path: stored}):
            kind_of(one, path).restore(one, saved, names, later)
        later.finish()
    return problem


def _names_with(
    objects: Mapping[str, object], unregistered: Mapping[str, object]
) -> ParameterNames:
    modules = {path: one for path, one in unregistered.items() if isinstance(one, nn.Module)}
    return ParameterNames({**objects, "attributes": modules})


@contextmanager
def _named(value: object, stored: Captured) -> Iterator[None]:
    """Say which object did not take its state back; the code that runs here is often a user's."""
    try:
        yield
    except (UnbrokenError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"the {stored.kind.replace('_', ' ')} does not take back the state that is stored"
        found = f"{type(error).__name__}: {error}"
        raise StateMismatchError(type(value).__name__, what, found=found) from error


def files_for(objects: Mapping[str, object]) -> FileOf:
    """Return the rule for `encode` that gives each module and optimizer a file of its own.

    Args:
        objects: The objects by name.

    Example:
        >>> files_for({"ema": nn.Linear(2, 1)})("ema.weight")
        ('ema.safetensors', 'weight')
    """
    files = {
        name: file
        for name, value in objects.items()
        if isinstance(value, (nn.Module, Optimizer)) and (file := own_file(name)) is not None
    }
    return file_layout(files)


def kind_of(value: object, path: str) -> Kind:
    """Return the entry of the table for an object, or raise."""
    for kind in KINDS:
        if isinstance(value, kind.type) and not (kind.type is Stateful and _makes_it_up(value)):
            return kind
    raise CaptureError(
        path,
        "is an object of a kind that has no state to capture",
        found=f"a {type(value).__module__}.{type(value).__qualname__}",
        hint="give it state_dict() and load_state_dict(), or leave it out",
    )


def _makes_it_up(value: object) -> bool:
    """Return whether an object has no state, but a `__getattr__` that answers any name."""
    held = hasattr(type(value), "state_dict") or "state_dict" in getattr(value, "__dict__", {})
    return not held and hasattr(value, "_unbroken_asks_for_a_name_that_nobody_has")


def _capture(
    value: object, path: str, names: ParameterNames, *, call_state_dict: bool = True
) -> Any:
    if type(value) in (list, tuple, dict):
        pairs = [
            (k, _capture(v, f"{path}.{k}", names, call_state_dict=call_state_dict))
            for k, v in _items(value)
        ]
        return dict(pairs) if type(value) is dict else type(value)(v for _, v in pairs)  # type: ignore[call-arg]
    kind = kind_of(value, path)
    if kind.type is Stateful and not call_state_dict:
        return None
    state, facts = kind.capture(value, path, names)
    return Captured(kind.name, kind.class_name(value), state, facts)


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items() if isinstance(value, Mapping) else enumerate(value))


def all_objects(objects: Any) -> Iterator[object]:
    """Yield registered objects one by one, those in lists and dicts too."""
    return (value for _, value in named_objects(objects))


def named_objects(objects: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield registered objects with their paths: "critic", or "optimizers.0" in a list."""
    items = objects.items() if isinstance(objects, Mapping) else enumerate(objects)
    for name, value in items:
        if isinstance(value, list | tuple | dict):
            yield from named_objects(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_group(value: object) -> bool:
    return type(value) in (list, tuple, dict)


def _check_all(live: Any, stored: Any, path: str, names: ParameterNames) -> Iterator[Mismatch]:
    """Check a group of objects: the same members, each of which fits."""
    here, there = dict(_items(live)), dict(_items(stored))
    for key, value in here.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in there:
            yield Mismatch(where, "the checkpoint has no such object", found=type(value).__name__)
        else:
            yield from _check(value, there[key], where, names)
    for key in there.keys() - here.keys():
        where = f"{path}.{key}" if path else str(key)
        yield Mismatch(where, "no such object is here", expected=_class_name(there[key]))


def _check(live: Any, stored: Any, path: str, names: ParameterNames) -> Iterator[Mismatch]:
    if _is_group(live) and type(live) is type(stored):
        yield from _check_all(live, stored, path, names)
        return
    if _is_group(live) or not isinstance(stored, Captured):
        yield Mismatch(path, "is another kind of object", _class_name(stored), type(live).__name__)
        return
    kind = kind_of(live, path)
    now = kind.class_name(live)
    if (kind.name, now) != (stored.kind, stored.class_name):
        yield Mismatch(path, "is of another class", stored.class_name, now)
        return
    yield from kind.check(live, stored, path, names)
    yield from _without_device(_stored_elsewhere(stored), path)


def _stored_elsewhere(stored: Captured) -> Any:
    """Return what of a state does not go where its object or its parameter is."""
    facts = stored.facts
    if stored.kind == "module":
        return facts.get("extra_state")
    if stored.kind == "tensor":
        return None
    if stored.kind != "optimizer":
        return stored
    devices = facts.get("devices", {})
    apart = [
        [tensor for tensor in _stored_in(own) if tensor.device != devices.get(name, "cpu")]
        for name, own in stored.state["state"].items()
    ]
    return [apart, facts.get("shared"), facts.get("more")]


def _class_name(stored: object) -> str:
    return stored.class_name if isinstance(stored, Captured) else type(stored).__name__


def _pairs(live: Any, stored: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in _items(live):
        if _is_group(value):
            yield from _pairs(value, stored[key])
        else:
            yield value, stored[key]
