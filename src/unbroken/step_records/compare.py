"""Steps that are taken again, held against their records: what may differ, and what did first.

The order in which parts are looked at is that in which one follows from another: the first that
differs is the cause, or next to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from unbroken.step_records.records import MODES, Recorded, StateAtStop, StepRecord

Part = Literal[
    "optimizer",
    "learning rate",
    "batch",
    "samples",
    "position",
    "modes",
    "state",
    "generators",
    "loss",
    "gradients",
    "others",
]
EVERY_PART: tuple[Part, ...] = (
    *("optimizer", "learning rate", "batch", "modes", "state", "generators"),
    *("loss", "gradients", "others"),
)
_COMPUTED = frozenset({"loss", "gradients"})
_SHOWN = 3


@dataclass(frozen=True)
class ComparedParts:
    """What of a repeated step must be as it was.

    Attributes:
        parts: These.
        reason: Why not all; "": all are compared.
        excuse: What was changed, where a difference may follow from that; "": nothing.
    """

    parts: tuple[Part, ...] = EVERY_PART
    reason: str = ""
    excuse: str = ""

    def is_shown_by(self, parts: Collection[Part]) -> bool:
        """Return whether these parts of a step depend on what a resume restores."""
        return bool({*parts} - {"optimizer"} if self.reason else {*parts} & _COMPUTED)

    def on_other_ranks(self) -> ComparedParts:
        """Return what of these is the same on another number of ranks.

        Example:
            >>> parts_to_compare([("learning_rate", "changed")]).on_other_ranks().parts
            ('optimizer', 'samples')
        """
        kept: list[Part] = [one for one in self.parts if one in ("optimizer", "learning rate")]
        if "batch" in self.parts or "samples" in self.parts:
            kept.append("samples")
        reasons = [self.reason, "another number of ranks"]
        return replace(self, parts=tuple(kept), reason="; ".join(filter(None, reasons)))


@dataclass(frozen=True)
class UnrepeatedStep:
    """The first difference of a repeated step.

    Attributes:
        number: Which step after the checkpoint.
        part: What differs.
        words: What differs, and the likeliest reason.
    """

    number: int
    part: Part
    words: str


def parts_to_compare(differences: Iterable[tuple[str, str]]) -> ComparedParts:
    """Return what a resume with these differences must repeat.

    Args:
        differences: Path and verdict of each.

    Example:
        >>> parts_to_compare([("packages.torch", "equivalent")]).parts
        ('optimizer', 'learning rate', 'samples')
    """
    found = list(differences)
    changed = [path for path, verdict in found if verdict in ("changed", "refused")]
    equivalent = [path for path, verdict in found if verdict == "equivalent"]
    if changed:
        return ComparedParts(_untouched(changed), f"accepted by name: {_some(changed)}")
    if any(path.partition(".")[0] not in _OF_CODE for path in equivalent):
        return ComparedParts(_untouched(equivalent), "equivalent, not exact")
    if equivalent:
        return ComparedParts(excuse=_some(equivalent))
    if any(verdict == "harmless" for _, verdict in found):
        return ComparedParts(tuple(part for part in EVERY_PART if part != "generators"))
    return ComparedParts()


def _untouched(paths: Iterable[str]) -> tuple[Part, ...]:
    """Return what is the same, however sums are rounded, where these differ."""
    groups = {path.partition(".")[0] for path in paths}
    kept: list[Part] = ["optimizer"]
    kept += [] if groups & _OF_RATE else ["learning rate"]
    kept += [] if groups & _OF_DATA else ["samples"]
    return tuple(kept)


_OF_CODE = frozenset({"code", "callbacks"})  # which may compute the same, or not
_OF_RATE = frozenset(
    {
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "scheduler"),
        *("warmup_ratio", "schedule", "max_steps", "num_train_epochs", "optimizer", "optim"),
        *("min_lr_rate", "eval_data", "batch_size", "gradient_accumulation_steps", "data"),
    }
)
_OF_DATA = frozenset(
    {
        *("data", "seed", "data_seed", "batch_size", "gradient_accumulation_steps", "epoch_size"),
        *("per_device_train_batch_size", "group_by_length", "shuffle", "collate_fn"),
        *("micro_batch_size", "auto_find_batch_size"),  # collators pad what comes together
    }
)


class ComparedStep(NamedTuple):
    """What came of comparing a step with its record.

    Attributes:
        parts: Those that both know, and that are equal.
        difference: The first part that is not; None: there is none.
    """

    parts: tuple[Part, ...] = ()
    difference: UnrepeatedStep | None = None


def compare_steps(recorded: Recorded, now: StepRecord, scope: ComparedParts) -> ComparedStep:
    """Return which parts of a step are as its record has them, up to the first that is not.

    A part that either side does not know is not compared.
    """
    before, parts = recorded.records.get(now.number), list[Part]()
    if before is None:
        return ComparedStep()
    for part in scope.parts:
        words = _DIFFERENCES[part](before, now, recorded.records)
        if words:
            return ComparedStep(tuple(parts), UnrepeatedStep(now.number, part, words))
        parts += [] if words is None else [part]
    return ComparedStep(tuple(parts))


class SampleSum(NamedTuple):
    """The samples of a step, in whatever order, on whatever ranks.

    Attributes:
        number: How many.
        width: Bytes of each; 0: not all have as many.
        total: The sum of their digests, modulo 2**64.
    """

    number: int
    width: int
    total: int

    @classmethod
    def of(cls, samples: Sequence[str]) -> Self:
        """Return the sum over the digests of samples.

        Example:
            >>> SampleSum.of(["1f.8", "01.8"]), SampleSum.of(["01.8", "1f.9"])
            (SampleSum(number=2, width=8, total=32), SampleSum(number=2, width=0, total=32))
        """
        parts = [one.partition(".") for one in samples]
        widths = {int(width or "0", 16) for _, _, width in parts}
        total = sum(int(digest, 16) for digest, _, _ in parts)
        return cls(len(parts), widths.pop() if len(widths) == 1 else 0, total % (1 << 64))

    def plus(self, other: SampleSum) -> SampleSum:
        """Return the samples of both."""
        width = self.width if self.width == other.width else 0
        return SampleSum(self.number + other.number, width, (self.total + other.total) % (1 << 64))


def compare_samples(recorded: Recorded, number: int, now: SampleSum) -> ComparedStep:
    """Compare the samples of a step, those of all ranks, with the ones of its record.

    Samples whose sizes differ are not compared: a collator may have padded them to the longest
    that came with them.
    """
    before = _sum_of(recorded.records.get(number))
    if before is None or not before.width or before.width != now.width:
        return ComparedStep()
    if before == now:
        return ComparedStep(("samples",))
    for other, record in recorded.records.items():
        if _sum_of(record) == now:
            return ComparedStep((), UnrepeatedStep(number, "position", _shift(other - number)))
    return ComparedStep((), UnrepeatedStep(number, "samples", _ANOTHER))


def _sum_of(record: StepRecord | None) -> SampleSum | None:
    return SampleSum.of(record.samples) if record is not None and record.samples else None


def compare_stops(
    before: StateAtStop, now: StateAtStop, scope: ComparedParts
) -> tuple[tuple[str, ...], str]:
    """Return in words what of a run is as it was when it was stopped, and what is not.

    Args:
        before: What it was.
        now: What it is after the resume.
        scope: What may be compared.

    Example:
        >>> before, now = StateAtStop({"model": "1f"}, [3]), StateAtStop({"model": "20"}, [3])
        >>> compare_stops(before, before, ComparedParts())
        (('the state', 'the next samples'), '')
        >>> compare_stops(before, now, ComparedParts())[1][:31]
        'model is not what it was: anoth'
    """
    same, parts = list[str](), {*scope.parts}
    if not scope.reason and not scope.excuse:
        changed = [
            one for one in before.state if now.state.get(one, "") not in ("", before.state[one])
        ]
        if changed:
            are = "are not what they were" if len(changed) > 1 else "is not what it was"
            return (), f"{_some(changed)} {are}: {_NOT_AS_SAVED}"
        same += ["the state"] if before.state.keys() & now.state.keys() else []
    knows = before.samples is not None and now.samples is not None
    if knows and parts & {"batch", "samples"}:
        if before.samples != now.samples:
            return tuple(same), "the next samples are others: the order or the position was lost"
        same.append("the next samples")
    return tuple(same), ""


_NOT_AS_SAVED = (
    "another object changed it while the run was resumed, or its load_state_dict forgets a part"
)

Records = Mapping[int, StepRecord]


def _optimizer(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    if before.optimizer == now.optimizer:
        return ""
    return (
        f"{now.optimizer} steps where {before.optimizer} did: what decides whose turn it is was "
        "not restored"
    )


def _learning_rate(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    if not (before.learning_rates and now.learning_rates):
        return None
    if before.learning_rates == now.learning_rates:
        return ""
    was, is_now = _numbers(before.learning_rates), _numbers(now.learning_rates)
    if any(":" in name for name in _differing(before.state, now.state)):
        return (
            f"the learning rate is {is_now} and was {was}, and the optimizer's state differs, too: "
            "the optimizer was not restored"
        )
    return (
        f"the learning rate is {is_now} and was {was}: the scheduler, or what else sets the rate, "
        "was not restored"
    )


def _batch(before: StepRecord, now: StepRecord, records: Records) -> str | None:
    if before.batches is None or now.batches is None:
        return None
    if before.batches == now.batches:
        return ""
    if now.losses and (now.losses, now.gradients) == (before.losses, before.gradients):
        return ""  # a loop may fetch batches ahead, and not as far ahead after a resume
    return _which_batch(before, now, records)


def _samples(before: StepRecord, now: StepRecord, records: Records) -> str | None:
    """Return how the samples differ, in whatever order and portions they came."""
    was, is_now = _sum_of(before), _sum_of(now)
    if was is None or is_now is None or not was.width or was.width != is_now.width:
        return None
    return "" if was == is_now else _which_batch(before, now, records)


def _which_batch(before: StepRecord, now: StepRecord, records: Records) -> str:
    samples = _sum_of(now)
    for number, other in records.items():
        is_same = other.batches == now.batches or (
            samples is not None and _sum_of(other) == samples
        )
        if number != now.number and is_same:
            return _shift(number - now.number)
    if before.samples and Counter(before.samples) == Counter(now.samples):
        return "the batch has the same samples in another order: the order within it was drawn anew"
    common = Counter(before.samples) & Counter(now.samples)
    if not common or 2 * common.total() < max(len(before.samples), len(now.samples)):
        return _ANOTHER
    return (
        f"{common.total()} of {len(now.samples)} samples of the batch are the same: the others "
        "are in other places, or were augmented by other random numbers"
    )


_ANOTHER = (
    "the batch is another one: the order of the samples, what was drawn for them, or the data "
    "themselves are not what they were"
)


def _shift(apart: int) -> str:
    steps = f"{abs(apart)} step{'s' if abs(apart) > 1 else ''}"
    side = "later" if apart > 0 else "earlier"
    return f"the batch is the one of {steps} {side}: the position in the data was lost"


def _modes(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    here, there = now.state.get(MODES), before.state.get(MODES)
    if here is None or there is None:
        return None
    if here == there:
        return ""
    return "modules are in training mode that were in evaluation mode, or the other way round"


def _state(before: StepRecord, now: StepRecord, records: Records) -> str | None:
    names = [one for one in _differing(before.state, now.state) if one != MODES]
    if not names:
        return _equal(before.state, now.state)
    weights = [name for name in names if ":" not in name]
    if not weights:
        return (
            f"the optimizer's state differs before the step ({_some(names)}): it was not restored, "
            "or belongs to other parameters"
        )
    if now.number == 1 or now.number - 1 not in records:
        return (
            f"weights differ before the step ({_some(weights)}): something changed them after the "
            "resume, or the resume did not reach them"
        )
    return (
        f"weights differ after steps with the same gradients ({_some(weights)}): something that "
        "the optimizer's update depends on was not restored"
    )


def _generators(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    names = _differing(before.generators, now.generators)
    if not names:
        return _equal(before.generators, now.generators)
    return (
        f"the global random generator of {_some(names)} differs: it was not restored, or as many "
        "numbers were not drawn from it"
    )


def _loss(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    if before.losses == now.losses:
        return "" if now.losses else None
    where = f"the loss is {_shown(now.losses)} and was {_shown(before.losses)}"
    if before.batches is None or now.batches is None:
        return (
            f"{where}, with the same learning rate, weights and optimizer state: the batch, which "
            f"is not seen here, was another one, or {_FORWARD}"
        )
    return f"{where}, with the same batch, learning rate, weights and optimizer state: {_FORWARD}"


_FORWARD = (
    "something else that the forward pass depends on was not saved (an attribute, a counter, a "
    "cache), or kernels are not deterministic"
)


def _gradients(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    names = _differing(before.gradients, now.gradients)
    if not names:
        return _equal(before.gradients, now.gradients)
    return (
        f"gradients differ with the same loss ({_some(names)}): gradients that waited for the step "
        "were lost, or kernels of the backward pass are not deterministic"
    )


def _others(before: StepRecord, now: StepRecord, _: Records) -> str | None:
    names = _differing(before.others, now.others)
    if not names:
        return _equal(before.others, now.others)
    return f"buffers or weights that no optimizer moves differ ({_some(names)}): not restored"


_DIFFERENCES: Mapping[Part, Callable[[StepRecord, StepRecord, Records], str | None]] = {
    "optimizer": _optimizer,
    "learning rate": _learning_rate,
    "batch": _batch,
    "samples": _samples,
    "modes": _modes,
    "state": _state,
    "generators": _generators,
    "loss": _loss,
    "gradients": _gradients,
    "others": _others,
}


def _equal(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    return "" if before.keys() & now.keys() - {MODES} else None


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ; those of one side alone, if it was looked at there."""
    seen = {name.partition(":")[0] for name in before} & {name.partition(":")[0] for name in now}
    return [
        name
        for name in {**before, **now}
        if before.get(name) != now.get(name) and name.partition(":")[0] in seen
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in dict.fromkeys(values)) or "none"


def _shown(losses: Sequence[str]) -> str:
    return _numbers([float.fromhex(one) for one in losses[:_SHOWN] if "x" in one]) or "another"
