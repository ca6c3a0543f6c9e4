"""Sources over loaders and iterables: through the loader's own state, or counted and skipped."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from unbroken.data.keyed_rng import KeyedRandom, derive_key
from unbroken.data.order import BatchShape
from unbroken.data.sources.batch_digests import OR_ALLOW, BatchDigest, read_otherwise, weights_of
from unbroken.data.sources.iterable import (
    END,
    EpochOverError,
    ForeignLoader,
    Grouping,
    Reader,
)
from unbroken.data.sources.order_state import OrderState
from unbroken.data.sources.own_generators import OwnGenerators
from unbroken.data.sources.protocol import (
    MAY_CHANGE_WITH_DATA,
    MicroBatch,
    Position,
    RunningIterator,
    require_counts,
    require_same_facts,
)
from unbroken.data.worker_signals import shut_down
from unbroken.errors import DataError
from unbroken.stored_names import stored_name

OnSkip = Callable[[int, int, float], None]

_log = logging.getLogger("unbroken.data")
_SECONDS_BETWEEN_REPORTS = 1.0
_OWN_STATE = (
    "Its state_dict does not bring it back to the place that it was taken at: give its data set, "
    "or a loader without state_dict, whose epoch is read again."
)


@dataclass(frozen=True)
class _Left:
    """An epoch that was left in the middle, and the position there."""

    reader: Reader | None = None
    position: Position | None = None

    def end(self) -> None:
        """Let its workers end."""
        if self.reader is not None:
            shut_down(self.reader.batches)


class LoaderSource:
    """Base of `StatefulSource` and `CountedSource`: endless epochs over a user's loader.

    Everything that the loader draws in this process is keyed, see `ForeignLoader`. With
    several ranks a loader of batches must itself give each rank its own batches.

    Args:
        loader: A loader of micro-batches, an iterable of samples, or a function giving one.
        seed: The seed of the run.
        shape: How a global batch is cut.
        grouping: What the loader gives, and how micro-batches are made of it.
        may_change: Facts (see `state_dict`) that need not be those of a loaded state.

    Attributes:
        rank_states: `rank_state` of every rank, where each has a loader of its own; to be set
            before each `state_dict`.
        first_items: What the first micro-batch of all ranks was made of, since `iterate`.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        loader: Any,
        *,
        seed: int,
        shape: BatchShape,
        grouping: Grouping | None = None,
        may_change: Collection[str] = (),
    ) -> None:
        self._may_change = frozenset(may_change)
        self.shape = shape
        self.position = Position()
        self._loader = ForeignLoader(loader, seed)
        self._grouping = Grouping() if grouping is None else grouping
        self.running = RunningIterator()
        self.rank_states: list[dict[str, Any]] = []
        self.first_items: list[Any] = []
        self.is_reading = False
        self._before: dict[str, Any] = {}
        self._weights: Mapping[str, str] = {}
        self._batch: list[Any] = []
        self._reader: Reader | None = None
        self._left: _Left | None = None
        self._over: Position | None = None  # where an epoch was seen to end
        self.own_generators = OwnGenerators(
            {"data": loader},
            is_alone=self.kind == "counted" and _is_read_here(loader) and shape.world_size == 1,
            without=self._loader.seeded,
        )
        self._epochs: dict[int, dict[str, Any]] = {}  # their states when an epoch began
        self._stored_generators: tuple[Position, Any] | None = None
        self._order = OrderState(self._loader.order_parts if self.kind == "counted" else {})
        self._stored_order: tuple[Position, Mapping[str, Any]] | None = None
        self._loader.on_epoch = self._note_epoch

    def _note_epoch(self, epoch: int) -> None:
        before = {n: states for n, states in self._epochs.items() if epoch - 2 <= n < epoch}
        self._epochs = {**before, epoch: self.own_generators.states()}
        self._order.note(epoch)

    @property
    def data(self) -> Any:
        """The loader or the iterable."""
        return self._loader.loader

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any] | None:
        """What makes a batch of samples, where that is done here."""
        return self._grouping.collate if self._grouping.samples else None

    @property
    def on_workers(self) -> Callable[[], object]:
        """Called before processes that read get copies of the data set; may be set."""
        return self._loader.on_workers

    @on_workers.setter
    def on_workers(self, call: Callable[[], object]) -> None:
        self._loader.on_workers = call

    @property
    def gives_samples(self) -> bool:
        """Whether the loader gives single samples, which are dealt to the ranks here."""
        return self._grouping.samples

    @property
    def steps_per_epoch(self) -> Fraction | None:
        """Optimizer steps in one epoch, where the loader has a length; else None."""
        length = self._loader.length
        if length is None:
            return None
        if not self._grouping.samples:
            return Fraction(length, self.shape.accumulation)
        if self._grouping.drop_last:
            length -= length % self.shape.micro_batch_size
        return Fraction(length, self.shape.global_batch_size)

    @property
    def samples_per_epoch(self) -> int | None:
        """None: positions are counted in what the loader gives."""
        return None

    def iterate(self, position: Position | None = None) -> Iterator[MicroBatch]:
        """Return the micro-batches from a position on, endless.

        A pass that stands there already goes on, with nothing to be read again.
        """
        start = self.position if position is None else position
        return self.running.begin(self._read(start, self._reader_left_at(start)))

    def _reader_left_at(self, start: Position) -> Reader | None:
        """Close the iterator that runs; return what it reads with, if it stands there."""
        self.first_items = []
        self._left = _Left()
        self.running.close()
        left, self._left = self._left, None
        if left.position is not start:
            left.end()
        return left.reader if left.position is start else None

    @property
    def epoch(self) -> int:
        """The epoch that the position lies in; at the edge of two, the one that was read last."""
        return self.position.epoch

    def rest_of_epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """Return the micro-batches of this epoch that are still to come.

        Raises:
            DataError: The position lies in another epoch.
        """
        start = self.position
        if start.epoch != epoch:
            what = "the position lies in another epoch than the loop"
            raise DataError("data", what, expected=epoch, found=start.epoch)
        if start is self._over or self._is_known_to_be_over(start):
            return iter(())
        return self.running.begin(self._read(start, self._reader_left_at(start), bounded=True))

    def _is_known_to_be_over(self, position: Position) -> bool:
        """Return whether nothing is left of an epoch, by a length that is always right."""
        loader = self._loader.loader
        is_plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
        if not is_plain or not all(map(_is_of_torch, (loader.sampler, loader.batch_sampler))):
            return False
        length = self._loader.length
        return length is not None and position.taken >= length

    def end_epoch(self, epoch: int) -> None:
        """Go to the beginning of the next epoch, whatever of this one was left out."""
        self._reader_left_at(self.position)
        if self.position.epoch == epoch:
            self.position = Position(samples=self.position.samples, epoch=epoch + 1)
            self.own_generators.note(self.position)
        self._reader = None

    def used(self, micro: MicroBatch) -> None:
        """Record that a micro-batch was used."""
        self.position = micro.after

    def micro_batches_left(self) -> int:
        """Return how many micro-batches are left in the current optimizer step: 1 to A."""
        return self.shape.accumulation - self.position.pending

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch used, and what it depends on.

        Where each rank has a loader and `rank_states` is set, it is the state of all ranks; else
        only that of this rank.
        """
        return {"ranks": self.rank_states} if self.rank_states else self.rank_state()

    def rank_state(self) -> dict[str, Any]:
        """Return the position of this rank's loader, and what it depends on."""
        position = self.position
        return {
            **self._facts(),
            "samples": position.samples,
            "epoch": position.epoch,
            "taken": position.taken,
            "pending": position.pending,
            "loader_state": position.loader_state,
            "trail": {**position.trail, **self._what_draws_next(position)},
            **self._generators_at(position),
            **self._order_of(position),
        }

    def _order_of(self, position: Position) -> dict[str, Any]:
        """Return what samplers keep: as it stood when the epoch of a position began, and here."""
        stored, reader = self._stored_order, self._reader
        if stored is not None and stored[0] is position:  # nothing was read since
            return {"order": stored[1]} if stored[1] else {}
        kept = self._order.state(position.epoch, None if reader is None else reader.epoch)
        place = None if reader is None else (reader.epoch, reader.taken)
        is_ahead = place not in (None, (position.epoch, position.taken))
        return {"order": {**kept, "is_ahead": is_ahead}} if kept else {}

    def _generators_at(self, position: Position) -> dict[str, Any]:
        """Return the states of generators that the data hold, here and when the epoch began."""
        found = self.own_generators.state(position)
        if found is None:
            return {}
        began, stored = self._epochs.get(position.epoch), self._stored_generators
        if stored is not None and stored[0] is position and isinstance(stored[1], Mapping):
            began = stored[1].get("epoch")  # nothing was read since
        is_known = found["is_known"] and (began is not None or not position.taken)
        return {"generators": {**found, "is_known": is_known, "epoch": began or {}}}

    def _what_draws_next(self, position: Position) -> dict[str, Any]:
        """Return the weights that the next epoch is drawn from; if it began, was drawn from."""
        reader = self._reader
        if reader is None or reader.epoch == position.epoch:
            return {"weights": weights_of(self._loader.loader)}
        return {"next": {"epoch": reader.epoch, "drawn_from": dict(reader.drawn_from)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: It was saved with another loader, seed or cut of the global batch, or by
                loaders on another number of ranks.
        """
        self.check_state_dict(state)
        state, facts = self._of_this_rank(state), self._facts()
        self.running.close()
        names = ("samples", "epoch", "taken", "pending", "loader_state")
        is_same = "trail" not in self._may_change and all(state.get(n) == facts[n] for n in facts)
        trail = state.get("trail", {}) if is_same else {}
        self._weights, self._reader = trail.get("weights") or {}, None
        self.position = Position(**{name: state[name] for name in names}, trail=trail)
        self._stored_generators = (self.position, state.get("generators") if trail else None)
        self.own_generators.restore(self._stored_generators[1])
        self._stored_order = (self.position, state.get("order", {}) if trail else {})

    def accept_other_data(self) -> None:
        """Accept a position even if the data now give other batches up to it."""
        self._may_change |= MAY_CHANGE_WITH_DATA

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        own = self._of_this_rank(state)
        require_same_facts(own, self._facts(), self._may_change)
        require_counts(own, "samples", "epoch", "taken", "pending")
        if "trail" not in self._may_change:
            self.own_generators.check(own.get("generators"))
            order = own.get("order", {})
            self._order.check(order)

    def _of_this_rank(self, state: Any) -> Any:
        if not isinstance(state, Mapping) or self._grouping.samples or state.get("gives_samples"):
            return state
        if "ranks" not in state and state.get("world_size") == self.shape.world_size:
            return state  # each rank has stored its own
        ranks = state.get("ranks", [state])
        if len(ranks) != self.shape.world_size:
            raise DataError(
                "data.world_size",
                "a loader that gives each rank its own batches goes on with as many ranks",
                expected=f"{len(ranks)}, as saved",
                found=self.shape.world_size,
                hint="A map-style data set, or an iterable of samples that is the same on all "
                "ranks, is dealt to any number of ranks.",
            )
        found: Mapping[str, Any] = ranks[self.shape.rank]
        return found

    def close(self) -> None:
        """Stop reading; the position stays."""
        self.running.close()

    @contextmanager
    def _reading(self) -> Iterator[KeyedRandom]:
        """Draw keyed numbers, and say so: what is read meanwhile is read for this source."""
        with KeyedRandom() as rng:
            self.is_reading = True
            try:
                yield rng
            finally:
                self.is_reading = False

    def _read(
        self, position: Position, reader: Reader | None, *, bounded: bool = False
    ) -> Generator[MicroBatch, None, None]:
        if reader is None:
            reader = self._begin_at(position)
        self._reader = reader
        reader.is_bounded = bounded  # what not all ranks get, none gets
        reader.gives_rest = self.shape.world_size == 1 and not self._grouping.drop_last
        try:
            while True:
                with self._reading() as rng:  # closed before each yield: the trainer draws too
                    self._before = self._beginning(reader, position)
                    micro = self._next(reader, position, rng)
                position = micro.after
                self.own_generators.note(position)
                yield micro
        except EpochOverError:
            self._over = position
        finally:
            left = _Left(reader, position)
            if self._left is None:
                left.end()
            else:
                self._left = left

    def _begin_at(self, position: Position) -> Reader:
        with ExitStack() as failed, self._reading() as rng:
            failed.callback(self._loader.end)  # else workers outlive the error, and the process
            reader = self._resume(position, rng)
            reader.expected = position.trail.get("next") or {}
            self._refuse_other_weights()
            failed.pop_all()
            return reader

    def _refuse_other_weights(self) -> None:
        """Raise if a sampler's weights, which training changes, are not those that were saved."""
        weights, self._weights = self._weights, {}
        now = weights_of(self._loader.loader) if weights else {}
        for name, digest in weights.items():
            if now.get(name, digest) != digest:
                raise DataError(
                    f"{type(self._loader.loader).__name__}.{name}",
                    "is not what it was when the checkpoint was saved",
                    expected=f"digest {digest}",
                    found=f"digest {now[name]}",
                    hint=f"Save it with the run, by a name of its own. {OR_ALLOW}",
                )

    def _next(self, reader: Reader, position: Position, rng: KeyedRandom) -> MicroBatch:
        if self._grouping.samples:
            return self._next_of_samples(reader, position, rng)
        (data,), epoch = reader.take(1, self._grouping, rng)
        self.first_items = self.first_items or [data]
        samples = _samples_in(data, self.shape.micro_batch_size)
        first = position.samples + self.shape.rank * samples
        return MicroBatch(data, samples, epoch, first, self._after(reader, position, samples))

    def _next_of_samples(self, reader: Reader, position: Position, rng: KeyedRandom) -> MicroBatch:
        """Deal a step in equal, contiguous parts; every rank reads all of it, and keeps its own."""
        shape = self.shape
        size, own = shape.micro_batch_size, shape.accumulation
        if position.pending == 0:
            self._skip_of_others(reader, shape.rank * own, rng)
        items, epoch = reader.take(size, self._grouping, rng)
        self.first_items = self.first_items or items
        begin = position.samples - position.pending * shape.stride
        first = begin + (shape.rank * own + position.pending) * size
        rng.seed(derive_key(self._loader.seed, "collate", first))
        data = self._grouping.collate(items)
        if self._collates:
            self._batch = [size, _digest_of(data)]
        if position.pending == own - 1:
            self._skip_of_others(reader, (shape.world_size - 1 - shape.rank) * own, rng)
        return MicroBatch(data, len(items), epoch, first, self._after(reader, position, len(items)))

    def _skip_of_others(self, reader: Reader, micro_batches: int, rng: KeyedRandom) -> None:
        """Read what other ranks take."""
        for _ in range(micro_batches):
            items, _ = reader.take(self.shape.micro_batch_size, self._grouping, rng)
            self.first_items = self.first_items or items

    def _after(self, reader: Reader, position: Position, samples: int) -> Position:
        return Position(
            samples=position.samples + samples * self.shape.world_size,
            epoch=reader.epoch,
            taken=reader.taken,
            pending=(position.pending + 1) % self.shape.accumulation,
            loader_state=self._loader_state(),
            trail=self._trail(reader),
        )

    def _trail(self, reader: Reader) -> dict[str, Any]:
        return {"digest": reader.seen.text(), "before": self._before, "batch": self._batch}

    @property
    def _collates(self) -> bool:
        """Whether a collator of the user's makes batches of which this rank has every one."""
        own = self._grouping.collate is not default_collate
        return own and self._grouping.samples and self.shape.world_size == 1

    def _collate_again(self, position: Position, items: list[Any], rng: KeyedRandom) -> None:
        """Raise if the collator makes another batch of the last samples than it did."""
        size, before = self.shape.micro_batch_size, position.trail.get("before") or {}
        is_same = (position.trail.get("batch") or [None])[0] == size
        if not self._collates or not is_same or before.get("epoch") != position.epoch:
            return
        rng.seed(derive_key(self._loader.seed, "collate", position.samples - size))
        digest, found = position.trail["batch"][1], _digest_of(self._grouping.collate(items))
        if digest != found:
            last, epoch = position.taken - 1, position.epoch
            what = f"the collator's batch of items up to {last} of epoch {epoch}"
            self._refuse_another(what, digest, found)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": self.kind,
            "seed": self._loader.seed,
            **self._loader.facts(),
            "global_batch_size": self.shape.global_batch_size,
            "gives_samples": self._grouping.samples,
        }
        if not self._grouping.samples or self._grouping.drop_last:
            facts["micro_batch_size"] = self.shape.micro_batch_size
        if not self._grouping.samples:
            facts["world_size"] = self.shape.world_size
        return facts

    def _resume(self, position: Position, rng: KeyedRandom) -> Reader:
        """Return a reader that continues at a position."""
        raise NotImplementedError

    def _loader_state(self) -> Any:
        """Return what must be stored to come back to the loader's present position."""
        raise NotImplementedError

    def _beginning(self, reader: Reader, position: Position) -> dict[str, Any]:
        """Return what is stored of the position before a micro-batch."""
        raise NotImplementedError

    def _refuse_another(self, what: str, expected: object, found: object, *hint: str) -> None:
        raise read_otherwise(type(self._loader.loader).__name__, what, expected, found, *hint)


@stored_name("unbroken.data.loader_source.StatefulSource")
class StatefulSource(LoaderSource):
    """A loader that has `state_dict` and `load_state_dict`, used through them.

    Its state is taken after each batch that it hands out and travels with the batch, so that
    what is saved belongs to the last batch *used*. How exact a resume is, and what it costs,
    is up to the loader; what it draws in this process is keyed.
    """

    kind: ClassVar[str] = "stateful"

    def _resume(self, position: Position, rng: KeyedRandom) -> Reader:
        before = position.trail.get("before") or {}
        if position.trail.get("digest") is None or not before:
            return self._at(position.epoch, position.taken, position.loader_state, rng)
        reader = self._at(**before, rng=rng)
        size = self.shape.micro_batch_size if self._grouping.samples else 1
        items, _ = reader.take(size, self._grouping, rng)
        found = (reader.epoch, reader.taken, reader.seen.text())
        if found != (position.epoch, position.taken, position.trail["digest"]):
            batch = f"item {position.taken - 1} of epoch {position.epoch}, from its own state"
            self._refuse_another(batch, position.trail["digest"], found[2], _OWN_STATE)
        self._collate_again(position, items, rng)
        return reader

    def _at(self, epoch: int, taken: int, loader_state: Any, rng: KeyedRandom) -> Reader:
        return Reader(self._loader, self._loader.begin(epoch, rng, loader_state), epoch, taken)

    def _loader_state(self) -> Any:
        return self._loader.state()

    def _beginning(self, reader: Reader, position: Position) -> dict[str, Any]:
        """One batch is read again from here, where it is this rank's alone."""
        reader.seen = BatchDigest()
        if self._grouping.samples and self.shape.world_size > 1:
            return {}
        return {
            "epoch": position.epoch,
            "taken": position.taken,
            "loader_state": position.loader_state,
        }


@stored_name("unbroken.data.loader_source.CountedSource")
class CountedSource(LoaderSource):
    """A loader without an exact state of its own: its epoch is read again up to the position.

    That is exact, because each epoch's `iter()` and each `next()` are keyed, and because
    skipped batches are really read, so that workers draw what they drew before. It costs the
    time of reading them, which is logged (logger `unbroken.data`) and told to `on_skip`.

    Args:
        loader: As for `LoaderSource`.
        seed: The seed of the run.
        shape: How a global batch is cut.
        grouping: As for `LoaderSource`.
        reason: Why the epoch must be read again; it stands in the log.
        on_skip: Called with (items skipped, items to skip, seconds so far), about once a
            second and when all are skipped.
        clock: Seconds, monotonic.

    Example:
        >>> source = CountedSource([[1, 2], [3, 4]], seed=0, shape=BatchShape(2, 2))
        >>> batch = next(source.iterate())
        >>> batch.data, batch.after.taken
        ([1, 2], 1)
    """

    kind: ClassVar[str] = "counted"

    def __init__(
        self,
        loader: Any,
        *,
        seed: int,
        shape: BatchShape,
        grouping: Grouping | None = None,
        reason: str = "it has no state_dict",
        on_skip: OnSkip | None = None,
        clock: Callable[[], float] = time.monotonic,
        may_change: Collection[str] = (),
    ) -> None:
        super().__init__(loader, seed=seed, shape=shape, grouping=grouping, may_change=may_change)
        self.on_skip = on_skip
        self._reason = reason
        self._clock = clock

    def _resume(self, position: Position, rng: KeyedRandom) -> Reader:
        began, now = self._generators_for(position)
        self.own_generators.put(began)
        order, self._stored_order = self._order_of(position).get("order", {}), None
        moved = order.get("moved", {})
        self._order.put(moved)
        reader = Reader(
            self._loader, self._loader.begin(position.epoch, rng), position.epoch, taken=0
        )
        if position.taken:
            last = self._skip(reader, position.taken, position.trail, rng)
            self._collate_again(position, last, rng)
            may_put = not order.get("is_ahead") and _is_read_here(self._loader.loader)
            self._order.go_on(moved, may_put=may_put)
        self.own_generators.put(now)
        self.own_generators.begin(position)
        return reader

    def _generators_for(self, position: Position) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return where generators of the data stood when the epoch began, and stand here."""
        stored, self._stored_generators = self._stored_generators, None
        if stored is not None and stored[0] is position and isinstance(stored[1], Mapping):
            return stored[1].get("epoch") or {}, stored[1].get("states") or {}
        began, now = self._epochs.get(position.epoch), self.own_generators.at(position)
        return (began, now) if began and now and position.taken else ({}, {})

    def _skip(
        self, reader: Reader, count: int, trail: Mapping[str, Any], rng: KeyedRandom
    ) -> list[Any]:
        """Read up to a position again; return what a micro-batch is made of, as far as it goes."""
        last: deque[Any] = deque(maxlen=self.shape.micro_batch_size if self._collates else 0)
        name = type(self._loader.loader).__name__
        _log.warning(
            "%s: reading and skipping %d items of epoch %d to come back to its place, because %s",
            name,
            count,
            reader.epoch,
            self._reason,
        )
        start = reported = self._clock()
        while reader.taken < count:
            if (item := reader.read(rng)) is END:
                raise DataError(
                    name,
                    f"epoch {reader.epoch} is shorter than when it was saved",
                    expected=f"at least {count} items",
                    found=reader.taken,
                )
            self._hold_against(reader, trail, count)
            last.append(item)
            now = self._clock()
            if now - reported >= _SECONDS_BETWEEN_REPORTS and reader.taken < count:
                reported = now
                self._report(reader.taken, count, now - start)
        self._report(count, count, self._clock() - start)
        _log.warning("skipped %d items in %.1f s", count, self._clock() - start)
        return list(last)

    def _hold_against(self, reader: Reader, trail: Mapping[str, Any], count: int) -> None:
        """Raise as soon as the data that are read again differ from those read before."""
        before, epoch = trail.get("before") or {}, f"epoch {reader.epoch}"
        drawn_from = trail.get("drawn_from") or {}
        now = {name: reader.drawn_from.get(name, digest) for name, digest in drawn_from.items()}
        changed = [name for name, digest in drawn_from.items() if now[name] != digest]
        if changed and count == self._loader.length and self._are_weights(changed):
            return  # the epoch is over: the next one is drawn from the weights as they are now
        if changed:
            name = changed[0]
            what = f"{epoch} was drawn from another state of {name}"
            self._refuse_another(what, drawn_from[name], now[name])
        expected = {count: trail.get("digest")}
        if before.get("epoch") == reader.epoch:
            expected[before["taken"]] = before["digest"]
        digest, found = expected.get(reader.taken), reader.seen.text()
        if digest is not None and digest != found:
            first = before["taken"] if reader.taken == count and len(expected) > 1 else 0
            items = (
                f"item {first}" if first == count - 1 else f"items {first} to {reader.taken - 1}"
            )
            self._refuse_another(f"{items} of {epoch}", digest, found)

    def _are_weights(self, names: Iterable[str]) -> bool:
        weights = weights_of(self._loader.loader)
        return all(name in weights for name in names)

    def _report(self, done: int, total: int, seconds: float) -> None:
        if self.on_skip is not None:
            self.on_skip(done, total, seconds)

    def _loader_state(self) -> None:
        return None

    def _beginning(self, reader: Reader, position: Position) -> dict[str, Any]:
        return {"epoch": reader.epoch, "taken": reader.taken, "digest": reader.seen.text()}

    def _trail(self, reader: Reader) -> dict[str, Any]:
        return {**super()._trail(reader), "drawn_from": dict(reader.drawn_from)}


def _is_of_torch(sampler: Any) -> bool:
    """Return whether torch wrote a sampler, so that it gives what its length says; None: it did."""
    of_torch = ("torch.utils.data.sampler", "torch.utils.data.distributed")
    return sampler is None or type(sampler).__module__ in of_torch


def _is_read_here(loader: Any) -> bool:
    base = getattr(loader, "base_dataloader", loader)
    return not getattr(base, "num_workers", 0)


def _digest_of(batch: Any) -> str | None:
    seen = BatchDigest()
    seen.add(batch)
    return seen.text()


def _samples_in(batch: Any, otherwise: int) -> int:
    """The length of the first tensor in a batch, or of the batch itself."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else otherwise
    if isinstance(batch, Mapping):
        return _samples_in(next(iter(batch.values())), otherwise) if batch else otherwise
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], (torch.Tensor, Mapping)):
            return _samples_in(batch[0], otherwise)
        return len(batch)
    return otherwise
