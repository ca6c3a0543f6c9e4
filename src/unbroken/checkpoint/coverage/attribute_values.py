"""One look at an attribute of a user's object: what it holds, and whether that is what it was."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import operator
import os
import random
import re
import sys
import time
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from enum import Enum
from io import IOBase
from pathlib import PurePath
from threading import Thread
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter as BaseDataLoaderIter

from unbroken.capture import decode, encode, is_sharded, named_buffers, named_parameters, types_in
from unbroken.capture.state_tree import TreeMap, children
from unbroken.errors import CaptureError, CheckpointError
from unbroken.fingerprint import keeps_attributes
from unbroken.fingerprint.values import array_digest, is_volatile_number
from unbroken.introspection import variables_of

_MOST_VALUES = 65536
_MOST_TENSORS = 4096
_SMALL = 1 << 20
_SAMPLE = 1024
_BEFORE = 60.0  # seconds that this process may have run when this was imported
_BEGAN = time.time() - _BEFORE
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_PURE = frozenset((list, tuple, dict))
_CONTAINERS = frozenset((*_PURE, set, frozenset, OrderedDict, Counter, deque, bytearray))

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
WITH_STATE = (Optimizer, LRScheduler, GradScaler, *GENERATORS)
"""What has state, and comes back in its own way; modules besides."""

_TOLD = (
    *(type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType),
    *(PurePath, IOBase, Thread, logging.Logger, logging.Handler, date, timedelta, time_of_day),
    *(torch.device, torch.dtype, np.dtype, np.memmap, DataLoader, Dataset, Sampler),
    *(weakref.ReferenceType, torch.utils.hooks.RemovableHandle, types.SimpleNamespace),
)
"""What is no state of a training, or is told elsewhere: code, files, threads, clocks, data."""

_BARS = ("tqdm", "rich", "progressbar", "alive_progress", "wandb", "tensorboard", "tensorboardX")
"""Whose objects only show what a run does."""

_NEVER = re.compile(
    r"_*((\w+_)?(pid|ppid|port|fd|fileno|timestamp|device|devices|hostname)"
    r"|(local_|global_|node_|process_)?rank|world_size|(local_)?process_index|num_processes)_*"
)
_OF_A_CLOCK = re.compile(
    r"(\w*_)?(time|clock|t0|tic|stamp)|_*(start|started|began|begin|now|since)"
)
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")

Kind = Literal["told", "plain", "tensors", "object", "moving", "unknown", "lost"]


class Look(NamedTuple):
    """What an attribute holds.

    Attributes:
        kind: "told": nothing to save; "plain"; "tensors": one, or a container with some;
            "object": one that has state; "moving": an iterator, whose place cannot be saved;
            "unknown": nobody can say whether it is state; "lost": it may be, and cannot be saved.
        mark: Equal for two looks at the same; means something in this process alone.
        value: What is to be saved; of the last three, why it is not.
    """

    kind: Kind
    mark: Any = None
    value: Any = None

    def noted(self) -> Look:
        """Return it without what may change."""
        if self.kind == "plain":
            return self._replace(value=_copied(self.value))
        return self if self.kind in ("moving", "unknown", "lost") else self._replace(value=None)

    def text(self) -> str:
        """Return a plain value as typed JSON; of any other look, that it is none.

        Raises:
            CaptureError: It cannot be stored.
        """
        if self.kind != "plain":
            return f"({self.kind})"
        return json.dumps(encode(self.value).structure)


TOLD = Look("told")


def look_at(name: str, value: Any, registered: Mapping[int, Any]) -> Look:
    """Look at an attribute.

    Args:
        name: Its name: those of ports, ranks and devices are never state.
        value: What it holds.
        registered: Ids of what is saved anyway, tensors too.
    """
    if type(value) in _ATOMS:
        return (
            TOLD
            if _is_volatile(name, value)
            else Look("plain", (type(value), _exact(value)), value)
        )
    if id(value) in registered or _NEVER.fullmatch(name):
        return TOLD
    if isinstance(value, nn.Module):
        return _of_module(value, registered)
    if isinstance(value, WITH_STATE):
        inner = getattr(value, "optimizer", None)  # of accelerate, around one that is registered
        return (
            TOLD
            if id(inner) in registered and not isinstance(value, LRScheduler)
            else Look("object", object(), value)
        )
    is_owner = keeps_attributes(value) and not isinstance(value, Enum | tuple)
    is_bar = type(value).__module__.partition(".")[0] in _BARS
    if is_owner or is_bar or isinstance(value, _TOLD):
        return TOLD
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if isinstance(value, torch.Tensor):
        return _of_tensors(value, [value], registered)
    if isinstance(value, Iterator):
        what = f"a {type(value).__module__}.{type(value).__qualname__}"
        return Look("moving", (id(value), _place_of(value)), what)
    return _of_container(value, registered)


def _exact(value: Any) -> Any:
    """Return what is equal for equal bits: 0.0 is not -0.0, and NaN is NaN."""
    return repr(value) if isinstance(value, float | complex) else value


def _is_volatile(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    if _NEVER.fullmatch(name):
        return True
    if isinstance(value, str):
        return os.path.isabs(value) or _DEVICE.fullmatch(value) is not None
    if not isinstance(value, int | float):
        return False
    if _OF_A_CLOCK.fullmatch(name) is None:  # a count may pass by any number
        return isinstance(value, float) and value % 1 != 0 and _BEGAN <= value <= time.time()
    if is_volatile_number(value):
        return True
    run = time.time() - _BEGAN  # a number that a clock showed before is of another process
    clocks = time.perf_counter(), time.monotonic()
    return isinstance(value, float) and any(0 <= clock - value < run for clock in clocks)


def _of_module(module: nn.Module, registered: Mapping[int, Any]) -> Look:
    tensors: dict[str, torch.Tensor] = dict(named_parameters(module))
    tensors |= dict(named_buffers(module, persistent=True))
    tensors |= dict(named_buffers(module, persistent=False))
    own = {n: t for n, t in tensors.items() if id(t) not in registered}
    if not own:
        return TOLD
    if any(t.is_meta or is_sharded(t) for t in own.values()):
        return Look("lost", tuple(own), f"a {type(module).__name__} in parts on ranks, or on meta")
    mark = [_mark_of(tensor) for tensor in own.values()]
    modes = [one.training for one in module.modules()]
    return Look("object", (tuple(own), mark, modes), module)


def _of_array(array: np.ndarray[Any, Any]) -> Look:
    if array.dtype.hasobject:
        return Look("unknown", id(array), "an array of objects")
    if array.nbytes > _SMALL and not array.flags.writeable:
        return Look("tensors", (id(array), array.shape), array)
    return Look("tensors", _mark_of(array), array)


def _of_container(value: Any, registered: Mapping[int, Any]) -> Look:
    if type(value) in (list, tuple, dict) and (found := _of_objects(value, registered)):
        return found
    if type(value) is defaultdict:
        return _of_container(dict(value), registered)
    if isinstance(value, Enum | np.generic) or (
        isinstance(value, tuple) and type(value) is not tuple
    ):
        return _of_mixed(value, registered)
    if type(value) not in _CONTAINERS:
        return Look("unknown", id(value), f"a {type(value).__module__}.{type(value).__qualname__}")
    is_plain = _is_plain(value)
    if is_plain is None:
        return Look("unknown", (id(value), len(value)), f"more than {_MOST_VALUES} values")
    return (
        Look("plain", (type(value), repr(value)), value)
        if is_plain
        else _of_mixed(value, registered)
    )


def _place_of(iterator: Any) -> Any:
    """Return what changes when an iterator is read on, as far as it tells; it is not read."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        return frame and (
            frame.f_lasti,
            repr({n: v for n, v in variables_of(frame).items() if type(v) in _ATOMS}),
        )
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    if isinstance(iterator, itertools.cycle):
        parts: Any = iterator.__reduce__()
        return (len(parts[2][0]), operator.length_hint(parts[1][0], -1))
    if isinstance(iterator, BaseDataLoaderIter):
        return iterator._num_yielded  # noqa: SLF001 (nothing else tells)
    return operator.length_hint(iterator, -1) if type(iterator).__module__ == "builtins" else None


