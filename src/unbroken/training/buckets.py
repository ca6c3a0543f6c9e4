"""Gradients of many parameters as few flat tensors, which ranks exchange quickly."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn

from unbroken.capture.dtypes import is_dense
from unbroken.distributed import Tree
from unbroken.distributed.sharding import local_part, sharded_as, with_mesh_of

_BYTES = 8 << 20  # of a bucket: a larger one is sent later, smaller ones cost more messages


def in_buckets(parameters: Iterable[nn.Parameter], padded: Callable[[int], int]) -> list[Bucket]:
    """Deal parameters to buckets, the last one first: its gradient is there first.

    The buckets are the same in each step and each process, unlike those of
    `DistributedDataParallel`, which follow the order in which gradients came in the first step.

    Args:
        parameters: In the order of the model.
        padded: From a number of elements to the length of a bucket's flat tensor.
    """
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in reversed(list(parameters)):
        bucket = open_buckets.get((parameter.dtype, parameter.device), [])
        if not bucket or _bytes([*bucket, parameter]) > _BYTES:
            buckets.append(bucket := [])
            open_buckets[parameter.dtype, parameter.device] = bucket
        bucket.append(parameter)
    return [Bucket(bucket, padded) for bucket in buckets]


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(part.numel() * part.element_size() for part in map(local_part, parameters))


class Bucket:
    """Some parameters of one dtype and device, and the sum of their gradients over the lanes.

    Of a parameter that ranks hold together it is the part of this rank.

    Args:
        parameters: In the order in which their gradients are expected.
        padded: From a number of elements to the length of the flat tensor.

    Attributes:
        parameters: As given.
        tree: Adds the lanes of this rank.
        with_gradient: Those that had a gradient in any lane of the step, by id.
        is_taken: Whether the gradients of the present lane are in the tree.
    """

    def __init__(self, parameters: list[nn.Parameter], padded: Callable[[int], int]) -> None:
        self.parameters = parameters
        self.tree = Tree()
        self.with_gradient: set[int] = set()
        self.is_taken = True
        self._parts = [local_part(p) for p in parameters]
        self._sizes = [part.numel() for part in self._parts]
        self._used = sum(self._sizes)
        self._numel = padded(self._used)
        self._missing: set[int] = set()

    def begin_step(self) -> None:
        """Forget what was taken."""
        self.tree.clear()
        self.with_gradient.clear()

    def expect_all(self) -> None:
        """Begin the last backward pass of a lane."""
        self.is_taken, self._missing = False, {id(p) for p in self.parameters}

    def arrived(self, parameter: Tensor) -> None:
        """Take note that a gradient is there."""
        self._missing.discard(id(parameter))

    @property
    def is_complete(self) -> bool:
        """Whether all gradients of the lane are there."""
        return not self._missing

    def take(self) -> None:
        """Add the gradients to the tree; the parameters have none after it."""
        self.is_taken = True
        flat = self._parts[0].detach().new_empty(self._numel)
        flat[self._used :].zero_()
        into, gradients = [], []
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            if parameter.grad is None:
                view.zero_()
                continue
            into.append(view)
            gradients.append(local_part(sharded_as(parameter, parameter.grad)))
            self.with_gradient.add(id(parameter))
            parameter.grad = None
        if gradients:
            torch._foreach_copy_(into, gradients)
        self.tree.add(flat)

    def give(self, flat: Tensor, absent: Container[int]) -> None:
        """Give the parameters their parts of a sum as gradients; those in `absent` have none."""
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            parameter.grad = None if id(parameter) in absent else with_mesh_of(parameter, view)

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat[: self._used], self._sizes)
        return [_shaped_as(p, part) for p, part in zip(self._parts, parts, strict=True)]


def _shaped_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Return a flat part in the shape of a parameter, in memory alike, as autograd has it."""
    if parameter.is_contiguous() or not is_dense(tuple(parameter.shape), parameter.stride()):
        return part.view(parameter.shape)
    return part.as_strided(parameter.shape, parameter.stride())
