"""Confirming a resume: steps that a killed start had taken already are taken again, and compared.

A resume restores what is known to matter. Whether that was all shows in the steps that the killed
start took after the checkpoint: it left a record of each. Where the same steps have the same bits
again, *these steps* are confirmed, and nothing later; where one has not, its record tells what
differs first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from unbroken.changes.differences import Difference, ResumeReport
from unbroken.checkpoint.resume.readers import UnseenStorage
from unbroken.distributed import Group
from unbroken.step_records import (
    ComparedParts,
    ComparedStep,
    Part,
    Recorded,
    RecordedRange,
    RecordWriter,
    SampleSum,
    StepObserver,
    StepRecord,
    UnrepeatedStep,
    compare_samples,
    compare_steps,
    compare_stops,
    parts_to_compare,
    read_recorded,
    read_recorded_by_ranks,
    remove_abandoned,
)
from unbroken.store import Json, RunDirectory
from unbroken.store.format.names import checkpoint_name

PATH = "repeated_steps"
"""The path of the difference between steps and their records; `allow` takes it."""

RECORDS_KEY = "step_records"
"""Where the facts of a checkpoint hold which start has saved it."""

_MOST_SAMPLES = 256  # steps whose samples wait for those of the other ranks
_WINDOWS = 4  # whose files are kept without a look whether their checkpoints still stand


@dataclass
class _Earlier:
    """An earlier start, and how the steps of this one compare with its records.

    Attributes:
        recorded: Its records.
        was_killed: It is the start that saved the checkpoint, and went on without a resume.
        same: Steps that were the same.
        parts: In how many steps each part was known, and the same.
        difference: The first that was not.
    """

    recorded: Recorded
    was_killed: bool
    same: int = 0
    parts: Counter[Part] = field(default_factory=Counter)
    difference: UnrepeatedStep | None = None

    def compare(self, here: StepRecord, scope: ComparedParts) -> None:
        """Compare a step, if it has a record and none has differed yet."""
        if self.difference is not None:
            return
        found = compare_steps(self.recorded, here, scope)
        self._add(found)
        self.same += found.difference is None and scope.is_shown_by(found.parts)

    def _add(self, found: ComparedStep) -> None:
        self.parts.update(found.parts)
        self.difference = found.difference

    def compare_samples(self, number: int, samples: SampleSum) -> None:
        """Compare the samples of a step, of all ranks, if none has differed yet."""
        if self.difference is None:
            self._add(compare_samples(self.recorded, number, samples))


@dataclass(frozen=True)
class Hears:
    """Who hears of what is found.

    Attributes:
        tell: Called with each line.
        report: Called with a difference that is told at once.
        note: Called with each event for the history.
    """

    tell: Callable[[str], None]
    report: Callable[[Difference], None]
    note: Callable[[Mapping[str, Any]], None]


class StepConfirmation:
    """Records the steps of this start, and compares them with those of earlier ones.

    Args:
        objects: What is registered, by name.
        group: The ranks; each records and compares its own steps.
        clock: Seconds since 1970.
        hears: Who hears of what is found.

    Attributes:
        observer: Sees the steps.
        differences: What was found not to repeat; empty, or one difference.
        on_found: Called with each line, and the difference that it tells of; may be set.
    """

    def __init__(
        self,
        objects: Mapping[str, object],
        group: Group,
        clock: Callable[[], float],
        hears: Hears,
    ) -> None:
        self.observer = StepObserver(objects, self._stepped)
        self.differences: tuple[Difference, ...] = ()
        self.on_found: Callable[[str, Difference | None], object] = lambda line, difference: None
        self._group, self._clock = group, clock
        self._hears = hears
        self._attempt = ""
        self._run: RunDirectory | None = None
        self._writer: RecordWriter | None = None
        self._written: list[tuple[int, str]] = []  # the windows of this start: step and path
        self._base = 0  # the step of the last checkpoint
        self._counted: int | None = None  # steps of the run until then
        self._resumed_at = 0
        self._scope = ComparedParts()
        self._earlier: list[_Earlier] = []
        self._offset = 0  # what is added to the number of a step since the last save
        self._on_other_ranks = False  # than the start that was killed
        self._samples: dict[int, tuple[int, SampleSum]] = {}  # this rank's: step, samples
        self._asks_ranks = self._is_strict = self._is_over = self._was_refused = False
        self._steps: list[int] = []  # the first and the last that were the same

    # A window of steps begins after each resume and each save.

    def resumed(
        self,
        run: RunDirectory,
        report: ResumeReport,
        facts: Mapping[str, Any],
        *,
        is_here: bool,
        strict: bool,
    ) -> ResumeReport:
        """Begin after a resume, or a fresh start; all ranks call this.

        Args:
            run: The run directory.
            report: What the resume did.
            facts: Those of the checkpoint.
            is_here: Whether the checkpoint is in this run directory.
            strict: Whether a difference is to be raised at the next save, and not told at once.

        Returns:
            The report, with what shows already: after a stop the state can be compared.
        """
        self._end_window()
        self._attempt, self._run = self._named(), run
        self._is_strict, self._is_over = strict, False
        self._scope = parts_to_compare((one.path, one.verdict) for one in report.differences)
        self.differences = tuple(one for one in report.differences if one.path == PATH)
        stored = facts.get(RECORDS_KEY)
        saved_by, counted = _who_saved(stored) if report.resumed else ("", 0)
        self._base, self._counted, self._resumed_at = report.step, counted, report.step
        self._earlier, self._steps, self._offset, self._samples = [], [], 0, {}
        self._on_other_ranks = False
        if is_here and saved_by:
            self._earlier = self._recorded(saved_by)
            self._write_after(saved_by)
        if report.resumed:
            other = self._group.broadcast("records of other ranks", self._on_other_ranks)
            self._on_other_ranks = bool(other)
        self._remove_abandoned(run)
        self._asks_ranks = self._group.world_size > 1 and report.resumed
        self.observer.begin(is_recording=is_here)
        return self._compared_with_stop(report)

    def stopped(self) -> None:
        """Leave what the run is, which was just saved for a stop; each rank for itself."""
        self.observer.look(self._note_stop, self._writer)

    def _note_stop(self, writer: RecordWriter | None) -> None:
        if writer is not None:
            writer.write_stop(self.observer.at_rest())

    def _compared_with_stop(self, report: ResumeReport) -> ResumeReport:
        """Compare what the run is after the resume with what it was when it was stopped."""
        found = [one.recorded.stop for one in self._earlier if one.recorded.stop is not None]
        if not found:
            return report
        same, words = compare_stops(found[0], self.observer.at_rest(), self._scope)
        if words:
            self._was_refused = self._is_strict
            difference = self._noted(self._base, f"after the stop at step {self._base}: {words}")
            return report.with_found(words, difference)
        if not same:
            return report
        self._hears.note({"event": "compared", "step": self._base, "same": [*same]})
        are = "are as they were" if len(same) > 1 else "is as it was"
        return report.with_found(f"{' and '.join(same)} {are} at the stop", None)

    def _named(self) -> str:
        """Return a name for this start: unique, and later ones sort behind earlier ones."""
        mine = f"{int(self._clock() * 1000):013d}-{os.getpid()}"
        return str(self._group.broadcast("the name of this start", mine))

    def _recorded(self, saved_by: str) -> list[_Earlier]:
        if self._run is None:
            return []
        rank, size = self._group.rank, self._group.world_size
        storage, step = self._run.storage, self._base
        found = read_recorded(storage, rank=rank, world_size=size, saved_by=saved_by, step=step)
        if not found and rank == 0:
            found = read_recorded_by_ranks(storage, saved_by=saved_by, step=step)
            self._on_other_ranks = bool(found)
            self._scope = self._scope.on_other_ranks() if found else self._scope
        return [_Earlier(one, one.attempt == saved_by) for one in found]

    def _write_after(self, saved_by: str) -> None:
        if self._run is None or isinstance(self._run.storage, UnseenStorage):
            return
        window = RecordedRange(
            attempt=self._attempt,
            rank=self._group.rank,
            world_size=self._group.world_size,
            saved_by=saved_by,
            step=self._base,
            counted=self._counted,
        )
        self._writer = RecordWriter(self._run.storage, window)
        self._written.append((self._base, self._writer.path))

    def _remove_abandoned(self, run: RunDirectory) -> None:
        try:
            steps = frozenset(step for step, _ in run.catalog.folders())
        except OSError:
            return
        rank, size = self._group.rank, self._group.world_size
        remove_abandoned(run.storage, rank=rank, world_size=size, steps=steps)

    def saved(self, run: RunDirectory, step: int) -> None:
        """Begin after a save of this step, durable or not yet; all ranks call this."""
        if not self._attempt:
            self._attempt, self._counted = self._named(), None
        self._end_window()
        self._offset += self.observer.number
        self._run, self._base, self._counted = run, step, self._counted_now()
        self._write_after(self._attempt)
        self._remove_oldest(run)
        self.observer.begin(is_recording=True)

    def _counted_now(self) -> int | None:
        return None if self._counted is None else self._counted + self.observer.counted

    def facts(self) -> dict[str, Json]:
        """Return what a checkpoint that is saved now says of its start."""
        if not self._attempt:
            self._attempt, self._counted = self._named(), None
        return {RECORDS_KEY: {"attempt": self._attempt, "counted": self._counted_now()}}

    def _remove_oldest(self, run: RunDirectory) -> None:
        """Remove the records after a checkpoint of this start that retention has removed."""
        if len(self._written) <= _WINDOWS:
            return
        step, path = self._written.pop(0)
        try:
            if run.storage.stat(checkpoint_name(step)) is None:
                run.storage.remove_file(path)
            else:
                self._written.append((step, path))
        except OSError:
            return

    def _end_window(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """Look no longer; what was compared is told."""
        self.observer.end()
        self._end_window()
        self._tell_of_the_same()
        if self._is_strict and not self._was_refused:  # else it was told at once
            for one in self.differences:
                self._hears.report(one)

    # The comparison.

    def _stepped(self, record: StepRecord) -> None:
        if self._writer is not None:
            self._writer.write(record)
        here = record._replace(number=record.number + self._offset)
        step = self._base + self.observer.counted
        if self._waits_for_ranks and not self._is_over:
            if here.samples and len(self._samples) < _MOST_SAMPLES:
                self._samples[here.number] = (step, SampleSum.of(here.samples))
            here = here._replace(samples=())
        if not self._earlier or self._is_over:
            return
        before = sum(one.same for one in self._earlier)
        for one in self._earlier:
            one.compare(here, self._scope)
        if sum(one.same for one in self._earlier) > before:
            self._steps = [*self._steps[:1], step]
        self._judge(step)
        if here.number >= self._last_recorded and not self._waits_for_ranks:
            self._tell_of_the_same()

    @property
    def _last_recorded(self) -> int:
        return max(one.recorded.last for one in self._earlier)

    @property
    def _waits_for_ranks(self) -> bool:
        """Whether samples are compared when all ranks have told theirs."""
        return self._on_other_ranks and self._group.world_size > 1

    def _compare_samples(self) -> None:
        """Compare the samples of steps since the last save; all ranks call this."""
        mine, self._samples = self._samples, {}
        sums = [[number, *found] for number, (_, found) in mine.items()]
        every: Any = self._group.gather("samples of repeated steps", sums)
        ranks = [{number: SampleSum(*found) for number, *found in one} for one in every]
        if not self._earlier:
            return
        compares = "samples" in self._scope.parts
        for number in sorted(set(ranks[0]).intersection(*ranks)) if compares else ():
            whole = reduce(SampleSum.plus, (one[number] for one in ranks))
            for one in self._earlier:
                one.compare_samples(number, whole)
            self._judge(mine[number][0])
        if self._offset + self.observer.number >= self._last_recorded:
            self._tell_of_the_same()

    def _judge(self, step: int) -> None:
        judged = [one for one in self._earlier if one.same or one.difference is not None]
        killed = [one for one in judged if one.was_killed and one.difference is not None]
        if judged and (killed or all(one.difference is not None for one in judged)):
            self._differs((killed or judged)[0], step)

    def _differs(self, earlier: _Earlier, step: int) -> None:
        difference = earlier.difference
        if difference is None or self._is_over:
            return
        bits = "" if self._scope.reason else " with the same bits"
        words = f"{self._called(step, step)} was not repeated{bits}: {difference.words}"
        agree = [one for one in self._earlier if one.same and one.difference is None]
        if agree and earlier.was_killed:
            words += "; another resume of the same checkpoint gave the same bits as this one, so "
            words += "what a resume restores is not all, rather than that the machine is flaky"
        self._tell_of_the_same()
        excuse = self._excuse(difference)
        if not excuse:
            found = self._noted(step, words)
            self.on_found(str(found), found)
            if not self._is_strict:
                self._hears.report(found)
        else:
            self._hears.note({"event": "repeated", "step": step, "same": None, "words": words})
            self._tell(f"{PATH}: cannot be judged, {excuse}: {words}")

    def _noted(self, step: int, words: str) -> Difference:
        """Return a difference that belongs to this run from here on."""
        found = Difference(PATH, None, None, words, "not covered")
        self.differences = (found,)
        self._hears.note({"event": "repeated", "step": step, "same": False, "words": words})
        return found

    def _tell(self, line: str) -> None:
        self._hears.tell(line)
        self.on_found(line, None)

    def _excuse(self, difference: UnrepeatedStep) -> str:
        """Return why a difference says nothing about the resume; "": it does."""
        draws = difference.part == "samples" and not self.observer.draws_by_sample
        if draws and self._on_other_ranks:
            return "as what is drawn for a batch may follow the number of ranks"
        if self._scope.excuse:
            return f"as it may follow from a change ({self._scope.excuse})"
        is_fixed = torch.are_deterministic_algorithms_enabled() or not self.observer.is_on_a_device
        return "" if is_fixed else "as deterministic kernels are off"

    def _tell_of_the_same(self) -> None:
        """Tell, once, of the steps that were the same, and what was compared of them."""
        if self._is_over:
            return
        self._is_over = bool(self._earlier)
        if not self._steps:
            return
        first, last = self._steps[0], self._steps[-1]
        steps = self._called(first, last)
        odd = next((one for one in self._earlier if one.difference is not None), None)
        parts = f"{self._parts()} ({self._scope.reason})" if self._scope.reason else ""
        part_of = {"parts": parts} if parts else {}
        self._hears.note({"event": "repeated", "from": first, "to": last, "same": True, **part_of})
        if parts:
            self._tell(f"{steps} repeated with the same {parts}")
            return
        self._tell(f"{steps} repeated with the same bits")
        if odd is not None and odd.difference is not None and not odd.was_killed:
            self._tell(f"an earlier start differs from these two: {odd.difference.words}")

    def _parts(self) -> str:
        """Return what was compared of the steps that were the same."""
        most = max(self._earlier, key=lambda one: one.same)
        known = [(part, most.parts[part]) for part in self._scope.parts if most.parts[part]]
        return " and ".join(
            part if count >= most.same else f"{part} (in {count} of them)"
            for part, count in known
            if part != "optimizer"
        )

    def _called(self, first: int, last: int) -> str:
        """Return what to call steps: by their numbers, where a step of the run is one of theirs."""
        if self._counted is not None and self._counted == self._base:
            return f"step {first}" if first == last else f"steps {first} to {last}"
        start, end = first - self._resumed_at, last - self._resumed_at
        numbers = f"optimizer step {start}" if start == end else f"optimizer steps {start} to {end}"
        return f"{numbers} after checkpoint {self._resumed_at}"

    def rounds_otherwise(self) -> None:
        """From here on steps are rounded in another order: with their records ends this window."""
        self.observer.forget_step()
        self._end_window()
        self._scope = parts_to_compare([("micro_batch_size", "equivalent")])

    def agree(self) -> None:
        """Share what each rank has found; all ranks call this before each save."""
        self._was_refused = self._is_strict and bool(self.differences)  # by the save
        if not self._asks_ranks:
            return
        if self._on_other_ranks:
            self._compare_samples()
        words = [one.effect for one in self.differences]
        is_over = self._is_over or not self._earlier
        every: Any = self._group.gather("repeated steps", [words, is_over])
        found = [(rank, words[0]) for rank, (words, _) in enumerate(every) if words]
        if found and not self.differences:
            rank, effect = found[0]
            difference = Difference(PATH, None, None, f"rank {rank}: {effect}", "not covered")
            self.differences = (difference,)
        self._asks_ranks = not found and not all(is_over for _, is_over in every)
        self._on_other_ranks &= self._asks_ranks


def _who_saved(stored: Any) -> tuple[str, int | None]:
    found = stored if isinstance(stored, dict) else {}
    attempt, counted = found.get("attempt"), found.get("counted")
    name = attempt if isinstance(attempt, str) and "/" not in attempt else ""
    return name, counted if type(counted) is int else None
