"""The loop in which nothing can be forgotten: `steps`, `epochs` and `batches` of a Checkpointer.

The position belongs to the weights: it moves where the optimizer has stepped, and saves are made
at the edge of a step alone, when the code of the loop asks for the next one. So `break`, `continue`
and an exception leave no checkpoint that pairs weights with the position of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch

from unbroken.capture import all_objects, capture, capture_rng, is_sharded, raw, restore_rng
from unbroken.capture.state_tree import TreeMap
from unbroken.changes.differences import ResumeReport
from unbroken.checkpoint.arguments import loggable
from unbroken.checkpoint.coverage.loop_watch import StepsSeen
from unbroken.checkpoint.loop.data import LoopData
from unbroken.checkpoint.loop.host import Around, LoopHost
from unbroken.checkpoint.loop.stored import LoopState, StoredLoop
from unbroken.checkpoint.preemption import Preemption, TrainingStopped
from unbroken.checkpoint.resume.selection import ResumeFrom
from unbroken.data import EpochSource, MicroBatch
from unbroken.data.worker_signals import is_end_of_a_worker
from unbroken.distributed import disagreement
from unbroken.errors import ConfigError, RankError

_PATIENCE = 60.0  # seconds, for the ranks that are still in a turn that this one ended without step
_TOGETHER = "`continue` and optimizer.step() must come on all ranks in the same turns"


@dataclass(frozen=True)
class _Turn:
    """One turn of the loop: the last that it was given, and when it began."""

    last: MicroBatch | None
    began: float


@dataclass
class _Epoch:
    """An epoch that was entered.

    Attributes:
        number: Which, from 0.
        start: The generators and the state of the loop at its beginning.
        place: Goes to the place where a resume goes on in it; None: it goes on here.
        is_read: Whether its batches were asked for.
    """

    number: int
    start: tuple[dict[str, Any], dict[str, Any]]
    place: Callable[[], None] | None = None
    is_read: bool = False


class TrainingLoop:
    """Steps, epochs and batches over the data of a run.

    Args:
        host: Saves and resumes.
        data: What was given as data.
        around: What else it needs of the host.
        has_cadence: Whether the host was told when to save.

    Attributes:
        state: What the code of the loop keeps in it.
    """

    def __init__(
        self,
        host: LoopHost,
        data: LoopData,
        around: Around,
        *,
        has_cadence: bool,
    ) -> None:
        self.state = LoopState()
        self.is_used = False
        self._host, self._data, self._around = host, data, around
        self._tell, self._clock = around.tell, around.clock
        self._has_cadence, self._seen = has_cadence, StepsSeen(host.objects, self._holds)
        self._step = 0
        self._is_at_work = False  # what the host is asked for now, it is asked for by this
        self._is_begun = self._is_saved = False
        self._running: Preemption | None = None
        self._turn: _Turn | None = None
        self._epoch: _Epoch | None = None
        self._next_epoch: int | None = None
        self._stored = StoredLoop()
        self._stopped: Sequence[int | None] = ()  # the `until` of a loop that stop() ended
        self._until: int | None = None
        self._began_with: Sequence[str] = ()  # the names in the state of a fresh run
        self._slowest = 0.0

    # What the host asks and tells.

    @property
    def step(self) -> int:
        """Completed steps: one more as soon as an optimizer has stepped."""
        self._count()
        return self._step

    def _holds(self, thing: object) -> bool:
        """Return whether an object is registered, or a part of what is."""
        if self._around.watch is not None:
            return self._around.watch.holds(thing)
        return any(one is thing for one in all_objects(self._host.objects))

    def record(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a line of statistics; values by name belong to the step under way, and its epoch.

        Raises:
            ConfigError: A value is neither a number nor a text, nor made of these.
        """
        is_open = self._turn is not None and not self._seen.has_stepped
        place = {"step": self.step + is_open} if values else {}
        if values and self._epoch is not None:
            place["epoch"] = self._epoch.number
        given = {**place, **record, **values}
        return {str(name): loggable(one, str(name)) for name, one in given.items()}

    def facts(self) -> dict[str, Any]:
        """Return what the training depends on and the loop was given."""
        return {"loop": {"accumulate": self._data.accumulate}} if self._data.accumulate else {}

    def refuse_by_hand(self, call: str) -> None:
        """Raise where the code of a loop asks for what the loop does itself.

        Raises:
            ConfigError: It was begun by `steps` or `epochs`.
        """
        if self.is_used and not self._is_at_work:
            what = "steps() and epochs() save at the edge of each step where that is due"
            hint = (
                "leave it out; or write the whole loop by hand, with resume() in place of steps()"
            )
            raise ConfigError(f"{call}()", what, hint=hint)

    def refuse_resume(self) -> None:
        """Raise where a resume cannot bring all back.

        Raises:
            ConfigError: A loop is under way, or the data are not known yet.
        """
        if self._is_at_work:
            return
        if self._running is not None:
            raise ConfigError("resume()", "a loop is under way", hint="leave the loop first")
        self._data.require_position()

    def resumed(self, report: ResumeReport) -> None:
        """Take note that the host has resumed."""
        self._is_begun, self._step = True, report.step
        self._is_saved = report.resumed
        self._epoch, self._turn = None, None
        self._stored = stored = StoredLoop.of(self._host.values if report.resumed else None)
        self._next_epoch, self._stopped = stored.epoch, tuple(stored.stopped)
        if stored.is_of_loop:
            self.state.put(stored.with_new(self.state))
            self._began_with = stored.began_with

    def give_way(self) -> bool:
        """Close the host if one of these loops was begun, and none is under way; say whether."""
        is_idle = self.is_used and self._running is None and not self._is_at_work
        if is_idle:
            self._host.close()
        return is_idle

    def closed(self) -> None:
        """Take note that the host was closed: the next loop resumes again."""
        self._is_begun = False

    # The loops.

    def steps(
        self,
        until: int | None,
        *,
        batch_size: int | None,
        accumulate: int | None,
        resume: ResumeFrom,
    ) -> Iterator[Any]:
        """See `LoopMethods.steps`."""
        self._begin("steps", until, batch_size, accumulate, resume)
        if self._stored.entered is not None or self._epoch is not None:
            what = "the checkpoint was made in the middle of an epoch of epochs()"
            raise ConfigError("steps()", what, hint="go on with epochs()")
        self._next_epoch = None
        return self._steps(until)

    def epochs(
        self,
        until: int | None,
        *,
        batch_size: int | None,
        accumulate: int | None,
        resume: ResumeFrom,
    ) -> Iterator[int]:
        """See `LoopMethods.epochs`."""
        self._begin("epochs", until, batch_size, accumulate, resume)
        source = self._data.source
        if not isinstance(source, EpochSource):
            found = "no data" if source is None else type(source).__name__
            what = "needs data that come in epochs"
            hint = "Checkpointer(..., data=...) takes a data set or a loader; without: run.steps()"
            raise ConfigError("epochs()", what, found=found, hint=hint)
        self._next_epoch = source.epoch if self._next_epoch is None else self._next_epoch
        return self._epochs(until)

    def batches(self) -> Iterator[Any]:
        """See `LoopMethods.batches`."""
        epoch, where = self._epoch, "batches()"
        if epoch is None or self._running is None:
            hint = "for epoch in run.epochs(5): for batch in run.batches(): ...; or run.steps(...)"
            raise ConfigError(where, "is called outside of a loop over epochs()", hint=hint)
        if self._turn is not None or epoch.is_read:
            what = "the batches of an epoch are given once"
            raise ConfigError(where, what, hint="for a second pass, take a second epoch")
        epoch.is_read = True
        return self._batches(epoch, self._running)

    def stop(self) -> None:
        """End the loop at its next edge: of the step in steps(), of the epoch in epochs()."""
        if self._running is None:
            raise ConfigError("stop()", "no loop is under way", hint="call it inside of the loop")
        self._stopped = (self._until,)

    def _begin(
        self,
        name: str,
        until: int | None,
        batch_size: int | None,
        accumulate: int | None,
        resume: ResumeFrom,
    ) -> None:
        if self._running is not None:
            what = "a loop over steps() or epochs() is under way"
            hint = "inside of epochs(): run.batches(); an iterator that was left: close() it"
            raise ConfigError(f"{name}()", what, hint=hint)
        if until is not None and (type(until) is not int or until < 0):
            raise ConfigError(f"{name}()", expected="a whole number", found=repr(until))
        self._data.choose(
            batch_size, accumulate, whole_epochs=name == "epochs", is_begun=self._is_begun
        )
        self._count()
        self._turn, self._epoch, self._until = None, None, until
        self.is_used = True
        if not self._is_begun:
            self._began_with = (*self.state,)
        if not self._is_begun or resume != "auto":
            with self._working(), self._signals():
                self._host.resume(resume)
        if name == "steps" and not self._has_cadence:
            self._tell(
                "nothing says when to save, so that only the end of the loop and a stop are "
                "saved: Checkpointer(..., save_steps=...)"
            )

    def _steps(self, until: int | None) -> Iterator[Any]:
        with self._run() as preemption:
            if self._tell_if_over("step", self._step, until):
                return
            for given, last in self._windows():
                self._turn_begins(last, preemption)
                yield given
                self._turn_is_over(preemption)
                if self._is_over(self._step, until):
                    break
            self._finish()

    def _epochs(self, until: int | None) -> Iterator[int]:
        with self._run() as preemption:
            if self._tell_if_over("epoch", self._number, until):
                return
            while not self._is_over(self._number, until):
                epoch = self._enter_epoch()
                preemption.training_begins()
                yield epoch.number
                self._leave_epoch(epoch)
                reason = self._agreed_reason(preemption)
                if not self._has_cadence:
                    self._save()
                    reason = reason or self._agreed_reason(preemption)
                if reason is not None and not self._is_over(self._number, until):
                    self._stop(reason)
            self._finish()

    @property
    def _epochs_of_data(self) -> EpochSource:
        source = self._data.source
        if not isinstance(source, EpochSource):
            raise TypeError("epochs() has looked at this")
        return source

    def _batches(self, epoch: _Epoch, preemption: Preemption) -> Iterator[Any]:
        place, epoch.place = epoch.place, None
        if place is not None:
            place()
        for given, last in self._cut(self._epochs_of_data.rest_of_epoch(epoch.number), preemption):
            self._turn_begins(last, preemption)
            try:
                yield given
            except GeneratorExit:
                self._count()
                self._turn = None  # a batch without a step: the epoch is left
                raise
            self._turn_is_over(preemption)

    # One turn of a loop.

    def _windows(self) -> Iterator[tuple[Any, MicroBatch | None]]:
        """Yield what each step is given, and the last micro-batch of it."""
        source, preemption = self._data.source, self._running
        if source is None:
            while True:
                yield self._step, None
        elif preemption is not None:
            yield from self._cut(source.iterate(), preemption)

    def _cut(
        self, batches: Iterator[MicroBatch], preemption: Preemption
    ) -> Iterator[tuple[Any, MicroBatch]]:
        """Yield the micro-batches of each step: one, or a list of them."""
        while True:
            try:
                window = list(islice(batches, self._data.next_count()))
            except RuntimeError as error:
                reason = preemption.reason()
                if reason is not None and self._is_alone and is_end_of_a_worker(error):
                    self._stop(reason)
                raise
            if not window:
                return
            given = [one.data for one in window]
            yield given if self._data.gives_lists else given[0], window[-1]

    @property
    def _is_alone(self) -> bool:
        return self._host.group.world_size == 1

    def _turn_begins(self, last: MicroBatch | None, preemption: Preemption) -> None:
        preemption.training_begins()
        self._seen.turn_begins()
        self._turn = _Turn(last, self._clock.monotonic())

    def _count(self) -> None:
        """Move the position if an optimizer has stepped in this turn."""
        if self._turn is not None and self._seen.has_stepped:
            self._take(self._turn, counts=True)

    def _take(self, turn: _Turn, *, counts: bool) -> None:
        """Let the position be the one behind a turn."""
        self._turn, self._is_saved = None, False
        self._step += counts
        if turn.last is not None and self._data.source is not None:
            self._data.source.used(turn.last)
        self._slowest = max(self._slowest, self._clock.monotonic() - turn.began)

    def _turn_is_over(self, preemption: Preemption) -> None:
        """Count the turn; save, if that is due; stop, if somebody asks for that."""
        before = self._step if self._turn is not None else self._step - 1
        self._count()
        if self._turn is not None:
            self._take(self._turn, counts=self._seen.counts_without_a_step())
        is_step = self._step > before
        reason = self._agreed_reason(preemption, is_step=is_step)
        if is_step and self._is_due():
            self._save()
            reason = reason or self._agreed_reason(preemption)
        goes_on = self._epoch is not None or not self._is_over(self._step, self._until)
        if reason is not None and goes_on and (is_step or not self._seen.waits_for_a_step()):
            self._stop(reason)

    def _is_due(self) -> bool:
        with self._working():
            self._host.rehearse(self._step, self._values)
            return self._host.should_save(self._step)

    # Epochs.

    @property
    def _number(self) -> int:
        """The epoch that is entered next."""
        return self._next_epoch or 0

    def _enter_epoch(self) -> _Epoch:
        """Begin an epoch; or let the code before its batches find what it found at its begin."""
        stored, self._stored = self._stored, StoredLoop()
        self._seen.turn_begins()
        if stored.entered is None:
            start = (capture_rng(), _copy(dict(self.state)))
            self._epoch = _Epoch(self._number, start)
            return self._epoch
        rng, state = stored.entered
        self._epoch = _Epoch(self._number, (rng, state), self._way_back())
        self._tell(
            f"epoch {self._number} goes on in its middle: what the loop counts or sums up in its "
            "own variables begins anew there; what is in run.state goes on"
        )
        restore_rng(rng)
        self.state.put(_copy(state))
        return self._epoch

    def _way_back(self) -> Callable[[], None]:
        """Return what goes back to where the run is now, whatever has been changed meanwhile."""
        rng, state, step = capture_rng(), _copy(dict(self.state)), self._step
        before = _signs(self._host.objects) if self._is_saved else {}

        def go_back() -> None:
            now, group = _signs(self._host.objects), self._host.group
            names = [name for name in before if group.any(now.get(name) != before[name])]
            with self._working():
                if names:
                    self._host.load(step, names)
            self._around.attributes.restore(again=True)
            if self._around.watch is not None:
                self._around.watch.around.restore()
            self.state.put(state)
            restore_rng(rng)

        return go_back

    def _leave_epoch(self, epoch: _Epoch) -> None:
        if not epoch.is_read and self._seen.has_stepped:
            what = "an optimizer has stepped in an epoch whose batches were not asked for"
            hint = "for epoch in run.epochs(5): for batch in run.batches(): ..."
            raise ConfigError("epochs()", what, hint=hint)
        self._epochs_of_data.end_epoch(epoch.number)
        self._epoch, self._next_epoch, self._is_saved = None, epoch.number + 1, False

    # Beginning, saving and ending.

    @contextmanager
    def _run(self) -> Iterator[Preemption]:
        """Hear of signals and steps while a loop is under way."""
        self._seen.begin()
        try:
            with self._signals() as preemption:
                self._running = preemption
                yield preemption
        finally:
            self._count()
            if self._epoch is not None:  # a loop in this process goes on in it
                self._stored = StoredLoop(entered=self._epoch.start)
            self._running = self._turn = self._epoch = None
            self._seen.end()
            if self._data.source is not None:
                self._data.source.close()

    @contextmanager
    def _signals(self) -> Iterator[Preemption]:
        clock = self._clock
        preemption = Preemption(clock=clock.monotonic, wall_clock=clock.wall)
        try:
            with preemption:
                yield preemption
        except TrainingStopped as end:
            if end.step is None:
                self._tell(str(end))
            raise

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._is_at_work = True
        try:
            yield
        finally:
            self._is_at_work = False

    def _values(self) -> dict[str, Any]:
        epoch = self._epoch
        stored = StoredLoop(
            state=dict(self.state),
            epoch=self._next_epoch if epoch is None else epoch.number,
            entered=None if epoch is None else epoch.start,
            stopped=self._stopped,
            began_with=self._began_with,
        )
        return stored.values()

    def _save(self) -> None:
        if self._is_saved:
            return
        group = self._host.group
        group.agree("the step of the loop", self._step)
        with self._working():
            self._host.save(self._step, self._values())
        self._is_saved = True

    def _is_over(self, count: int, until: int | None) -> bool:
        return (until is not None and count >= until) or self._stopped == (until,)

    def _tell_if_over(self, unit: str, count: int, until: int | None) -> bool:
        """Say so where nothing is left to be done."""
        if self._stopped == (until,):
            self._tell(
                f"finished: stop() was called after step {self._step}; "
                "with another `until` the run goes on"
            )
        elif until is not None and count >= until:
            done = f"{count} {unit}s are done"
            beyond = f", more than the {until} that are asked for" if count > until else ""
            self._tell(f"finished: {done}{beyond}")
        return self._is_over(count, until)

    def _finish(self) -> None:
        self._save()
        self._host.wait()

    def _agreed_reason(self, preemption: Preemption, *, is_step: bool = True) -> str | None:
        """Return why to stop, on any rank; end the loop on all where one has called `stop`.

        Raises:
            RankError: The ranks have not taken their steps in the same turns.
        """
        cost, group = self._host.last_save_cost, self._host.group
        preemption.margin_seconds = self._slowest + 2 * (0.0 if cost is None else cost.durable)
        mine = [self._step, self._stopped == (self._until,), preemption.reason()]
        try:
            # Where this rank alone left its turn, the others wait for it in their backward pass.
            patience = None if is_step else max(_PATIENCE, 10 * self._slowest)
            every: Any = group.gather("the end of a turn", mine, within=patience)
        except RankError as error:
            if not is_step:
                error.add_note(f"this rank has ended its turn without a step: {_TOGETHER}")
            raise
        if len({step for step, *_ in every}) > 1:
            steps = [str(step) for step, *_ in every]
            raise disagreement(steps, "the step of the loop", _TOGETHER)
        if any(is_stopped for _, is_stopped, _ in every):
            self._stopped = (self._until,)
        return next((str(reason) for *_, reason in every if reason is not None), None)

    def _stop(self, reason: str) -> NoReturn:
        self._save()
        with self._working():
            self._host.wait()
            self._host.confirmation.stopped()
            self._host.note_event({"event": "stopped", "step": self._step, "by": reason})
        end = TrainingStopped(self._step, reason)
        self._tell(str(end))
        raise end


