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
    "modes": lambda step: step.modes,
    "loss": lambda step: step.losses,
    "gradients": lambda step: step.gradients,
    "buffers": lambda step: step.buffers,
    "params": lambda step: step.after.params,
    "moments": lambda step: step.after.moments,
    "counts": lambda step: step.after.counts,
}
Labelled = tuple[str, str | int]  # a label, and a digest or a step
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
    there: Step, here: Step, moving: frozenset[str], fixed: frozenset[Labelled] = frozenset()
) -> tuple[str, ...]:
    """Return what differs in a step, in the order of cause and effect.

    Args:
        there: The step of the reference.
        here: The step of the other run.
        moving: The generators that count.
        fixed: Schedulers and weights outside the optimizer that do not count: see `fixed_parts`.
    """
    parts = [name for name, look in _PARTS.items() if look(there) != look(here)]
    if there.losses and _ends_with(_PARTS["data"](here), _PARTS["data"](there)):
        # A model was tried out before: that shows in what it left, or it played no part.
        tried_out = ("data", "loss") if _ends_with(here.losses, there.losses) else ("data",)
        parts = [part for part in parts if part not in tried_out]
    elif set(parts) <= {"data", "loss"} and _goes_on_in_a_window(there, here):
        parts = []
    if lost(there.schedulers, here.schedulers, fixed):
        parts.append("schedulers")
    if lost(there.others, here.others, fixed):
        parts.append("others")
    if differing_generators(there, here, moving):
        parts.append("generators")
    return tuple(parts)


def _goes_on_in_a_window(there: Step, here: Step) -> bool:
    """Return whether the step is the end of an accumulation window whose gradients were saved."""
    look = _PARTS["data"]
    return _ends_with(look(there), look(here)) and _ends_with(there.losses, here.losses)


def _ends_with(seen: Sequence[Any], used: Sequence[Any]) -> bool:
    return bool(used) and list(seen[-len(used) :]) == list(used)


def lost(
    there: Sequence[Labelled], here: Sequence[Labelled], fixed: frozenset[Labelled] = frozenset()
) -> list[Labelled]:
    """Return what is there and moves, and is not here.

    More here is no difference: a resumed process may hold what it has loaded.

    Example:
        >>> lost([("SWALR", 3), ("StepLR", 8)], [("StepLR", 8), ("StepLR", 0)])
        [('SWALR', 3)]
    """
    return list((Counter(one for one in there if one not in fixed) - Counter(here)).elements())


def differing_generators(there: Step, here: Step, moving: frozenset[str]) -> list[str]:
    """Return the moving generators that stand elsewhere."""
    return [
        name
        for name, digest in there.generators.items()
        if name in moving and here.generators.get(name, digest) != digest
    ]


def fixed_parts(steps: Sequence[Step]) -> frozenset[Labelled]:
    """Return what never changes: a teacher, a forgotten copy, a scheduler that nobody steps."""
    each = (frozenset[Labelled]((*step.others, *step.schedulers)) for step in steps)
    return frozenset.intersection(*each)


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
