"""One optimizer step: forward and backward over its micro-batches, clipping, the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from unbroken.data import MicroBatch, derive_key
from unbroken.errors import DataError
from unbroken.training.ambient import Randomness
from unbroken.training.division import Division
from unbroken.training.fsdp import FsdpSum
from unbroken.training.lanes import LaneSum
from unbroken.training.loss import LossFn, compute_loss, to_device
from unbroken.training.precision import Precision
from unbroken.training.window import Window


@dataclass(frozen=True)
class Stepped:
    """What one optimizer step gave.

    Attributes:
        loss: The mean loss over all labels of the batch, on the device of the model.
        grad_norm: The norm of the gradients before clipping; None without clipping.
        learning_rate: The learning rate of the first parameter group in this step.
    """

    loss: Tensor
    grad_norm: Tensor | None
    learning_rate: float


class Stepper:
    """Takes optimizer steps; the randomness of each forward pass is derived, never restored.

    Args:
        forward: The model, or its compiled form.
        optimizer: Takes the step.
        scheduler: Stepped with it, unless it follows a metric.
        precision: Autocast, scaling, clipping.
        window: The micro-batches of the unfinished step.
        loss_fn: As `compute_loss` takes it.
        device: Where the model is.
        division: How ranks share the model.
        lanes: Sums gradients lane by lane, and over the ranks; None: one part of the data, one
            lane.
        randomness: The global generators, keyed while a step runs.
        seed: All randomness is derived from it and from the position of each micro-batch.
    """

    def __init__(
        self,
        forward: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        precision: Precision,
        window: Window,
        loss_fn: LossFn | None,
        device: torch.device,
        division: Division,
        lanes: LaneSum | FsdpSum | None,
        randomness: Randomness,
        seed: int,
    ) -> None:
        self._forward = forward
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._precision = precision
        self._window = window
        self._loss_fn = loss_fn
        self._device = device
        self._division = division
        self._lanes = lanes
        self._seed = seed
        self._randomness = randomness

    def run(
        self, micro_batches: Sequence[MicroBatch], after_each: Callable[[MicroBatch], None]
    ) -> Stepped:
        """Finish one optimizer step with these micro-batches.

        Args:
            micro_batches: Those that are still missing in the step.
            after_each: Called after each backward pass.
        """
        in_lane = len(micro_batches) // (1 if self._lanes is None else self._lanes.lanes)
        shares = self._window.shares(micro_batches)
        if self._lanes is not None:
            self._lanes.begin()
        for number, (micro, share) in enumerate(zip(micro_batches, shares, strict=True), 1):
            self._randomness.seed(derive_key(self._seed, "forward", micro.first_position))
            if self._lanes is not None and number % in_lane == 0:
                with self._lanes.lane_ends():
                    self._accumulate(micro, share)
                self._lanes.add_loss(self._window.take_loss())
            else:
                self._accumulate(micro, share)
            after_each(micro)
        if self._lanes is not None:
            self._window.add(self._lanes.finish())
        return self._take_step()

    def _accumulate(self, micro: MicroBatch, share: float) -> None:
        data = to_device(micro.data, self._device)
        with self._division.watched():
            with self._precision.autocast():
                loss = compute_loss(self._forward, data, self._loss_fn)
                loss = loss if share == 1 else loss * share
            self._precision.backward(loss)
        self._window.add(loss)

    def _take_step(self) -> Stepped:
        if self._window.loss is None:
            raise DataError("batch", "the source of batches ended inside a step")
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm, has_stepped = self._precision.step(self._optimizer, trained)
        if has_stepped and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._window.loss
        self._window.clear()
        return Stepped(loss, norm, learning_rate)