def _copy(tree: Any) -> Any:
    """Return a copy of plain values and tensors."""
    return TreeMap(lambda one: one.detach().clone() if isinstance(one, torch.Tensor) else one)(tree)


def _signs(objects: Mapping[str, object]) -> dict[str, str]:
    """Return for each object a text that is another one when the object was changed."""
    return {name: repr(TreeMap(_sign)(tree)) for name, tree in capture(objects).items()}


def _sign(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        is_plain = leaf.layout is torch.strided and not is_sharded(leaf)
        where = raw(leaf).data_ptr() if is_plain else id(leaf)
        return (where, leaf._version, tuple(leaf.shape))  # noqa: SLF001 (no public name)
    return leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf


class LoopMethods:
    """The loops that a Checkpointer runs: see `Checkpointer`."""

    _training_loop: TrainingLoop

    def steps(
        self,
        until: int | None = None,
        *,
        batch_size: int | None = None,
        accumulate: int | None = None,
        resume: ResumeFrom = "auto",
    ) -> Iterator[Any]:
        """Resume, and give the batch of each step: exact wherever the process is killed.

        A step is a turn of the loop in which a registered optimizer stepped, or a registered
        `GradScaler` skipped that; without a registered optimizer it is each turn that came to its
        end. Another turn uses its batch and counts as no step. A save is made between two turns
        alone, where it is due, at the end, and when a signal asks for a stop, which then raises
        `TrainingStopped` (exit status 75). `break` and exceptions save nothing; `stop` does.

        Args:
            until: Steps of the whole run, over all starts; None: endless.
            batch_size: Samples in a batch on this rank, of data that give single samples.
            accumulate: Micro-batches of one step: the step is given a list of so many.
            resume: Which checkpoint, as `resume` takes it, for the first loop of a Checkpointer.

        Returns:
            Batches of the data, as they are; without data the numbers of steps done.

        Raises:
            ConfigError: What is given does not fit; or a loop is under way.
            UnbrokenError: As `resume` and `save`.
        """
        return self._training_loop.steps(
            until, batch_size=batch_size, accumulate=accumulate, resume=resume
        )

    def epochs(
        self,
        until: int | None = None,
        *,
        batch_size: int | None = None,
        accumulate: int | None = None,
        resume: ResumeFrom = "auto",
    ) -> Iterator[int]:
        """Resume, and give the number of each epoch, from 0: `batches` gives the batches of it.

        The code before the batches may run once more, for an epoch that goes on in its middle. It
        finds the generators and `state` as they were at the epoch's begin; its batches find all as
        it was there. Without a cadence of saves the end of each epoch is saved.

        Args:
            until: Epochs of the whole run, over all starts; None: endless.
            batch_size: As `steps` takes it.
            accumulate: As `steps` takes it; the last list of an epoch may be shorter.
            resume: As `steps` takes it.

        Raises:
            UnbrokenError: As `steps`.
        """
        return self._training_loop.epochs(
            until, batch_size=batch_size, accumulate=accumulate, resume=resume
        )

    def batches(self) -> Iterator[Any]:
        """Give what `steps` gives, to the end of the epoch.

        Raises:
            ConfigError: Not in a loop over `epochs`, or a second time in an epoch.
        """
        return self._training_loop.batches()

    def stop(self) -> None:
        """End the loop, for good, at its next edge: of the step in `steps`, else of the epoch.

        It is saved there, and the same command started again finds the run finished: a loop with
        another `until` goes on. On several ranks it ends the loop of all of them.

        Raises:
            ConfigError: No loop is under way.
        """
        self._training_loop.stop()

    @property
    def step(self) -> int:
        """Completed steps of the run: one more as soon as an optimizer has stepped."""
        return self._training_loop.step

    @property
    def state(self) -> LoopState:
        """Running sums, bests and the like of the loop's code: saved and brought back."""
        return self._training_loop.state
