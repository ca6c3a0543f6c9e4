"""The group of several processes: messages go through the store of their process group."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial, reduce
from operator import add
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar, cast

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError, DistStoreError

from unbroken.errors import RankError, RankTimeoutError
from unbroken.store import Json, this_machine

# Messages between ranks through the key-value store of their process group.
#
# A store, and not a collective, because of what happens when a rank is missing: a collective of
# gloo or NCCL hangs or says that *something* timed out, while keys that are not there tell whose
# they are. It is the faster way as well (2 ranks on 2 cores: 0.3 ms against 0.8 ms for an
# all_gather of one byte by gloo).


# Noticing at once that a rank on this machine has ended, however it ended.


def this_process() -> Json:
    """Return what another process needs to know to watch this one."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = None
    return [*this_machine(), space, os.getpid()]


class ProcessWatch:
    """Watches the ranks that run on this machine; others are never seen to end.

    The kernel says that a process has ended as soon as it has, before its parent knows; a
    process that is only stopped has not. (Linux, pidfd_open(2); elsewhere nobody is watched.)

    Args:
        processes: `this_process` of every rank, by rank; None: nobody is watched.

    Example:
        >>> ProcessWatch([this_process()]).ended([0])
        ()
    """

    def __init__(self, processes: Sequence[Any] = ()) -> None:
        here: Any = this_process()
        self._ends: dict[int, int] = {}
        for rank, (*place, pid) in enumerate(processes):
            if place == here[:-1] and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # it has just ended: the timeout will tell
                    self._ends[rank] = os.pidfd_open(pid)

    def ended(self, ranks: Collection[int]) -> tuple[int, ...]:
        """Return those of the ranks whose process has ended."""
        watched = {self._ends[rank]: rank for rank in ranks if rank in self._ends}
        poll = select.poll()
        for end in watched:
            poll.register(end, select.POLLIN)
        return tuple(sorted(watched[end] for end, _ in poll.poll(0)))

    def copy(self) -> ProcessWatch:
        """Return one that watches the same ranks, and is closed separately."""
        other = ProcessWatch()
        other._ends = {rank: os.dup(end) for rank, end in self._ends.items()}
        return other

    def close(self) -> None:
        """Stop watching."""
        for end in self._ends.values():
            os.close(end)
        self._ends.clear()


T = TypeVar("T")

_PART = 4 << 20  # bytes; a TCPStore takes no value of more than 8 MiB
_GOODBYE = 5.0  # seconds that leaving may take
_GLANCE = 0.2  # seconds; a signal that comes just before a wait is not seen until the wait ends,
# and whether a rank has ended is looked at as often
_GRACE = 1.0  # seconds; after them the store itself is late with saying that time is up


class NoAnswerError(Exception):
    """The messages of `ranks` were not there in time; of no rank: the store itself was silent.

    Attributes:
        ended: Whether their processes have ended; else time is up.
    """

    def __init__(self, ranks: tuple[int, ...] = (), *, ended: bool = False) -> None:
        super().__init__(ranks)
        self.ranks = ranks
        self.ended = ended


class StoreLostError(Exception):
    """The process that holds the store has ended."""


