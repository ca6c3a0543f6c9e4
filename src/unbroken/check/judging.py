"""From recordings to a verdict: pure functions, with the rules in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from unbroken.check.alignment import align
from unbroken.check.comparison import (
    LATENT,
    PARTS,
    Difference,
    differing_parts,
    first_effect,
    fixed_others,
    moving_generators,
    reproducible_generators,
)
from unbroken.check.data_stream import epoch_starts
from unbroken.check.recording import Recording
from unbroken.check.restored_state import Kill, judge_state
from unbroken.check.step_causes import Scenery, explain
from unbroken.check.verdict import Culprit, Status, Verdict, not_exact, unknown

Ranks = Mapping[int, Recording]


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run, made twice.

    Attributes:
        ranks: The first of the two, by rank.
        generators: For each rank the generators that count: those that are drawn from between
            steps, and stand alike in both runs.
    """

    ranks: Ranks
    generators: Mapping[int, frozenset[str]]

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return min((len(one.steps) for one in self.ranks.values()), default=0)


def make_reference(first: Ranks, second: Ranks) -> Reference | Verdict:
    """Return the reference, or why it is none: the two runs differ, or saw nothing."""
    for ranks in (first, second):
        verdict = _unusable(ranks)
        if verdict is not None:
            return verdict
    if set(first) != set(second):
        return _nondeterministic("the ranks", 1)
    generators = {rank: reproducible_generators(first[rank], second[rank]) for rank in first}
    reference = Reference(first, generators)
    return _repeated(reference, second, whole=True) or reference


def judge_killed(reference: Reference, killed: Ranks) -> Verdict | None:
    """Return why the run that is to be killed is not the reference even before the kill."""
    return _unusable(killed) or _repeated(reference, killed, whole=False)


def judge_resumed(reference: Reference, resumed: Ranks, kill: Kill, *, is_whole: bool) -> Verdict:
    """Return whether a resumed run goes on as the reference did.

    Args:
        reference: The uninterrupted run.
        resumed: What the resumed process did, by rank; each has made a step.
        kill: The kill before it.
        is_whole: Whether it was left to run to its end.

    Example:
        >>> judge_resumed(Reference({}, {}), {}, Kill(1, True), is_whole=True).culprit
        <Culprit.NOT_RECORDED: 'not-recorded'>
    """
    problem = _unusable(resumed)
    if problem is not None:
        return problem
    if set(resumed) != set(reference.ranks):
        words = f"{len(resumed)} ranks after resume, {len(reference.ranks)} in the reference"
        return not_exact(Culprit.SETTINGS, words)
    idle = [rank for rank, recording in resumed.items() if not recording.steps]
    if idle:
        return not_exact(Culprit.STEPS_MISSING, f"rank {idle[0]} made no step after resume")
    found = [_judge_rank(reference, rank, resumed[rank], kill, is_whole) for rank in resumed]
    worst = min(found, key=lambda one: (one.status is Status.EXACT, one.order))
    if len(resumed) > 1 and worst.verdict.status is not Status.EXACT:
        return replace(worst.verdict, rank=worst.rank)
    return worst.verdict


@dataclass(frozen=True)
class _Judged:
    """A rank's verdict, and how early in the chain of causes it lies."""

    verdict: Verdict
    rank: int
    order: tuple[int, int] = (0, 0)

    @property
    def status(self) -> Status:
        return self.verdict.status


def _judge_rank(
    reference: Reference, rank: int, resumed: Recording, kill: Kill, is_whole: bool
) -> _Judged:
    uninterrupted = reference.ranks[rank]
    place = align(uninterrupted, resumed)
    wrong = judge_state(uninterrupted, resumed, place, kill)
    if wrong is not None or place.start is None:
        return _Judged(wrong or not_exact(Culprit.WEIGHTS, "not found"), rank)
    start, generators = place.start, reference.generators[rank]
    difference = _lasting_difference(uninterrupted, resumed, start, generators)
    if difference is not None and not _is_harmless(difference, uninterrupted, resumed, start):
        scenery = Scenery(uninterrupted, resumed, start, difference, generators, reference.ranks)
        order = (scenery.place, PARTS.index(difference.parts[0]))
        return _Judged(explain(scenery), rank, order)
    verdict = _judge_end(uninterrupted, resumed, start, is_whole)
    if difference is not None and verdict.status is Status.EXACT:
        verdict = replace(verdict, evidence=(*verdict.evidence, _HARMLESS))
    return _Judged(verdict, rank, (1 << 60, 0))


