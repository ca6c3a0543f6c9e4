"""A copy of what is saved, so that training goes on while it is written.

After an optimizer's step nothing changes parameters and optimizer state until its next step. So
they may be copied while the next forward and backward passes run: CheckFreq (FAST '21),
DataStates-LLM (HPDC '24). What makes that exact here: the next step waits for the copy, and a
tensor that something else changed before then is found by its version.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.capture import TensorLeaf, raw
from unbroken.distributed.sharding import local_part
from unbroken.store import places_in_files

_PAGE = 4096
_SMALL = 1 << 20  # bytes that are copied sooner than PyTorch has begun
_PLAIN = (torch.Tensor, nn.Parameter)
Steady = Mapping[tuple[int, int], torch.Tensor]
"""Tensors that only an optimizer's step is expected to change, by address and length."""


@dataclass(frozen=True)
class Watched:
    """A tensor that must stay as it is until it was copied."""

    path: str
    tensor: torch.Tensor
    version: int
    address: int

    @classmethod
    def now(cls, path: str, tensor: torch.Tensor) -> Watched:
        """Watch a tensor from now on."""
        return cls(path, tensor, tensor._version, tensor.data_ptr())  # noqa: SLF001 (as below)

    @property
    def is_as_it_was(self) -> bool:
        """Whether nothing changed it, as far as its version and its address tell."""
        now = (self.tensor._version, self.tensor.data_ptr())  # noqa: SLF001 (no public name)
        return now == (self.version, self.address)


