"""What another length of a run does to a learning rate that falls to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from unbroken.changes.differences import Difference

LENGTH = "schedule"
"""The path of the difference that tells of a schedule which reaches its end elsewhere, where no
setting of the length does."""

LENGTH_SETTINGS = ("max_steps", "num_train_epochs")

Factor = Callable[[int], float]
"""From a step, counted from 0, to what its learning rate is multiplied by."""

Differences = tuple[Difference, ...]


def with_schedule_length(
    settings: Differences,
    others: Differences,
    *,
    lengths: tuple[int, int],
    step: int,
    learning_rate: float,
    factor_of: Callable[[int], Factor],
    of_schedule: Collection[str],
) -> Differences:
    """Return the settings that differ, with what another length does to the learning rate.

    Another length is another training, and has to be named. Where it follows from another change
    (of the data, of the size of a step), the schedule is listed beside that one; but not where a
    setting of the schedule differs, too.

    Args:
        settings: The differences of settings.
        others: All others.
        lengths: The steps of the run that was, and of the run now.
        step: How many steps the checkpoint has.
        learning_rate: That of the settings.
        factor_of: Returns the factor of a run with so many steps.
        of_schedule: The settings of the schedule.

    Example:
        >>> linear = lambda steps: lambda step: 1 - step / steps
        >>> found = with_schedule_length(
        ...     (), (), lengths=(4, 8), step=2, learning_rate=1.0, factor_of=linear, of_schedule=()
        ... )
        >>> found[0].path, found[0].verdict
        ('max_steps', 'changed')
    """
    if lengths[0] == lengths[1] or lengths[1] <= step:
        return settings
    before, after = factor_of(lengths[0]), factor_of(lengths[1])
    for at in _sampled(step, min(lengths)):
        rates = learning_rate * before(at), learning_rate * after(at)
        if rates[0] != rates[1]:
            found = _with_other_rates(settings, others, lengths, at, rates)
            is_known = any(one.path in of_schedule for one in settings)
            return settings if is_known and found[-1].path == LENGTH else found
    return settings


def is_another_schedule(difference: Difference) -> bool:
    """Return whether a difference tells of learning rates that another length of the run makes."""
    of_length = difference.path in LENGTH_SETTINGS and difference.verdict == "changed"
    return of_length or difference.path == LENGTH


def _with_other_rates(
    settings: Differences,
    others: Differences,
    lengths: tuple[int, int],
    step: int,
    rates: tuple[float, float],
) -> Differences:
    effect = (
        f"another schedule: step {step + 1} has the learning rate {rates[1]:.6g} in a run of "
        f"{lengths[1]} steps, and {rates[0]:.6g} in one of {lengths[0]}"
    )
    given = [one for name in LENGTH_SETTINGS for one in settings if one.path == name]
    if given:
        judged = replace(given[0], verdict="changed", effect=effect)
        return (*(one for one in settings if one is not given[0]), judged)
    follows = any(one.verdict in ("changed", "refused") for one in (*settings, *others))
    if follows:
        return (*settings, Difference(LENGTH, *rates, effect, "changed"))
    return (*settings, Difference("max_steps", *lengths, effect, "changed"))


def _sampled(start: int, stop: int) -> list[int]:
    """Return all steps between two, or a thousand of them."""
    return sorted({start + (stop - start) * i // 1000 for i in range(1001)} | {start})
