"""Any value as facts: what of functions, objects and containers a training may depend on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from unbroken.data import Permutation, derive_key
from unbroken.fingerprint.environment import VARIABLES
from unbroken.fingerprint.source_code import (
    called_by,
    functions_of,
    globals_of,
    is_of_unbroken,
    is_user_code,
    names_in,
    qualified_name,
    reached,
    source_digest,
    texts_in,
    variables_in,
)
from unbroken.introspection import Failed, attributes_of, safe_call, safe_getattr, try_call
from unbroken.stored_names import stored_class_name

# Digests of records: what a data set gives, as a number that can be compared.


_DEPTH = 8
_WHOLE = 1 << 20  # bytes of an array that are all read
_SAMPLE = 4096
_KEY = derive_key(0, "fingerprint")


def record_digest(record: object) -> str:
    """Return a digest of a record: equal for equal bytes, types and shapes.

    Tensors and arrays count by their bytes; texts, bytes and numbers by their value; mappings,
    sequences, sets and objects with attributes or slots by their parts. Of anything else its
    class counts.

    Returns:
        16 hexadecimal digits (xxh3-64).

    Example:
        >>> record_digest({"x": [1, 2]}) == record_digest({"x": [1, 2]})
        True
        >>> record_digest(1) == record_digest(1.0)
        False
    """
    digest = xxhash.xxh3_64()
    _update(digest, record, frozenset())
    return digest.hexdigest()


def array_digest(array: torch.Tensor | np.ndarray) -> str:
    """Return dtype, shape and digest of an array; of one above 1 MiB a sample counts.

    Example:
        >>> array_digest(torch.zeros(2)).partition(":")[0]
        'torch.float32[2]'
    """
    size = array.nbytes if isinstance(array, np.ndarray) else array.numel() * array.element_size()
    name = f"{array.dtype}{[*array.shape]}"
    if size > _WHOLE and getattr(array, "layout", torch.strided) is torch.strided:
        flat: Any = array.reshape(-1)
        at = [*_sampled_indices(len(flat))]
        array = flat[torch.tensor(at)] if isinstance(array, torch.Tensor) else flat[at]
    return f"{name}: {record_digest(array)}"


def some_of(parts: Iterable[Any], length: int) -> list[Any]:
    """Return all of a few parts, of many those at places of a fixed key."""
    if length <= _SAMPLE:
        return list(parts)
    if isinstance(parts, list | tuple):
        return [parts[index] for index in _sampled_indices(length)]
    return list(itertools.islice(parts, _SAMPLE))


def _sampled_indices(length: int) -> list[int]:
    indices = Permutation(length, _KEY)(np.arange(min(length, _SAMPLE), dtype=np.uint64))
    return [int(index) for index in indices]


def _update(digest: Any, value: object, path: frozenset[int]) -> None:
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, torch.Tensor):
        _update_tensor(digest, value)
    elif isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes() if value.dtype != object else b"")
    elif isinstance(value, bytes | bytearray | memoryview):
        digest.update(value)
    elif value is None or isinstance(value, str | bool | int | float | complex):
        digest.update(repr(value).encode())
    elif len(path) < _DEPTH and id(value) not in path:  # an object may hold itself
        _update_parts(digest, value, path | {id(value)})


def _update_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}".encode())
    if tensor.is_meta:
        return
    for part in _strided(tensor.detach()):
        flat = part.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def _strided(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the arrays that a tensor consists of."""
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout is torch.strided:
        return [tensor.resolve_conj().resolve_neg()]
    if tensor.layout is not torch.sparse_coo:
        tensor = tensor.to_sparse_coo()  # type: ignore[no-untyped-call]
    whole = tensor.coalesce()
    return [whole.indices(), whole.values()]


def _update_parts(digest: Any, value: Any, path: frozenset[int]) -> None:
    if isinstance(value, Mapping):
        parts: list[object] = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, set | frozenset):
        parts = [*sorted(record_digest(part) for part in value)]
    elif isinstance(whole := safe_call(value, "tobytes"), bytes):  # a PIL image
        parts = [whole]
    else:
        named = attributes_of(value)
        parts = [part for name in sorted(named) for part in (name, named[name])]
    digest.update(f"{len(parts)};".encode())
    for part in parts:
        _update(digest, part, path)


# What a tokenizer makes of a text, as a digest.


_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")