def has_state(value: object) -> bool:
    """Return whether a value may be an object with state, or a container of such."""
    if type(value) in (list, tuple, dict) and value:
        value = next(iter(value.values() if type(value) is dict else value))  # type: ignore[call-overload]
    return isinstance(value, (nn.Module, *WITH_STATE))


def _of_objects(value: Any, registered: Mapping[int, Any]) -> Look | None:
    """Look at a container of objects that have state; None: that is not what it is."""
    parts = [*(value.values() if type(value) is dict else value)]
    if not parts or not all(isinstance(one, (nn.Module, *WITH_STATE)) for one in parts):
        return None
    looks = [look_at("", one, registered) for one in parts]
    if all(look.kind == "told" for look in looks):
        return TOLD
    if any(look.kind != "object" for look in looks):
        return Look("unknown", id(value), "some of its objects are saved elsewhere")
    return Look("object", [look.mark for look in looks], value)


def _copied(value: Any) -> Any:
    """Return a plain value that stays as it is; of what is no container, the value itself."""
    if type(value) in (list, tuple):
        return type(value)(value if {*map(type, value)} <= _ATOMS else map(_copied, value))
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    return copy.deepcopy(value) if type(value) in _CONTAINERS else value


def _is_plain(value: Any) -> bool | None:
    """Return whether there are lists, tuples, dicts and plain values alone; None: too many."""
    todo, count = [value], 0
    while todo:
        one = todo.pop()
        count += len(one)
        if count > _MOST_VALUES:
            return None
        if type(one) not in _PURE:
            return False
        parts = [*one, *one.values()] if type(one) is dict else one
        if {*map(type, parts)} <= _ATOMS:
            continue
        inner = [part for part in parts if type(part) not in _ATOMS]
        if not {*map(type, inner)} <= _PURE:
            return False
        todo += inner
    return True


