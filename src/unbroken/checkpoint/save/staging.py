"""A copy of what is saved, so that training goes on while it is written.

After an optimizer's step nothing changes parameters and optimizer state until its next step. So
they may be copied while the next forward and backward passes run: CheckFreq (FAST '21),
DataStates-LLM (HPDC '24). What makes that exact here: the next step waits for the copy, and a
tensor that something else changed before then is found by its version. A change through `.data`, or
from outside PyTorch, moves no version: such a one is found by a digest that was taken before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.capture import TensorLeaf, raw
from unbroken.checkpoint.save.rank_shares import gathered, rows_of_sample, sample_of
from unbroken.distributed.dtensors import local_part
from unbroken.storage.direct_io import aligned_buffer
from unbroken.store import offsets_in_files
from unbroken.store.format.canonical_json import Digester, digest_of
from unbroken.store.format.safetensors_file import Copied

# Copies from CUDA devices into pinned memory, which run while the devices compute.


class DeviceCopies:
    """Copies of one snapshot, on a stream of its own for each device.

    A copy begins when all that was launched before it on its device's current stream is done.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []

    def begin(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy a tensor; its memory stays taken until the copy is done."""
        stream = self._stream_of(source.device)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def hold_back(self) -> None:
        """Let what the devices are given from now on wait for the copies begun so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def end(self) -> None:
        """All copies are begun."""
        self._events = [(device, one.record_event()) for device, one in self._streams.items()]

    def hold_back_for_all(self) -> None:
        """Let what the devices are given from now on wait for all copies; from any thread."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Wait for all copies; from any thread."""
        for _, event in self._events:
            event.synchronize()

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams[device] = stream
        return self._streams[device]


_PAGE = 4096
_SMALL = 1 << 20  # bytes that are copied sooner than PyTorch has begun
_PIECE = 1 << 20  # copied, and then hashed while it is in the processor's cache
_PLAIN = (torch.Tensor, nn.Parameter)
_MOST = 64  # saves, in which the digests of all tensors in turn are of all bytes
_FEW = 8 << 20  # bytes, of which the digests are of all bytes in each save: 1 ms
_BLOCK = 256  # bytes at each offset of a sample
StableTensors = Mapping[tuple[int, int], Sequence[torch.Tensor]]
"""Tensors that only an optimizer's step is expected to change, by address and length."""


class WatchedTensor(NamedTuple):
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


class SourceDigests:
    """What live tensors hold before they are copied: digests of all bytes, or a sample.

    Args:
        leaves: The tensors.
        turn: Chooses the offsets of the sample; None: the digests.
        samples: The sample of each that is on a device: of one kind, and on one device.
    """

    def __init__(
        self, leaves: Sequence[TensorLeaf], turn: int | None, samples: Sequence[torch.Tensor] = ()
    ) -> None:
        self.on_device = leaves[0].tensor.is_cuda
        self._leaves, self._turn = leaves, turn
        self._digests = [] if turn is not None else [_digest(leaf) for leaf in leaves]
        self._blocks: list[list[bytes]] = []
        if turn is not None and not self.on_device:
            self._blocks = [_blocks(one.tensor.data_ptr(), one.nbytes, turn) for one in leaves]
        self._lengths = [sample.numel() for sample in samples]
        self._sample = gathered(samples) if samples else torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, leaves: Sequence[TensorLeaf], number: int) -> list[SourceDigests]:
        """Look at tensors that are to be copied in the save of this number."""
        on_host = [leaf for leaf in leaves if not leaf.tensor.is_cuda]
        wholly = _in_turn(on_host, number)
        known = {leaf.path for leaf in wholly}
        rest = [leaf for leaf in on_host if leaf.path not in known]
        alike: dict[tuple[torch.device, bool], list[tuple[TensorLeaf, torch.Tensor]]] = {}
        for leaf in leaves:
            if leaf.tensor.is_cuda:
                sample = sample_of(leaf.tensor, number, block=_BLOCK)
                alike.setdefault((sample.device, len(sample) > 1), []).append((leaf, sample))
        kinds = [zip(*pairs, strict=True) for pairs in alike.values()]
        found = [cls(these, number, samples) for these, samples in kinds]
        found += [cls(rest, number)] if rest else []
        return [cls(wholly, None), *found] if wholly else found

    def bring(self, copies: DeviceCopies) -> None:
        """Begin to copy what is on a device."""
        if self.on_device:
            on_device, host = self._sample, torch.empty(self._sample.shape, dtype=torch.uint8)
            self._sample = host.pin_memory()
            copies.begin(on_device, self._sample)

    def differing(
        self, memory: torch.Tensor, offsets: Mapping[str, int], digests: Mapping[str, str]
    ) -> list[str]:
        """Return the paths of tensors whose copies hold other bytes."""
        paths = [leaf.path for leaf in self._leaves]
        if self._turn is None:
            return [p for p, seen in zip(paths, self._digests, strict=True) if digests[p] != seen]
        if not self.on_device:
            begin = memory.data_ptr()
            return [
                one.path
                for one, seen in zip(self._leaves, self._blocks, strict=True)
                if _blocks(begin + offsets[one.path], one.nbytes, self._turn) != seen
            ]
        copies = [memory[offsets[one.path] :][: one.nbytes] for one in self._leaves]
        samples = [sample_of(copy, self._turn, block=_BLOCK) for copy in copies]
        differs = gathered(samples) != self._sample
        if not differs.any():
            return []
        pieces = zip(paths, torch.split(differs, self._lengths), strict=True)
        return [path for path, piece in pieces if piece.any()]