def is_tokenizer(thing: object) -> bool:
    """Return whether an object is a tokenizer of Hugging Face, or one with a vocabulary."""
    return callable(safe_getattr(thing, "get_vocab")) and callable(safe_getattr(thing, "encode"))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, rules, special tokens and sides of a tokenizer.

    How it truncated and padded last does not count: each call sets that anew.
    """
    settings = [(name, str(safe_getattr(tokenizer, name))) for name in _SETTINGS]
    text = f"{settings}{_rules(tokenizer)}"
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _rules(tokenizer: Any) -> str:
    backend = safe_getattr(tokenizer, "backend_tokenizer") or tokenizer
    text = safe_call(backend, "to_str")
    if isinstance(text, str):
        head, found, tail = text.partition('"added_tokens":')  # truncation and padding are first
        return tail if found else head
    vocabulary = safe_call(tokenizer, "get_vocab")
    return repr(sorted(vocabulary.items())) if isinstance(vocabulary, dict) else ""


# Plain values: what of an object can stand in a manifest and be compared with `==`.


Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""A JSON value."""

NOT_COMPARED = "not compared: "
"""What the value of a fact begins with that could not be taken; why not follows."""

_MAX_PLAIN_ITEMS = 64
_MAX_PLAIN_DEPTH = 8


def plain_items(items: Mapping[str, object]) -> dict[str, Plain]:
    """Return the items whose values are plain, as JSON has them.

    Numbers that JSON does not know (inf, nan) become their names; tuples lists; dtypes,
    devices and enums their names; NumPy's and torch's single numbers numbers.

    Example:
        >>> plain_items({"betas": (0.9, 0.999), "limit": float("inf"), "model": object()})
        {'betas': [0.9, 0.999], 'limit': 'inf'}
    """
    found = {name: _plain(value) for name, value in items.items()}
    return {name: value for name, value in found.items() if value is not ...}


def plain_or_text(value: object) -> Plain:
    """Return a value as JSON has it, or else as text.

    Example:
        >>> plain_or_text({1}), plain_or_text(0.5)
        ('{1}', 0.5)
    """
    found: Plain = plain_items({"value": value}).get("value", str(value))
    return found


def plain_attributes(thing: object) -> dict[str, Plain]:
    """Return the public attributes of an object that are plain values, sorted by name.

    Example:
        >>> class Crop:
        ...     def __init__(self):
        ...         self.size, self.fill, self._cache, self.source = 24, 0.5, 1, object()
        >>> plain_attributes(Crop())
        {'fill': 0.5, 'size': 24}
    """
    items = sorted(getattr(thing, "__dict__", {}).items())
    return plain_items({name: value for name, value in items if not name.startswith("_")})


