"""Saves in a thread while training goes on, one after the other; all ranks learn together how."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from torch.optim import Optimizer

from unbroken.checkpoint.save.rank_shares import RankShare
from unbroken.checkpoint.save.session import SaveAbandonedError, SaveSession
from unbroken.checkpoint.save.staging import StagedState, StagingBuffer, stable_tensors
from unbroken.distributed import Group, name_ranks
from unbroken.errors import ConfigError, RankError, SaveError, one_of
from unbroken.recorder.step_hooks import StepHooks

_AHEAD = 2  # boundaries: enough for the exchange to be over before a training thread comes there


class StepRendezvous:
    """Agree on the step boundary at which all ranks learn that a background save finished.

    The training threads exchange nothing. Each counts the boundaries it passes; all ranks make the
    same calls, so the same number is the same point of the training. The save thread promises in
    its name not to pass the second boundary from now before all ranks have sent their numbers.
    The latest of these is where all learn it.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> rendezvous = StepRendezvous()
        >>> before = rendezvous.is_here()
        >>> rendezvous.agree(SingleProcess())
        >>> before, rendezvous.is_here()
        (False, True)
    """

    def __init__(self) -> None:
        self._boundary = 0
        self._limit: int | None = None  # not to be passed before `_at` is known
        self._at: int | None = None
        self._changed = threading.Condition()

    def agree(self, group: Group) -> None:
        """Agree on a boundary; called once, in the save thread of each rank.

        Raises:
            RankError: Another rank is gone: training learns that at once.
        """
        with self._changed:
            self._limit = self._boundary + (_AHEAD if group.world_size > 1 else 0)
        at = 0
        try:
            limits = group.gather("when to hear of a save", self._limit)
            at = max(int(str(limit)) for limit in limits)
        finally:
            with self._changed:
                self._at = at
                self._changed.notify_all()

    def is_here(self) -> bool:
        """Pass a boundary, in the training thread; return whether it is the one agreed on.

        Waits only where other ranks have yet to send their numbers.
        """
        with self._changed:
            self._boundary += 1
            if self._limit is None or self._boundary < self._limit:
                return False
            self._changed.wait_for(lambda: self._at is not None)
            return self._at is not None and self._boundary >= self._at


_PATIENCE = 5.0  # seconds that one who is in a hurry waits for the consent of the other ranks


@dataclass(frozen=True)
class SaveCost:
    """What a save took.

    Attributes:
        blocked: Seconds in which training stood still.
        durable: Seconds until the checkpoint was durable.
        computing: Seconds of a processor's time that the save thread took from training.
    """

    blocked: float
    durable: float
    computing: float = 0.0


class SaveThread:
    """Runs a save session in a thread; the checkpoint is committed only after `approve`.

    The training threads call that: only they can tell that nothing changed the tensors while they
    were copied.

    Attributes:
        modified: The paths of tensors, on any rank, because of which the save was abandoned; known
            when it is over.
        seconds: How long it took.
        computing: Seconds of a processor's time that it took.
    """

    def __init__(
        self, session: SaveSession, share: RankShare, staged: StagedState, group: Group
    ) -> None:
        self.session = session
        self.modified: tuple[str, ...] = ()
        self.seconds = self.computing = 0.0
        self._share, self._staged, self._group = share, staged, group
        self._modified_here: tuple[str, ...] | None = None  # None: nobody looked yet
        self._modified_by_rank: Mapping[int, tuple[str, ...]] = {}
        self._error: BaseException | None = None
        self._rendezvous = StepRendezvous()
        self._copied, self._approved = threading.Event(), threading.Event()
        self._then: list[Callable[[], None]] = []
        self._stored = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unbroken-save", daemon=True)
        self._began = time.perf_counter()
        self._thread.start()

    def is_reported_here(self) -> bool:
        """Pass a step boundary; return whether all ranks learn here how the save ended."""
        if self._copied.is_set():  # else this would wait for it
            self.approve()
        is_alone = self._group.world_size == 1
        return self._rendezvous.is_here() or (is_alone and bool(self._modified_here))

    @property
    def is_over(self) -> bool:
        """Whether it ended, well or not."""
        return not self._thread.is_alive()

    def approve(self) -> None:
        """Wait for the copy, and let the save commit if nothing changed what was copied."""
        if self._modified_here is not None:
            return
        self._copied.wait()
        self._staged.hold_back_devices()
        self._modified_here = self._staged.modified()
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

    def abandoned_error(self) -> SaveError:
        """Return the error for a save that was abandoned, and that no later save replaces."""
        where = f"checkpoint-{self.session.step}"
        if self._group.world_size > 1:
            where = f"{where}: {name_ranks([*self._modified_by_rank])}"
        return SaveError(
            where,
            "was not made: tensors were changed while they were being copied",
            found=", ".join(self.modified[:3]),
            hint='save once more; with save_mode="async" they may be changed as soon as save '
            "returns",
        )

    def _run(self) -> None:
        try:
            with self.session:
                # First of all: the optimizer's next step waits for it.
                self.session.share = self._group.run_on_all("copy the rest", self._copy_rest)
                self.session.run(self._group, self._wait_for_approval)
        except SaveAbandonedError as abandoned:
            self._modified_by_rank = abandoned.modified  # not the error: it holds the copy's memory
            paths = [path for of_rank in abandoned.modified.values() for path in of_rank]
            self.modified = tuple(dict.fromkeys(paths))
        except BaseException as error:
            self._error = error
        self._copied.set()  # whatever failed: nobody must wait for it
        self._stored.set()
        self.seconds = time.perf_counter() - self._began
        self.computing = time.thread_time()
        self._report()
        self._end()

    def call_when_over(self, then: Callable[[], None]) -> None:
        """Let the thread call `then` at its end, or do so here; wait for nothing."""
        self._then.append(then)
        if self._copied.is_set():
            self.approve()
        if self.is_over:
            self._end()

    def _end(self) -> None:
        while self._then:
            with suppress(IndexError):  # the other thread took it
                self._then.pop()()

    def _copy_rest(self) -> RankShare:
        try:
            self._staged.copy_rest()
        finally:
            self._copied.set()
        self._staged.wait_for_devices()
        return replace(self._share, leaves=self._staged.leaves())

    def _wait_for_approval(self) -> tuple[str, ...]:
        """Return what changed before it was copied, once the training thread has looked."""
        self._stored.set()
        self._approved.wait()
        return tuple(dict.fromkeys((*(self._modified_here or ()), *self._staged.torn)))

    def _report(self) -> None:
        try:
            self._rendezvous.agree(self._group)
        except RankError as error:
            if self._error is None:
                self._error = error


_IN_HISTORY = 10  # paths of tensors
SaveMode = Literal["blocking", "async", "overlap"]
"""How a save gets hold of the state: see `Checkpointer`."""


class AsyncSaver:
    """Runs save sessions, one at a time: at once, or in a thread while training goes on.

    All ranks learn how a save ended at the same step boundary.

    Args:
        mode: With "blocking", a save is over when `submit` returns.
        group: The ranks; all make the same calls.
        objects: What is saved, by name.

    Attributes:
        must_repeat: A save was abandoned, since tensors changed while they were copied.
        cost: What the last save took that is over; None: there was none.

    Raises:
        ConfigError: There is no such mode.
    """

    def __init__(self, mode: SaveMode, group: Group, objects: Mapping[str, object]) -> None:
        if mode not in get_args(SaveMode):
            raise ConfigError("save_mode", expected=one_of(get_args(SaveMode)), found=repr(mode))
        self.mode = mode
        self.must_repeat = False
        self.cost: SaveCost | None = None
        self._group = group
        self._objects = objects
        self._thread_group: Group | None = None  # for the save threads
        self._buffer: StagingBuffer | None = None  # made by the first copy
        self._without_storage: tuple[int, ...] | None = None  # ranks, once a save found out
        self._running: SaveThread | None = None
        self._process = 0  # that it runs in
        self._hook: StepHooks | None = None
        self._began = self._blocked = 0.0
        self._unstable: set[str] = set()  # paths of tensors that do change between steps
        self._committed: list[int] = []

    def finish_previous(self) -> None:
        """Begin a save: wait for the one before, and count the time from here.

        Raises:
            SaveError: That failed; earlier checkpoints are as they were.
            RankError: That failed on another rank.
        """
        self._began = time.perf_counter()
        self._settle()

    def submit(self, session: SaveSession) -> None:
        """Make a checkpoint: at once, or in a thread once its state can no longer change.

        Raises:
            CaptureError: Something cannot be stored.
            SaveError: The disk failed or is full; earlier checkpoints are as they were.
            RankError: That happened on another rank, or the ranks hold different states.
        """
        if self.mode == "blocking":
            with session:
                session.run(self._group)
            self._note_blocking(session.step)
            return
        with ExitStack() as stack:
            stack.enter_context(session)
            session.without_storage = self._without_storage
            if session.without_storage is None:  # later, that is the thread's work
                session.stage(self._group)
                self._without_storage = session.without_storage
            share = session.plan_share(self._group)
            staged = self._group.run_on_all("copy", partial(self._copy, share))
            stack.pop_all()
        self._start(session, share, staged)
        self._blocked = time.perf_counter() - self._began

    def _copy(self, share: RankShare) -> StagedState:
        self._buffer = self._buffer or StagingBuffer()
        if self.mode == "async":
            return self._buffer.take(share.leaves)
        stable = stable_tensors(self._objects, share.leaves, self._unstable)
        return self._buffer.take(share.leaves, stable)

    def _start(self, session: SaveSession, share: RankShare, staged: StagedState) -> None:
        """Let a thread make the checkpoint."""
        if self._thread_group is None:
            self._thread_group = self._group.new_subgroup()
            atexit.register(self._at_exit)
        if self._hook is None and self.mode == "overlap":
            # Any optimizer, also one that is not saved: fused ones do not count versions up.
            self._hook = StepHooks(self._before_step)
        self._process = os.getpid()
        self._running = SaveThread(session, share, staged, self._thread_group)
        if self.mode == "async":
            self._running.approve()
        self.must_repeat = False

    def _current(self) -> SaveThread | None:
        """Return the save that is running; in a forked process there is none."""
        return self._running if self._process == os.getpid() else None

    def _before_step(self, _: Optimizer) -> None:
        if self._running is not None and not self._running.is_over:  # it is, in a forked process
            self._running.approve()

    def poll(self) -> None:
        """Learn whether the running save ended; called where no tensor is being changed.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
            RankError: It failed on another rank.
        """
        running = self._current()
        if running is not None and running.is_reported_here():
            self._settle()

    def _settle(self, *, hurried: bool = False) -> None:
        """Wait until no save is running; one that was abandoned is to be made again."""
        running = self._current()
        if running is None:
            return
        try:
            running.finish(hurried=hurried)
        finally:
            if running.is_over:  # an interrupt leaves it to the next who waits
                self._running = None
        self.cost = SaveCost(self._blocked, self._blocked + running.seconds, running.computing)
        session, modified = running.session, running.modified
        if not modified:
            self._committed.append(session.step)
            return
        self._unstable.update(modified)
        if self._group.rank == 0:
            named = [*modified[:_IN_HISTORY]]
            session.note_in_history({"event": "given up", "step": session.step, "edited": named})
        self.must_repeat = True

    def wait(self, *, hurried: bool = False) -> None:
        """Wait until all that was saved is durable.

        Args:
            hurried: Do not wait long for the other ranks.

        Raises:
            SaveError: It failed, or tensors were changed while they were copied.
            RankError: It failed on another rank.
        """
        running = self._current()
        self._settle(hurried=hurried)
        if running is not None and running.modified:
            raise running.abandoned_error()

    def committed(self) -> list[int]:
        """Return the steps whose checkpoints became durable since the last call."""
        steps, self._committed = self._committed, []
        return steps

    def close(self, *, hurried: bool = False) -> None:
        """Wait as `wait` does, and give the memory and the threads back."""
        try:
            self.wait(hurried=hurried)
        finally:
            if self.is_idle:
                self._release()

    def abandon(self, then: Callable[[], None]) -> None:
        """Call `then` when no save is running: at once, or at the end of the running one's thread.

        For an owner whom nobody holds any more: the garbage collector may call it, at any point of
        the training thread. It waits for nothing. A save whose copy is not over goes on at the
        next step of an optimizer, at the next `wait`, or at the exit.
        """

        def end() -> None:
            self._release()
            then()

        running = self._current()
        if running is None:
            end()
        else:
            running.call_when_over(end)

    @property
    def is_idle(self) -> bool:
        """Whether no save is running; one may be, where `close` was interrupted."""
        return self._current() is None

    def _release(self) -> None:
        self._buffer = None
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.end()
        group, self._thread_group = self._thread_group, None
        if group is not None:
            atexit.unregister(self._at_exit)
            group.close()

    def _at_exit(self) -> None:
        """Finish the last save of a script that ends without `close`."""
        if self._process == os.getpid():  # a forked process inherits this call
            self.close(hurried=hasattr(sys, "last_value"))  # an error, maybe not on all ranks

    def _note_blocking(self, step: int) -> None:
        seconds = time.perf_counter() - self._began
        self.cost = SaveCost(seconds, seconds)
        self.must_repeat = False
        self._committed.append(step)
