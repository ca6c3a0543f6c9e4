"""The saves of one run that go on beside its training, one after the other."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from unbroken.checkpoint.save.rank_shares import Share
from unbroken.checkpoint.save.session import GivenUpError, Saving
from unbroken.checkpoint.save.staging import Snapshot, Staging, steady_tensors
from unbroken.distributed import Group, name_ranks
from unbroken.errors import ConfigError, RankError, SaveError, one_of
from unbroken.store import Json

# At which edge of a step all ranks hear of something that happened beside their training.


_AHEAD = 2  # edges: enough for the exchange to be over before a training thread comes there


class Appointment:
    """Finds an edge that no rank has passed, without an exchange in the threads that train.

    Every training thread counts its edges; they make the same calls, so the same number is the
    same place in the training. The thread beside it promises in its name not to pass the second
    edge from now before all have told theirs. The latest of these is the one at which all hear.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> appointment = Appointment()
        >>> before = appointment.is_now()
        >>> appointment.make(SingleProcess())
        >>> before, appointment.is_now()
        (False, True)
    """

    def __init__(self) -> None:
        self._edge = 0
        self._limit: int | None = None  # not to be passed before `_at` is known
        self._at: int | None = None
        self._changed = threading.Condition()

    def make(self, group: Group) -> None:
        """Agree on an edge; called once, on each rank by the thread beside the training.

        Raises:
            RankError: Another rank is gone: it is heard of at once.
        """
        with self._changed:
            self._limit = self._edge + (_AHEAD if group.world_size > 1 else 0)
        at = 0
        try:
            at = max(int(str(edge)) for edge in group.gather("when to hear of a save", self._limit))
        finally:
            with self._changed:
                self._at = at
                self._changed.notify_all()

    def is_now(self) -> bool:
        """Pass an edge, in the thread that trains; return whether what happened is heard of here.

        Waits only where the other ranks have yet to tell which edge they agree on.
        """
        with self._changed:
            self._edge += 1
            if self._limit is None or self._edge < self._limit:
                return False
            self._changed.wait_for(lambda: self._at is not None)
            return self._at is not None and self._edge >= self._at


# Saving beside the training: one save at a time, in a thread of its own.


_PATIENCE = 5.0  # seconds that one who is in a hurry waits for the consent of the other ranks


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

    The checkpoint is committed only after `approve` was called, by the threads that train: only
    they can tell that nothing changed the tensors while they were copied.

    Args:
        step: Completed optimizer steps.
        saving: The checkpoint to be made.
        share: What this rank stores of it.
        snapshot: The memory of that share.
        group: The ranks that make it; no other thread uses this group.
        blind: Those of them that do not see where it is stored.

    Attributes:
        step: As given.
        edited: The paths of tensors because of which it was given up, on any rank; known when
            it is over.
        seconds: How long it took.
        computing: Seconds of a processor's time that it took.
    """

    def __init__(
        self,
        step: int,
        saving: Saving,
        share: Share,
        snapshot: Snapshot,
        group: Group,
        blind: tuple[int, ...],
    ) -> None:
        self.step = step
        self.edited: tuple[str, ...] = ()
        self.seconds = self.computing = 0.0
        self._saving, self._share, self._snapshot = saving, share, snapshot
        self._group, self._blind = group, blind
        self._edited_here: tuple[str, ...] | None = None  # None: nobody looked yet
        self._edited_by_rank: Mapping[int, tuple[str, ...]] = {}
        self._error: BaseException | None = None
        self._appointment = Appointment()
        self._copied, self._approved = threading.Event(), threading.Event()
        self._stored = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unbroken-save", daemon=True)
        self._began = time.perf_counter()
        self._thread.start()

    def is_heard_of(self) -> bool:
        """Pass an edge of a step; return whether all ranks hear here how it ended."""
        if self._copied.is_set():  # else this would wait for it
            self.approve()
        alone = self._group.world_size == 1
        return self._appointment.is_now() or (alone and bool(self._edited_here))

    @property
    def is_over(self) -> bool:
        """Whether it ended, well or not."""
        return not self._thread.is_alive()

    def approve(self) -> None:
        """Wait for the copy, and let the save commit if nothing changed what was copied."""
        if self._edited_here is not None:
            return
        self._copied.wait()
        self._snapshot.hold_back_devices()
        self._edited_here = self._snapshot.edited()
        self._approved.set()

    def finish(self, *, hurried: bool = False) -> None:
        """Wait until it is over.

        Args:
            hurried: Leave the other ranks if they do not soon consent to the commit: their
                training may stand still for want of this rank.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
            RankError: It failed on another rank.
        """
        self.approve()
        if hurried:
            self._stored.wait()
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                self._group.close()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def edited_error(self) -> SaveError:
        """Return the error for those whom no later save consoles."""
        where = f"checkpoint-{self.step}"
        if self._group.world_size > 1:
            where = f"{where}: {name_ranks([*self._edited_by_rank])}"
        return SaveError(
            where,
            "was not made: tensors were changed while they were being copied",
            found=", ".join(self.edited[:3]),
            hint='save once more; with save_mode="async" they may be changed as soon as save '
            "returns",
        )

    def _run(self) -> None:
        try:
            with self._saving:
                # First of all: the optimizer's next step waits for it.
                share = self._group.together("copy the rest", self._copy)
                self._stage()
                self._saving.store(self._group, share, self._changes)
        except GivenUpError as given_up:
            self._edited_by_rank = given_up.edited  # not the error: that holds the copy's memory
            paths = [path for own in given_up.edited.values() for path in own]
            self.edited = tuple(dict.fromkeys(paths))
        except BaseException as error:
            self._error = error
        self._copied.set()  # whatever failed: nobody must wait for it
        self._stored.set()
        self.seconds = time.perf_counter() - self._began
        self.computing = time.thread_time()
        self._tell()

    def _stage(self) -> None:
        if self._saving.is_staged:
            return
        blind = self._saving.stage(self._group)
        if blind != self._blind:
            ranks = tuple({*blind} ^ {*self._blind})
            what = "does not see the same run directory as in the save before"
            raise RankError(name_ranks(ranks), what, ranks=ranks)

    def _copy(self) -> Share:
        try:
            self._snapshot.copy_rest()
        finally:
            self._copied.set()
        self._snapshot.wait_for_devices()
        return replace(self._share, leaves=self._snapshot.leaves())

    def _changes(self) -> tuple[str, ...]:
        """Return what was changed meanwhile, when the thread that trains has looked."""
        self._stored.set()
        self._approved.wait()
        return tuple(dict.fromkeys((*(self._edited_here or ()), *self._snapshot.torn)))

    def _tell(self) -> None:
        try:
            self._appointment.make(self._group)
        except RankError as error:
            if self._error is None:
                self._error = error


_TOLD = 10  # paths of tensors in the history
SaveMode = Literal["blocking", "async", "overlap"]
"""How a save gets hold of the state: see `Checkpointer`."""


class BesideTraining:
    """Starts saves, and hears how they ended: on all ranks at the same edge of a step.

    Args:
        mode: With "blocking", a save is over when it was started.
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
        self, mode: SaveMode, group: Group, note: Callable[[Mapping[str, Json]], None]
    ) -> None:
        if mode not in get_args(SaveMode):
            raise ConfigError("save_mode", expected=one_of(get_args(SaveMode)), found=repr(mode))
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
            if self.mode == "blocking" or self._blind is None:  # later, that is the thread's work
                self._blind = saving.stage(self._group)
            share = share_of(self._blind)
            if self.mode == "blocking":
                saving.store(self._group, share)
                self._note_streamed(step, began)
                return
            snapshot = self._group.together("copy", lambda: self._taken(share, objects))
            stack.pop_all()
        self._go_on(step, saving, share, snapshot)
        self._blocked = time.perf_counter() - began

    def _taken(self, share: Share, objects: Mapping[str, object]) -> Snapshot:
        if self.mode == "async":
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
        if self.mode == "async":
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
