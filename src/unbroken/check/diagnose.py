"""Explaining the first step at which a resumed run differs, by what differs in it."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from unbroken.check.compare import (
    StepDifference,
    differing_generators,
    first_effect,
    lost,
    states_before,
)
from unbroken.check.recording import Batch, Recording, Step
from unbroken.check.verdict import Culprit, Verdict, not_exact

# The data of a recording in one row: by contents, or by the samples that loaders took.


_RUNS = (4, 2)  # so many batches in a row are no accident


@dataclass(frozen=True)
class Stream:
    """All micro-batches of a recording, in order.

    Attributes:
        tokens: What stands for each: equal tokens are the same data.
        windows: For each step the index of its first micro-batch.
        epochs: The steps at which a pass over the data begins.
    """

    tokens: tuple[Any, ...]
    windows: tuple[int, ...]
    epochs: tuple[int, ...]

    def since(self, step: int) -> tuple[Any, ...]:
        """Return what a step and those after it used."""
        return self.tokens[self.windows[step] :] if step < len(self.windows) else ()

    def window(self, step: int) -> tuple[int, int]:
        """Return the indices at which the micro-batches of a step begin and end."""
        ends = (*self.windows[1:], len(self.tokens))
        return self.windows[step], ends[step]

    def step_of(self, index: int) -> int:
        """Return the step that used a micro-batch."""
        return bisect_right(self.windows, index) - 1

    def epoch_of(self, step: int) -> int:
        """Return the epoch in which a step is, from 0."""
        return max(bisect_right(self.epochs, step) - 1, 0)

    def find(self, ours: Sequence[Any]) -> list[int]:
        """Return each index from which `ours` follow one another, as far as both go.

        Four in a row are looked for, then two: a position that was lost right before the end of
        an epoch shows itself only in those.

        Example:
            >>> Stream(("a", "b", "a", "c"), (0, 1, 2, 3), (0,)).find(("a", "c"))
            [2]
        """
        for run in _RUNS:
            indices = range(len(self.tokens))
            found = [index for index in indices if follows(self.tokens[index:], ours, run)]
            if found:
                return found
        return []


def follows(theirs: Sequence[Any], ours: Sequence[Any], run: int = _RUNS[0]) -> bool:
    """Return whether two rows of data begin alike."""
    pairs = list(zip(theirs[:run], ours[:run], strict=False))
    return bool(pairs) and all(a == b for a, b in pairs)


def by_content(steps: Sequence[Step]) -> Stream:
    """Return the data by the digests of what was used."""
    tokens: list[str] = []
    windows = []
    for step in steps:
        windows.append(len(tokens))
        tokens.extend(batch.digest for batch in step.data)
    return Stream(tuple(tokens), tuple(windows), tuple(epoch_starts(steps)))


def by_samples(steps: Sequence[Step]) -> Stream | None:
    """Return the data by the samples that the loader of the training data took.

    A step uses what was fetched last before it, also where batches were skipped: each fetched batch
    stands for as many uses as in most steps. None if a loader did not tell its samples.
    """
    training = _training_dataset(steps)
    of_steps = [[one for one in step.fetched if one.dataset == training] for step in steps]
    fetched = [fetch for step in of_steps for fetch in step]
    if not fetched or not all(fetch.samples for fetch in fetched):
        return None
    pairs = zip(steps, of_steps, strict=True)
    uses = [len(step.data) / len(fetches) for step, fetches in pairs if fetches]
    uses_of_each = max(round(median(uses)), 1)
    windows: list[int] = []
    until = 0
    for step, fetches in zip(steps, of_steps, strict=True):
        until += len(fetches)
        used = -(-len(step.data) // uses_of_each)
        windows.append(max(until - used, windows[-1] if windows else 0))
    tokens = tuple(fetch.samples for fetch in fetched)
    return Stream(tokens, tuple(windows), tuple(epoch_starts(steps)))


def epoch_starts(steps: Sequence[Step]) -> list[int]:
    """Return the steps at which a pass over the training data begins; [0] if that is not seen."""
    training = _training_dataset(steps)
    begins = {
        index
        for index, step in enumerate(steps)
        if any(fetch.index == 0 and fetch.dataset == training for fetch in step.fetched)
    }
    return sorted({0} | begins)


def _training_dataset(steps: Sequence[Step]) -> int | None:
    """Return the dataset from which most batches come."""
    counted = Counter(fetch.dataset for step in steps for fetch in step.fetched)
    return counted.most_common(1)[0][0] if counted else None


# Explaining why a resumed run saw other data than the reference at the same step.


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
    step_index = start + index
    culprit, words = _explain(reference, resumed, step_index, index)
    there, here = reference.steps[step_index].data, resumed.steps[index].data
    names = [" ".join(batch.digest[:8] for batch in batches) for batches in (there, here)]
    evidence = f"batches of the step: reference {names[0]}, resumed {names[1]}"
    return not_exact(culprit, words, evidence, step=step_index + 1)


def _explain(reference: Recording, resumed: Recording, step_index: int, index: int) -> Found:
    contents = by_content(reference.steps)
    ours = by_content(resumed.steps).since(index)
    samples = by_samples(reference.steps)
    our_samples = by_samples(resumed.steps)
    found = (
        _window(contents, ours, step_index)
        or _position(contents, ours, step_index)
        or _stray(contents, ours, step_index)
    )
    if found is not None or samples is None or our_samples is None:
        return found or _other_contents(reference, resumed, step_index, index)
    taken = our_samples.since(index)
    if follows(samples.since(step_index), taken):
        return Culprit.AUGMENTATION, (
            "the right samples with other contents: what changes them at random (augmentation, "
            "masking) was not restored"
        )
    return (
        _position(samples, taken, step_index)
        or _window(samples, taken, step_index)
        or _other_samples(samples, our_samples, step_index, index)
    )


def _window(stream: Stream, ours: Sequence[object], step_index: int) -> Found | None:
    """Find the same data cut into steps elsewhere: an accumulation window was not finished."""
    begin, end = stream.window(step_index)
    inside = [index for index in stream.find(ours) if begin < index < end]
    if inside:
        lost = inside[0] - begin
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: the resumed run goes on inside the "
            f"window of step {step_index + 1}, without the gradients of its first {lost} of "
            f"{end - begin} micro-batches"
        )
    if ours and begin in stream.find(ours):
        return Culprit.ACCUMULATION, (
            f"gradients of an accumulation window were lost: step {step_index + 1} begins with the "
            f"right micro-batch, but is made of another number of micro-batches"
        )
    return None


def _position(stream: Stream, ours: Sequence[object], step_index: int) -> Found | None:
    """Find at which other step of the reference these data begin."""
    found = {stream.step_of(index) for index in stream.find(ours) if index in stream.windows}
    if not found:
        return None
    epoch = stream.epoch_of(step_index)
    begin = stream.epochs[epoch]
    position = step_index - begin
    if position and begin in found:
        return Culprit.DATA_RESTARTED, _restarted(begin, step_index)
    for other in range(epoch):
        if stream.epochs[other] + position in found:
            return Culprit.EPOCH_ORDER, (
                f"epoch {epoch + 1} goes in the order of epoch {other + 1}: "
                "the epoch of the sampler, or the generator that shuffles, was not restored"
            )
    if 0 in found:
        return Culprit.DATA_RESTARTED, _restarted(0, step_index)
    return _shifted(stream, min(found, key=lambda step: (abs(step - step_index), step)), step_index)


def _stray(stream: Stream, ours: Sequence[object], step_index: int) -> Found | None:
    """Find one batch of another position that comes before the right ones."""
    begin = stream.window(step_index)[0]
    is_known = bool(ours) and ours[0] in stream.tokens
    if not is_known or not any(follows(stream.tokens[begin + gap :], ours[1:]) for gap in (0, 1)):
        return None
    other = stream.step_of(stream.tokens.index(ours[0])) + 1
    return Culprit.DATA_REPEATED, (
        f"the batch of step {other} was used after resume, and only then the right ones: it was "
        "read before the position was restored"
    )


def _restarted(begin: int, step_index: int) -> str:
    return (
        f"data order: after resume the script saw batch {begin + 1} again, where the reference "
        f"saw batch {step_index + 1}; the position in the epoch was not restored"
    )


def _shifted(stream: Stream, found: int, step_index: int) -> Found:
    if found < step_index:
        again = step_index - found
        return Culprit.DATA_REPEATED, (
            f"the batches of steps {found + 1} to {step_index} were seen again: "
            f"the position in the data is {again} {_steps(again)} behind the weights"
        )
    position = step_index - stream.epochs[stream.epoch_of(step_index)]
    later = [begin for begin in stream.epochs if begin > step_index]
    if found in later or any(found == begin + position for begin in later):
        return Culprit.EPOCH_SKIPPED, (
            f"an epoch was skipped: after step {step_index} the script saw the batch of step "
            f"{found + 1}, which is in epoch {stream.epoch_of(found) + 1}"
        )
    gap = found - step_index
    return Culprit.DATA_SKIPPED, (
        f"the batches of steps {step_index + 1} to {found} were never seen: "
        f"the position in the data is {gap} {_steps(gap)} ahead of the weights"
    )


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


def _other_samples(theirs: Stream, ours: Stream, step_index: int, index: int) -> Found:
    """Explain samples in batches that the reference never made."""
    begin = theirs.window(step_index)[0]
    return _other_batches(
        [one for batch in theirs.tokens for one in batch],
        [one for batch in ours.since(index) for one in batch],
        sum(len(batch) for batch in theirs.tokens[:begin]),
        (len(theirs.tokens[begin]), len(ours.since(index)[0])),
    )


def _other_contents(reference: Recording, resumed: Recording, step_index: int, index: int) -> Found:
    """Explain batches that the reference never used by their rows, where no samples are known."""
    before, theirs = _rows(reference.steps[:step_index]), _rows(reference.steps)
    ours = _rows(resumed.steps[index:])
    if not ours:
        return Culprit.DATA_ORDER, "the step used no data that could be seen, the reference did"
    if set(ours) & set(theirs):
        sizes = _size(reference.steps[step_index].data), _size(resumed.steps[index].data)
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
    """Explain known samples in unknown batches."""
    if sizes[0] == sizes[1]:
        return Culprit.DATA_ORDER, (
            "the samples come in another order: the generator that shuffles was not restored"
        )
    run = list(ours[:2])
    indices = range(len(theirs))
    found = [
        step_index
        for step_index in indices
        if list(theirs[step_index : step_index + len(run)]) == run
    ]
    if found and expected not in found:
        return Culprit.POSITION_UNITS, (
            f"with {sizes[1]} samples in a batch, where the reference had {sizes[0]}, the script "
            f"went on at sample {found[0] + 1} of the run, not at sample {expected + 1}: "
            "the position is counted in batches or steps, not in samples"
        )
    return Culprit.BATCH_SIZE, (
        f"a batch has {sizes[1]} samples, in the reference it has {sizes[0]}: this is another run"
    )


_INDEPENDENT = {
    "learning rate": Culprit.SCHEDULER,
    "schedulers": Culprit.SCHEDULER,
    "scaler": Culprit.SCALER,
    "others": Culprit.AVERAGE,
    "generators": Culprit.GENERATORS,
}


@dataclass(frozen=True)
class Evidence:
    """All that an explanation can look at.

    Attributes:
        reference: The uninterrupted run, of the same rank.
        resumed: The resumed process.
        start: How many steps of the reference the resumed process has behind it.
        difference: The first step that differs, and what differs in it.
        generators: The generators that count.
        ranks: The uninterrupted run on all ranks.
    """

    reference: Recording
    resumed: Recording
    start: int
    difference: StepDifference
    generators: frozenset[str]
    ranks: Mapping[int, Recording]

    @property
    def step_index(self) -> int:
        """The index of the differing step in the reference."""
        return self.start + self.difference.index

    @property
    def there(self) -> Step:
        """The step of the reference."""
        return self.reference.steps[self.step_index]

    @property
    def here(self) -> Step:
        """The step of the resumed process."""
        return self.resumed.steps[self.difference.index]


def explain(observed: Evidence) -> Verdict:
    """Return the verdict for the first thing that differs, and name what else was lost."""
    parts = observed.difference.parts
    verdict = _other_optimizer(observed) or _CAUSES[parts[0]](observed)
    also = {_INDEPENDENT[part] for part in parts[1:] if part in _INDEPENDENT}
    known = {verdict.culprit}
    if verdict.culprit in (Culprit.SEED_RESET, Culprit.WRONG_RANK):
        known.add(Culprit.GENERATORS)
    return replace(verdict, step=observed.step_index + 1, also=tuple(sorted(also - known)))


def _other_optimizer(observed: Evidence) -> Verdict | None:
    theirs, ours = (len(one.after.params_each) for one in (observed.there, observed.here))
    if theirs == ours:
        return None
    words = (
        f"the step is one of an optimizer with {ours} tensors, in the reference of one with "
        f"{theirs}: an optimizer is missing after the resume, or steps at other times"
    )
    return not_exact(Culprit.OPTIMIZER, words)


def _data(observed: Evidence) -> Verdict:
    index = observed.difference.index
    found = explain_data(observed.reference, observed.resumed, observed.start, index)
    has_loaders = any(step.fetched for step in observed.resumed.steps)
    if "generators" not in observed.difference.parts:
        return found
    if found.culprit is Culprit.AUGMENTATION:
        return replace(found, words=f"{found.words}; {_which_generators(observed)[1]}")
    if has_loaders:
        return found
    culprit, why = _which_generators(observed)  # batches that no loader gave are drawn at random
    return not_exact(culprit, f"data: other batches; {why}", found.words, *found.evidence)


def _learning_rate(observed: Evidence) -> Verdict:
    here, there = observed.here.learning_rates, observed.there.learning_rates
    same = [
        step_index + 1
        for step_index, step in enumerate(observed.reference.steps)
        if step.learning_rates == here
    ]
    words = (
        f"learning rate {_numbers(here)}, reference {_numbers(there)}: "
        "the scheduler was not restored"
    )
    evidence = [f"it is the learning rate of step {same[0]}"] if same else []
    return not_exact(Culprit.SCHEDULER, words, *evidence)


def _schedulers(observed: Evidence) -> Verdict:
    names = [
        ", ".join(f"{name} at {step}" for name, step in one.schedulers)
        for one in (observed.here, observed.there)
    ]
    words = f"scheduler: {names[0]}, reference {names[1]}: it was not restored"
    return not_exact(Culprit.SCHEDULER, words, _first_other_rate(observed))


def _first_other_rate(observed: Evidence) -> str:
    theirs = observed.reference.steps[observed.start :]
    for step_index, (there, here) in enumerate(zip(theirs, observed.resumed.steps, strict=False)):
        if there.learning_rates != here.learning_rates:
            return (
                f"step {observed.start + step_index + 1}: learning rate "
                f"{_numbers(here.learning_rates)}, reference {_numbers(there.learning_rates)}"
            )
    return "no learning rate of the compared steps shows it"


def _settings(observed: Evidence) -> Verdict:
    firsts = [_settings_of(one.steps) for one in (observed.resumed, observed.reference)]
    different = [
        f"{name} {ours[name]}, reference {theirs.get(name)}"
        for ours, theirs in zip(*firsts, strict=False)
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    what = "; ".join(different) or "they change during training"
    words = f"the optimizer's settings differ: {what}"
    return not_exact(Culprit.SETTINGS, words)


def _settings_of(steps: Sequence[Step]) -> tuple[Mapping[str, object], ...]:
    return next((step.setting_values for step in steps if step.setting_values), ())


def _modes(observed: Evidence) -> Verdict:
    pairs = zip(observed.here.modes, observed.there.modes, strict=False)
    count = sum(here != there for here, there in pairs)
    is_evaluating = observed.here.modes.count("0") > observed.there.modes.count("0")
    mode = "evaluation" if is_evaluating else "training"
    words = (
        f"{count} modules are in {mode} mode, in the reference they are not: `train()` or `eval()` "
        "was called, or forgotten, after the resume"
    )
    return not_exact(Culprit.MODE, words)


def _scaler(observed: Evidence) -> Verdict:
    here, there = observed.here.scalers, observed.there.scalers
    words = (
        f"gradient scaler: scale and growth count {_pairs(here)}, reference {_pairs(there)}: "
        "it was not restored"
    )
    return not_exact(Culprit.SCALER, words)


def _loss(observed: Evidence) -> Verdict:
    evidence = (
        f"loss {_numbers(observed.here.loss_values)}, "
        f"reference {_numbers(observed.there.loss_values)}"
    )
    if "generators" in observed.difference.parts:
        culprit, why = _which_generators(observed)
        words = f"dropout: same batch, same weights, other loss: {why}"
        return not_exact(culprit, words, evidence)
    if "buffers" in observed.difference.parts:
        return replace(_buffers(observed), evidence=(evidence,))
    if "others" in observed.difference.parts:
        return replace(_others(observed), evidence=(evidence,))
    words = (
        "same batch, same weights, same generators, other loss: something in the model that is "
        "neither parameter nor buffer was not restored (a mode, a flag, a counter), or it draws "
        "from a generator of its own"
    )
    return not_exact(Culprit.MODEL, words, evidence)


def _gradients(observed: Evidence) -> Verdict:
    if "generators" in observed.difference.parts:
        culprit, why = _which_generators(observed)
        return not_exact(culprit, f"same loss, other gradients: {why}")
    words = (
        "same batch, same loss, other gradients: gradients that were pending were lost or kept, "
        "or they are clipped or scaled otherwise"
    )
    return not_exact(Culprit.GRADIENTS, words)


def _buffers(observed: Evidence) -> Verdict:
    pairs = enumerate(zip(observed.here.buffers_each, observed.there.buffers_each, strict=False))
    different = [index for index, (here, there) in pairs if here != there]
    names = observed.reference.buffer_names
    shown = [names[index] if index < len(names) else f"buffer {index}" for index in different]
    words = (
        "the model's buffers (BatchNorm's running statistics, say) differ, the weights do not: "
        "they were not restored; a load with strict=False passes over missing ones"
    )
    return not_exact(Culprit.BUFFERS, words, f"different: {', '.join(shown[:4])}")


def _update(observed: Evidence) -> Verdict:
    begin, there = observed.here.before, states_before(observed.reference)[observed.step_index][1]
    if begin is not None and begin.moments != there.moments:
        words = (
            f"the state of optimizer {observed.here.optimizer + 1} is not that before step "
            f"{observed.step_index + 1}: it was not loaded"
        )
        return not_exact(Culprit.OPTIMIZER, words)
    words = (
        "same weights, gradients and learning rate, other update: something in the optimizer that "
        "is neither moment nor step count was not restored"
    )
    return not_exact(Culprit.OPTIMIZER, words)


def _others(observed: Evidence) -> Verdict:
    here = Counter(label for label, _ in observed.here.others)
    there = Counter(label for label, _ in observed.there.others)
    labels = dict.fromkeys(label for label, _ in lost(observed.there.others, observed.here.others))
    differ = "are not there" if any(there[one] > here[one] for one in labels) else "differ"
    words = (
        f"weights that no optimizer moves {differ} ({'; '.join(map(str, labels))}): "
        "an average of the weights (EMA), or another copy of them, was not restored"
    )
    return not_exact(Culprit.AVERAGE, words, "the trained weights do not show it")


def _generators(observed: Evidence) -> Verdict:
    culprit, why = _which_generators(observed)
    effect = first_effect(observed.reference.steps[observed.start :], observed.resumed.steps)
    if effect is None:
        later = "nothing in the compared steps depended on it; what is drawn later will"
    else:
        step, part = observed.start + effect.index + 1, effect.parts[0]
        later = f"its first effect is on step {step}: {part}"
    return not_exact(culprit, why, later)


def _which_generators(observed: Evidence) -> tuple[Culprit, str]:
    names = differing_generators(observed.there, observed.here, observed.generators)
    for name in names:
        digest = observed.here.generators.get(name)
        for rank, other in observed.ranks.items():
            if rank != observed.reference.rank and _stands(
                other, observed.step_index, name, digest
            ):
                return Culprit.WRONG_RANK, f"the {name} generator is that of rank {rank}"
        if _stands(observed.reference, observed.difference.index, name, digest):
            return Culprit.SEED_RESET, (
                f"the {name} generator began again from the seed: the script seeds at its start "
                "and does not restore the generator after that"
            )
    return Culprit.GENERATORS, f"the {' and '.join(names)} generator was not restored"


def _stands(recording: Recording, index: int, name: str, digest: str | None) -> bool:
    steps = recording.steps
    return index < len(steps) and steps[index].generators.get(name) == digest


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in dict.fromkeys(values)) or "none"


def _pairs(values: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{scale:g} and {count:g}" for scale, count in values) or "none"


_CAUSES: dict[str, Callable[[Evidence], Verdict]] = {
    "data": _data,
    "learning rate": _learning_rate,
    "settings": _settings,
    "scaler": _scaler,
    "modes": _modes,
    "loss": _loss,
    "gradients": _gradients,
    "buffers": _buffers,
    "params": _update,
    "moments": _update,
    "counts": _update,
    "schedulers": _schedulers,
    "others": _others,
    "generators": _generators,
}
