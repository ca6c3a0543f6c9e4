"""Explaining the first step at which a resumed run differs, by what differs in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from unbroken.check.comparison import Difference, differing_generators, first_effect
from unbroken.check.data_order import explain_data
from unbroken.check.recording import Recording, Step
from unbroken.check.verdict import Culprit, Verdict, not_exact

_INDEPENDENT = {
    "learning rate": Culprit.SCHEDULER,
    "schedulers": Culprit.SCHEDULER,
    "scaler": Culprit.SCALER,
    "others": Culprit.AVERAGE,
    "generators": Culprit.GENERATORS,
}


@dataclass(frozen=True)
class Scenery:
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
    difference: Difference
    generators: frozenset[str]
    ranks: Mapping[int, Recording]

    @property
    def place(self) -> int:
        """The index of the differing step in the reference."""
        return self.start + self.difference.index

    @property
    def there(self) -> Step:
        """The step of the reference."""
        return self.reference.steps[self.place]

    @property
    def here(self) -> Step:
        """The step of the resumed process."""
        return self.resumed.steps[self.difference.index]


def explain(scenery: Scenery) -> Verdict:
    """Return the verdict for the first thing that differs, and name what else was lost."""
    parts = scenery.difference.parts
    verdict = _CAUSES[parts[0]](scenery)
    also = {_INDEPENDENT[part] for part in parts[1:] if part in _INDEPENDENT}
    known = {verdict.culprit}
    if verdict.culprit in (Culprit.SEED_RESET, Culprit.WRONG_RANK):
        known.add(Culprit.GENERATORS)
    return replace(verdict, step=scenery.place + 1, also=tuple(sorted(also - known)))


def _data(scenery: Scenery) -> Verdict:
    index = scenery.difference.index
    found = explain_data(scenery.reference, scenery.resumed, scenery.start, index)
    has_loaders = any(step.fetched for step in scenery.resumed.steps)
    if has_loaders or "generators" not in scenery.difference.parts:
        return found
    culprit, why = _which_generators(scenery)  # batches that no loader gave are drawn at random
    return not_exact(culprit, f"data: other batches; {why}", found.words, *found.evidence)


def _learning_rate(scenery: Scenery) -> Verdict:
    here, there = scenery.here.learning_rates, scenery.there.learning_rates
    same = [
        place + 1
        for place, step in enumerate(scenery.reference.steps)
        if step.learning_rates == here
    ]
    words = (
        f"learning rate {_numbers(here)}, reference {_numbers(there)}: "
        "the scheduler was not restored"
    )
    evidence = [f"it is the learning rate of step {same[0]}"] if same else []
    return not_exact(Culprit.SCHEDULER, words, *evidence)


def _schedulers(scenery: Scenery) -> Verdict:
    names = [
        ", ".join(f"{name} at {step}" for name, step in one.schedulers)
        for one in (scenery.here, scenery.there)
    ]
    words = f"scheduler: {names[0]}, reference {names[1]}: it was not restored"
    return not_exact(Culprit.SCHEDULER, words, _first_other_rate(scenery))


def _first_other_rate(scenery: Scenery) -> str:
    theirs = scenery.reference.steps[scenery.start :]
    for place, (there, here) in enumerate(zip(theirs, scenery.resumed.steps, strict=False)):
        if there.learning_rates != here.learning_rates:
            return (
                f"step {scenery.start + place + 1}: learning rate "
                f"{_numbers(here.learning_rates)}, reference {_numbers(there.learning_rates)}"
            )
    return "no learning rate of the compared steps shows it"


def _settings(scenery: Scenery) -> Verdict:
    firsts = [_settings_of(one.steps) for one in (scenery.resumed, scenery.reference)]
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


def _scaler(scenery: Scenery) -> Verdict:
    here, there = scenery.here.scalers, scenery.there.scalers
    words = (
        f"gradient scaler: scale and growth count {_pairs(here)}, reference {_pairs(there)}: "
        "it was not restored"
    )
    return not_exact(Culprit.SCALER, words)


def _loss(scenery: Scenery) -> Verdict:
    evidence = (
        f"loss {_numbers(scenery.here.loss_values)}, "
        f"reference {_numbers(scenery.there.loss_values)}"
    )
    if "generators" in scenery.difference.parts:
        culprit, why = _which_generators(scenery)
        words = f"dropout: same batch, same weights, other loss: {why}"
        return not_exact(culprit, words, evidence)
    if "buffers" in scenery.difference.parts:
        return replace(_buffers(scenery), evidence=(evidence,))
    words = (
        "same batch, same weights, same generators, other loss: something in the model that is "
        "neither parameter nor buffer was not restored (a mode, a flag, a counter), or it draws "
        "from a generator of its own"
    )
    return not_exact(Culprit.MODEL, words, evidence)


def _gradients(scenery: Scenery) -> Verdict:
    if "generators" in scenery.difference.parts:
        culprit, why = _which_generators(scenery)
        return not_exact(culprit, f"same loss, other gradients: {why}")
    words = (
        "same batch, same loss, other gradients: gradients that were pending were lost or kept, "
        "or they are clipped or scaled otherwise"
    )
    return not_exact(Culprit.GRADIENTS, words)


def _buffers(scenery: Scenery) -> Verdict:
    pairs = enumerate(zip(scenery.here.buffers_each, scenery.there.buffers_each, strict=False))
    different = [index for index, (here, there) in pairs if here != there]
    names = scenery.reference.buffer_names
    shown = [names[index] if index < len(names) else f"buffer {index}" for index in different]
    words = (
        "the model's buffers (BatchNorm's running statistics, say) differ, the weights do not: "
        "they were not restored; a load with strict=False passes over missing ones"
    )
    return not_exact(Culprit.BUFFERS, words, f"different: {', '.join(shown[:4])}")


def _update(scenery: Scenery) -> Verdict:
    words = (
        "same weights, gradients and learning rate, other update: something in the optimizer that "
        "is neither moment nor step count was not restored"
    )
    return not_exact(Culprit.OPTIMIZER, words)


def _others(scenery: Scenery) -> Verdict:
    here = set(scenery.here.others)
    lost = [label for label, digest in scenery.there.others if (label, digest) not in here]
    words = (
        f"weights that no optimizer moves differ ({'; '.join(lost)}): "
        "an average of the weights (EMA), or another copy of them, was not restored"
    )
    return not_exact(Culprit.AVERAGE, words, "the trained weights do not show it")


def _generators(scenery: Scenery) -> Verdict:
    culprit, why = _which_generators(scenery)
    effect = first_effect(scenery.reference.steps[scenery.start :], scenery.resumed.steps)
    if effect is None:
        later = "nothing in the compared steps depended on it; what is drawn later will"
    else:
        step, part = scenery.start + effect.index + 1, effect.parts[0]
        later = f"its first effect is on step {step}: {part}"
    return not_exact(culprit, why, later)


def _which_generators(scenery: Scenery) -> tuple[Culprit, str]:
    names = differing_generators(scenery.there, scenery.here, scenery.generators)
    for name in names:
        digest = scenery.here.generators.get(name)
        for rank, other in scenery.ranks.items():
            if rank != scenery.reference.rank and _stands(other, scenery.place, name, digest):
                return Culprit.WRONG_RANK, f"the {name} generator is that of rank {rank}"
        if _stands(scenery.reference, scenery.difference.index, name, digest):
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


_CAUSES: dict[str, Callable[[Scenery], Verdict]] = {
    "data": _data,
    "learning rate": _learning_rate,
    "settings": _settings,
    "scaler": _scaler,
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