def _plain(value: object, depth: int = 0) -> Any:
    """Return a value as JSON has it, or Ellipsis."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, np.generic | torch.Tensor):
        has_number = value.ndim == 0 and not getattr(value, "is_meta", False)
        return _plain(value.item()) if has_number else ...
    if isinstance(value, Enum | torch.dtype | torch.device):
        return str(value)
    if not isinstance(value, list | tuple | Mapping) or len(value) > _MAX_PLAIN_ITEMS:
        return ...
    if depth > _MAX_PLAIN_DEPTH:  # a list may hold itself
        return ...
    if isinstance(value, list | tuple):
        return _all([_plain(item, depth + 1) for item in value])
    if all(isinstance(key, str) for key in value):
        items = _all([_plain(item, depth + 1) for item in value.values()])
        return items if items is ... else dict(zip(value, items, strict=True))
    return ...


def _all(items: list[Any]) -> Any:
    return ... if ... in items else items


# Values that pass: paths, marks of time and places, which say nothing of a training.


OWN_TO_A_START = frozenset({
    "training", "gradient_checkpointing", "name_or_path", "_name_or_path", "architectures",
    "transformers_version", "torch_dtype", "dtype", "device", "warnings_issued",
    "_is_torch_compile", "_compiled_call_impl",
})  # fmt: skip
"""Attributes that may be others at each start, or that the environment tells."""

_DAY = 86400.0
_LONG = 64
_VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\d|20\d{6}[-_T]?\d{4}|[0-9a-f]{16}|[0-9a-f]{8}-[0-9a-f]{4}-"
    r"|^(cpu|cuda|mps|xpu)(:\d+)?$| at 0x",
    re.IGNORECASE,
)


def is_volatile_text(text: str) -> bool:
    """Return whether a text looks like a path, a date, a random name or a device."""
    return len(text) > _LONG or os.sep in text or _VOLATILE.search(text) is not None


def is_volatile_number(number: float) -> bool:
    """Return whether a number is the time of this start, in seconds, milli- or nanoseconds."""
    now = time.time()
    return any(abs(number / unit - now) < _DAY for unit in (1, 1e3, 1e6, 1e9))


_MAX_ITEMS = 64
_MAX_DEPTH = 6
_MAX_NODES = 20_000
_MAX_TEXT = 2_000
_RECORDED_ELSEWHERE = (
    *(Optimizer, LRScheduler, DataLoader, Dataset, ModuleType, logging.Logger),
    *(pathlib.PurePath, torch.device, torch.Generator, np.random.Generator, random.Random),
)
_NAMESPACES = (argparse.Namespace, SimpleNamespace)


def facts_of(
    value: object, *, used: Set[str] | None = None, exclude: Set[int] = frozenset()
) -> Any:
    """Return what a value is, as JSON has it, or Ellipsis where nothing can be compared.

    Numbers and texts stand for themselves, tensors, arrays and long lists as digests, functions
    and objects as their code and what they hold. Left out are paths, dates, random names, times
    of the start, devices, generators, files, data, optimizers, and anything that raises.

    Args:
        value: Anything; no code of it runs but what Python needs to read it.
        used: The names that the code around uses: of a namespace, a dataclass or a mapping only
            these count, for the others may say when and where a run was started.
        exclude: Ids of objects that are told elsewhere.

    Example:
        >>> facts_of({"scale": 2.0, "where": "/tmp/a", "skip": {3, 1}})
        {'scale': 2.0, 'skip': [1, 3]}
    """
    found = _Walk(used, exclude).facts(value, 0)
    if not isinstance(found, list | dict):
        return found
    text = json.dumps(found, sort_keys=True)
    return found if len(text) <= _MAX_TEXT else xxhash.xxh3_128(text.encode()).hexdigest()


def facts_of_items(
    items: Mapping[str, object], *, used: Set[str] | None = None, exclude: Set[int] = frozenset()
) -> dict[str, Plain]:
    """Return the facts of those items that have any, sorted by name.

    Example:
        >>> facts_of_items({"share": 0.5, "log_dir": "/tmp/a", "device": "cuda"})
        {'share': 0.5}
    """
    kept = sorted((name, value) for name, value in _named(items))
    facts = {name: facts_of(value, used=used, exclude=exclude) for name, value in kept}
    return {name: value for name, value in facts.items() if value is not ...}


def callable_facts(
    thing: Callable[..., Any], *, without: Set[str] = frozenset()
) -> dict[str, Plain]:
    """Return what a function, or an object that is called, is and does.

    Args:
        thing: A function, a partial, a method, an `nn.Module`, any object.
        without: Attributes that do not count.

    Returns:
        `name`; `source`, the digest of its own code and of the code of the user's own functions
        that it calls by their global names, or None for installed code; `values`: what it takes
        from defaults, closures and globals, the arguments of a partial, the attributes of an
        object.

    Example:
        >>> def schedule(warmup):
        ...     return lambda step: min(1.0, step / warmup)
        >>> callable_facts(schedule(10))["values"]
        {'warmup': 10}
    """
    return _Walk(None, frozenset()).callable(thing, 0, without)


def object_facts(thing: object) -> dict[str, Plain]:
    """Return the class of an object, the digest of its code if it is the user's, and its values.

    Example:
        >>> class Ema:
        ...     def __init__(self, decay):
        ...         self.decay = decay
        >>> object_facts(Ema(0.9))["values"]
        {'decay': 0.9}
    """
    walk = _Walk(names_used_by(type(thing)), frozenset())
    values = _compacted(walk.items(_attributes(thing), 0))
    return {"class": qualified_name(thing), "source": source_digest(type(thing)), "values": values}


def names_used_by(*things: object, leave_out: frozenset[str] = frozenset()) -> set[str]:
    """Return all names, and keys, in the code of things and of what they reach."""
    functions = [
        f
        for thing in things
        for one in reached(thing, leave_out)
        for f in functions_of(one, leave_out)
    ]
    return set().union(*(names_in(f) | texts_in(f) for f in functions))


def values_around(thing: object, leave_out: frozenset[str] = frozenset()) -> dict[str, Plain]:
    """Return the values that code takes from defaults, closures and globals.

    Example:
        >>> def work(x, scale=2):
        ...     return x * scale
        >>> values_around(work)
        {'scale': 2}
    """
    return _compacted(_Walk(None, frozenset()).around(thing, 0, leave_out))


class _Walk:
    """One way through a value, which ends: bounded in depth, in parts, and in circles."""

    def __init__(self, used: Set[str] | None, exclude: Set[int]) -> None:
        self._used, self._exclude = used, exclude
        self._path: set[int] = set()
        self._left = _MAX_NODES

    def facts(self, value: Any, depth: int) -> Any:
        found = try_call(self._facts, value, depth)
        return ... if isinstance(found, Failed) else found

    def _facts(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if isinstance(value, Enum):
            return f"{stored_class_name(type(value))}.{value.name}"
        if isinstance(value, torch.dtype):
            return str(value)
        if value is None or isinstance(value, bool | int | float | str):
            return _of_plain(value)
        if self._left < 0 or depth > _MAX_DEPTH or self._is_left_out(value):
            return ...
        if isinstance(value, _RECORDED_ELSEWHERE):
            return ...
        self._path.add(id(value))
        try:
            return self._parts(value, depth)
        finally:
            self._path.discard(id(value))

    def _is_left_out(self, value: object) -> bool:
        return id(value) in self._path or id(value) in self._exclude

    def _parts(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor | np.ndarray | np.generic):
            return _of_array(value)
        if isinstance(value, bytes | bytearray | complex | range):
            return record_digest(value)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            return self._sequence(value, depth)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools.partial | FunctionType | BuiltinFunctionType | MethodType):
            return self.callable(value, depth, frozenset())
        return tokenizer_digest(value) if is_tokenizer(value) else self._object(value, depth)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        items = {str(key): part for key, part in some_of(value.items(), len(value))}
        items = {key: part for key, part in items.items() if not is_volatile_text(key)}
        if self._used is not None and (common := items.keys() & self._used):
            items = {key: part for key, part in items.items() if key in common}
        if len(items) <= _MAX_ITEMS:
            return self.items(items, depth)
        parts = [[key, self._in_line(part, depth)] for key, part in items.items()]
        return _long(len(value), parts)

    def _sequence(self, value: Any, depth: int) -> Any:
        is_set = isinstance(value, set | frozenset)
        if is_set and len(value) > _MAX_SET:
            return f"set of {len(value)}"
        parts = [self._in_line(part, depth) for part in some_of(value, len(value))]
        if is_set:
            parts.sort(key=lambda part: json.dumps(part, sort_keys=True))
        return parts if len(value) <= _MAX_ITEMS else _long(len(value), parts)

    def _in_line(self, part: Any, depth: int) -> Any:
        found = self.facts(part, depth + 1)
        return "-" if found is ... else found

    def items(self, items: Mapping[str, Any], depth: int) -> dict[str, Any]:
        facts = {name: self.facts(value, depth + 1) for name, value in sorted(_named(items))}
        return {name: value for name, value in facts.items() if value is not ...}

    def _class(self, value: type) -> Any:
        return {"class": qualified_name(value), "source": source_digest(value)}

    def callable(self, thing: Any, depth: int, without: Set[str]) -> dict[str, Any]:
        function, given = called_by(thing)
        values = self.around(function, depth)
        if not isinstance(function, type | FunctionType | BuiltinFunctionType):
            attributes = _attributes(function).items()
            values |= self.items({n: v for n, v in attributes if n not in without}, depth)
        if (owner := _owner_of_method(thing)) is not None:
            values |= self.items(_attributes(owner), depth)
        values |= self.items(given, depth)
        return {
            "name": qualified_name(function),
            "source": source_digest(function),
            "values": _compacted(values) if depth == 0 else values,
        }

    def around(
        self, thing: Any, depth: int, leave_out: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Return what the functions of a thing, and those that they call, take from around."""
        found: dict[str, Any] = {}
        ones = reached(thing, leave_out) or [thing]  # an installed function closes over things too
        outer, self._used = self._used, names_used_by(thing, leave_out=leave_out)
        for one in ones:
            for function in functions_of(one, leave_out):
                prefix = "" if one is ones[0] else f"{function.__qualname__}."
                values = self.items(_around_function(function), depth)
                values |= _variables_of(function)
                found |= {f"{prefix}{name}": value for name, value in values.items()}
        self._used = outer
        return dict(sorted(found.items()))

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if is_of_unbroken(kind):
            return ...
        attributes = _attributes(value)
        if isinstance(value, _NAMESPACES) or dataclasses.is_dataclass(value):
            if self._used is not None:
                attributes = {n: v for n, v in attributes.items() if n in self._used}
            return {"class": qualified_name(kind), **self.items(attributes, depth)}
        if kind.__name__.endswith("Config") and isinstance(
            settings := safe_call(value, "to_dict"), dict
        ):
            return self.items(settings, depth)
        if not attributes and not is_user_code(kind):
            return ...  # a lock, a file: nothing to see but that it is one
        facts = {"class": qualified_name(kind), **self.items(attributes, depth)}
        return {**facts, "source": source_digest(kind)} if is_user_code(kind) else facts


