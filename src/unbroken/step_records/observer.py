"""Seeing the steps of registered optimizers, and what each is made of, while training goes on.

Nothing is drawn, changed or waited for. Of large tensors a sample is read, of many some in turn:
the first step after a checkpoint looks at all of them, later ones at a few.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unbroken.capture import ParameterNames, capture, named_objects
from unbroken.capture.state_tree import TreeMap
from unbroken.data import BatchDigest, LoaderSource, MapSource, arrays_in
from unbroken.recorder.digests import (
    TensorDigester,
    digest_of,
    generator_digests,
    learning_rates_of,
    sample_of,
)
from unbroken.recorder.step_hooks import StepHooks
from unbroken.step_records.records import MODES, StateAtStop, StepRecord

# Steps after a checkpoint, and later every so many: a small step leaves the caches of a processor
# cold, so that a digest of a batch takes 20 us in it.
_DETAILED, _DETAILED_EVERY = 8, 16
_WITH_BATCH, _WITH_BATCH_EVERY = 16, 4
_MAX_SAMPLES = 256  # of a step of which each has a digest
_MAX_NEXT = 1024  # indices of the samples that come next
_MAX_WAITING = 4096  # losses and batches that no step follows
_MAX_BEHIND = 64  # records whose numbers are still on their way from a device
_GENERATORS = ("torch", "python", "numpy")
_TURNS = ("torch", "python", "torch", "numpy")  # reading all three takes as long as a small step
_DIGITS = 12
_DIGESTER = TensorDigester(sampled=True)

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Watched:
    """A registered optimizer, and its parameters by name."""

    name: str
    optimizer: Optimizer
    parameters: Named


class StepObserver:
    """Hears of each step of the registered optimizers, and makes a record of it.

    Args:
        objects: What is registered, by name; read when observing begins.
        on_step: Called with each record after the step; later, where numbers of it are still on
            their way from a device.

    Attributes:
        is_recording: Whether records are made.
        is_on_a_device: Whether parameters are elsewhere than in the memory of this machine.
        counted: Steps that the optimizer which steps first has taken since `begin`.
        number: Steps of all optimizers since `begin`.
    """

    def __init__(
        self, objects: Mapping[str, object], on_step: Callable[[StepRecord], None]
    ) -> None:
        self._objects, self._on_step = objects, on_step
        self.number = self.counted = 0
        self.is_on_a_device = self.is_recording = False
        self._hooks: StepHooks | None = None
        self._watched: dict[int, _Watched] = {}
        self._seen: set[int] = set()  # optimizers that have taken a step since `begin`
        self._others: Named = []
        self._first: str | None = None
        self._stepping: Optimizer | None = None
        self._pid = os.getpid()
        self._record: dict[str, Any] = {}
        self._behind: deque[tuple[torch.Event, dict[str, Any]]] = deque()
        self._forget()

    def _forget(self) -> None:
        self._losses: list[str | Tensor] = []
        self._batches: list[str] = []
        self._samples: list[str] = []
        self._knows_batches = self._knows_samples = True

    @property
    def draws_by_sample(self) -> bool:
        """Whether what is drawn for a sample is the same in whatever batch, on whatever rank."""
        found = [one for _, one in named_objects(self._objects)]
        sources = [one for one in found if isinstance(one, LoaderSource | MapSource)]
        keyed = (isinstance(one, MapSource) and one.draws_by_sample for one in sources)
        return bool(sources) and all(keyed)

    def begin(self, *, is_recording: bool) -> None:
        """Count from here on: the state is that of a checkpoint.

        Args:
            is_recording: Whether records are made, too.
        """
        self._deliver(wait=True)
        self.is_recording = is_recording
        self.number = self.counted = 0
        self._forget()
        self._seen.clear()
        self._watched, self._others = _watched(self._objects)
        every = (one for watched in self._watched.values() for _, one in watched.parameters)
        self.is_on_a_device = any(one.device.type not in ("cpu", "meta") for one in every)
        for _, one in named_objects(self._objects):
            if isinstance(one, MapSource | LoaderSource):
                one.running.on_batch = self.note_batch
        if self._hooks is None:
            _open.append(ref(self))
            _hear_of_backward()
            self._hooks = StepHooks(self._step_begins, self._step_is_over)

    def end(self) -> None:
        """Look no longer."""
        self._deliver(wait=True)
        if self._hooks is not None:
            self._hooks.end()
        self._hooks, self._watched, self._others = None, {}, []
        self.is_recording = False
        _open[:] = [one for one in _open if one() is not self]
        _hear_of_backward()

    # What leads to a step.

    def look(self, note: Callable[[Any], None], thing: Any) -> None:
        """Look at something; where that fails, look no longer: training goes on in any case."""
        try:
            note(thing)
        except Exception:  # tensors of any library come here, and a record is worth no run
            self._behind.clear()
            self.end()

    def at_rest(self) -> StateAtStop:
        """Return what the registered objects are now; of large tensors a sample is read."""
        found = [one for _, one in named_objects(self._objects)]
        sources = [one for one in found if isinstance(one, MapSource)]
        samples = sources[0].next_samples(_MAX_NEXT) if len(sources) == 1 else None
        return StateAtStop(_state_digests(self._objects), samples)

    def note_batch(self, batch: Any) -> None:
        """Take note of a micro-batch that is trained on now."""
        self.look(self._note_batch, batch)

    def _note_batch(self, batch: Any) -> None:
        number = self.number + 1
        has_turn = number <= _WITH_BATCH or number % _WITH_BATCH_EVERY == 0
        if not (self.is_recording and has_turn and len(self._batches) < _MAX_WAITING):
            return
        text = _batch_text(batch)
        if text is None:
            self._knows_batches = False
            return
        self._batches.append(text)
        if is_detailed(number) and self._knows_samples:
            found = sample_digests(batch, _MAX_SAMPLES - len(self._samples))
            self._samples, self._knows_samples = [*self._samples, *found], bool(found)

    def note_backward(self, roots: Any) -> None:
        """Take note of the loss that a backward pass begins at."""
        if not self.is_recording:
            return
        tensors = (roots,) if isinstance(roots, Tensor) else tuple(roots)
        if len(self._losses) < _MAX_WAITING:
            plain = (one for one in tensors if type(one) is Tensor and not one.is_meta)
            self._losses += [_bits(one) for one in plain if one.numel() == 1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look at nothing that happens inside: it repeats what was seen."""
        was, self.is_recording = self.is_recording, False
        try:
            yield
        finally:
            self.is_recording = was

    def forget_step(self) -> None:
        """Forget what was seen of a step that is tried again."""
        self._forget()

    # The step.

    def _step_begins(self, optimizer: Optimizer) -> None:
        self.look(self._before_step, optimizer)

    def _step_is_over(self, optimizer: Optimizer) -> None:
        self.look(self._after_step, optimizer)

    def _before_step(self, optimizer: Optimizer) -> None:
        known = self._watched.get(id(optimizer))
        is_inside = self._stepping not in (None, optimizer)  # the same: an exception left its step
        if known is None or is_inside or os.getpid() != self._pid:
            return
        self._stepping, number = optimizer, self.number + 1
        self._record = {"optimizer": known.name}
        if not self.is_recording:
            return
        if not any(_is_elsewhere(group.get("lr")) for group in optimizer.param_groups):
            self._record["learning_rates"] = tuple(learning_rates_of(optimizer))
        is_new = id(optimizer) not in self._seen
        if is_new or is_detailed(number):
            self._seen.add(id(optimizer))
            with torch.no_grad():
                self._record |= self._details(known, number, is_new=is_new)

    def _details(self, known: _Watched, number: int, *, is_new: bool) -> dict[str, Any]:
        """Return digests: after a checkpoint of everything, later of some things in turn."""
        turn = number if number <= _DETAILED else _DETAILED + number // _DETAILED_EVERY
        chosen = known.parameters if is_new else _in_turn(known.parameters, turn)
        others = self._others if number == 1 else _in_turn(self._others, turn)
        names = _GENERATORS if number == 1 else (_TURNS[turn % len(_TURNS)],)
        return {
            "generators": _short(generator_digests(names)),
            "state": {**self._modes(), **dict(_states(chosen, known.optimizer))},
            "gradients": {n: _digest(p.grad) for n, p in chosen if p.grad is not None},
            "others": {name: _digest(one) for name, one in others},
        }

    def _modes(self) -> dict[str, str]:
        """Return a digest of which modules are in training mode."""
        roots = [one for _, one in named_objects(self._objects) if isinstance(one, nn.Module)]
        modes = bytes(one.training for root in roots for one in root.modules())
        return {MODES: digest_of(modes)[:_DIGITS]}

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._stepping is not optimizer:
            return
        self._stepping = None
        record, name = self._record, self._record["optimizer"]
        self._first = name if self._first is None else self._first
        self.number += 1
        self.counted += name == self._first
        if not self.is_recording:
            return
        has_batches = self._knows_batches and bool(self._batches)
        record["number"] = self.number
        record["losses"] = tuple(self._losses)
        record["batches"] = tuple(self._batches) if has_batches else None
        record["samples"] = tuple(self._samples) if has_batches and self._knows_samples else ()
        self._forget()
        if not self.is_on_a_device:
            self._on_step(StepRecord(**record))
            return
        event = torch.Event()
        event.record()
        self._behind.append((event, record))
        self._deliver(wait=False)

    def _deliver(self, *, wait: bool) -> None:
        """Hand over the records whose numbers have come, in order."""
        while self._behind:
            event, record = self._behind[0]
            if not event.query():
                if not wait and len(self._behind) <= _MAX_BEHIND:
                    return
                event.synchronize()
            self._behind.popleft()
            self._on_step(StepRecord(**_arrived(record)))