class StoreExchange:
    """Numbered rounds of messages: each rank posts one, and reads those of all.

    Every rank must post to each round, in order; a rank that posts to a round has read the round
    before it, or needs it no longer. So nobody needs the round before that, and each rank
    removes its own message of it.

    The store is used by a thread of its own. A `TCPStore` waits without limit for an answer of
    the process that holds it, which may be stopped; and a thread that waits in it cannot be
    interrupted by Ctrl-C.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        # A connection of our own: a wait must not hold up NCCL's watchdog, which uses the store.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=_GLANCE))
        self.watch = ProcessWatch()
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._round = 0
        self._store_is_silent = self._is_leaving = False
        self._posted: dict[int, list[str]] = {}
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="unbroken-mailbox", daemon=True).start()

    def exchange(self, message: bytes, seconds: float) -> list[bytes]:
        """Post to the next round and return the messages of all ranks to it, by rank."""
        number = self._next_round()
        messages = self._in_time(lambda: self._post_and_read(number, message, seconds), seconds)
        self._later(lambda: self._remove_before(number))
        return messages

    def post(self, message: bytes) -> None:
        """Post to the next round without reading it."""
        number = self._next_round()
        self._in_time(lambda: self._post(number, message))

    def leave(self, message: bytes, *, wait_for_others: bool = False) -> None:
        """Post a last message, and wait a little until all have left, if that is asked for.

        Another thread that is in `exchange` meanwhile does not wait for its answers any longer.
        """
        self._is_leaving = True
        number = self._next_round()
        left = [f"left/{rank}" for rank in range(self._world_size)]

        def announce_leaving() -> None:
            self._post(number, message)
            self._set(left[self._rank], b"")
            if wait_for_others:
                self._store.wait(left, timedelta(seconds=_GOODBYE))

        with contextlib.suppress(NoAnswerError, StoreLostError):
            self._in_time(announce_leaving, 0.0 if self._store_is_silent else _GOODBYE)
        self._jobs.put(None)

    def _next_round(self) -> int:
        self._round += 1
        return self._round

    def _in_time(self, job: Callable[[], T], seconds: float | None = None) -> T:
        """Run a job in the thread of the store; wait a little longer than that does."""
        answer = self._later(job)
        deadline = time.monotonic() + (self._timeout if seconds is None else seconds) + _GRACE
        while time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                return answer.get(timeout=_GLANCE)()
        self._store_is_silent = True
        raise NoAnswerError

    def _later(self, job: Callable[[], T]) -> SimpleQueue[Callable[[], T]]:
        # Not a Future: Ctrl-C in the wrong moment leaves its lock held, and the thread stuck.
        answer: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._jobs.put(lambda: answer.put(_outcome(job)))
        return answer

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _post_and_read(self, number: int, message: bytes, seconds: float) -> list[bytes]:
        self._post(number, message)
        keys = [f"{number}/{rank}" for rank in range(self._world_size)]
        first = self._read_when_there(keys, seconds)
        return [self._whole(key, part) for key, part in zip(keys, first, strict=True)]

    def _read_when_there(self, keys: list[str], seconds: float) -> list[bytes]:
        """Wait for the first parts of all messages, with a look from time to time."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(DistStoreError):
                return self._store.multi_get(keys)
            is_late = time.monotonic() >= deadline
            ended = self.watch.ended(range(len(keys)))  # before the look: they post no more
            missing = tuple(r for r, key in enumerate(keys) if not self._store.check([key]))
            if ended_ranks := tuple(rank for rank in missing if rank in ended):
                raise NoAnswerError(ended_ranks, ended=True)
            if missing and (is_late or self._is_leaving):
                raise NoAnswerError(missing)

    def _post(self, number: int, message: bytes) -> None:
        key = f"{number}/{self._rank}"
        parts = [message[start : start + _PART] for start in range(0, len(message), _PART)]
        keys = [key, *(f"{key}/{index}" for index in range(1, len(parts)))]
        parts[0] = b"%d\n" % len(parts) + parts[0]
        for name, part in reversed(list(zip(keys, parts, strict=True))):
            self._set(name, part)  # the first one last: when it is there, all are
        self._posted[number] = keys

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]  # torch says str and means bytes

    def _whole(self, key: str, first: bytes) -> bytes:
        count, _, part = first.partition(b"\n")
        rest = [f"{key}/{index}" for index in range(1, int(count))]
        return b"".join([part, *(self._store.multi_get(rest) if rest else [])])

    def _remove_before(self, number: int) -> None:
        for old in [posted for posted in self._posted if posted < number]:
            for key in self._posted.pop(old):
                self._store.delete_key(key)


def _outcome(job: Callable[[], T]) -> Callable[[], T]:
    """Run a job; return what gives its result, or raises its error, to whoever waits for it."""
    try:
        result = job()
    except Exception as error:
        return partial(_raise, error)
    return lambda: result


def _raise(error: Exception) -> NoReturn:
    if isinstance(error, DistError):
        raise StoreLostError from error
    raise error


# Which ranks differ from the others, and in what.


_LONGEST = 200  # characters of a value in a message


def name_ranks(ranks: Sequence[int]) -> str:
    """Return the words for some ranks in a message.

    Example:
        >>> name_ranks([2]), name_ranks([0, 3])
        ('rank 2', 'ranks 0, 3')
    """
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(rank) for rank in ranks)}"


def disagreement(texts: Sequence[str], what: str, hint: str | None = None) -> RankError:
    """Return the error that names the ranks whose text is not that of most, and all texts.

    Of texts that are equally frequent, that of the lowest rank counts as right.

    Example:
        >>> print(disagreement(["4", "4", "5"], "micro_batch_size"))
        rank 2: micro_batch_size: expected 4 (ranks 0, 1), found 5 (rank 2)
    """
    usual = Counter(texts).most_common(1)[0][0]
    odd = tuple(rank for rank, text in enumerate(texts) if text != usual)

    def shown(text: str) -> str:
        ranks = name_ranks([rank for rank, other in enumerate(texts) if other == text])
        return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'} ({ranks})"

    others = dict.fromkeys(texts[rank] for rank in odd)
    found = ", ".join(shown(text) for text in others)
    return RankError(
        name_ranks(odd), what, ranks=odd, expected=shown(usual), found=found, hint=hint
    )


