"""One optimizer step: its micro-batches, its sums, and what it does where memory is short."""

from __future__ import annotations

import copy
import ctypes
import gc
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from unbroken.checkpoint import Difference
from unbroken.data import MicroBatch, Position, derive_key
from unbroken.errors import DataError, OutOfMemoryError, UnbrokenError
from unbroken.training.callback import Callback, CallHook, Hooks, overridden, with_state
from unbroken.training.config_rules import rules_for
from unbroken.training.data_parallel import gradient_sync_for
from unbroken.training.micro_batches import compute_loss, to_device, tokens_of
from unbroken.training.run_state import DataDigest, Progress, RunState, StepResult, Window, epoch_at
from unbroken.training.setup import Parts
from unbroken.verification import StepVerifier, cloned

# Memory that a step frees stays with the process, for the next step to use.


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_ARENA_BLOCK = 32 << 20
_NEVER = 2**31 - 1


def keep_freed_memory(device: torch.device) -> bool:
    """Ask the C library not to give memory back to the system after each step.

    A step frees its activations and gradients, and the next one needs as much again. Whether
    glibc gives it back in between depends on what happens to lie at the end of the heap; where it
    does, the system must clear and map thousands of pages in every step (see mallopt(3)). GPU
    memory has PyTorch's caching allocator for the same reason.

    Args:
        device: Where the model is; only on "cpu" something is done.

    Returns:
        Whether the C library has been told: it is glibc, and the model is on the CPU.

    Example:
        >>> keep_freed_memory(torch.device("meta"))
        False
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    return bool(kept and libc.mallopt(_MMAP_THRESHOLD, _LARGEST_ARENA_BLOCK))


def give_back_freed_memory(device: torch.device) -> None:
    """Release free memory that is kept, so that blocks of other sizes can use it.

    Example:
        >>> give_back_freed_memory(torch.device("cpu"))
    """
    gc.collect()  # graphs that stand in circles
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    elif device.type == "cuda":
        torch.cuda.empty_cache()


# The errors by which PyTorch says that there is no memory left.


_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had.

    CUDA's own allocator has a class for it; the CPU's, and libraries that ask the driver for
    memory themselves, say it in the text of a RuntimeError.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, UnbrokenError):
        return False
    text = str(error)
    return any(sign in text for sign in _SIGNS)


@dataclass(frozen=True)
class StepSnapshot:
    """What the micro-batches of a step change, as it was before the first of them."""

    progress: Progress
    position: Position
    data_digest: str | None
    buffers: tuple[tuple[Tensor, Tensor], ...]
    callbacks: tuple[tuple[Callback, Any], ...]

    @classmethod
    def of(cls, parts: Parts, state: RunState, callbacks: Sequence[Callback]) -> StepSnapshot:
        """Take a snapshot; buffers and the state of callbacks are copied."""
        buffers = tuple((b, b.detach().clone()) for b in parts.model.buffers())
        following = [c for c in with_state(callbacks).values() if _follows_portions(c)]
        states = tuple((c, copy.deepcopy(c.state_dict())) for c in following)
        position = Position() if parts.source is None else parts.source.position
        return cls(state.progress, position, state.statistics.data_digest, buffers, states)

    def restore(self, parts: Parts, state: RunState, window: Window) -> None:
        """Undo the step, as if it had not begun."""
        parts.model.zero_grad(set_to_none=True)
        parts.optimizer.zero_grad(set_to_none=True)  # a loss may have parameters too
        window.clear()
        state.progress = self.progress
        state.statistics.data_digest = self.data_digest
        if parts.source is not None:
            parts.source.position = self.position
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for callback, before in self.callbacks:
            callback.load_state_dict(before)


def _follows_portions(callback: Callback) -> bool:
    return bool(overridden([callback], "on_micro_batch_end"))


class OomRetry:
    """Halves the micro-batch when a step does not fit, if `micro_batch_size="auto"` asks for it."""

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        window: Window,
        hooks: Hooks,
        announce: Callable[[dict[str, Any], str], None],
    ) -> None:
        self._parts = parts
        self._state = state
        self._window = window
        self._hooks = hooks
        self._announce = announce

    def attempt(self, step: Callable[[], StepResult]) -> StepResult | None:
        """Run one step; None: it did not fit and is to be tried again in smaller portions.

        Raises:
            OutOfMemoryError: If it did not fit and cannot be made smaller, or must not be.
        """
        parts, state = self._parts, self._state
        start = None
        if parts.may_halve:
            start = StepSnapshot.of(parts, state, self._hooks.callbacks)
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if start is None or not self._can_be_halved(start):
                raise self._out_of_memory(error) from error
        # After the error is gone, and with it what it held:
        start.restore(parts, state, self._window)
        give_back_freed_memory(parts.device)
        self._halve()
        return None

    def _halve(self) -> None:
        state, before = self._state, self._state.config.per_forward
        size = before // 2
        state.use_micro_batch(size, self._parts.source)
        verdict, effect = rules_for(self._parts.model)["micro_batch_size"]
        difference = Difference("micro_batch_size", before, size, effect, verdict)
        report = state.resume_report
        state.resume_report = replace(report, differences=(*report.differences, difference))
        event = {"event": "micro_batch_size", "step": state.progress.step, "from": before}
        self._announce({**event, "to": size, "verdict": verdict}, f"out of memory: {difference}")

    def _can_be_halved(self, start: StepSnapshot) -> bool:
        config, pending = self._state.config, self._state.progress.pending
        verdict, _ = rules_for(self._parts.model)["micro_batch_size"]
        in_update = pending == config.gradient_accumulation_steps
        return (
            verdict == "equivalent"
            and config.per_forward % 2 == 0
            and config.exact_resume != "require"
            and not in_update
            and start.progress.pending == 0
        )

    def _out_of_memory(self, error: BaseException) -> OutOfMemoryError:
        config, is_auto = self._state.config, self._parts.may_halve
        size = config.per_forward
        auto = "" if is_auto else ' or "auto"'
        smaller = f"micro_batch_size={size // 2}{auto}; " if size > 1 else ""
        if is_auto and config.exact_resume == "require":
            smaller = f'exact_resume="prefer", so that it may be halved; {smaller}'
        return OutOfMemoryError(
            f"step {self._state.progress.step + 1}",
            f"does not fit into the memory of {self._parts.device}",
            found=f"micro_batch_size {size}: {error}",
            hint=f"choose a smaller portion: {smaller}gradient_checkpointing=True saves more; "
            "the batch, and so the training, stays the same",
        )


class StepRunner:
    """Takes optimizer steps; the randomness of each forward pass is derived, never restored.

    Args:
        verifier: Runs some steps twice; None: none.

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
        verifier: StepVerifier | None = None,
    ) -> None:
        self._parts = parts
        self._state = state
        self._window = window
        self._call = call
        self._retry = retry
        self._verifier = verifier
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
        step, verifier = state.progress.step + 1, self._verifier
        if verifier is not None:
            verifier.step_begins(step)
        result = self._retry.attempt(partial(self._gradients_and_step, micro_batches))
        if result is None:
            return None
        if self._parts.division.parts > 1:
            state.progress = replace(state.progress, tokens=tokens_before + self._window.tokens)
            self._data_digest.step_is_over()
        state.progress = state.progress.after_step(epoch_at(state.progress, self._parts.batches))
        state.statistics.add_step(result)
        if verifier is not None:
            verifier.step_ends(step)
        return result

    def _gradients_and_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        step = self._state.progress.step + 1
        if self._verifier is None or not self._verifier.is_due(step):
            self._gradients(micro_batches)
        else:
            self._verified_gradients(self._verifier, micro_batches)
        return self._take_step()

    def _verified_gradients(
        self, verifier: StepVerifier, micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Run forward and backward twice, from the same state and on the same data."""
        state, progress = self._state, self._state.progress
        put_back = self._window.put_back()
        again = [replace(micro, data=cloned(micro.data)) for micro in micro_batches]

        def run_again() -> Tensor | None:
            put_back()
            state.progress = progress
            data = [replace(micro, data=cloned(micro.data)) for micro in again]
            return self._gradients(data, is_repeated=True)

        first = partial(self._gradients, micro_batches)
        verifier.verify(progress.step + 1, first, run_again)

    def _gradients(
        self, micro_batches: Sequence[MicroBatch], *, is_repeated: bool = False
    ) -> Tensor | None:
        """Run forward and backward of the micro-batches; return the loss of the step so far."""
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
            self._after_micro_batch(micro, is_repeated=is_repeated)
        if (loss := self._sync.finish()) is not None:
            self._window.loss = loss
        return self._window.loss

    def _accumulate(self, micro: MicroBatch, share: float) -> None:
        data = to_device(micro.data, self._parts.device)
        with self._parts.division.watched():
            with self._parts.precision.autocast():
                loss = compute_loss(self._parts.forward, data, self._loss_fn)
                loss = loss if share == 1 else loss * share
            self._parts.precision.backward(loss)
        self._window.add(loss)

    def _after_micro_batch(self, micro: MicroBatch, *, is_repeated: bool) -> None:
        if not is_repeated:  # the position has moved, and stays there
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
