"""Digests of batches, so that a resumed run verifies the batches that it reads again."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from unbroken.errors import DataError

_DEPTH = 6
_ITEMS = 1024  # of a list, all that are looked at
_NODES = 512
_FEW = 32  # parts of a container that is looked into
_WHOLE = 1 << 17  # bytes of a tensor that are all read: ids of 16 texts of 1,024 tokens
_REMEMBERED = 4096  # of the batches read ahead, how many digests are kept
_SAMPLE = 4096  # elements of a larger one
_OF_NUMPY = {
    *(torch.float32, torch.float64, torch.float16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
}
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class BatchDigest:
    """A running digest of batches.

    The tensors and arrays in a batch count, wherever in containers and objects they are; where
    there are none, its numbers and texts do. Of a large tensor a sample counts, of one on another
    device its shape: a digest takes a few microseconds, and never waits for a device.

    Example:
        >>> one, other = BatchDigest(), BatchDigest()
        >>> one.add({"x": torch.ones(2)}), other.add([torch.ones(2)])
        (None, None)
        >>> one.text() == other.text() != BatchDigest().text()
        True
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()
        self._is_empty = True

    def add(self, batch: Any) -> None:
        """Add a batch to the digest."""
        arrays: list[Any] = [*arrays_in(batch)] or [*_plain_in(batch)]
        for array in arrays:
            self._is_empty = False
            if isinstance(array, Tensor):
                _add_tensor(self._digest, array)
            elif isinstance(array, np.ndarray | np.generic):
                _add_array(self._digest, np.asarray(array))
            else:
                self._digest.update(repr(array).encode())

    def text(self) -> str | None:
        """Return the digest so far; None where there was nothing that can be compared."""
        return None if self._is_empty else self._digest.hexdigest()


