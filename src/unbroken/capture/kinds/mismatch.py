"""What differs between a checkpoint and live objects, all found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unbroken.errors import StateMismatchError

_SHOWN = 5


@dataclass(frozen=True)
class Mismatch:
    """One reason why a checkpoint does not fit.

    Args:
        where: Path of the object or tensor.
        what: What is wrong there.
        expected: What the checkpoint holds.
        found: What is here now.
    """

    where: str
    what: str
    expected: object = None
    found: object = None

    def __str__(self) -> str:
        """Return *where: what: expected X, found Y*."""
        return str(
            StateMismatchError(self.where, self.what, expected=self.expected, found=self.found)
        )


def raise_all(mismatches: Iterable[Mismatch], hint: str | None = None) -> None:
    """Raise one error that lists the first mismatches and counts the rest; none: return."""
    found = list(mismatches)
    if not found:
        return
    if len(found) == 1:
        only = found[0]
        raise StateMismatchError(
            only.where, only.what, expected=only.expected, found=only.found, hint=hint
        )
    lines = [f"\n  {mismatch}" for mismatch in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"\n  and {len(found) - _SHOWN} more")
    raise StateMismatchError(
        "checkpoint", f"does not fit, in {len(found)} places:{''.join(lines)}", hint=hint
    )