def _state_digests(objects: Mapping[str, object]) -> dict[str, str]:
    """Return a digest of what would be saved of each object."""
    return {
        name: digest_of(repr(TreeMap(_leaf)(tree)).encode())[:_DIGITS]
        for name, tree in capture(objects).items()
    }


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), _DIGESTER.of(value).hex())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, digest_of(value.tobytes()))
    return sorted(map(repr, value)) if isinstance(value, set | frozenset) else value


def _is_elsewhere(rate: object) -> bool:
    """Return whether a learning rate is on a device, which is not waited for."""
    return isinstance(rate, Tensor) and not rate.is_cpu


def _in_turn(values: Named, number: int) -> Named:
    """Return one of them, another one each time, the same ones in each run."""
    return [values[number % len(values)]] if values else []


def _watched(objects: Mapping[str, object]) -> tuple[dict[int, _Watched], Named]:
    """Return the optimizers with their parameters, and all other tensors of what is registered."""
    names, found, moved = ParameterNames(objects), dict[int, _Watched](), set[int]()
    for path, one in named_objects(objects):
        if isinstance(one, Optimizer):
            every = [p for group in one.param_groups for p in group["params"]]
            moved |= {id(p) for p in every}
            named = [(names.of(p) or f"{path}.{at}", p) for at, p in enumerate(every)]
            found[id(one)] = _Watched(path, one, named)
    others: Named = []
    for path, value in named_objects(objects):
        others += [(name, one) for name, one in _tensors(path, value) if id(one) not in moved]
    return found, others