_HARMLESS = (
    "a generator was not restored, and was drawn from since: that had no effect on these steps "
    "(a data loader draws a number that nothing uses at the start of each pass)"
)


def _is_harmless(
    difference: Difference, reference: Recording, resumed: Recording, start: int
) -> bool:
    """Return whether only generators differ, and that could have shown itself and did not.

    It could if they were drawn from in the resumed steps, and a pass over the data began there.
    """
    if set(difference.parts) != {"generators"}:
        return False
    if first_effect(reference.steps[start:], resumed.steps) is not None:
        return False
    has_loaders = any(step.fetched for step in resumed.steps)
    has_pass = any(begin > 0 for begin in epoch_starts(resumed.steps))
    return bool(moving_generators(resumed.steps)) and (has_pass or not has_loaders)


def _lasting_difference(
    reference: Recording, resumed: Recording, start: int, generators: frozenset[str]
) -> Difference | None:
    """Return the first difference; of what may heal by itself only what lasts to the end."""
    theirs, ours = reference.steps[start:], resumed.steps
    pairs = list(zip(theirs, ours, strict=False))
    if not pairs:
        return None
    fixed = fixed_others(reference.steps[max(start - 1, 0) :])
    lasting = set(differing_parts(*pairs[-1], generators, fixed))
    for index, pair in enumerate(pairs):
        parts = differing_parts(*pair, generators, fixed)
        kept = [part for part in parts if part not in LATENT or part in lasting]
        if kept:
            at_once = [part for part in parts if part in LATENT and part not in lasting]
            return Difference(index, (*kept, *at_once))
    return None


def _judge_end(reference: Recording, resumed: Recording, start: int, is_whole: bool) -> Verdict:
    total, made = len(reference.steps), start + len(resumed.steps)
    if is_whole and made < total:
        words = f"the resumed run ended after step {made}; the reference made {total} steps"
        return not_exact(Culprit.STEPS_MISSING, words, step=made + 1)
    if made > total:
        words = f"the resumed run went on to step {made}; the reference ended after step {total}"
        return not_exact(Culprit.STEPS_EXTRA, words, step=total + 1)
    words = (
        f"resumed after step {start}; {len(resumed.steps)} steps are the same in every bit of "
        "data, loss, learning rate, gradients, weights, buffers, optimizer and generators"
    )
    sampled = "of large tensors, blocks were compared, not every byte"
    evidence = (sampled,) if resumed.sampled else ()
    return Verdict(Status.EXACT, Culprit.NONE, words, evidence)


def _unusable(ranks: Ranks) -> Verdict | None:
    """Return why a recording says nothing."""
    for recording in ranks.values():
        if recording.errors:
            words = "the recorder failed in the script's process; this is a defect of the check"
            return unknown(Culprit.RECORDER_FAILED, words, *recording.errors[0].splitlines())
    if not any(recording.steps for recording in ranks.values()):
        words = "no optimizer step was seen: the script takes none, or the recorder did not enter"
        hint = "python -I, -E and -S, and a script that sets PYTHONPATH anew, keep it out"
        return unknown(Culprit.NOT_RECORDED, words, hint)
    return None


def _repeated(reference: Reference, again: Ranks, *, whole: bool) -> Verdict | None:
    """Return the first difference between two uninterrupted runs."""
    for rank, recording in again.items():
        if rank not in reference.ranks:
            return _nondeterministic("the ranks", 1)
        first = reference.ranks[rank].steps
        if first and recording.steps and first[0].before != recording.steps[0].before:
            return _nondeterministic("the initial weights", 1)
        found = first_effect(first, recording.steps)
        if found is not None:
            return _nondeterministic(found.parts[0], found.index + 1)
        if whole and len(first) != len(recording.steps):
            return _nondeterministic("the number of steps", min(len(first), len(recording.steps)))
    return None


def _nondeterministic(part: str, step: int) -> Verdict:
    words = (
        f"not deterministic at all: two uninterrupted runs differ from step {step} on, first in "
        f"{part}; fix that first"
    )
    return unknown(Culprit.NOT_DETERMINISTIC, words, step=step)
