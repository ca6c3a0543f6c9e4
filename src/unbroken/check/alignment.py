"""Finding where in the reference a resumed process begins, by content, not by any counter."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unbroken.check.recording import Recording, State, Step


@dataclass(frozen=True)
class Alignment:
    """Where the state of a resumed process, before its first step, is found in the reference.

    A place is the number of steps that the reference had made; 0 is the untrained state.

    Attributes:
        start: The place whose parameters these are; of several the one that fits best otherwise.
        params: All places with these parameters.
        moments: All places with these moments of the optimizer.
        counts: All places with these step counts.
        data: All places after which the reference used the batch that the first step used.
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
        if step.edited is not None:
            params, each = step.edited
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
        (place, state)
        for place, (optimizer, state) in enumerate(states_before(reference))
        if optimizer == first.optimizer
    ]
    params = tuple(place for place, state in states if state.params == begin.params)
    moments = tuple(place for place, state in states if state.moments == begin.moments)
    counts = tuple(place for place, state in states if state.counts == begin.counts)
    data = _places_with(reference, first)
    start = max(
        params,
        key=lambda place: (place in moments, place in counts, place in data, -place),
        default=None,
    )
    return Alignment(start, params, moments, counts, data)


def _places_with(reference: Recording, first: Step) -> tuple[int, ...]:
    if not first.data:
        return ()
    return tuple(place for place, step in enumerate(reference.steps) if step.data == first.data)


def matching_tensors(reference: Recording, resumed: Recording) -> tuple[int, set[int]] | None:
    """Return the place with which most of the first parameters agree, and which of them do not.

    None if the recordings have no parameter in common.
    """
    begin = resumed.steps[0].before
    if begin is None:
        return None
    best: tuple[int, set[int]] | None = None
    for place, (_, state) in enumerate(states_before(reference)):
        if len(state.params_each) != len(begin.params_each):
            continue
        pairs = enumerate(zip(state.params_each, begin.params_each, strict=True))
        different = {index for index, (there, here) in pairs if there != here}
        if len(different) < len(begin.params_each) and (
            best is None or len(different) < len(best[1])
        ):
            best = place, different
    return best