class Snapshot:
    """The bytes of leaves at one moment.

    Args:
        leaves: The leaves, over live memory.
        memory: Where their copies lie.
        places: Where in it each one lies, by path.
        late: Those that are not copied yet.
        watched: The live tensors behind these, and behind copies from a device that still run.
        event: When copies from a device are complete.
    """

    def __init__(
        self,
        leaves: Sequence[TensorLeaf],
        memory: torch.Tensor,
        places: Mapping[str, int],
        late: list[TensorLeaf],
        watched: Sequence[Watched],
        event: torch.cuda.Event | None,
    ) -> None:
        self._leaves = leaves
        self._memory = memory
        self._places = places
        self._late = late
        self._watched = watched
        self._event = event

    def leaves(self) -> tuple[TensorLeaf, ...]:
        """Return the leaves over the memory of the copy."""
        return tuple(
            replace(leaf, tensor=self._memory[self._places[leaf.path] :][: leaf.nbytes])
            for leaf in self._leaves
        )

    def copy_rest(self) -> None:
        """Copy what was not copied at once; called once, from any thread."""
        start = self._memory.data_ptr()
        for leaf in self._late:
            _move(leaf, start + self._places[leaf.path])
        self._late = []

    def wait_for_device(self) -> None:
        """Wait for the copies from a device."""
        if self._event is not None:
            self._event.synchronize()

    def hold_back_device(self) -> None:
        """Let what is launched on the current stream from now on wait for the copies."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def edited(self) -> tuple[str, ...]:
        """Return the paths of tensors that were changed since the snapshot began."""
        return tuple(one.path for one in self._watched if not one.is_as_it_was)


class Staging:
    """The memory for one snapshot at a time, used again for each: fresh memory is slow."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        self._planned: tuple[list[Any], tuple[dict[str, int], int]] = ([], ({}, 0))

    def take(self, leaves: Sequence[TensorLeaf], steady: Steady | None = None) -> Snapshot:
        """Copy leaves; those that are steady, later, with `Snapshot.copy_rest`.

        The bytes of each file come to lie as they will lie in the file, from a multiple of a page
        on: so a disk can take them without another copy.

        Args:
            leaves: What is to be copied.
            steady: What may be copied later; None: nothing.
        """
        places, nbytes = self._places(leaves)
        on_device = any(leaf.tensor.is_cuda for leaf in leaves)
        memory = self._reserve(nbytes, pinned=on_device)
        waiting: list[tuple[TensorLeaf, torch.Tensor]] = []
        for leaf in leaves:
            live = _live(leaf.tensor, steady or {})
            if live is None:
                self._copy(leaf, memory, places)
            else:
                waiting.append((leaf, live))
        if self._stream is not None:  # on the device: what follows must not change these either
            torch.cuda.current_stream().wait_stream(self._stream)
        for leaf, _ in waiting:
            if leaf.tensor.is_cuda:
                self._copy(leaf, memory, places)
        event = self._end_of_copies()
        if event is not None and steady is None:
            event.synchronize()
        late = [leaf for leaf, _ in waiting if not leaf.tensor.is_cuda]
        watched = [Watched.now(leaf.path, live) for leaf, live in waiting]
        return Snapshot(leaves, memory, places, late, watched, event)

    def _places(self, leaves: Sequence[TensorLeaf]) -> tuple[dict[str, int], int]:
        """Return where leaves lie; the same as before if they are the same as before."""
        key = [(leaf.path, leaf.file, leaf.name, leaf.dtype, leaf.shape) for leaf in leaves]
        if key != self._planned[0]:
            self._planned = (key, places_in_files(leaves, _PAGE))
        return self._planned[1]

    def _copy(self, leaf: TensorLeaf, memory: torch.Tensor, places: Mapping[str, int]) -> None:
        if leaf.nbytes <= _SMALL and leaf.tensor.is_cpu and leaf.tensor.is_contiguous():
            _move(leaf, memory.data_ptr() + places[leaf.path])
            return
        source = raw(leaf.tensor)
        target = memory[places[leaf.path] :][: leaf.nbytes].view(source.dtype).view(source.shape)
        if not source.is_cuda:
            target.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def _end_of_copies(self) -> torch.cuda.Event | None:
        stream, self._stream = self._stream, None
        return None if stream is None else stream.record_event()

    def _reserve(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        """Return memory that starts at a page; the same as before if that is enough."""
        if len(self._memory) < nbytes or self._memory.is_pinned() != pinned:
            self._memory = torch.empty(0, dtype=torch.uint8)  # gives the old memory back first
            fresh = torch.empty(nbytes + _PAGE, dtype=torch.uint8, pin_memory=pinned)
            self._memory = fresh[-fresh.data_ptr() % _PAGE :]
        return self._memory


def _move(leaf: TensorLeaf, address: int) -> None:
    """Copy a contiguous leaf; other threads of Python go on meanwhile."""
    ctypes.memmove(address, leaf.tensor.data_ptr(), leaf.nbytes)


def _live(tensor: torch.Tensor, steady: Steady) -> torch.Tensor | None:
    """Return the steady tensor that has just this memory, in this order, if there is one."""
    live = steady.get(_place(tensor))
    return live if live is not None and tensor.is_contiguous() else None


def steady_tensors(
    objects: Mapping[str, object], leaves: Sequence[TensorLeaf], restless: Collection[str]
) -> dict[tuple[int, int], torch.Tensor]:
    """Return the parameters, and the optimizers' state: an optimizer's step alone changes them.

    Args:
        objects: What is saved, by name; also lists and dicts of objects.
        leaves: What was captured of them.
        restless: The paths of leaves that something else does change.
    """
    found = [tensor for value in flattened(objects) for tensor in _steady_in(value)]
    steady = {_place(tensor): tensor for tensor in found if tensor.numel() > 1}
    for leaf in leaves:
        if leaf.path in restless:
            steady.pop(_place(leaf.tensor), None)
    return steady


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def flattened(value: object) -> Iterator[object]:
    """Yield the objects in groups of objects."""
    if type(value) is dict:
        for one in value.values():
            yield from flattened(one)
    elif type(value) in (list, tuple):
        for one in value:  # type: ignore[attr-defined]
            yield from flattened(one)
    else:
        yield value


def _steady_in(value: object) -> Iterator[torch.Tensor]:
    tensors: Collection[object] = ()
    if isinstance(value, nn.Module):
        tensors = list(value.parameters())
    elif isinstance(value, Optimizer):
        states = (state for state in value.state.values() if isinstance(state, dict))
        tensors = [one for state in states for one in state.values()]
    for one in tensors:
        if isinstance(one, torch.Tensor):
            here = local_part(one)
            if type(here) in _PLAIN and not here.is_inference():
                yield here
