"""Explaining why a resumed run saw other data than the reference at the same step."""

from __future__ import annotations

from collections.abc import Sequence

from unbroken.check.data_stream import Stream, by_content, by_samples, epoch_starts, follows
from unbroken.check.recording import Batch, Recording, Step
from unbroken.check.verdict import Culprit, Verdict, not_exact

Found = tuple[Culprit, str]


def explain_data(reference: Recording, resumed: Recording, start: int, index: int) -> Verdict:
    """Return why the data of a resumed step are not those of the reference.

    The batches are looked up by their contents, and where these are new, by the samples that
    the data loader took for them.

    Args:
        reference: The uninterrupted run.
        resumed: The resumed process.
        start: How many steps of the reference the resumed process has behind it.
        index: The first resumed step whose data differ.
    """
    place = start + index
    culprit, words = _explain(reference, resumed, place, index)
    there, here = reference.steps[place].data, resumed.steps[index].data
    names = [" ".join(batch.digest[:8] for batch in batches) for batches in (there, here)]
    evidence = f"batches of the step: reference {names[0]}, resumed {names[1]}"
    return not_exact(culprit, words, evidence, step=place + 1)


def _explain(reference: Recording, resumed: Recording, place: int, index: int) -> Found:
    contents = by_content(reference.steps)
    ours = by_content(resumed.steps).since(index)
    samples = by_samples(reference.steps)
    our_samples = by_samples(resumed.steps)
    found = (
        _window(contents, ours, place)
        or _position(contents, ours, place)
        or _stray(contents, ours, place)
    )
    if found is not None or samples is None or our_samples is None:
        return found or _other_contents(reference, resumed, place, index)
    taken = our_samples.since(index)
    if follows(samples.since(place), taken):
        return Culprit.AUGMENTATION, (
            "the right samples with other contents: what changes them at random (augmentation, "
            "masking) was not restored"
        )
    return (
        _position(samples, taken, place)
        or _window(samples, taken, place)
        or _other_samples(samples, our_samples, place, index)
    )


def _window(stream: Stream, ours: Sequence[object], place: int) -> Found | None:
    """The same data, cut into steps elsewhere: a window of accumulation was not finished."""
    begin, end = stream.window(place)
    inside = [index for index in stream.find(ours) if begin < index < end]
    if inside:
        lost = inside[0] - begin
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: the resumed run goes on inside the "
            f"window of step {place + 1}, without the gradients of its first {lost} of "
            f"{end - begin} micro-batches"
        )
    if ours and begin in stream.find(ours):
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: step {place + 1} begins with the "
            f"right micro-batch, but is made of another number of micro-batches"
        )
    return None


def _position(stream: Stream, ours: Sequence[object], place: int) -> Found | None:
    """The data of the beginning of another step of the reference."""
    found = {stream.step_of(index) for index in stream.find(ours) if index in stream.windows}
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


def _stray(stream: Stream, ours: Sequence[object], place: int) -> Found | None:
    """One batch from elsewhere, then the right ones."""
    begin = stream.window(place)[0]
    is_known = bool(ours) and ours[0] in stream.tokens
    if not is_known or not any(follows(stream.tokens[begin + gap :], ours[1:]) for gap in (0, 1)):
        return None
    other = stream.step_of(stream.tokens.index(ours[0])) + 1
    return Culprit.DATA_REPEATED, (
        f"the batch of step {other} was used after resume, and only then the right ones: it was "
        "read before the position was restored"
    )


def _restarted(begin: int, place: int) -> str:
    return (
        f"data order: after resume the script saw batch {begin + 1} again, where the reference "
        f"saw batch {place + 1}; the position in the epoch was not restored"
    )


def _elsewhere(stream: Stream, found: int, place: int) -> Found:
    if found < place:
        again = place - found
        return Culprit.DATA_REPEATED, (
            f"the batches of steps {found + 1} to {place} were seen again: "
            f"the position in the data is {again} {_steps(again)} behind the weights"
        )
    position = place - stream.epochs[stream.epoch_of(place)]
    later = [begin for begin in stream.epochs if begin > place]
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


def _other_samples(theirs: Stream, ours: Stream, place: int, index: int) -> Found:
    """Samples in batches that the reference never made."""
    begin = theirs.window(place)[0]
    return _other_batches(
        [one for batch in theirs.tokens for one in batch],
        [one for batch in ours.since(index) for one in batch],
        sum(len(batch) for batch in theirs.tokens[:begin]),
        (len(theirs.tokens[begin]), len(ours.since(index)[0])),
    )


def _other_contents(reference: Recording, resumed: Recording, place: int, index: int) -> Found:
    """Batches that the reference never used, and nothing is known about samples: look at rows."""
    before, theirs = _rows(reference.steps[:place]), _rows(reference.steps)
    ours = _rows(resumed.steps[index:])
    if not ours:
        return Culprit.DATA_ORDER, "the step used no data that could be seen, the reference did"
    if set(ours) & set(theirs):
        sizes = _size(reference.steps[place].data), _size(resumed.steps[index].data)
        return _other_batches(theirs, ours, len(before), sizes)
    if len(epoch_starts(reference.steps)) > 1:
        return Culprit.AUGMENTATION, (
            "the samples have contents that the reference never saw: what changes them at random "
            "(augmentation, masking) was not restored"
        )
    return Culprit.DATA_ORDER, (
        "the samples are none that the reference saw: another order, or other random contents"
    )


def _rows(steps: Sequence[Step]) -> list[str]:
    return [row for step in steps for batch in step.data for row in batch.rows]


def _size(batches: Sequence[Batch]) -> int:
    return max((len(batch.rows) for batch in batches), default=0)


def _other_batches(
    theirs: Sequence[object], ours: Sequence[object], expected: int, sizes: tuple[int, int]
) -> Found:
    """Known samples in unknown batches."""
    if sizes[0] == sizes[1]:
        return Culprit.DATA_ORDER, (
            "the samples come in another order: the generator that shuffles was not restored"
        )
    run = list(ours[:2])
    places = range(len(theirs))
    found = [place for place in places if list(theirs[place : place + len(run)]) == run]
    if found and expected not in found:
        return Culprit.POSITION_UNITS, (
            f"with {sizes[1]} samples in a batch, where the reference had {sizes[0]}, the script "
            f"went on at sample {found[0] + 1} of the run, not at sample {expected + 1}: "
            "the position is counted in batches or steps, not in samples"
        )
    return Culprit.BATCH_SIZE, (
        f"a batch has {sizes[1]} samples, in the reference it has {sizes[0]}: this is another run"
    )