def _owner_of_method(thing: Any) -> Any:
    """Return the object whose method a thing is, or a partial of one."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    return thing.__self__ if isinstance(thing, MethodType) else None


_MAX_SET = 65536
_HUGE = 2**63


def _of_plain(value: Any) -> Any:
    if isinstance(value, str):
        return ... if is_volatile_text(value) else str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= _HUGE:
            return hex(value)[:_MAX_ITEMS]
        return ... if is_volatile_number(value) else int(value)
    if not math.isfinite(value):
        return str(float(value))
    return ... if is_volatile_number(value) else float(value)


def _of_array(value: Any) -> Any:
    if isinstance(value, np.datetime64 | np.timedelta64):
        return ...
    if value.ndim == 0 and not (isinstance(value, torch.Tensor) and value.is_meta):
        item = value.item()
        plain = isinstance(item, bool | int | float | str)
        return _of_plain(item) if plain else record_digest(value)
    return array_digest(value)


def _long(length: int, parts: list[Any]) -> str:
    digest = xxhash.xxh3_64(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{length} items: {digest}"


def _named(items: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((str(n), v) for n, v in items.items() if str(n) not in OWN_TO_A_START)


def _compacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they are, but those that would fill a page as digests."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    return {
        name: value if len(text) <= _MAX_TEXT else xxhash.xxh3_128(text.encode()).hexdigest()
        for (name, value), text in zip(values.items(), texts.values(), strict=True)
    }


def _attributes(thing: Any) -> dict[str, Any]:
    """Return what an object holds; of a module also its parts, but no weights."""
    own = attributes_of(thing)
    if not isinstance(thing, nn.Module):
        keeps_private = is_user_code(type(thing))
        return {n: v for n, v in own.items() if keeps_private or not n.startswith("_")}
    kept = {n: v for n, v in own.items() if n not in _OF_EVERY_MODULE}
    if not is_user_code(type(thing)):
        kept = {n: v for n, v in kept.items() if not n.startswith("_")}
    held = {**own.get("_modules", {})}
    if try_call(lambda: next(nn.Module.parameters(thing), None)) is None:
        held |= own.get("_buffers", {})  # constants of a loss; else they are state
    return {**kept, **{name: part for name, part in held.items() if part is not None}}


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _variables_of(function: FunctionType) -> dict[str, Any]:
    """Return digests of the environment variables that a function reads: they may be secret."""
    names = variables_in(function) if is_user_code(function) else set()
    values = {name: os.environ.get(name) for name in sorted(names - {*VARIABLES})}
    return {
        f"environ.{name}": None if value is None else xxhash.xxh3_128_hexdigest(value.encode())
        for name, value in values.items()
        if value is None or not is_volatile_text(value)
    }


def _around_function(function: FunctionType) -> dict[str, Any]:
    """Return the defaults, closures and globals of a function that are not code.

    Not what Python says of a module (`__name__`): its functions may move to another one.
    """
    values = {
        name: value
        for name, value in (globals_of(function) if is_user_code(function) else {}).items()
        if not isinstance(value, FunctionType | BuiltinFunctionType | type)
        and not name.rpartition(".")[2].startswith("__")
    }
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount][::-1]
    values |= dict(zip(arguments, (function.__defaults__ or ())[::-1], strict=False))
    values |= function.__kwdefaults__ or {}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    values |= {name: _content(cell) for name, cell in cells if name != "__class__"}
    return {name: value for name, value in values.items() if value is not _EMPTY}


_EMPTY = object()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet: a function that names itself
        return _EMPTY
