"""What differs between a stored run and the one that goes on from it, and the report of a start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from unbroken.errors import DifferenceError
from unbroken.store import Rejection
from unbroken.stored_names import to_stored

_LIMIT = 60

Verdict = Literal["same", "harmless", "equivalent", "not covered", "changed", "refused"]
"""What a setting means for the bits of a run: see `Difference`."""

Word = Literal["exact", "equivalent", "not covered", "changed"]
"""What a whole resume is; "not covered" where something was found that nobody can answer for."""

ExactResume = Literal["prefer", "require"]
"""Whether a start that is equivalent or not covered passes with a line, or is refused."""


@dataclass(frozen=True)
class Difference:
    """One setting or fact that has changed.

    Attributes:
        path: Its name.
        stored: The value that the checkpoint was made with.
        now: The value of this start.
        effect: What follows from it, in plain words.
        verdict: "harmless": the bits of the training stay; "equivalent": the same training,
            rounded in another order; "not covered": something that training depends on was
            neither saved nor derived nor compared, and `effect` says what; "changed": another
            training, which passes if it is named; "refused": it cannot be; "same": nothing
            changed (in tables that show all).

    Example:
        >>> print(Difference("learning_rate", 3e-4, 1e-4, "other updates", "changed"))
        learning_rate: stored 0.0003, now 0.0001: changed: other updates
    """

    path: str
    stored: Any
    now: Any
    effect: str
    verdict: Verdict

    def __str__(self) -> str:
        """Return the difference in one line."""
        if self.verdict == "not covered" and self.stored is None and self.now is None:
            return f"{self.path}: not covered: {self.effect}"
        stored, now = self.values()
        return f"{self.path}: stored {stored}, now {now}: {self.verdict}: {self.effect}"

    def values(self) -> tuple[str, str]:
        """Return both values shortened; of lists, only the items that the other one lacks."""
        stored, now = self.stored, self.now
        if isinstance(stored, list) and isinstance(now, list):
            removed = [item for item in stored if item not in now]
            added = [item for item in now if item not in stored]
            if removed or added:
                return brief(removed or "none of these"), brief(added or "none of these")
        return _where_they_differ(str(stored), str(now))


Rule = tuple[Verdict, str]
"""The verdict and the effect of a setting that differs."""


def compare(
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    rules: Mapping[str, Rule] | Callable[[str], Rule],
    *,
    differs: Callable[[str, Any, Any], bool] = lambda _, before, after: before != after,
) -> tuple[Difference, ...]:
    """Return every setting whose value has changed, the most severe first.

    A setting that only one side knows (it came or went with a version of unbroken) is no
    difference.

    Args:
        stored: The settings of the checkpoint.
        now: The settings of this start.
        rules: What a difference in a setting means; without a rule it is "changed".
        differs: Whether the two values of a setting differ.

    Example:
        >>> rules = {"save_steps": ("harmless", "saves at other steps")}
        >>> found = compare({"save_steps": 5, "seed": 1}, {"save_steps": 6, "seed": 2}, rules)
        >>> [difference.path for difference in found]
        ['seed', 'save_steps']
    """
    rule_of = rules if callable(rules) else lambda name: rules.get(name, _UNKNOWN)
    found = [
        Difference(name, stored[name], value, effect, verdict)
        for name, value in now.items()
        if name in stored and differs(name, stored[name], value)
        for verdict, effect in [rule_of(name)]
    ]
    return by_severity(found)


def unchanged(stored: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return every setting that has the value that it had, with the verdict "same".

    Example:
        >>> [row.path for row in unchanged({"seed": 1, "lr": 1.0}, {"seed": 1, "lr": 2.0})]
        ['seed']
    """
    same = [name for name, value in now.items() if name in stored and stored[name] == value]
    return tuple(Difference(name, stored[name], now[name], "", "same") for name in same)