def narrowed(what: str, values: Sequence[Json]) -> tuple[str, list[str]]:
    """Return the smallest part in which mappings differ: its path, and its JSON text by rank.

    Example:
        >>> narrowed("settings", [{"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1}])
        ('settings.seed', ['1', '2'])
    """
    mappings = [value for value in values if isinstance(value, Mapping)]
    if len(mappings) < len(values):
        return what, [_text(value) for value in values]
    keys = sorted({key for mapping in mappings for key in mapping})
    parts = [{key: _text(m[key]) if key in m else "" for key in keys} for m in mappings]
    differing = [key for key in keys if len({part[key] for part in parts}) > 1]
    if len(differing) == 1 and all(differing[0] in mapping for mapping in mappings):
        return narrowed(f"{what}.{differing[0]}", [m[differing[0]] for m in mappings])
    return what, [_text({key: m[key] for key in differing if key in m}) for m in mappings]


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


_LEFT, _FAILED = "left", "failed"


class StoreGroup:
    """The group of several processes. `join` makes it.

    A rank that ends with `close`, or fails inside `run_on_all`, is known to the others at once, as
    is one on the same machine that is killed, once `watch` was called. One that is killed on
    another machine, or stopped, is known when the timeout has passed: there is no heartbeat.

    Args:
        store: The key-value store of the process group, under a prefix that nobody else uses.
        rank: The number of this process.
        world_size: How many processes there are.
        local_rank: The number of this process on its machine.
        timeout: Seconds to wait for the other ranks in each call.
        store_on_rank_0: Whether rank 0 holds the store; else the launcher does.
        on_close: Called by `close`, after the other ranks got notice.

    Example:
        >>> from torch.distributed import HashStore
        >>> group = StoreGroup(HashStore(), rank=0, world_size=1)
        >>> group.gather("step", 7), group.any(True), group.sum([0.5])
        ([7], True, [0.5])
        >>> group.close()
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        local_rank: int = 0,
        timeout: float = 600.0,
        store_on_rank_0: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._store: Store | None = store
        self._subgroups = 0
        self._exchange = StoreExchange(store, rank, world_size, timeout)
        self._timeout = timeout
        self._store_on_rank_0 = store_on_rank_0
        self._on_close = on_close
        self._broken: RankError | None = None
        self._closed = False

    def watch(self) -> None:
        """Notice from now on when a rank on this machine ends; every rank calls it."""
        self._exchange.watch = ProcessWatch(self.gather("processes", this_process()))

    def gather(self, what: str, value: Json, *, within: float | None = None) -> list[Json]:
        """Return the values of all ranks, by rank, on every rank."""
        return self._ask("gather", what, value, within)

    def broadcast(self, what: str, value: Json = None) -> Json:
        """Return the value of rank 0 on every rank."""
        return self._ask("broadcast", what, value if self.rank == 0 else None)[0]

    def agree(self, what: str, value: Json) -> None:
        """Return only if all ranks have the same value."""
        texts = cast("list[str]", self._ask("agree", what, json.dumps(value, sort_keys=True)))
        if len(set(texts)) > 1:
            where, parts = narrowed(what, [json.loads(text) for text in texts])
            raise disagreement(parts, where, "every rank needs the same")

    def run_on_all(self, what: str, action: Callable[[], T]) -> T:
        """Run an action on every rank and return its own result, if it succeeded on all ranks."""
        try:
            result = action()
        except BaseException as error:
            with contextlib.suppress(RankError):
                self._tell(_FAILED, what, f"{type(error).__name__}: {error}")
            raise
        self._ask("run_on_all", what, None)
        return result

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return True in self._ask("any", "", bool(flag))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the ranks of each value, as float64, added by rank."""
        rows = cast("list[list[float]]", self._ask("sum", "", [float(value) for value in values]))
        if len({len(row) for row in rows}) > 1:
            raise disagreement([str(len(row)) for row in rows], "how many values to sum")
        return [reduce(add, column) for column in zip(*rows, strict=True)]

    def new_subgroup(self) -> StoreGroup:
        """Return a group of the same ranks for another thread."""
        if self._store is None:
            raise self._left("new_subgroup")
        self._subgroups += 1
        other = StoreGroup(
            PrefixStore(f"subgroup/{self._subgroups}", self._store),
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            timeout=self._timeout,
            store_on_rank_0=self._store_on_rank_0,
        )
        other._exchange.watch = self._exchange.watch.copy()
        return other

    def close(self) -> None:
        """Leave the group, and the process group if it was joined with it."""
        if self._closed:
            return
        self._closed = True
        self._store = None  # which ends with the last who holds it
        # The store ends with the process that holds it; the others may still read in it.
        needed = self.rank == 0 and self._store_on_rank_0
        needed = needed and not isinstance(self._broken, RankTimeoutError)
        self._exchange.leave(_encoded(_LEFT, "", None), wait_for_others=needed)
        self._exchange.watch.close()
        self._on_close()

    def _ask(self, kind: str, what: str, value: Json, within: float | None = None) -> list[Json]:
        """Send a value under the name of the call and return those of all ranks, by rank."""
        message = _encoded(kind, what, value)
        seconds = self._timeout if within is None else min(within, self._timeout)
        exchange = partial(self._exchange.exchange, message, seconds)
        texts = self._in_touch(_call(kind, what), exchange, seconds)
        messages = [json.loads(text) for text in texts]
        self._raise_failures(kind, what, messages)
        return [value for _, _, value in messages]

    def _tell(self, kind: str, what: str, value: Json) -> None:
        message = _encoded(kind, what, value)
        self._in_touch(_call(kind, what), lambda: self._exchange.post(message))

    def _in_touch(self, call: str, talk: Callable[[], T], seconds: float | None = None) -> T:
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise self._left(call)
        try:
            return talk()
        except NoAnswerError as silent:
            self._broken = self._without_answer(call, silent, seconds or self._timeout)
        except StoreLostError:
            self._broken = self._store_lost(call)
        raise self._broken

    def _raise_failures(self, kind: str, what: str, messages: Sequence[Any]) -> None:
        calls = [(message[0], message[1]) for message in messages]
        left = tuple(rank for rank, call in enumerate(calls) if call[0] == _LEFT)
        failed = tuple(rank for rank, call in enumerate(calls) if call[0] == _FAILED)
        if failed:
            first, more = failed[0], len(failed) - 1
            also = f" (and {more} other {'ranks' if more > 1 else 'rank'})" if more else ""
            found = f"{messages[first][1]}: {messages[first][2]}{also}"
            error = RankError(name_ranks(failed[:1]), found, ranks=failed)
        elif left:
            error = RankError(
                name_ranks(left),
                f"has left before {_call(kind, what)}",
                ranks=left,
                hint="its own output says why it ended",
            )
        elif len(set(calls)) > 1:
            error = disagreement(
                [f"{name} {of!r}" if of else name for name, of in calls],
                "the ranks are out of step",
                "every rank must make the same calls in the same order",
            )
        else:
            return
        # A failure that all ranks expect here leaves them in step.
        if left or set(calls) - {(kind, what), (_FAILED, what)} or kind != "run_on_all":
            self._broken = error
        raise error

    def _without_answer(self, call: str, silent: NoAnswerError, seconds: float) -> RankError:
        if self._closed:
            return self._left(call)
        if silent.ended:
            return self._ended(call, silent.ranks)
        return self._no_answer(call, silent.ranks, seconds)

    def _left(self, call: str) -> RankError:
        return RankError("group", f"{call}: this rank has left the group")

    def _ended(self, call: str, ranks: tuple[int, ...]) -> RankError:
        what, hint = f"has ended before {call}", "its own output says why it ended"
        return RankError(name_ranks(ranks), what, ranks=ranks, hint=hint)

    def _no_answer(self, call: str, ranks: tuple[int, ...], seconds: float) -> RankTimeoutError:
        if ranks:
            return RankTimeoutError(
                name_ranks(ranks),
                f"no answer within {seconds:g} s: {call}",
                ranks=ranks,
                hint="a rank that does not answer is slow, stopped or dead: see its output",
            )
        where, holder = self._store_holder()
        what = f"no answer within {seconds:g} s from the store of the process group: {call}"
        return RankTimeoutError(where, what, ranks=holder, hint=f"{where} holds it")

    def _store_lost(self, call: str) -> RankError:
        where, holder = self._store_holder()
        what = f"has ended, and with it the store of the process group: {call}"
        return RankError(where, what, ranks=holder, hint="its own output says why it ended")

    def _store_holder(self) -> tuple[str, tuple[int, ...]]:
        return ("rank 0", (0,)) if self._store_on_rank_0 else ("the launcher", ())


def _call(kind: str, what: str) -> str:
    """Return how messages name a call."""
    return f"{kind} {what}" if what else f"{kind}() of all ranks"


def _encoded(kind: str, what: str, value: Json) -> bytes:
    return json.dumps([kind, what, value]).encode()
