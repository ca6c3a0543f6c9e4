"""At which edge of a step all ranks hear of something that happened beside their training."""

from __future__ import annotations

import threading

from unbroken.distributed import Group

_AHEAD = 2  # edges: enough for the exchange to be over before a training thread comes there


class Appointment:
    """Finds an edge that no rank has passed, without an exchange in the threads that train.

    Every training thread counts its edges; they make the same calls, so the same number is the
    same place in the training. The thread beside it promises in its name not to pass the second
    edge from now before all have told theirs. The latest of these is the one at which all hear.

    Example:
        >>> from unbroken.distributed import Alone
        >>> appointment = Appointment()
        >>> before = appointment.is_now()
        >>> appointment.make(Alone())
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
