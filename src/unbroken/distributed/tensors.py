"""Tensors of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from unbroken.distributed.group import Group
from unbroken.errors import RankError


def gather_tensors(group: Group, tensor: Tensor) -> list[Tensor]:
    """Return this tensor of every rank, by rank, through the default process group.

    Args:
        group: The ranks; says who did not answer, which a collective cannot.
        tensor: Of the same shape and dtype on all ranks.

    Raises:
        RankTimeoutError: `ranks` did not answer in time.
        RankError: The exchange failed though all ranks answer.
    """
    found = [torch.empty_like(tensor) for _ in range(group.world_size)]
    try:
        dist.all_gather(found, tensor.contiguous())
    except RuntimeError as error:
        group.gather("tensors", None)
        raise RankError("tensors", "could not be exchanged", found=str(error)) from error
    return found
