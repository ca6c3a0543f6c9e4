"""The group of several processes: messages go through the store of their process group."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar, cast

from torch._C._distributed_c10d import PrefixStore, Store

from unbroken.distributed.store_exchange import (
    NoAnswerError,
    ProcessWatch,
    StoreExchange,
    StoreLostError,
    this_process,
)
from unbroken.errors import RankError, RankTimeoutError
from unbroken.store import Json

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


T = TypeVar("T")

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

    def gather(self, what: str, value: Json) -> list[Json]:
        """Return the values of all ranks, by rank, on every rank."""
        return self._ask("gather", what, value)

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

    def _ask(self, kind: str, what: str, value: Json) -> list[Json]:
        """Send a value under the name of the call and return those of all ranks, by rank."""
        message = _encoded(kind, what, value)
        texts = self._in_touch(_call(kind, what), lambda: self._exchange.exchange(message))
        messages = [json.loads(text) for text in texts]
        self._raise_failures(kind, what, messages)
        return [value for _, _, value in messages]

    def _tell(self, kind: str, what: str, value: Json) -> None:
        message = _encoded(kind, what, value)
        self._in_touch(_call(kind, what), lambda: self._exchange.post(message))

    def _in_touch(self, call: str, talk: Callable[[], T]) -> T:
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise self._left(call)
        try:
            return talk()
        except NoAnswerError as silent:
            self._broken = self._without_answer(call, silent)
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

    def _without_answer(self, call: str, silent: NoAnswerError) -> RankError:
        if self._closed:
            return self._left(call)
        return (self._ended if silent.ended else self._no_answer)(call, silent.ranks)

    def _left(self, call: str) -> RankError:
        return RankError("group", f"{call}: this rank has left the group")

    def _ended(self, call: str, ranks: tuple[int, ...]) -> RankError:
        what, hint = f"has ended before {call}", "its own output says why it ended"
        return RankError(name_ranks(ranks), what, ranks=ranks, hint=hint)

    def _no_answer(self, call: str, ranks: tuple[int, ...]) -> RankTimeoutError:
        if ranks:
            return RankTimeoutError(
                name_ranks(ranks),
                f"no answer within {self._timeout:g} s: {call}",
                ranks=ranks,
                hint="a rank that does not answer is slow, stopped or dead: see its output",
            )
        where, holder = self._store_holder()
        what = f"no answer within {self._timeout:g} s from the store of the process group: {call}"
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
