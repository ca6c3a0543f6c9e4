"""Gradients that FSDP sums over the ranks: once a step, and as sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unbroken.distributed.dtensors import fsdp_modules
from unbroken.training.gradient_sums.data_parallel import Division


class FsdpSum:
    """Lets FSDP exchange gradients in the last backward pass of a step alone.

    The losses are already shares of the step's mean, so gradients are summed, not averaged.

    Args:
        model: With `fully_shard`; its divide factors are set to 1.
        division: The ranks that share each step.

    Attributes:
        lanes: 1: FSDP adds gradients in its own order.
    """

    def __init__(self, model: nn.Module, division: Division) -> None:
        self.lanes = 1
        self._modules = fsdp_modules(model)
        self._division = division
        self._loss: Tensor | None = None
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it sums

    def begin(self) -> None:
        """Begin a step: gradients gather on each rank."""
        self._exchange(False)
        self._loss = None

    @contextmanager
    def lane_ends(self) -> Iterator[None]:
        """Exchange the gradients of the step during its last backward pass."""
        self._exchange(True)
        yield

    def add_loss(self, loss: Tensor) -> None:
        """Take the loss of this rank's part of the step."""
        self._loss = loss

    def finish(self) -> Tensor:
        """Return the loss of the whole step, the same bits on all ranks."""
        loss = torch.as_tensor(0.0) if self._loss is None else self._loss
        return loss.new_tensor(self._division.sum([float(loss)])[0])

    def _exchange(self, now: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(now, recurse=False)
