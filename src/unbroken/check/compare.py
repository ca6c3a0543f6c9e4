"""Comparing two recordings step by step, from where they are the same on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unbroken.check.recording import Recording, State, Step

# In the order of cause and effect within a step: what differs first explains what follows.
_PARTS: dict[str, Callable[[Step], Any]] = {
    "data": lambda step: [batch.digest for batch in step.data],
    "learning rate": lambda step: step.learning_rates,
    "settings": lambda step: step.settings,
    "scaler": lambda step: step.scalers,
    "loss": lambda step: step.losses,
    "gradients": lambda step: step.gradients,
    "buffers": lambda step: step.buffers,
    "params": lambda step: step.after.params,
    "moments": lambda step: step.after.moments,
    "counts": lambda step: step.after.counts,
}
LATENT = ("schedulers", "others", "generators")  # they may differ without any effect yet
PARTS = (*_PARTS, *LATENT)


@dataclass(frozen=True)
class StepDifference:
    """The first step at which two recordings differ.

    Attributes:
        index: Its index among the resumed steps.
        parts: What differs in it, in the order of cause and effect.
    """

    index: int
    parts: tuple[str, ...]


def first_effect(reference: Sequence[Step], again: Sequence[Step]) -> StepDifference | None:
    """Return the first step at which the runs themselves differ, not only what may lead to it."""
    for index, (there, here) in enumerate(zip(reference, again, strict=False)):
        parts = tuple(
            part for part in differing_parts(there, here, frozenset()) if part not in LATENT
        )
        if parts:
            return StepDifference(index, parts)
    return None


def differing_parts(
    there: Step, here: Step, moving: frozenset[str], fixed: frozenset[tuple[str, str]] = frozenset()
) -> tuple[str, ...]:
    """Return what differs in a step, in the order of cause and effect.

    Args:
        there: The step of the reference.
        here: The step of the other run.
        moving: The generators that count.
        fixed: Weights that no optimizer moves and that do not count: see `fixed_others`.
    """
    parts = [name for name, look in _PARTS.items() if look(there) != look(here)]
    if parts == ["data"] and there.losses and _has_seen_more(there, here):
        parts = []  # same losses, gradients and all: what else was looked at played no part
    if not _has_all(there.schedulers, here.schedulers):
        parts.append("schedulers")
    if not _has_all([one for one in there.others if one not in fixed], here.others):
        parts.append("others")
    if differing_generators(there, here, moving):
        parts.append("generators")
    return tuple(parts)


def _has_seen_more(there: Step, here: Step) -> bool:
    """Return whether the data end with those of the reference: a model was tried out before."""
    used, seen = _PARTS["data"](there), _PARTS["data"](here)
    return bool(used) and seen[-len(used) :] == used


def _has_all(there: Sequence[tuple[Any, Any]], here: Sequence[tuple[Any, Any]]) -> bool:
    """Return whether all that is there is here too, for each label that both have as often.

    More of a label here is no difference: a resumed process may hold what it has loaded.
    """
    counted_there = Counter(label for label, _ in there)
    counted_here = Counter(label for label, _ in here)
    known = {label for label, count in counted_there.items() if counted_here[label] >= count}
    missing = Counter(one for one in there if one[0] in known) - Counter(here)
    return not missing


def differing_generators(there: Step, here: Step, moving: frozenset[str]) -> list[str]:
    """Return the moving generators that stand elsewhere."""
    return [
        name
        for name, digest in there.generators.items()
        if name in moving and here.generators.get(name, digest) != digest
    ]


def fixed_others(steps: Sequence[Step]) -> frozenset[tuple[str, str]]:
    """Return the weights outside the optimizer that never change: a teacher, a forgotten copy."""
    return frozenset.intersection(*(frozenset(step.others) for step in steps))


def moving_generators(steps: Sequence[Step]) -> frozenset[str]:
    """Return the generators that are drawn from between the steps; the others do not count."""
    names = {name for step in steps for name in step.generators}
    return frozenset(
        name for name in names if len({step.generators.get(name) for step in steps}) > 1
    )


def reproducible_generators(first: Recording, second: Recording) -> frozenset[str]:
    """Return the generators that move, and move alike in two uninterrupted runs."""
    moving = moving_generators(first.steps)
    pairs = list(zip(first.steps, second.steps, strict=False))
    return frozenset(
        name
        for name in moving
        if not any(differing_generators(a, b, moving & {name}) for a, b in pairs)
    )


# Finding where in the reference a resumed process begins, by content, not by any counter.


@dataclass(frozen=True)
class Alignment:
    """Where the state of a resumed process, before its first step, is found in the reference.

    A position is the number of steps that the reference had made; 0 is the untrained state.

    Attributes:
        start: The position whose parameters these are; of several the one that fits best otherwise.
        params: All positions with these parameters.
        moments: All positions with these moments of the optimizer.
        counts: All positions with these step counts.
        data: All positions after which the reference used the batch that the first step used.
    """

    start: int | None
    params: tuple[int, ...]
    moments: tuple[int, ...]
    counts: tuple[int, ...]
    data: tuple[int, ...]


def states_before(recording: Recording) -> list[tuple[int, State]]:
    """Return, for each step and for the end, the optimizer whose turn it is and its state then.

    At the end it is the turn of the optimizer that made the first step.
    """
    now: dict[int, State] = {}
    found: list[tuple[int, State]] = []
    for step in recording.steps:
        before = step.before if step.before is not None else now.get(step.optimizer, step.after)
        if step.modified is not None:
            params, each = step.modified
            before = replace(before, params=params, params_each=each)
        found.append((step.optimizer, before))
        now[step.optimizer] = step.after
    if recording.steps:
        first = recording.steps[0].optimizer
        found.append((first, now[first]))
    return found


def align(reference: Recording, resumed: Recording) -> Alignment:
    """Look the resumed process's first state up among all states of the reference.

    Args:
        reference: The uninterrupted run, of the same rank.
        resumed: The resumed process; it has made a step.
    """
    first = resumed.steps[0]
    begin = first.before if first.before is not None else first.after
    states = [
        (position, state)
        for position, (optimizer, state) in enumerate(states_before(reference))
        if optimizer == first.optimizer
    ]
    params = tuple(position for position, state in states if state.params == begin.params)
    moments = tuple(position for position, state in states if state.moments == begin.moments)
    counts = tuple(position for position, state in states if state.counts == begin.counts)
    data = _positions_with(reference, first)
    start = max(
        params,
        key=lambda position: (position in moments, position in counts, position in data, -position),
        default=None,
    )
    return Alignment(start, params, moments, counts, data)


def _positions_with(reference: Recording, first: Step) -> tuple[int, ...]:
    if not first.data:
        return ()
    return tuple(
        position for position, step in enumerate(reference.steps) if step.data == first.data
    )


def matching_tensors(reference: Recording, resumed: Recording) -> tuple[int, set[int]] | None:
    """Return the position with which most of the first parameters agree, and which of them do not.

    None if the recordings have no parameter in common.
    """
    begin = resumed.steps[0].before
    if begin is None:
        return None
    best: tuple[int, set[int]] | None = None
    for position, (_, state) in enumerate(states_before(reference)):
        if len(state.params_each) != len(begin.params_each):
            continue
        pairs = enumerate(zip(state.params_each, begin.params_each, strict=True))
        different = {index for index, (there, here) in pairs if there != here}
        if len(different) < len(begin.params_each) and (
            best is None or len(different) < len(best[1])
        ):
            best = position, different
    return best