def arrays_in(value: Any, depth: int = 0) -> Iterator[Tensor | np.ndarray | np.generic]:
    """Yield the tensors and arrays in containers, dataclasses and objects, in a fixed order."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        yield value
    elif depth < _DEPTH and not isinstance(value, _LEAVES):
        for part in _parts_of(value):
            yield from arrays_in(part, depth + 1)


def _plain_in(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, _LEAVES):
        yield value
    elif depth < _DEPTH:
        for part in _parts_of(value):
            yield from _plain_in(part, depth + 1)


_LEAVES = (bool, int, float, complex, str, bytes, type(None))


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [value[name] for name in list(value)[:_ITEMS]]
    if isinstance(value, list | tuple):
        return value[:_ITEMS]
    return _own_attributes(value).values()


def _own_attributes(value: Any) -> dict[str, Any]:
    """Return what stands in an object itself, without running any code of it."""
    own = _own_dict(value)
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__"))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **own}


def _own_dict(value: Any) -> dict[str, Any]:
    try:
        own: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else [*(slots or ())]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    is_plain = type(tensor) is Tensor and tensor.dtype in _OF_NUMPY and not tensor.is_neg()
    if is_plain and tensor.layout is torch.strided and tensor.device.type == "cpu":
        _add_array(digest, tensor.detach().numpy())  # the quick way
        return
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (no code of a user's subclass)
        digest.update(f"{tensor.dtype}{tensor.shape}".encode())
        if tensor.device.type != "cpu" or tensor.is_quantized:
            return
        if tensor.layout is not torch.strided:
            if tensor.layout is torch.sparse_coo:
                whole = tensor.detach().coalesce()
                _add_tensor(digest, whole.indices())
                _add_tensor(digest, whole.values())
            return
        flat = tensor.detach().resolve_conj().resolve_neg()
        if flat.nbytes > _WHOLE:
            flat = flat[tuple(_some_of(flat.shape))]
        digest.update(flat.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _add_array(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    if array.nbytes > _WHOLE:
        array = array[tuple(_some_of(array.shape))]
    if array.dtype.kind in "biufc":
        digest.update(array if array.flags.c_contiguous else np.ascontiguousarray(array))
    elif not array.dtype.hasobject:
        digest.update(array.tobytes())


def _some_of(shape: Sequence[int]) -> list[slice]:
    """Return slices that leave about as many elements as are read, the last dimension thinned most.

    So something of every sample in a batch counts.
    """
    left, found = math.prod(shape) / _SAMPLE, []
    for size in reversed(shape):
        step = max(1, min(size, round(left)))
        left /= step
        found.append(slice(step // 2, None, step))
    return found[::-1]


class EpochDigests:
    """Digests of one epoch's batches, which a later start compares with what it reads again.

    Args:
        where: What gives the batches, for errors.
        holders: The objects that draw them, by name.
        trail: What `trail` returned at the position where a resumed run begins; {}: nothing.

    Example:
        >>> first = EpochDigests("stream", {})
        >>> first.add([1, 2]), first.add([3])
        (None, None)
        >>> again = EpochDigests("stream", {}, first.trail(2))
        >>> again.add([1, 2]), again.add([3])
        (None, None)
    """

    def __init__(
        self, where: str, holders: Mapping[str, Any], trail: Mapping[str, Any] | None = None
    ) -> None:
        self._where, self._holders = where, holders
        self._expected = {} if trail is None else trail
        self._seen, self._count = BatchDigest(), 0
        self._digests: deque[str | None] = deque(maxlen=_REMEMBERED)
        self._drawn_from: dict[str, str] = {}

    def add(self, batch: Any) -> None:
        """Add a batch; raise if the batches so far differ from those of the first run."""
        self._seen.add(batch)
        self._digests.append(self._seen.text())
        self._count += 1
        if self._count == 1:
            self._drawn_from = drawn_from(self._holders)
            before = self._expected.get("drawn_from") or {}
            for name, digest in before.items():
                if (now := self._drawn_from.get(name, digest)) != digest:
                    self._refuse(f"it was drawn from another state of {name}", digest, now)
        digest, found = self._expected.get("digest"), self._digests[-1]
        if self._count == self._expected.get("batches") and digest not in (None, found):
            self._refuse(f"batches 0 to {self._count - 1} of the epoch", digest, found)

    def end(self) -> None:
        """Raise if the epoch is over before the position is reached that it was read up to."""
        if self._count < self._expected.get("batches", 0):
            raise DataError(
                self._where,
                "the epoch is shorter than when it was saved",
                expected=f"at least {self._expected['batches']} batches",
                found=self._count,
                hint=f"{_OTHERWISE} {OR_ALLOW}",
            )

    def trail(self, batches: int) -> dict[str, Any]:
        """Return what to store for the position after `batches`; {}: it is not known."""
        if not self._count - len(self._digests) < batches <= self._count:
            return {}
        digest = self._digests[batches - self._count - 1]
        return {"batches": batches, "digest": digest, "drawn_from": self._drawn_from}

    def _refuse(self, what: str, expected: object, found: object) -> None:
        raise read_otherwise(self._where, what, expected, found)


_OTHERWISE = (
    "Draw from random, numpy.random or torch, which are keyed, and take what an order depends on "
    "once an epoch; or give the loader state_dict and load_state_dict that hold all of it."
)
OR_ALLOW = 'To go on with what it gives now: allow=["data"].'


def read_otherwise(
    where: str, what: str, expected: object, found: object, hint: str = _OTHERWISE
) -> DataError:
    """Return the error for data that differ when they are read again."""
    return DataError(
        where,
        f"{what}: what is read again is not what the run was trained on",
        expected=f"digest {expected}",
        found=f"digest {found}",
        hint=f"{hint} {OR_ALLOW}",
    )


def drawn_from(loader: Any) -> dict[str, str]:
    """Return digests of what a loader holds that an order or noise can be drawn from.

    These are random generators, wherever in its objects they are, and arrays of floating-point
    numbers that a sampler has: its weights.

    Example:
        >>> class Files:
        ...     def __init__(self):
        ...         self.rng = random.Random(0)
        >>> list(drawn_from(Files()))
        ['rng']
    """
    return {name: _digest_of(_state_of(one)) for name, one in _held(loader).items()}


def weights_of(loader: Any) -> dict[str, str]:
    """Return of `drawn_from` the weights alone.

    Example:
        >>> sampler = torch.utils.data.WeightedRandomSampler([0.5, 0.5], 2)
        >>> list(weights_of(torch.utils.data.DataLoader([1, 2], sampler=sampler)))
        ['sampler.weights']
    """
    held = _held(loader).items()
    return {name: _digest_of(one) for name, one in held if not isinstance(one, _GENERATORS)}


def generators_in(holder: Any) -> dict[str, Any]:
    """Return the generators that something holds of its own; the global ones are not among them.

    Example:
        >>> sorted(generators_in({"own": random.Random(1), "all": random._inst}))
        ['own']
    """
    everyones = (random._inst, np.random.mtrand._rand, torch.default_generator)  # noqa: SLF001
    held = {n: one for n, one in _held(holder).items() if isinstance(one, _GENERATORS)}
    return {n: one for n, one in held.items() if not any(one is other for other in everyones)}


def _held(loader: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    met, waiting = set[int](), [("", loader, 0)]
    while waiting and len(met) < _NODES:
        name, part, depth = waiting.pop(0)
        if id(part) in met or isinstance(part, _LEAVES):
            continue
        met.add(id(part))
        if isinstance(part, _GENERATORS) or (_is_of_floats(part) and "sampler" in name):
            found[name] = part
        elif depth < _DEPTH:
            held = _held_by(part)
            waiting += [(f"{name}.{key}".lstrip("."), one, depth + 1) for key, one in held]
    return found


def _held_by(part: Any) -> Iterable[tuple[str, Any]]:
    """Return what may hold generators: attributes, short lists, what a function reaches."""
    if isinstance(part, (Tensor, np.ndarray, type, nn.Module, ModuleType)):
        return []
    if type(part) in (list, tuple, dict) and len(part) > _FEW:
        return []
    if type(part) in (list, tuple):
        return [(str(index), one) for index, one in enumerate(part)]
    if isinstance(part, dict):
        return [(str(key), one) for key, one in part.items()]
    if isinstance(part, Mapping):  # an open archive, say, which reads what it is asked for
        return []
    if isinstance(part, partial):
        return [("func", part.func), ("args", part.args), ("keywords", part.keywords)]
    if isinstance(part, MethodType):
        inner = part.__func__
        return [
            ("self", part.__self__),
            *(_reached(inner) if isinstance(inner, FunctionType) else []),
        ]
    if isinstance(part, FunctionType):
        return _reached(part)
    methods = [getattr(type(part), name, None) for name in ("__iter__", "__getitem__", "__call__")]
    called = [one for one in methods if isinstance(one, FunctionType)]
    named = [item for one in called for item in _reached(one) if isinstance(item[1], _GENERATORS)]
    own = _own_attributes(part).items()
    return [*((name, one) for name, one in own if name != "_iterator"), *named]


def _reached(function: FunctionType) -> list[tuple[str, Any]]:
    """Return what a function closes over, and the generators that it names globally."""
    code, own = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    closed = [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    named = [(name, own[name]) for name in code.co_names if isinstance(own.get(name), _GENERATORS)]
    return [*closed, *named]


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_of_floats(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.is_floating_point() and part.device.type == "cpu"
    return isinstance(part, np.ndarray) and part.dtype.kind == "f"


def _state_of(generator: Any) -> Any:
    """Return the state of a generator; weights are their own."""
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    if isinstance(generator, torch.Generator):
        return generator.get_state() if generator.device.type == "cpu" else ""
    if isinstance(generator, np.random.RandomState):
        return repr(_listed(generator.get_state(legacy=False)))
    if isinstance(generator, np.random.Generator):
        return repr(_listed(generator.bit_generator.state))
    return generator


def _listed(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _listed(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


def _digest_of(value: Any) -> str:
    seen = BatchDigest()
    seen.add(value)
    return seen.text() or ""
