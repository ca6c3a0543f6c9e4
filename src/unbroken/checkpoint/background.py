"""Saving beside the training: one save at a time, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.optim import Optimizer

from unbroken.checkpoint.snapshot import Snapshot
from unbroken.errors import SaveError


class _GivenUpError(Exception):
    """What was copied is not the state of the step."""


@dataclass(frozen=True)
class SaveCost:
    """What a save took.

    Attributes:
        blocked: Seconds in which training stood still.
        durable: Seconds until the checkpoint was durable.
        computing: Seconds of a processor's time that went on beside the training.
    """

    blocked: float
    durable: float
    computing: float = 0.0


class BackgroundSave:
    """A save that goes on in a thread, while the training may go on.

    The checkpoint is committed only after `approve` was called, by the thread that trains: only
    it can tell that nothing changed the tensors while they were copied.

    Args:
        step: Completed optimizer steps.
        snapshot: What is saved.
        write: Writes it; calls what it is given just before it commits.
        optimizers: Their next step waits for the copy.
    """

    def __init__(
        self,
        step: int,
        snapshot: Snapshot,
        write: Callable[[Callable[[], None]], None],
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        self.step = step
        self.edited: tuple[str, ...] | None = None  # None: nobody looked yet
        self.seconds = self.computing = 0.0
        self._snapshot = snapshot
        self._write = write
        self._error: BaseException | None = None
        self._copied, self._approved = threading.Event(), threading.Event()
        self._hooks = [o.register_step_pre_hook(self._before_step) for o in optimizers]
        self._thread = threading.Thread(target=self._run, name="unbroken-save", daemon=True)
        self._began = time.perf_counter()
        self._thread.start()

    @property
    def has_copied(self) -> bool:
        """Whether the copy is complete, so that `approve` does not wait."""
        return self._copied.is_set()

    @property
    def is_over(self) -> bool:
        """Whether it ended, in any way."""
        return not self._thread.is_alive()

    def approve(self) -> None:
        """Wait for the copy, and let the save commit if nothing changed what was copied."""
        if self.edited is not None:
            return
        self._copied.wait()
        self._snapshot.hold_back_device()
        self.edited = self._snapshot.edited()
        for hook in self._hooks:
            hook.remove()
        self._approved.set()

    def finish(self) -> None:
        """Wait until it is over.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
        """
        self.approve()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None and not isinstance(error, _GivenUpError):
            raise error

    def edited_error(self) -> SaveError:
        """Return the error for those whom no later save consoles."""
        return SaveError(
            f"checkpoint-{self.step}",
            "was not made: tensors were changed while they were being copied",
            found=", ".join((self.edited or ())[:3]),
            hint='save once more; with snapshot="sync" they may be changed as soon as save returns',
        )

    def _before_step(self, *_: object) -> None:
        self.approve()

    def _run(self) -> None:
        try:
            try:
                self._snapshot.copy_rest()
            finally:
                self._copied.set()
            self._snapshot.wait_for_device()
            self._write(self._gate)
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - self._began
        self.computing = time.thread_time()

    def _gate(self) -> None:
        self._approved.wait()
        if self.edited:
            raise _GivenUpError
