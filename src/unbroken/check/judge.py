"""Turn recordings into a verdict: pure functions, one rule after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from unbroken.check.compare import (
    LATENT,
    PARTS,
    Alignment,
    StepDifference,
    align,
    differing_parts,
    first_effect,
    fixed_parts,
    matching_tensors,
    moving_generators,
    reproducible_generators,
    states_before,
)
from unbroken.check.diagnose import Evidence, epoch_starts, explain
from unbroken.check.recording import Recording
from unbroken.check.verdict import Culprit, Status, Verdict, not_exact, unknown

# Judging the state in which a resumed process takes its first step: weights and optimizer.


_SHOWN = 4


@dataclass(frozen=True)
class Kill:
    """What is known about the kill before a resume.

    Attributes:
        after: The step after which the run was killed.
        saved: Whether a checkpoint was in the output folder then.
    """

    after: int
    saved: bool


def judge_state(
    reference: Recording, resumed: Recording, found: Alignment, kill: Kill
) -> Verdict | None:
    """Return what is wrong with the restored state; None if it is the state after one step.

    Args:
        reference: The uninterrupted run.
        resumed: The resumed process.
        found: Where its first state was found.
        kill: The kill before it.
    """
    if found.start is None:
        return _unknown_weights(reference, resumed, found)
    if found.start == 0:
        return _untrained_weights(resumed, found, kill)
    if found.start not in found.moments:
        return _other_moments(resumed, found, found.start)
    if found.start not in found.counts:
        where = _steps_text(found.counts) if found.counts else "none that the reference had"
        words = (
            f"weights and moments of step {found.start}, but the optimizer's step counts are "
            f"{where}: they were not restored"
        )
        return not_exact(Culprit.OPTIMIZER, words, step=found.start + 1)
    return _stale_state(reference, resumed, found, found.start, kill)


def _steps_text(positions: tuple[int, ...]) -> str:
    return "those of step " + " or ".join(map(str, positions[:_SHOWN]))


def _unknown_weights(reference: Recording, resumed: Recording, found: Alignment) -> Verdict:
    left = _left_by_a_step(reference, resumed)
    if left is not None:
        words = (
            f"the weights at resume are those that the optimizer's step {left} left; the "
            "reference changed them once more before the next step (clamped, merged, averaged), "
            "and that was neither saved nor done again"
        )
        return not_exact(Culprit.WEIGHTS, words, step=left + 1)
    reordered = _in_another_order(reference, resumed)
    if reordered is not None:
        return reordered
    evidence = []
    partly = matching_tensors(reference, resumed)
    if partly is not None:
        position, different = partly
        names = [reference.name_of(index) for index in sorted(different)]
        total = len(resumed.steps[0].before.params_each) if resumed.steps[0].before else 0
        evidence.append(
            f"{total - len(different)} of {total} parameters are those of step {position}; not: "
            + ", ".join(names[:_SHOWN])
            + (", ..." if len(names) > _SHOWN else "")
        )
    if resumed.steps[0].had_moments and found.moments:
        evidence.append(f"the optimizer's moments are {_steps_text(found.moments)}")
    if found.data:
        evidence.append(f"the first batch is the one after step {found.data[0]}")
    words = "the weights at resume are none that the reference had between any two steps"
    return not_exact(Culprit.WEIGHTS, words, *evidence)


def _in_another_order(reference: Recording, resumed: Recording) -> Verdict | None:
    begin = resumed.steps[0].before
    each = () if begin is None else begin.params_each
    for position, (_, state) in enumerate(states_before(reference)):
        if each and sorted(each) == sorted(state.params_each):
            pairs = enumerate(zip(state.params_each, each, strict=True))
            moved = [reference.name_of(index) for index, (there, here) in pairs if there != here]
            words = (
                f"weights of step {position}, but the optimizer has its parameters in another "
                f"order ({', '.join(moved[:_SHOWN])}): each gets the moments of another"
            )
            return not_exact(Culprit.PARAMETER_ORDER, words, step=position + 1)
    return None


def _left_by_a_step(reference: Recording, resumed: Recording) -> int | None:
    """Return the step that left the weights of the resume, before anything else changed them."""
    begin = resumed.steps[0].before
    for position, step in enumerate(reference.steps, start=1):
        if begin is not None and step.after.params == begin.params:
            return position
    return None


def _untrained_weights(resumed: Recording, found: Alignment, kill: Kill) -> Verdict:
    later = tuple(position for position in found.moments if position > 0)
    if resumed.steps[0].had_moments and later:
        words = f"the weights are untrained, the optimizer's moments {_steps_text(later)}"
        return not_exact(Culprit.WEIGHTS, f"{words}: the weights were not loaded", step=1)
    if found.data and 0 not in found.data:
        words = (
            "weights and optimizer are untrained, but the data go on after step "
            f"{found.data[0]}: the weights were not loaded"
        )
        return not_exact(Culprit.WEIGHTS, words, step=1)
    if kill.saved:
        words = (
            f"resume started from scratch: killed after step {kill.after}, with a checkpoint in "
            "the output folder, the run began again at step 1"
        )
        return not_exact(Culprit.FROM_SCRATCH, words, step=1)
    words = (
        f"never saved before the kill: after step {kill.after} there was no checkpoint in the "
        "output folder, so nothing was resumed"
    )
    return unknown(Culprit.NEVER_SAVED, words, "kill later (--at), or save more often")


def _other_moments(resumed: Recording, found: Alignment, start: int) -> Verdict:
    step = start + 1
    if not resumed.steps[0].had_moments:
        words = (
            f"optimizer: weights of step {start}, but all moments are zero: the first update "
            "differs; the optimizer's state was not loaded"
        )
        return not_exact(Culprit.OPTIMIZER, words, step=step)
    if not found.moments:
        words = (
            f"optimizer: weights of step {start}, but moments that the reference never had: "
            "changed on their way (another dtype, other parameters), or loaded in part"
        )
        return not_exact(Culprit.OPTIMIZER, words, step=step)
    words = (
        f"the checkpoint mixes two moments of the run: weights of step {start}, optimizer of "
        f"step {found.moments[-1]}"
    )
    is_stale_weights = found.moments[-1] > start
    culprit = Culprit.STALE_WEIGHTS if is_stale_weights else Culprit.STALE_OPTIMIZER
    return not_exact(culprit, words, step=step)


def _stale_state(
    reference: Recording, resumed: Recording, found: Alignment, start: int, kill: Kill
) -> Verdict | None:
    """Judge weights and optimizer older than schedule and data, which agree with each other."""
    first = resumed.steps[0]
    if start >= len(reference.steps) or first.schedulers == reference.steps[start].schedulers:
        return None
    for position in found.data:
        if (
            start < position <= kill.after
            and reference.steps[position].schedulers == first.schedulers
        ):
            words = (
                f"the checkpoint mixes two moments of the run: weights and optimizer of step "
                f"{start}, data and schedule of step {position}"
            )
            return not_exact(Culprit.STALE_STATE, words, step=start + 1)
    return None


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
    """Return the reference; or a verdict if the two runs differ or nothing was recorded."""
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
    """Return how the run differs from the reference before it is killed; None if it does not."""
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
    alignment = align(uninterrupted, resumed)
    wrong = judge_state(uninterrupted, resumed, alignment, kill)
    if wrong is not None or alignment.start is None:
        return _Judged(wrong or not_exact(Culprit.WEIGHTS, "not found"), rank)
    start, generators = alignment.start, reference.generators[rank]
    difference = _lasting_difference(uninterrupted, resumed, start, generators)
    if difference is not None and not _is_harmless(difference, uninterrupted, resumed, start):
        observed = Evidence(uninterrupted, resumed, start, difference, generators, reference.ranks)
        order = (observed.step_index, PARTS.index(difference.parts[0]))
        return _Judged(explain(observed), rank, order)
    verdict = _judge_end(uninterrupted, resumed, start, is_whole)
    if difference is not None and verdict.status is Status.EXACT:
        verdict = replace(verdict, evidence=(*verdict.evidence, _HARMLESS))
    return _Judged(verdict, rank, (1 << 60, 0))


_HARMLESS = (
    "a generator was not restored, and was drawn from since: that had no effect on these steps "
    "(a data loader draws a number that nothing uses at the start of each pass)"
)


def _is_harmless(
    difference: StepDifference, reference: Recording, resumed: Recording, start: int
) -> bool:
    """Return whether only generators differ, and the steps show that this had no effect.

    They show it if generators were drawn from, and an epoch began, in the resumed steps.
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
) -> StepDifference | None:
    """Return the first difference; of parts that may agree again later, only if it lasts."""
    theirs, ours = reference.steps[start:], resumed.steps
    pairs = list(zip(theirs, ours, strict=False))
    if not pairs:
        return None
    fixed = fixed_parts(reference.steps[max(start - 1, 0) :])
    lasting = set(differing_parts(*pairs[-1], generators, fixed))
    for index, pair in enumerate(pairs):
        parts = differing_parts(*pair, generators, fixed)
        kept = [part for part in parts if part not in LATENT or part in lasting]
        if kept:
            at_once = [part for part in parts if part in LATENT and part not in lasting]
            return StepDifference(index, (*kept, *at_once))
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
    """Return why the recordings cannot be judged; None if they can."""
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
