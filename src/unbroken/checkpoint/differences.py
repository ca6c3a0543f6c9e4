"""What differs between a stored run and the one that wants to go on from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unbroken.errors import DifferenceError

Verdict = Literal["harmless", "equivalent", "changed"]


@dataclass(frozen=True)
class Difference:
    """One setting that is not what it was.

    Attributes:
        path: Its name.
        stored: The value that the checkpoint was made with.
        now: The value of this start.
        effect: What follows from it, in plain words.
        verdict: "harmless": the bits of the training stay; "equivalent": the same training,
            rounded in another order; "changed": another training.

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
        return f"{self.path}: stored {self.stored}, now {self.now}: {self.verdict}: {self.effect}"


Rule = tuple[Verdict, str]
"""The verdict and the effect of a setting that differs."""

Examine = Callable[[Mapping[str, Any]], tuple[Difference, ...]]
"""From the facts of a checkpoint to the differences; raises where one is not allowed."""


def compare(
    stored: Mapping[str, Any], now: Mapping[str, Any], rules: Mapping[str, Rule]
) -> tuple[Difference, ...]:
    """Return every setting that has another value than it had, the gravest first.

    A setting that only one side knows (it came or went with a version of unbroken) is no
    difference.

    Args:
        stored: The settings of the checkpoint.
        now: The settings of this start.
        rules: What a difference in a setting means; without a rule it is "changed".

    Example:
        >>> rules = {"save_steps": ("harmless", "saves at other steps")}
        >>> found = compare({"save_steps": 5, "seed": 1}, {"save_steps": 6, "seed": 2}, rules)
        >>> [difference.path for difference in found]
        ['seed', 'save_steps']
    """
    found = [
        _difference(name, stored[name], value, rules)
        for name, value in now.items()
        if name in stored and stored[name] != value
    ]
    order = ("changed", "equivalent", "harmless")
    return tuple(sorted(found, key=lambda difference: order.index(difference.verdict)))


def _difference(name: str, stored: Any, now: Any, rules: Mapping[str, Rule]) -> Difference:
    verdict, effect = rules.get(name, ("changed", "another training"))
    return Difference(name, stored, now, effect, verdict)


def refuse_unnamed(
    where: str, differences: Iterable[Difference], *, allowed: Collection[str]
) -> None:
    """Raise for the first "changed" difference that the caller has not named.

    The name of a group ("model") names all in it ("model.dropout").

    Raises:
        DifferenceError: With the stored value, the value now, and how to go on.
    """
    unnamed = [
        d
        for d in differences
        if d.verdict == "changed" and not {d.path, d.path.partition(".")[0]} & set(allowed)
    ]
    if not unnamed:
        return
    first, names = unnamed[0], [difference.path for difference in unnamed]
    others = f"; and {len(names) - 1} more: {', '.join(names[1:])}" if len(names) > 1 else ""
    raise DifferenceError(
        where,
        f"{first.path}: stored {first.stored}, now {first.now}{others}",
        hint=f"go on with the new value: allow={names} or --allow {' '.join(names)}; "
        "keep the stored one: take the change back",
    )
