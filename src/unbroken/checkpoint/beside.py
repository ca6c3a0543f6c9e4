"""The saves of one run that go on beside its training, one after the other."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, get_args

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from unbroken.checkpoint.background import BackgroundSave, SaveCost
from unbroken.checkpoint.saving import Saving
from unbroken.checkpoint.shares import Share
from unbroken.checkpoint.snapshot import Snapshot, Staging, steady_tensors
from unbroken.distributed import Group
from unbroken.errors import ConfigError, one_of
from unbroken.store import Json

_TOLD = 10  # paths of tensors in the history
SnapshotMode = Literal["stream", "sync", "overlap"]
"""How a save gets hold of the state: see `Checkpointer`."""


class BesideTraining:
    """Starts saves, and hears how they ended: on all ranks at the same edge of a step.

    Args:
        mode: With "stream", a save is over when it was started.
        group: The ranks; all make the same calls.
        note: Tells the history of a save that was given up.

    Attributes:
        mode: As given.
        again: A save was given up, since tensors were changed while they were copied.
        cost: What the last save took that is over; None: there was none.

    Raises:
        ConfigError: There is no such mode.
    """

    def __init__(
        self, mode: SnapshotMode, group: Group, note: Callable[[Mapping[str, Json]], None]
    ) -> None:
        if mode not in get_args(SnapshotMode):
            raise ConfigError("snapshot", expected=one_of(get_args(SnapshotMode)), found=repr(mode))
        self.mode = mode
        self.again = False
        self.cost: SaveCost | None = None
        self._group = group
        self._note = note
        self._channel: Group | None = None  # for the threads beside the training
        self._staging = Staging()
        self._blind: tuple[int, ...] | None = None  # ranks that do not see where is stored
        self._running: BackgroundSave | None = None
        self._process = 0  # that it runs in
        self._hook: RemovableHandle | None = None
        self._blocked = 0.0
        self._restless: set[str] = set()  # paths of tensors that do change between steps
        self._committed: list[int] = []

    def save(
        self,
        step: int,
        saving: Saving,
        share_of: Callable[[Sequence[int]], Share],
        objects: Mapping[str, object],
        began: float,
    ) -> None:
        """Make a checkpoint: at once, or beside the training once its state cannot change.

        Args:
            step: Completed optimizer steps.
            saving: The checkpoint.
            share_of: Returns what this rank stores, given the ranks that do not see where to.
            objects: What is saved.
            began: `time.perf_counter` when the save began.
        """
        with ExitStack() as stack:
            stack.enter_context(saving)
            if self.mode == "stream" or self._blind is None:  # later, that is the thread's work
                self._blind = saving.stage(self._group)
            share = share_of(self._blind)
            if self.mode == "stream":
                saving.store(self._group, share)
                self._note_streamed(step, began)
                return
            snapshot = self._group.together("copy", lambda: self._taken(share, objects))
            stack.pop_all()
        self._go_on(step, saving, share, snapshot)
        self._blocked = time.perf_counter() - began

    def _taken(self, share: Share, objects: Mapping[str, object]) -> Snapshot:
        if self.mode == "sync":
            return self._staging.take(share.leaves)
        steady = steady_tensors(objects, share.leaves, self._restless)
        return self._staging.take(share.leaves, steady)

    def _go_on(self, step: int, saving: Saving, share: Share, snapshot: Snapshot) -> None:
        """Let a thread make the checkpoint."""
        if self._channel is None:
            self._channel = self._group.apart()
            atexit.register(self._at_exit)
        if self._hook is None and self.mode == "overlap":
            # Any optimizer, also one that is not saved: fused ones do not count versions up.
            self._hook = register_optimizer_step_pre_hook(self._before_step)
        self._process = os.getpid()
        self._running = BackgroundSave(
            step, saving, share, snapshot, self._channel, self._blind or ()
        )
        if self.mode == "sync":
            self._running.approve()
        self.again = False

    def _current(self) -> BackgroundSave | None:
        """Return the save that is running; in a forked process there is none."""
        return self._running if self._process == os.getpid() else None

    def _before_step(self, *_: object) -> None:
        if self._running is not None and not self._running.is_over:  # it is, in a forked process
            self._running.approve()

    def poll(self) -> None:
        """Hear whether the running save ended; called where no tensor is being changed.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
            RankError: It failed on another rank.
        """
        running = self._current()
        if running is not None and running.is_heard_of():
            self.settle()

    def settle(self, *, hurried: bool = False) -> None:
        """Wait until no save is running; one that was given up is to be made again.

        Args:
            hurried: Do not wait long for the other ranks.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
            RankError: It failed on another rank.
        """
        running = self._current()
        if running is None:
            return
        try:
            running.finish(hurried=hurried)
        finally:
            if running.is_over:  # an interrupt leaves it to the next who waits
                self._running = None
        self.cost = SaveCost(self._blocked, self._blocked + running.seconds, running.computing)
        if running.edited:
            self._restless.update(running.edited)
            edited = [*running.edited[:_TOLD]]
            self._note({"event": "given up", "step": running.step, "edited": edited})
            self.again = True
        else:
            self._committed.append(running.step)

    def wait(self, *, hurried: bool = False) -> None:
        """Wait until all that was saved is durable.

        Args:
            hurried: Do not wait long for the other ranks.

        Raises:
            SaveError: It failed, or tensors were changed while they were copied.
            RankError: It failed on another rank.
        """
        running = self._current()
        self.settle(hurried=hurried)
        if running is not None and running.edited:
            raise running.edited_error()

    def committed(self) -> list[int]:
        """Return the steps whose checkpoints became durable since the last call."""
        found, self._committed = self._committed, []
        return found

    def close(self, *, hurried: bool = False) -> None:
        """Wait as `wait` does, and give the memory and the threads back."""
        try:
            self.wait(hurried=hurried)
        finally:
            if self.is_idle:
                self._give_back()

    @property
    def is_idle(self) -> bool:
        """Whether no save is running; one may be, where `close` was interrupted."""
        return self._current() is None

    def _give_back(self) -> None:
        self._staging = Staging()
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()
        channel, self._channel = self._channel, None
        if channel is not None:
            atexit.unregister(self._at_exit)
            channel.close()

    def _at_exit(self) -> None:
        """Finish the last save of a script that ends without `close`."""
        if self._process == os.getpid():  # a forked process inherits this call
            self.close(hurried=hasattr(sys, "last_value"))  # an error, maybe not on all ranks

    def _note_streamed(self, step: int, began: float) -> None:
        seconds = time.perf_counter() - began
        self.cost = SaveCost(seconds, seconds)
        self.again = False
        self._committed.append(step)