def _of_mixed(value: Any, registered: Mapping[int, Any]) -> Look:
    found = _parts(value)
    if found is None:
        why = f"more than {_MOST_TENSORS} values"
        has_some = any(isinstance(one, torch.Tensor) for one in children(value))
        return Look("lost" if has_some else "unknown", (id(value), len(value)), why)
    tensors = [one for one in found if isinstance(one, torch.Tensor)]
    if tensors:
        return _of_tensors(value, tensors, registered)
    try:
        encoded = encode(value)
    except CaptureError as error:
        return Look("unknown", id(value), f"holds {error.found or 'what cannot be stored'}")
    if encoded.leaves and types_in(value):
        return Look("lost", id(value), "an enum or a named tuple among arrays")
    if encoded.leaves:
        arrays = [_mark_of(one) for one in found if isinstance(one, np.ndarray)]
        return Look("tensors", (json.dumps(encoded.structure), arrays), value)
    return Look("plain", json.dumps(encoded.structure), value)


def _parts(value: Any) -> list[Any] | None:
    todo, found = [value], []
    while todo:
        one = todo.pop()
        found.append(one)
        if len(found) > _MOST_TENSORS:
            return None
        todo += children(one)
    return found


def _of_tensors(value: Any, tensors: list[torch.Tensor], registered: Mapping[int, Any]) -> Look:
    ours = [id(one) in registered or _memory(one) in registered for one in tensors]
    if all(ours):
        return TOLD
    if any(ours):
        return Look("unknown", id(value), "shares memory with what is saved under other names")
    if any(one.is_meta or is_sharded(one) for one in tensors):
        return Look("lost", id(value), "a tensor in parts on ranks, or on meta")
    if types_in(value):
        return Look("lost", id(value), "an enum or a named tuple among tensors")
    graphs = [one for one in tensors if one.grad_fn is not None]
    if any(one.nbytes > _SMALL for one in graphs):
        return Look("unknown", id(value), "a result of the last pass, with its graph")
    if graphs:
        value = TreeMap(lambda v: v.detach() if isinstance(v, torch.Tensor) else v)(value)
    try:
        marks = [_mark_of(one.detach()) for one in tensors]
        structure = [] if value is tensors[0] else json.dumps(encode(value).structure)
    except (CaptureError, RuntimeError) as error:  # RuntimeError: a layout without elements
        found = error.found if isinstance(error, CaptureError) else None
        return Look("unknown", id(value), f"holds {found or 'what cannot be stored'}")
    return Look("tensors", (structure, marks), value)


def _memory(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; never the id of an object, which is positive."""
    if tensor.layout is not torch.strided or tensor.is_meta or is_sharded(tensor):
        return 0
    return -tensor.untyped_storage().data_ptr()


def _mark_of(one: torch.Tensor | np.ndarray[Any, Any]) -> Any:
    """Return what changes when one of the elements does.

    Of a long tensor, a sample of the elements counts, and the count of changes that PyTorch
    keeps; of a long array, a sample alone.
    """
    if isinstance(one, np.ndarray):
        whole = one.nbytes <= 16 * _SMALL and one.flags.c_contiguous
        elements = xxhash.xxh3_64_intdigest(one.view(np.uint8).data) if whole and one.ndim else 0
        return (str(one.dtype), one.shape, elements or array_digest(one))
    if one.nbytes <= _SMALL or one.is_inference():
        return (array_digest(one), one.requires_grad)
    flat = one.detach().view(-1) if one.is_contiguous() else one.detach()[..., 0].reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLE)]
    return (tuple(one.shape), array_digest(some), one._version, one.data_ptr())  # noqa: SLF001


def value_of(text: str, kinds: Iterable[type] = ()) -> Any:
    """Return the value of such a text.

    Raises:
        CheckpointError: The text is none, or is of a class that is not among the kinds.
    """
    try:
        structure = json.loads(text)
    except ValueError as error:
        raise CheckpointError("attributes", "is no JSON", found=text[:60]) from error
    return decode(structure, _Nothing(), types=kinds)


class _Nothing:
    """Where no leaves are."""

    @property
    def manifest(self) -> _Nothing:
        """Lists no leaves."""
        return self

    @property
    def tensors(self) -> dict[str, Any]:
        """No leaves."""
        return {}

    def read_leaf_into(self, path: str, _buffer: memoryview, /) -> None:
        """Raise: there are none."""
        raise CheckpointError(path, "has no bytes")

    def read_box_into(
        self, path: str, _offsets: tuple[int, ...], _shape: tuple[int, ...], _buffer: memoryview, /
    ) -> None:
        """Raise: there are none."""
        raise CheckpointError(path, "has no bytes")


def kinds_near(owner: object, *values: Any) -> frozenset[type]:
    """Return the enums and named tuples that a value of an object may be of."""
    module = sys.modules.get(type(owner).__module__)
    named = [] if module is None else [v for v in vars(module).values() if isinstance(v, type)]
    near = {kind for kind in named if issubclass(kind, Enum | tuple) and kind is not tuple}
    return frozenset(near).union(*map(types_in, values))