def by_severity(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """Return the differences in the order that matters; equal verdicts stay as they come."""
    return tuple(sorted(differences, key=lambda difference: _SEVERITIES.index(difference.verdict)))


def overall(differences: Iterable[Difference]) -> Word:
    """Return the one word for a resume with these differences.

    Example:
        >>> overall([]), overall([Difference("seed", 1, 2, "another order", "changed")])
        ('exact', 'changed')
        >>> overall([Difference("ema", None, None, "was not given", "not covered")])
        'not covered'
    """
    verdicts = {difference.verdict for difference in differences}
    if verdicts & {"changed", "refused"}:
        return "changed"
    if "not covered" in verdicts:
        return "not covered"
    return "equivalent" if "equivalent" in verdicts else "exact"


_UNKNOWN: Rule = ("changed", "another training")
_SEVERITIES = ("refused", "changed", "not covered", "equivalent", "harmless", "same")


def refuse_unnamed(
    where: str,
    differences: Iterable[Difference],
    *,
    allowed: Collection[str],
    exact_resume: ExactResume = "prefer",
) -> None:
    """Raise if one of the differences is "refused", or is "changed" and not named.

    The name of a group ("model") names all in it ("model.dropout").

    Args:
        where: What was to be resumed, for the message.
        differences: What was found.
        allowed: The names that the caller gave.
        exact_resume: "require": "equivalent" and "not covered" must be named too.

    Raises:
        DifferenceError: With the stored value, the value now, and how to go on.
    """
    found = by_severity(differences)
    refused = [d for d in found if d.verdict == "refused"]
    inexact = {"changed", "equivalent", "not covered"}
    needs_name = inexact if exact_resume == "require" else {"changed"}
    unnamed = [d for d in found if d.verdict in needs_name and not is_named(d.path, allowed)]
    if not refused and not unnamed:
        return
    first, *others = map(_sentence, [*refused, *unnamed])
    way_out = _way_out(refused, unnamed, exact_resume == "require")
    hint = "\n".join([*(f"also {other}" for other in others), way_out])
    raise DifferenceError(where, first, hint=hint, differences=found)


def is_named(path: str, names: Collection[str]) -> bool:
    """Return whether one of the names is the path or a group that it is in.

    Example:
        >>> is_named("model.dropout", ["model"]), is_named("model_dim", ["model"])
        (True, False)
    """
    parts = path.split(".")
    return any(".".join(parts[: length + 1]) in names for length in range(len(parts)))


def _sentence(difference: Difference) -> str:
    if difference.stored is None and difference.now is None:
        return f"{difference.path}: {difference.verdict}: {difference.effect}"
    stored, now = difference.values()
    return f"{difference.path}: stored {stored}, now {now}: {difference.effect}"


def _way_out(refused: list[Difference], unnamed: list[Difference], strict: bool) -> str:
    if refused:
        return "take the change back, or begin a new run in another directory"
    names = [difference.path for difference in unnamed]
    groups = {name.partition(".")[0] for name in names}
    short = sorted(groups) if len(names) > 3 and len(groups) < len(names) else names
    why = " (exact_resume='require' asks for it)" if strict else ""
    if all(difference.verdict == "not covered" for difference in unnamed):
        return f"go on all the same: allow={short}{why}"
    return (
        f"go on with the new value: allow={short}; keep the stored one: take the change back{why}"
    )


def _where_they_differ(stored: str, now: str) -> tuple[str, str]:
    """Return two texts shortened; of long ones, the part where they first differ."""
    if len(stored) <= _LIMIT and len(now) <= _LIMIT:
        return stored, now
    pairs = enumerate(zip(stored, now, strict=False))
    parting = next((i for i, (one, other) in pairs if one != other), min(len(stored), len(now)))
    start = max(0, parting - _LIMIT // 3)
    dots = "..." if start else ""
    return f"{dots}{brief(stored[start:])}", f"{dots}{brief(now[start:])}"


def brief(value: object, limit: int = _LIMIT) -> str:
    """Return a value as text that fits into a line.

    Example:
        >>> brief(list(range(50)))
        '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1...'
    """
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# What a start found: the value that is printed, kept in history.jsonl and given to the caller.


@dataclass(frozen=True)
class ResumeReport:
    """How a segment of a run began.

    Attributes:
        step: Completed optimizer steps in the state training goes on from; 0 for a fresh start.
        checkpoint: The folder that was resumed, or None for a fresh start.
        rejected: Newer checkpoints that could not be used, and why.
        set_aside: Checkpoints of an abandoned future that were renamed, as (old, new) names.
        differences: Settings that are not what they were when the checkpoint was saved.
        same: All else that was compared, with the verdict "same".
        previous_owner: Who held the run directory and died holding it, if anybody.
    """

    step: int
    checkpoint: str | None = None
    rejected: tuple[Rejection, ...] = ()
    set_aside: tuple[tuple[str, str], ...] = ()
    previous_owner: str | None = None
    differences: tuple[Difference, ...] = ()
    same: tuple[Difference, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Word:
        """The one word for this start: "exact", "equivalent", "not covered" or "changed"."""
        return overall(self.differences)

    @property
    def table(self) -> tuple[Difference, ...]:
        """All that was compared: what differs, the most severe first, then what is the same."""
        return (*self.differences, *self.same)

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.checkpoint is not None

    def with_found(self, line: str, difference: Difference | None) -> ResumeReport:
        """Return the report with what showed since: a difference, or else a line."""
        if difference is None:
            return replace(self, notes=(*self.notes, line))
        return replace(self, differences=by_severity((*self.differences, difference)))

    def lines(self) -> list[str]:
        """Return the report as lines of text, the most important first.

        Example:
            >>> ResumeReport(step=0).lines()
            ['no checkpoint yet: starting at step 0']
        """
        return [*self.heading(), *map(str, self.differences), *self.notes]

    def heading(self) -> list[str]:
        """Return the lines without the differences and notes.

        Example:
            >>> ResumeReport(step=8, checkpoint="runs/a/checkpoint-8").heading()
            ['resuming from runs/a/checkpoint-8 (step 8): exact']
        """
        word = "not known to be exact" if self.verdict == "not covered" else self.verdict
        head = (
            f"resuming from {self.checkpoint} (step {self.step}): {word}"
            if self.resumed
            else f"no checkpoint yet: starting at step {self.step}"
        )
        rejected = [f"not used: {item.folder}: {item.reason}" for item in self.rejected]
        moved = [f"set aside: {old} is now {new}" for old, new in self.set_aside]
        owner = (
            [f"took over from a process that died: {self.previous_owner}"]
            if self.previous_owner is not None
            else []
        )
        return [head, *rejected, *moved, *owner]

    def to_json(self) -> dict[str, object]:
        """Return the report as plain JSON values, for history.jsonl; without what is the same."""
        return {
            "step": self.step,
            "checkpoint": self.checkpoint,
            "verdict": self.verdict if self.resumed else None,
            "rejected": [
                {"checkpoint": item.folder, "reason": item.reason} for item in self.rejected
            ],
            "set_aside": [{"from": old, "to": new} for old, new in self.set_aside],
            "differences": [to_stored(difference) for difference in self.differences],
            "previous_owner": self.previous_owner,
            "notes": list(self.notes),
        }
