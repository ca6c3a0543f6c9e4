"""Lanes: gradients summed in one fixed order, on however many ranks they are computed.

A step's micro-batches are dealt to L lanes in equal, contiguous parts, and ranks take whole lanes.
Each lane's gradient is computed by itself, and the lanes are added in one binary tree: neighbours
first, then neighbours of these. What a rank holds of the tree is a whole branch of it, so the sums
are the same additions in the same order on 1, 2, 4, ... L ranks, and their bits are the same.

All this happens while the last backward pass of a lane runs: as soon as all gradients of a bucket
are there, they are taken into the tree, and in the last lane its sum is sent to the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unbroken.capture.dtypes import is_dense
from unbroken.distributed import Group, RankSums, Tree
from unbroken.distributed.dtensors import local_part, sharded_as, with_mesh_of
from unbroken.errors import ConfigError

# Gradients of many parameters as few flat tensors, which ranks exchange quickly.


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


class LaneReducer:
    """Sums the gradients and the loss of one step, lane by lane, and then over the ranks.

    A parameter without a gradient in a lane counts as zeros there; one that has none in any lane
    has none in the end.

    Args:
        model: Whose parameters hold the gradients.
        lanes: How many lanes this rank has.
        group: The ranks of the run.
        sums: Adds over the ranks that share each step.
    """

    def __init__(self, model: nn.Module, lanes: int, group: Group, sums: RankSums) -> None:
        self.lanes = lanes
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._group, self._sums = group, sums
        self._buckets: list[Bucket] = []
        self._hooks: list[RemovableHandle] = []
        self._losses = Tree()
        self._lanes_taken = self._buckets_taken = 0
        self._is_ending = False

    def begin_step(self) -> None:
        """Begin a step, whatever became of the one before."""
        trainable = [parameter for parameter in self._names if parameter.requires_grad]
        laid_out = {id(p) for bucket in self._buckets for p in bucket.parameters}
        if {id(parameter) for parameter in trainable} != laid_out:
            self._lay_out(trainable)
        for bucket in self._buckets:
            bucket.begin_step()
        self._sums.clear()
        self._losses.clear()
        self._lanes_taken, self._is_ending = 0, False

    def _lay_out(self, trainable: list[nn.Parameter]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._buckets = in_buckets(trainable, self._sums.padded)
        notify = partial(partial, _on_gradient_ready, ref(self))
        hooks = [(notify(number), bucket) for number, bucket in enumerate(self._buckets)]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for hook, bucket in hooks
            for parameter in bucket.parameters
        ]

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Take the gradients of a lane during its last backward pass; none is left after it."""
        self._buckets_taken, self._is_ending = 0, True
        for bucket in self._buckets:
            bucket.expect_all()
        try:
            yield
        finally:
            self._is_ending = False
        for bucket in self._buckets[self._buckets_taken :]:
            self._take(bucket)
        self._lanes_taken += 1

    def on_gradient(self, number: int, parameter: Tensor) -> None:
        """Take the buckets that are complete, in the one order that all ranks have."""
        if not self._is_ending:
            return
        bucket = self._buckets[number]
        if bucket.is_taken:
            raise self._twice(parameter)
        bucket.arrived(parameter)
        while self._buckets_taken < len(self._buckets):
            if not self._buckets[self._buckets_taken].is_complete:
                break
            self._take(self._buckets[self._buckets_taken])

    def _take(self, bucket: Bucket) -> None:
        bucket.take()
        self._buckets_taken += 1
        if self._lanes_taken == self.lanes - 1:
            self._sums.begin(bucket.tree.total())

    def add_loss(self, loss: Tensor) -> None:
        """Count the loss of a lane; it travels as float64, the same bits on all ranks."""
        self._losses.add(loss.detach().double())

    def finish(self) -> Tensor:
        """Give the parameters the sum over all lanes of all ranks; return that of the losses."""
        loss = self._losses.total()
        self._sums.begin(torch.nn.functional.pad(loss.view(1), (0, self._sums.padded(1) - 1)))
        absent = self._absent_on_all()
        *flats, losses = self._sums.finish()
        for bucket, flat in zip(self._buckets, flats, strict=True):
            bucket.give(flat, absent)
        return losses[0].float()

    def _absent_on_all(self) -> set[int]:
        """Return the ids of the parameters that had no gradient in any lane of any rank."""
        had = {one for bucket in self._buckets for one in bucket.with_gradient}
        own = [place for place, p in enumerate(self._names) if p.requires_grad and id(p) not in had]
        ranks: Any = self._group.gather("parameters without a gradient", own)
        parameters = list(self._names)
        return {id(parameters[place]) for place in set(ranks[0]).intersection(*ranks[1:])}

    def _twice(self, parameter: Tensor) -> ConfigError:
        name = next(name for p, name in self._names.items() if p is parameter)
        return ConfigError(
            f"model.{name}",
            "had a second gradient in one backward pass, after the first was sent",
            hint="gradient checkpointing: use_reentrant=False",
        )


def _on_gradient_ready(reducer: ref[LaneReducer], bucket: int, parameter: Tensor) -> None:
    """Pass a gradient on; weakly, as the garbage collector does not see what a hook holds."""
    if (there := reducer()) is not None:
        there.on_gradient(bucket, parameter)
