"""Explaining why a resumed run saw other data than the reference at the same step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unbroken.check.recording import Batch, Recording, Step
from unbroken.check.verdict import Culprit, Verdict, not_exact

_RUN = 4  # so many batches in a row are a place, and no accident


@dataclass(frozen=True)
class _Stream:
    """All batches of the reference in one row.

    Attributes:
        batches: The batches.
        windows: For each step the index of its first batch.
        epochs: The steps at which a pass over the data begins, as step indices.
    """

    batches: tuple[Batch, ...]
    windows: tuple[int, ...]
    epochs: tuple[int, ...]

    def step_of(self, index: int) -> int:
        """Return the index of the step that used a batch."""
        return bisect_right(self.windows, index) - 1

    def epoch_of(self, step: int) -> int:
        """Return the index of the epoch in which a step is."""
        return max(bisect_right(self.epochs, step) - 1, 0)


def explain_data(reference: Recording, resumed: Recording, start: int, index: int) -> Verdict:
    """Return why the data of a resumed step are not those of the reference.

    Args:
        reference: The uninterrupted run.
        resumed: The resumed process.
        start: How many steps of the reference the resumed process has behind it.
        index: The first resumed step whose data differ.
    """
    place = start + index
    stream = _stream(reference.steps)
    ours = [batch for step in resumed.steps[index:] for batch in step.data]
    there = reference.steps[place].data
    evidence = _evidence(there, resumed.steps[index].data)
    step = place + 1
    if not ours:
        words = "the step used no data that could be seen; the reference's did"
        return not_exact(Culprit.DATA_ORDER, words, evidence, step=step)
    for rule in (_window, _position):
        verdict = rule(stream, ours, place)
        if verdict is not None:
            culprit, words = verdict
            return not_exact(culprit, words, evidence, step=step)
    culprit, words = _contents(reference, resumed, place, index)
    return not_exact(culprit, words, evidence, step=step)


def _stream(steps: Sequence[Step]) -> _Stream:
    batches: list[Batch] = []
    windows = []
    for step in steps:
        windows.append(len(batches))
        batches.extend(step.data)
    return _Stream(tuple(batches), tuple(windows), tuple(epoch_starts(steps)))


def epoch_starts(steps: Sequence[Step]) -> list[int]:
    """Return the steps at which a pass over the training data begins; [0] if that is not seen."""
    counted = [fetch.dataset for step in steps for fetch in step.fetched]
    if not counted:
        return [0]
    training = max(set(counted), key=counted.count)
    starts = {0} | {
        index
        for index, step in enumerate(steps)
        if any(fetch.dataset == training and fetch.index == 0 for fetch in step.fetched)
    }
    return sorted(starts)


def _evidence(there: Sequence[Batch], here: Sequence[Batch]) -> str:
    names = [" ".join(batch.digest[:8] for batch in batches) for batches in (there, here)]
    return f"batches of the step: reference {names[0]}, resumed {names[1]}"


def _found_at(stream: _Stream, ours: Sequence[Batch]) -> list[int]:
    """Return each index of the stream from which our batches follow one another as far as known."""
    first = [index for index, batch in enumerate(stream.batches) if batch == ours[0]]
    return [index for index in first if _follows(stream.batches[index:], ours)]


def _follows(theirs: Sequence[Batch], ours: Sequence[Batch]) -> bool:
    return all(a == b for a, b in zip(theirs[:_RUN], ours[:_RUN], strict=False))


def _window(stream: _Stream, ours: Sequence[Batch], place: int) -> tuple[Culprit, str] | None:
    """The same data, cut into steps elsewhere: a window of accumulation was not finished."""
    begin = stream.windows[place]
    end = stream.windows[place + 1] if place + 1 < len(stream.windows) else len(stream.batches)
    inside = [index for index in _found_at(stream, ours) if begin < index < end]
    if inside:
        lost = inside[0] - begin
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: the resumed run goes on inside the "
            f"window of step {place + 1}, without the gradients of its first {lost} of "
            f"{end - begin} micro-batches"
        )
    if _follows(stream.batches[begin:], ours) and len(stream.batches) > begin:
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: step {place + 1} begins with the "
            f"right micro-batch, but is made of another number of micro-batches"
        )
    return None


def _position(stream: _Stream, ours: Sequence[Batch], place: int) -> tuple[Culprit, str] | None:
    """The data of another place of the reference."""
    found = {stream.step_of(index) for index in _found_at(stream, ours)}
    if not found:
        return None
    epoch = stream.epoch_of(place)
    begin = stream.epochs[epoch]
    position = place - begin
    if position and begin in found:
        return Culprit.DATA_RESTARTED, _restarted(begin, place)
    for other in range(epoch):
        if stream.epochs[other] + position in found:
            return Culprit.EPOCH_ORDER, (
                f"epoch {epoch + 1} goes in the order of epoch {other + 1}: "
                "the epoch of the sampler, or the generator that shuffles, was not restored"
            )
    if 0 in found:
        return Culprit.DATA_RESTARTED, _restarted(0, place)
    return _elsewhere(stream, min(found, key=lambda step: (abs(step - place), step)), place)


def _restarted(begin: int, place: int) -> str:
    return (
        f"after resume the script saw batch {begin + 1} again, where the reference saw batch "
        f"{place + 1}: the position in the epoch was not restored"
    )


def _elsewhere(stream: _Stream, found: int, place: int) -> tuple[Culprit, str]:
    if found < place:
        again = place - found
        return Culprit.DATA_REPEATED, (
            f"the batches of steps {found + 1} to {place} were seen again: "
            f"the position in the data is {again} {_steps(again)} behind the weights"
        )
    epoch = stream.epoch_of(place)
    later = [begin for begin in stream.epochs if begin > place]
    position = place - stream.epochs[epoch]
    if found in later or any(found == begin + position for begin in later):
        return Culprit.EPOCH_SKIPPED, (
            f"an epoch was skipped: after step {place} the script saw the batch of step "
            f"{found + 1}, which is in epoch {stream.epoch_of(found) + 1}"
        )
    gap = found - place
    return Culprit.DATA_SKIPPED, (
        f"the batches of steps {place + 1} to {found} were never seen: "
        f"the position in the data is {gap} {_steps(gap)} ahead of the weights"
    )


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


def _contents(
    reference: Recording, resumed: Recording, place: int, index: int
) -> tuple[Culprit, str]:
    """Batches that the reference never used: look at their samples."""
    theirs = list(_rows(reference.steps))
    ours = list(_rows(resumed.steps[index:]))
    sizes = [_size(reference.steps[place]), _size(resumed.steps[index])]
    if ours and sizes[0] != sizes[1]:
        return _other_size(theirs, ours, sum(1 for _ in _rows(reference.steps[:place])), sizes)
    known = set(theirs)
    if ours and any(row in known for row in ours):
        return Culprit.DATA_ORDER, (
            "the samples come in another order: the generator that shuffles was not restored"
        )
    if len(epoch_starts(reference.steps)) > 1 or not _has_passes(reference):
        return Culprit.AUGMENTATION, (
            "the samples have contents that the reference never saw: what changes them at random "
            "(augmentation, masking, sampling) was not restored"
        )
    return Culprit.DATA_ORDER, (
        "the samples are none that the reference saw: another order, or other random contents"
    )


def _has_passes(reference: Recording) -> bool:
    return any(step.fetched for step in reference.steps)


def _rows(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        batches = tuple(fetch.batch for fetch in step.fetched) or step.inputs
        for batch in batches:
            yield from batch.rows


def _size(step: Step) -> int:
    return max((len(batch.rows) for batch in step.data), default=0)


def _other_size(
    theirs: Sequence[str], ours: Sequence[str], expected: int, sizes: Sequence[int]
) -> tuple[Culprit, str]:
    """Explain batches of another size."""
    run = ours[:2]
    found = [place for place in range(len(theirs)) if list(theirs[place : place + len(run)]) == run]
    if found and expected not in found:
        return Culprit.POSITION_UNITS, (
            f"with {sizes[1]} samples in a batch, where the reference had {sizes[0]}, the script "
            f"went on at sample {found[0] + 1} of the run, not at sample {expected + 1}: "
            "the position is counted in batches or steps, not in samples"
        )
    return Culprit.BATCH_SIZE, (
        f"a batch has {sizes[1]} samples, in the reference it has {sizes[0]}: this is another run"
    )
