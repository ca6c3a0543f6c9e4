"""Judging the state in which a resumed process takes its first step: weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from unbroken.check.alignment import Alignment, matching_tensors
from unbroken.check.recording import Recording
from unbroken.check.verdict import Culprit, Verdict, not_exact, unknown

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
    """Return what is wrong with the restored state, None if it is that of one step.

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


def _steps_text(places: tuple[int, ...]) -> str:
    return "those of step " + " or ".join(map(str, places[:_SHOWN]))


def _unknown_weights(reference: Recording, resumed: Recording, found: Alignment) -> Verdict:
    left = _left_by_a_step(reference, resumed)
    if left is not None:
        words = (
            f"the weights at resume are those that the optimizer's step {left} left; the "
            "reference changed them once more before the next step (clamped, merged, averaged), "
            "and that was neither saved nor done again"
        )
        return not_exact(Culprit.WEIGHTS, words, step=left + 1)
    evidence = []
    partly = matching_tensors(reference, resumed)
    if partly is not None:
        place, different = partly
        names = [_name(reference, index) for index in sorted(different)]
        total = len(resumed.steps[0].before.params_each) if resumed.steps[0].before else 0
        evidence.append(
            f"{total - len(different)} of {total} parameters are those of step {place}; not: "
            + ", ".join(names[:_SHOWN])
            + (", ..." if len(names) > _SHOWN else "")
        )
    if resumed.steps[0].had_moments and found.moments:
        evidence.append(f"the optimizer's moments are {_steps_text(found.moments)}")
    if found.data:
        evidence.append(f"the first batch is the one after step {found.data[0]}")
    words = "the weights at resume are none that the reference had between any two steps"
    return not_exact(Culprit.WEIGHTS, words, *evidence)


def _left_by_a_step(reference: Recording, resumed: Recording) -> int | None:
    """Return the step after which, before all else, the weights were those of the resume."""
    begin = resumed.steps[0].before
    for place, step in enumerate(reference.steps, start=1):
        if begin is not None and step.after.params == begin.params:
            return place
    return None


def _name(reference: Recording, index: int) -> str:
    known = index < len(reference.names) and reference.names[index]
    return known or f"parameter {index}"


def _untrained_weights(resumed: Recording, found: Alignment, kill: Kill) -> Verdict:
    later = tuple(place for place in found.moments if place > 0)
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
    """Weights and optimizer are older than schedule and data, which agree with each other."""
    first = resumed.steps[0]
    if start >= len(reference.steps) or first.schedulers == reference.steps[start].schedulers:
        return None
    for place in found.data:
        if start < place <= kill.after and reference.steps[place].schedulers == first.schedulers:
            words = (
                f"the checkpoint mixes two moments of the run: weights and optimizer of step "
                f"{start}, data and schedule of step {place}"
            )
            return not_exact(Culprit.STALE_STATE, words, step=start + 1)
    return None