def _tensors(path: str, value: object) -> Iterator[tuple[str, Tensor]]:
    before = "" if path == "model" else f"{path}."
    if isinstance(value, nn.Module):
        for name, one in (*value.named_parameters(), *value.named_buffers()):
            yield f"{before}{name}", one
    elif isinstance(value, Tensor):
        yield path, value


def _states(chosen: Named, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield digests of parameters, and of what the optimizer keeps of them."""
    for name, parameter in chosen:
        yield name, _digest(parameter)
        state = optimizer.state.get(parameter, {})  # get: reading a missing one would make it
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{name}:{key}", _digest(value)
            elif isinstance(value, bool | int | float):
                yield f"{name}:{key}", repr(value)


def _digest(tensor: Tensor) -> str | Tensor:
    """Return the digest; of what is on another device, its sample on the way to this one."""
    if tensor.device.type in ("cpu", "meta"):
        return _DIGESTER.of(tensor).hex()[:_DIGITS]
    return sample_of(tensor).to("cpu", non_blocking=True)


def _bits(loss: Tensor) -> str | Tensor:
    """Return a number as text, each bit of it; on another device, on its way to this one."""
    if loss.is_cpu:
        return _as_text(loss)
    return loss.detach().clone().to("cpu", non_blocking=True)


def _as_text(loss: Tensor) -> str:
    value = loss.item()
    return value.hex() if isinstance(value, float) else repr(value)


def _short(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest[:_DIGITS] for name, digest in digests.items()}


_PARTS = ("state", "gradients", "others")


def _arrived(record: Mapping[str, Any]) -> dict[str, Any]:
    losses = (_as_text(one) if isinstance(one, Tensor) else one for one in record["losses"])
    digests = {
        part: {
            name: _DIGESTER.of(one).hex()[:_DIGITS] if isinstance(one, Tensor) else one
            for name, one in record[part].items()
        }
        for part in _PARTS
        if part in record
    }
    return {**record, "losses": tuple(losses), **digests}


def is_detailed(number: int) -> bool:
    """Return whether digests of state belong to the record of a step.

    Example:
        >>> [number for number in range(1, 20) if is_detailed(number)]
        [1, 2, 3, 4, 5, 6, 7, 8, 16]
    """
    return number <= _DETAILED or number % _DETAILED_EVERY == 0


def _batch_text(batch: Any) -> str | None:
    """Return the digest of a batch; None: nothing in it can be compared."""
    parts = batch.values() if type(batch) is dict else batch
    if type(parts) in _PLAIN_PARTS and all(type(one) is Tensor and one.is_cpu for one in parts):
        found = b"".join([_DIGESTER.of(one) for one in parts])  # the quick way
        return digest_of(found)[:_DIGITS]
    digest = BatchDigest()
    digest.add(batch)
    text = digest.text()
    return None if text is None else text[:_DIGITS]


_PLAIN_PARTS: tuple[type, ...] = (type({}.values()), list, tuple)


def sample_digests(batch: Any, most: int) -> list[str]:
    """Return a digest of each sample of a batch, and its size: of the rows of all arrays as long.

    Where there are more than `most`, none: which of them come first depends on how they are cut.

    Example:
        >>> one, other = sample_digests(torch.eye(2), 256), sample_digests(torch.eye(2).flip(0), 9)
        >>> one == other[::-1] != other
        True
    """
    arrays = [one for found in arrays_in(batch) if (one := _as_array(found)) is not None]
    count = len(arrays[0]) if arrays else 0
    if not 0 < count <= most:
        return []
    same = [np.ascontiguousarray(one) for one in arrays if len(one) == count]
    rows = (b"".join(one[row].tobytes() for one in same) for row in range(count))
    return [f"{digest_of(row)[:_DIGITS]}.{len(row):x}" for row in rows]


def _as_array(value: Any) -> np.ndarray | None:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.layout is not torch.strided or value.dim() == 0:
            return None
        raw = value.detach().contiguous()
        return raw.view(torch.uint8).numpy() if raw.numel() and not raw.is_quantized else None
    is_plain = isinstance(value, np.ndarray) and value.ndim > 0 and not value.dtype.hasobject
    return value if is_plain else None


# Backward passes are heard of by one function in the place of PyTorch's, while anybody looks.


_open: list[ref[StepObserver]] = []
_replaced: list[tuple[Any, Any]] = []  # PyTorch's own, and what stands in its place


def _hear_of_backward() -> None:
    _open[:] = [one for one in _open if one() is not None]
    if _open and not _replaced:
        plain = torch.autograd.backward
        _replaced.append((plain, _heard(plain)))
        torch.autograd.backward = _replaced[0][1]
    elif not _open and _replaced:
        plain, heard = _replaced.pop()
        if torch.autograd.backward is heard:
            torch.autograd.backward = plain


def _heard(plain: Callable[..., None]) -> Callable[..., None]:
    @wraps(plain)
    def backward(tensors: Any, *args: Any, **options: Any) -> None:
        if not torch.compiler.is_compiling():
            for one in _open:
                if (observer := one()) is not None:
                    observer.look(observer.note_backward, tensors)
        plain(tensors, *args, **options)

    return backward
