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

import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.capture import TensorLeaf, raw
from unbroken.store import places_in_files

_PAGE = 4096
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

    @property
    def is_as_it_was(self) -> bool:
        """Whether nothing changed it, as far as its version and its address tell."""
        now = (self.tensor._version, self.tensor.data_ptr())  # noqa: SLF001 (no public name)
        return now == (self.version, self.address)


class Snapshot:
    """The bytes of leaves at one moment.

    Args:
        leaves: The leaves, over the memory of the copy.
        late: Sources that are not copied yet, each with its place in that memory.
        watched: The live tensors behind these.
        event: When copies from a device are complete.

    Attributes:
        leaves: As given.
    """

    def __init__(
        self,
        leaves: tuple[TensorLeaf, ...],
        late: list[tuple[torch.Tensor, torch.Tensor]],
        watched: Sequence[Watched],
        event: torch.cuda.Event | None,
    ) -> None:
        self.leaves = leaves
        self._late = late
        self._watched = watched
        self._event = event

    def copy_rest(self) -> None:
        """Copy what was not copied at once; called once, from any thread."""
        for source, target in self._late:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())
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

    def take(self, leaves: Sequence[TensorLeaf], steady: Steady | None = None) -> Snapshot:
        """Copy leaves; those that are steady, later, with `Snapshot.copy_rest`.

        The bytes of each file come to lie as they will lie in the file, from a multiple of a page
        on: so a disk can take them without another copy.

        Args:
            leaves: What is to be copied.
            steady: What may be copied later; None: nothing.
        """
        places, nbytes = places_in_files(leaves, _PAGE)
        on_device = any(leaf.tensor.is_cuda for leaf in leaves)
        memory = self._reserve(nbytes, pinned=on_device)
        sources = [(leaf, raw(leaf.tensor), _live(leaf.tensor, steady or {})) for leaf in leaves]
        targets = {leaf.path: memory[places[leaf.path] :][: leaf.nbytes] for leaf in leaves}
        for leaf, source, live in sources:
            if live is None:
                self._copy(source, targets[leaf.path])
        if self._stream is not None:  # on the device: what follows must not change these either
            torch.cuda.current_stream().wait_stream(self._stream)
        late, watched = [], []
        for leaf, source, live in sources:
            if live is not None:
                watched.append(Watched(leaf.path, live, live._version, live.data_ptr()))  # noqa: SLF001
                if source.is_cuda:
                    self._copy(source, targets[leaf.path])
                else:
                    late.append((source, targets[leaf.path]))
        event = self._end_of_copies()
        if event is not None and steady is None:
            event.synchronize()
        held = tuple(replace(leaf, tensor=targets[leaf.path]) for leaf in leaves)
        return Snapshot(held, late, watched, event)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.numel() == 0:
            return
        target = target.view(source.dtype).view(source.shape)
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
        if isinstance(one, torch.Tensor) and type(one) in _PLAIN and not one.is_inference():
            yield one
