"""Optimizer steps: what a window of micro-batches does to the model and to the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from torch.optim.lr_scheduler import ReduceLROnPlateau

from unbroken.data import MicroBatch, derive_key
from unbroken.errors import DataError
from unbroken.training.callback import CallHook
from unbroken.training.gradient_sums.sync import gradient_sync_for
from unbroken.training.metrics import DataDigest
from unbroken.training.progress import epoch_at
from unbroken.training.run_state import RunState
from unbroken.training.setup import Parts
from unbroken.training.step.forward import compute_loss, to_device, tokens_of
from unbroken.training.step.oom_retry import OomRetry
from unbroken.training.step.window import StepResult, Window


class StepRunner:
    """Takes optimizer steps; the randomness of each forward pass is derived, never restored.

    Args:
        parts: The model, its optimizer, and how ranks share it.
        state: Moves on with each micro-batch and each step.
        window: The micro-batches of the unfinished step.
        call: Called with "on_micro_batch_end" after each backward pass.
        retry: What a step that does not fit into memory does.

    Raises:
        ConfigError: If gradients of this model cannot be summed as the configuration says.
    """

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        window: Window,
        call: CallHook,
        retry: OomRetry,
    ) -> None:
        self._parts = parts
        self._state = state
        self._window = window
        self._call = call
        self._retry = retry
        self._loss_fn = parts.loss_fn
        self._seed = state.config.seed
        self._sync = gradient_sync_for(parts.model, state.config, parts.division)
        self._data_digest = DataDigest(state.statistics, parts.division)

    def run(self, micro_batches: Sequence[MicroBatch]) -> StepResult | None:
        """Finish one optimizer step with the micro-batches that are still missing in it.

        Returns:
            None: It did not fit into memory, and is to be tried again in smaller portions.
        """
        state, tokens_before = self._state, self._state.progress.tokens
        result = self._retry.attempt(partial(self._gradients_and_step, micro_batches))
        if result is None:
            return None
        if self._parts.division.parts > 1:
            state.progress = replace(state.progress, tokens=tokens_before + self._window.tokens)
            self._data_digest.step_is_over()
        state.progress = state.progress.after_step(epoch_at(state.progress, self._parts.batches))
        state.statistics.add_step(result)
        return result

    def _gradients_and_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        in_lane = len(micro_batches) // self._sync.lanes
        shares = self._window.shares(micro_batches)
        self._sync.begin_step()
        for number, (micro, share) in enumerate(zip(micro_batches, shares, strict=True), 1):
            self._parts.randomness.seed(derive_key(self._seed, "forward", micro.first_position))
            is_last = number % in_lane == 0
            with self._sync.last_backward() if is_last else nullcontext():
                self._accumulate(micro, share)
            if is_last:
                self._window.loss = self._sync.add_loss(self._window.take_loss())
            self._after_micro_batch(micro)
        if (loss := self._sync.finish()) is not None:
            self._window.loss = loss
        return self._take_step()

    def _accumulate(self, micro: MicroBatch, share: float) -> None:
        data = to_device(micro.data, self._parts.device)
        with self._parts.division.watched():
            with self._parts.precision.autocast():
                loss = compute_loss(self._parts.forward, data, self._loss_fn)
                loss = loss if share == 1 else loss * share
            self._parts.precision.backward(loss)
        self._window.add(loss)

    def _after_micro_batch(self, micro: MicroBatch) -> None:
        self._parts.batches.used(micro)
        if self._state.config.log_data_digest:
            self._data_digest.add(micro.data)
        self._state.progress = self._state.progress.after_micro_batch(
            samples=micro.after.samples, tokens=tokens_of(micro.data)
        )
        self._call("on_micro_batch_end")

    def _take_step(self) -> StepResult:
        optimizer, scheduler = self._parts.optimizer, self._parts.scheduler
        if self._window.loss is None:
            raise DataError("batch", "the source of batches ended inside a step")
        learning_rate = float(optimizer.param_groups[0]["lr"])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm, has_stepped = self._parts.precision.step(optimizer, trained)
        if has_stepped and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        loss = self._window.loss
        self._window.clear()
        return StepResult(loss, norm, learning_rate)
