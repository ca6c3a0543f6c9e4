"""A step that does not fit into the device's memory: told by name, or taken in smaller portions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unbroken.checkpoint import Difference
from unbroken.data import MapSource, Position
from unbroken.errors import ConfigError, DeviceMemoryError, UnbrokenError
from unbroken.training.callback import Callback, overridden, with_state
from unbroken.training.config_rules import rules_for
from unbroken.training.memory import give_back_freed_memory
from unbroken.training.progress import Progress
from unbroken.training.step import Stepped

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


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
class StepStart:
    """What the micro-batches of a step change, as it was before the first of them."""

    progress: Progress
    position: Position
    data_digest: str | None
    buffers: tuple[tuple[Tensor, Tensor], ...]
    callbacks: tuple[tuple[Callback, Any], ...]

    @classmethod
    def of(cls, trainer: Trainer) -> StepStart:
        """Take note of it; buffers and the state of callbacks are copied."""
        buffers = tuple((b, b.detach().clone()) for b in trainer.model.buffers())
        following = [c for c in with_state(trainer.callbacks).values() if _follows_portions(c)]
        callbacks = tuple((c, copy.deepcopy(c.state_dict())) for c in following)
        position = Position() if trainer.source is None else trainer.source.position
        digest = trainer.statistics.data_digest
        return cls(trainer.progress, position, digest, buffers, callbacks)

    def put_back(self, trainer: Trainer) -> None:
        """Make it as if the step had not been begun."""
        trainer.model.zero_grad(set_to_none=True)
        trainer.optimizer.zero_grad(set_to_none=True)  # a loss may have parameters too
        trainer.window.clear()
        trainer.progress = self.progress
        trainer.statistics.data_digest = self.data_digest
        if trainer.source is not None:
            trainer.source.position = self.position
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for callback, state in self.callbacks:
            callback.load_state_dict(state)


def _follows_portions(callback: Callback) -> bool:
    return bool(overridden([callback], "on_micro_batch_end"))


class Halving:
    """Halves the micro-batch when a step does not fit, if `micro_batch_size="auto"` asks for it.

    Args:
        trainer: Its configuration has the size in use from then on.

    Raises:
        ConfigError: If "auto" is asked for data whose batches are not cut here.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.is_auto = trainer.config.micro_batch_size == "auto"
        if (
            self.is_auto
            and trainer.source is not None
            and not isinstance(trainer.source, MapSource)
        ):
            raise ConfigError(
                "micro_batch_size",
                '"auto" needs a map-style data set: a loader makes its batches itself',
                found=type(trainer.source).__name__,
            )

    def attempt(self, step: Callable[[], Stepped]) -> Stepped | None:
        """Run one step; None: it did not fit and is to be tried again in smaller portions.

        Raises:
            DeviceMemoryError: If it did not fit and cannot be made smaller, or must not be.
        """
        start = StepStart.of(self._trainer) if self.is_auto else None
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if start is None or not self._can_be_halved(start):
                raise self._as_ours(error) from error
        start.put_back(self._trainer)  # after the error is gone, and with it what it held
        give_back_freed_memory(self._trainer.device)
        self._halve()
        return None

    def use(self, size: int) -> None:
        """Cut batches into micro-batches of this size from here on."""
        trainer = self._trainer
        if size != trainer.config.per_forward and isinstance(trainer.source, MapSource):
            trainer.config = trainer.config.replace(micro_batch_size=size)
            trainer.source.split_into(size)

    def _halve(self) -> None:
        trainer = self._trainer
        before, size = trainer.config.per_forward, trainer.config.per_forward // 2
        self.use(size)
        verdict, effect = rules_for(trainer.config, trainer.model)["micro_batch_size"]
        difference = Difference("micro_batch_size", before, size, effect, verdict)
        report = trainer.resume_report
        trainer.resume_report = replace(report, differences=(*report.differences, difference))
        event = {"event": "micro_batch_size", "step": trainer.progress.step, "from": before}
        trainer.checkpointer.note_event({**event, "to": size, "verdict": verdict})
        trainer.display.note(f"out of memory: {difference}")

    def _can_be_halved(self, start: StepStart) -> bool:
        trainer = self._trainer
        strict = trainer.config.exact_resume == "require"
        verdict, _ = rules_for(trainer.config, trainer.model)["micro_batch_size"]
        in_update = trainer.progress.pending == trainer.config.gradient_accumulation_steps
        divisible = trainer.config.per_forward % 2 == 0
        return (
            verdict == "equivalent"
            and divisible
            and not strict
            and not in_update
            and start.progress.pending == 0
        )

    def _as_ours(self, error: BaseException) -> DeviceMemoryError:
        size = self._trainer.config.per_forward
        auto = "" if self.is_auto else ' or "auto"'
        smaller = f"micro_batch_size={size // 2}{auto}; " if size > 1 else ""
        if self.is_auto and self._trainer.config.exact_resume == "require":
            smaller = f'exact_resume="prefer", so that it may be halved; {smaller}'
        return DeviceMemoryError(
            f"step {self._trainer.progress.step + 1}",
            f"does not fit into the memory of {self._trainer.device}",
            found=f"micro_batch_size {size}: {error}",
            hint=f"choose a smaller portion: {smaller}gradient_checkpointing=True saves more; "
            "the batch, and so the training, stays the same",
        )
