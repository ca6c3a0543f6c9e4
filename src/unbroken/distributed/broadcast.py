"""Send bytes from rank 0 to all ranks; name the rank where a collective fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from unbroken.distributed.group import Group
from unbroken.errors import RankError

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
        >>> ByteStream(SingleProcess()).send(memoryview(bytearray(b"alone")))
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._process_group = None if group.world_size == 1 else _for_the_cpu()

    def send(self, buffer: memoryview) -> None:
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
