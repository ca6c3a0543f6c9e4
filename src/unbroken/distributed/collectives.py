"""Bytes from rank 0 to all ranks, and sums of tensors over the ranks in one fixed order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unbroken.distributed.group import Group
from unbroken.errors import RankError

# Send bytes from rank 0 to all ranks; name the rank where a collective fails.


_PIECE = 64 << 20  # bytes of one broadcast


@contextmanager
def raising_rank_errors(group: Group) -> Iterator[None]:
    """Turn the error of a collective into one that names the rank."""
    try:
        yield
    except RuntimeError as error:
        group.gather("tensors", None)
        raise RankError("tensors", "could not be exchanged", found=str(error)) from error


class ByteStream:
    """Sends bytes from rank 0 into the buffers of all other ranks; no rank holds them twice.

    Args:
        group: The ranks; all make a stream at the same time, and make the same calls on it.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> ByteStream(SingleProcess()).transfer(memoryview(bytearray(b"alone")))
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._process_group = None if group.world_size == 1 else _for_the_cpu()

    def transfer(self, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of rank 0's buffer, which must be as long.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: The exchange failed though all ranks answer.
        """
        if self._process_group is None or buffer.nbytes == 0:
            return
        whole = torch.frombuffer(buffer, dtype=torch.uint8)
        for start in range(0, buffer.nbytes, _PIECE):
            with raising_rank_errors(self._group):
                dist.broadcast(whole[start : start + _PIECE], src=0, group=self._process_group)


def _for_the_cpu() -> dist.ProcessGroup:
    """Return a process group that carries tensors on the CPU; NCCL alone does not."""
    world = dist.group.WORLD
    if world is not None and torch.device("cpu") in world._device_types:  # noqa: SLF001
        return world
    made: dist.ProcessGroup = dist.new_group(backend="gloo")
    return made


# Sums in one fixed order: that of a binary tree, whoever adds them and when.


class Tree:
    """Adds tensors in pairs, as soon as neighbours are there; holds log2 of their number at most.

    Example:
        >>> import torch
        >>> tree = Tree()
        >>> for number in (1.0, 2.0, 3.0, 4.0):
        ...     tree.add(torch.tensor(number))
        >>> len(tree), tree.total(), len(tree)
        (1, tensor(10.), 0)
    """

    def __init__(self) -> None:
        self._branches: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        """Return how many sums it holds."""
        return len(self._branches)

    def add(self, tensor: Tensor) -> None:
        """Add the next one; it may be changed."""
        height = 0
        while self._branches and self._branches[-1][0] == height:
            tensor = self._branches.pop()[1].add_(tensor)
            height += 1
        self._branches.append((height, tensor))

    def total(self) -> Tensor:
        """Return the sum of all and reset; a tensor without a neighbour is added last."""
        total = self._branches.pop()[1]
        while self._branches:
            total = self._branches.pop()[1].add_(total)
        return total

    def clear(self) -> None:
        """Forget what was added."""
        self._branches.clear()


_AHEAD = 2  # sums whose parts may be under way: a rank that is late does not stop the others


class _Exchange(NamedTuple):
    work: dist.Work
    sent: Tensor
    received: Tensor


class RankSums:
    """Sums tensors over the ranks in the order of a tree, in the background.

    A sum takes two exchanges: each rank gets its own part of every rank's tensor and adds the
    parts in the order of the ranks' tree; then all give their sums to all. The bytes are those
    of an all-reduce in a ring (Patarasuk and Yuan, 2009), but the order of the additions depends
    neither on where in the tensor an element stands nor on the library. Both are all-to-all
    exchanges, which gloo does three times as fast as an all-gather.

    All ranks begin the same sums in the same order.

    Args:
        group: The ranks; says who did not answer, which a collective cannot.
        members: Those that share these sums; None: all.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> sums = RankSums(SingleProcess())
        >>> sums.begin(torch.tensor([1.0, 2.0]))
        >>> sums.finish()
        [tensor([1., 2.])]
    """

    def __init__(self, group: Group, members: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._members = members
        self._size = group.world_size if members is None else members.size()
        self._first: deque[_Exchange] = deque()
        self._second: list[_Exchange] = []
        self._alone: list[Tensor] = []

    def padded(self, numel: int) -> int:
        """Return the padded length of a tensor with `numel` elements."""
        return -(-numel // self._size) * self._size

    def begin(self, tensor: Tensor) -> None:
        """Begin to sum a tensor over the ranks, in place; it is not to be used until `finish`.

        Args:
            tensor: One-dimensional, contiguous, of a `padded` length.
        """
        if self._size == 1:
            self._alone.append(tensor)
            return
        self._first.append(self._exchanged(tensor, torch.empty_like(tensor)))
        if len(self._first) > _AHEAD:
            self._go_on()

    def finish(self) -> list[Tensor]:
        """Return the tensors in the order in which they were begun; each holds its sum.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: The exchange failed though all ranks answer.
        """
        while self._first:
            self._go_on()
        sums = [*self._alone, *(self._received(exchange) for exchange in self._second)]
        self._alone, self._second = [], []
        return sums

    def clear(self) -> None:
        """Forget sums that were begun in this process alone and not finished."""
        self._alone.clear()

    def _go_on(self) -> None:
        """Add the parts of the sum that was begun first, and give the result to all."""
        first = self._first.popleft()
        parts = self._received(first).view(self._size, -1)
        tree = Tree()
        for part in parts:
            tree.add(part)
        parts[1:] = tree.total()  # it stands in parts[0]
        self._second.append(self._exchanged(parts.view(-1), first.sent))

    def _exchanged(self, sent: Tensor, received: Tensor) -> _Exchange:
        with raising_rank_errors(self._group):
            work = dist.all_to_all_single(received, sent, group=self._members, async_op=True)
        return _Exchange(work, sent, received)

    def _received(self, exchange: _Exchange) -> Tensor:
        with raising_rank_errors(self._group):
            exchange.work.wait()
        return exchange.received
