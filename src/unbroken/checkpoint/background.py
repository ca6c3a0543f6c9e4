"""Saving beside the training: one save at a time, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from unbroken.checkpoint.appointment import Appointment
from unbroken.checkpoint.saving import GivenUpError, Saving
from unbroken.checkpoint.shares import Share
from unbroken.checkpoint.snapshot import Snapshot
from unbroken.distributed import Group, name_ranks
from unbroken.errors import RankError, SaveError

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
            hint='save once more; with snapshot="sync" they may be changed as soon as save returns',
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
