"""What an optimizer step asks of whoever sums its gradients over lanes and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from unbroken.distributed import RankSums
from unbroken.distributed.dtensors import fsdp_modules, is_dtensor
from unbroken.errors import ConfigError
from unbroken.training.config import TrainerConfig
from unbroken.training.gradient_sums.data_parallel import DataParallelLayout
from unbroken.training.gradient_sums.lanes import LaneReducer


class GradientSync(Protocol):
    """Sums the gradients and the loss of one step over lanes and ranks."""

    lanes: int
    """How many lanes this rank has: equal, contiguous parts of its micro-batches."""

    def begin_step(self) -> None:
        """Begin a step, whatever became of the one before."""

    def last_backward(self) -> AbstractContextManager[None]:
        """Take the gradients of a lane during its last backward pass."""

    def add_loss(self, loss: Tensor) -> Tensor | None:
        """Take the loss of a lane; return it where it is to stay in the window."""

    def finish(self) -> Tensor | None:
        """Finish the sums; return the loss of the step, unless it stayed in the window."""


class NoSync:
    """One rank without lanes: gradients gather in the parameters, and the loss in the window."""

    lanes = 1

    def begin_step(self) -> None:
        """Do nothing."""

    def last_backward(self) -> AbstractContextManager[None]:
        """Do nothing: gradients stay where autograd adds them."""
        return nullcontext()

    def add_loss(self, loss: Tensor) -> Tensor | None:
        """Leave the loss in the window."""
        return loss

    def finish(self) -> Tensor | None:
        """Do nothing: the loss is in the window."""
        return None


class FsdpReducer:
    """Lets FSDP exchange gradients in the last backward pass of a step alone.

    The losses are already shares of the step's mean, so gradients are summed, not averaged.

    Args:
        model: With `fully_shard`; its divide factors are set to 1.
        division: The ranks that share each step.

    Attributes:
        lanes: 1: FSDP adds gradients in its own order.
    """

    def __init__(self, model: nn.Module, division: DataParallelLayout) -> None:
        self.lanes = 1
        self._modules = fsdp_modules(model)
        self._division = division
        self._loss: Tensor | None = None
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it sums

    def begin_step(self) -> None:
        """Begin a step: gradients gather on each rank."""
        self._exchange(False)
        self._loss = None

    @contextmanager
    def last_backward(self) -> Iterator[None]:
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


def gradient_sync_for(
    model: nn.Module, config: TrainerConfig, division: DataParallelLayout
) -> GradientSync:
    """Return what sums the gradients of a model as it is shared.

    Raises:
        ConfigError: If the model has batch statistics, which would be those of each portion;
            or if sharded gradients were to be scaled.
    """
    if config.fp16 and any(is_dtensor(p) for p in model.parameters()):
        hint = "use bf16, which needs no gradient scaling"
        raise ConfigError("fp16", "is not for models that are sharded over ranks", hint=hint)
    lanes = config.lanes or division.parts
    if lanes == 1 and not division.by_fsdp:
        return NoSync()
    _refuse_batch_statistics(model)
    if division.by_fsdp:
        return FsdpReducer(model, division)
    sums = RankSums(division.group, division.replicas)
    return LaneReducer(model, lanes // division.parts, division.group, sums)


def _refuse_batch_statistics(model: nn.Module) -> None:
    normal = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 (the base of all of them)
    found = [name for name, m in model.named_modules() if isinstance(m, normal)]
    if found:
        raise ConfigError(
            f"model.{found[0]}",
            "its statistics would be those of each rank's or lane's samples",
            hint="use another normalisation (GroupNorm, LayerNorm), or one rank without lanes",
        )