def _blocks(address: int, nbytes: int, turn: int) -> list[bytes]:
    """Return the sample of a tensor in memory, without a view of it for each."""
    start, count, length, row = rows_of_sample(nbytes, turn, block=_BLOCK)
    memory: Any = (ctypes.c_char * nbytes).from_address(address)  # a slice of it is bytes
    return [memory[at : at + length] for at in range(start, start + count * row, row)]


def _in_turn(leaves: Sequence[TensorLeaf], number: int) -> Sequence[TensorLeaf]:
    """Return those of which a save looks at all bytes: all in the first save, then some in turn.

    An edit of a few elements through `.data` that begins later is found when it is their turn:
    of small models in each save, of large ones, where all would cost too much, within `_MOST`.
    """
    nbytes = sum(leaf.nbytes for leaf in leaves)
    saves = min(_MOST, -(-nbytes // _FEW))
    if number == 0 or saves <= 1:
        return leaves
    share, turn = nbytes // saves + 1, number % saves
    ends = accumulate(leaf.nbytes for leaf in leaves)
    return [leaf for leaf, end in zip(leaves, ends, strict=True) if (end - 1) // share == turn]


def _digest(leaf: TensorLeaf) -> str:
    digester = Digester()
    for chunk in leaf.chunks():
        digester.update(chunk)
    return digester.digest()


class StagedState:
    """The bytes of leaves at one moment.

    Args:
        leaves: The leaves, over live memory.
        memory: Where their copies lie.
        offsets: Where in it each one lies, by path.
        late: Those that are not copied yet.
        watched: The live tensors behind these, and behind copies from a device that still run.
        device_copies: Copies from devices, which may still run.
        seen: What is known of the live bytes of all these.

    Attributes:
        torn: The paths of tensors whose copies are not what they were when the snapshot began;
            known when `copy_rest` and `wait_for_devices` have ended.
    """

    def __init__(
        self,
        leaves: Sequence[TensorLeaf],
        memory: torch.Tensor,
        offsets: Mapping[str, int],
        late: list[TensorLeaf],
        watched: Sequence[WatchedTensor],
        device_copies: DeviceCopies,
        seen: Sequence[SourceDigests],
    ) -> None:
        self.torn: tuple[str, ...] = ()
        self._seen = seen
        self._leaves = leaves
        self._memory = memory
        self._offsets = offsets
        self._late = late
        self._watched = watched
        self._device_copies = device_copies
        self._digests: dict[str, str] = {}

    def leaves(self) -> tuple[TensorLeaf, ...]:
        """Return the leaves as they were copied, with their digests."""
        memory = self._memory.numpy().data
        return tuple(self._copied(leaf, memory) for leaf in self._leaves)

    def copy_rest(self) -> None:
        """Copy what was not copied at once; called once, from any thread.

        It is hashed while it is in the processor's cache: to read memory twice costs more.
        """
        address, memory = self._memory.data_ptr(), self._memory.numpy().data
        for leaf in self._late:
            digester, offset = Digester(), self._offsets[leaf.path]
            for begin in range(0, leaf.nbytes, _PIECE):
                count, start = min(_PIECE, leaf.nbytes - begin), offset + begin
                _move(leaf, begin, count, address + start)
                digester.update(memory[start : start + count])
            self._digests[leaf.path] = digester.digest()
        self._late = []
        self._compare(on_device=False)

    def _copied(self, leaf: TensorLeaf, memory: memoryview) -> TensorLeaf:
        start, digest = self._offsets[leaf.path], self._digests.get(leaf.path)
        if digest is None:
            digest = digest_of(memory[start : start + leaf.nbytes])
        return leaf._replace(copied=Copied(memory, start, digest))

    def wait_for_devices(self) -> None:
        """Wait for the copies from devices."""
        self._device_copies.wait()
        self._compare(on_device=True)

    def _compare(self, *, on_device: bool) -> None:
        """Find copies of what was changed before it was copied."""
        for one in self._seen:
            if one.on_device == on_device:
                self.torn += tuple(one.differing(self._memory, self._offsets, self._digests))

    def hold_back_devices(self) -> None:
        """Let what is launched on current streams from now on wait for the copies."""
        self._device_copies.hold_back_for_all()

    def modified(self) -> tuple[str, ...]:
        """Return the paths of tensors that were changed since the snapshot began."""
        return tuple(one.path for one in self._watched if not one.is_as_it_was)


class StagingBuffer:
    """The memory for one snapshot at a time, used again for each: fresh memory is slow."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._planned: tuple[list[Any], tuple[dict[str, int], int]] = ([], ({}, 0))
        self._taken = 0

    def take(
        self, leaves: Sequence[TensorLeaf], stable: StableTensors | None = None
    ) -> StagedState:
        """Copy leaves; those that are stable, later, with `StagedState.copy_rest`.

        The bytes of each file come to lie as they will lie in the file, from a multiple of a page
        on: so a disk can take them without another copy.

        Args:
            leaves: What is to be copied.
            stable: What may be copied later; None: nothing.
        """
        offsets, nbytes = self._offsets(leaves)
        on_device = any(leaf.tensor.is_cuda for leaf in leaves)
        memory, copies = self._reserve(nbytes, pinned=on_device), DeviceCopies()
        each = [(leaf, _live(leaf.tensor, stable or {})) for leaf in leaves]
        waiting = [(leaf, live) for leaf, live in each if live]
        seen = SourceDigests.of(
            [leaf for leaf, _ in waiting], self._taken
        )  # before a copy is begun
        self._taken += stable is not None
        for leaf, live in each:
            if not live:
                _copy(leaf, memory, offsets, copies)
        copies.hold_back()  # what a device does next must not change these either
        for leaf, _ in waiting:
            if leaf.tensor.is_cuda:
                _copy(leaf, memory, offsets, copies)
        for one in seen:
            one.bring(copies)
        copies.end()
        if stable is None:
            copies.wait()
        on_host = [leaf for leaf, _ in waiting if not leaf.tensor.is_cuda]
        watched = [
            WatchedTensor(leaf.path, one, one._version, one.data_ptr())  # noqa: SLF001 (as above)
            for leaf, live in waiting
            for one in live
        ]
        return StagedState(leaves, memory, offsets, on_host, watched, copies, seen)

    def _offsets(self, leaves: Sequence[TensorLeaf]) -> tuple[dict[str, int], int]:
        """Return where leaves lie; the same as before if they are the same as before."""
        key = [(leaf.path, leaf.file, leaf.name, leaf.dtype, leaf.shape) for leaf in leaves]
        if key != self._planned[0]:
            self._planned = (key, offsets_in_files(leaves, _PAGE))
        return self._planned[1]

    def _reserve(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        """Return memory that starts at a page; the same as before if that is enough."""
        if len(self._memory) < nbytes or self._memory.is_pinned() != pinned:
            self._memory = torch.empty(0, dtype=torch.uint8)  # gives the old memory back first
            self._memory = _pinned(nbytes) if pinned else _plain(nbytes)
        return self._memory


def _plain(nbytes: int) -> torch.Tensor:
    """Return memory that forked processes do not get: sharing its pages would double them."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(aligned_buffer(nbytes, inherited=False), dtype=torch.uint8)


def _pinned(nbytes: int) -> torch.Tensor:
    fresh = torch.empty(nbytes + _PAGE, dtype=torch.uint8, pin_memory=True)
    return fresh[-fresh.data_ptr() % _PAGE :]


def _copy(
    leaf: TensorLeaf, memory: torch.Tensor, offsets: Mapping[str, int], copies: DeviceCopies
) -> None:
    if leaf.nbytes <= _SMALL and leaf.tensor.is_cpu and leaf.tensor.is_contiguous():
        _move(leaf, 0, leaf.nbytes, memory.data_ptr() + offsets[leaf.path])
        return
    source = raw(leaf.tensor)
    target = memory[offsets[leaf.path] :][: leaf.nbytes].view(source.dtype).view(source.shape)
    if source.is_cuda:
        copies.begin(source, target)
    else:
        target.copy_(source)


def _move(leaf: TensorLeaf, begin: int, count: int, address: int) -> None:
    """Copy bytes of a contiguous leaf; other threads of Python go on meanwhile."""
    ctypes.memmove(address, leaf.tensor.data_ptr() + begin, count)


def _live(tensor: torch.Tensor, stable: StableTensors) -> Sequence[torch.Tensor]:
    """Return the stable tensors that have just this memory, in this order, if there are any."""
    live = stable.get(_place(tensor), ())
    return live if live and tensor.is_contiguous() else ()


def stable_tensors(
    objects: Mapping[str, object], leaves: Sequence[TensorLeaf], unstable: Collection[str]
) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Return the parameters, and the optimizers' state: an optimizer's step alone changes them.

    Args:
        objects: What is saved, by name; also lists and dicts of objects.
        leaves: What was captured of them.
        unstable: The paths of leaves that something else does change.
    """
    stable: dict[tuple[int, int], list[torch.Tensor]] = {}
    for value in _flattened(objects):
        for tensor in _stable_in(value):
            if tensor.numel() > 1:
                stable.setdefault(_place(tensor), []).append(tensor)
    for leaf in leaves:
        if leaf.path in unstable:
            stable.pop(_place(leaf.tensor), None)
    return stable


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return (tensor.data_ptr(), tensor.nbytes)


def _flattened(value: object) -> Iterator[object]:
    """Yield the objects in groups of objects."""
    if type(value) is dict:
        for one in value.values():
            yield from _flattened(one)
    elif type(value) in (list, tuple):
        for one in value:  # type: ignore[attr-defined]
            yield from _flattened(one)
    else:
        yield value


def _stable_in(value: object) -> Iterator[torch.Tensor]:
    tensors: Collection[object] = ()
    if isinstance(value, nn.Module):
        tensors = list(value.parameters())
    elif isinstance(value, Optimizer):
        states = (state for state in value.state.values() if isinstance(state, dict))
        tensors = [one for state in states for one in state.values()]
    for one in tensors:
        if isinstance(one, torch.Tensor):
            here = local_part(one)
            if type(here) in _PLAIN and not here.is_inference() and _is_watchable(here, one):
                yield here


def _is_watchable(here: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Tell whether a change is seen: not where other tensors lie on the same memory.

    A change of a flat buffer, say, does not move the versions of parameters that lie on it.
    """
    if not (here.is_cpu or here.is_cuda):
        return False
    is_part = here is not tensor  # of a sharded tensor, whose memory may be longer
    return is_part or here.untyped_storage().nbytes() == here.nbytes
