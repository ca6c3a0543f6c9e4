"""How the machine and the software of a checkpoint differ from those of this start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unbroken.checkpoint.differences import Difference, compare
from unbroken.checkpoint.environment import GPU_DETAILS, GPU_SOFTWARE, environment_facts
from unbroken.checkpoint.environment_rules import ENVIRONMENT_RULES, GPU, MACHINE


def environment_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any] | None = None
) -> tuple[Difference, ...]:
    """Return what is not the same about the machine and the software, the gravest first.

    Every difference that can change a bit is "equivalent", none is "changed": training goes on
    with the same data and settings, and rounds differently. "harmless" are only facts that no
    number depends on.

    No difference is: a path that one side does not have (it came or went with a version of
    unbroken, or is of a package that a program imports sooner or later), and what one side does
    not know (GPUs before CUDA was used). A variable that was set or unset is one.

    Args:
        stored: `environment_facts()` of the checkpoint.
        now: Those of this start; None: of this process.

    Returns:
        Differences whose paths begin with "environment.".

    Example:
        >>> stored, now = {"num_threads": 8, "cores": 8}, {"num_threads": 4, "cores": 4}
        >>> found = environment_differences(stored, now)
        >>> [(difference.path, difference.verdict) for difference in found]
        [('environment.num_threads', 'equivalent'), ('environment.cores', 'harmless')]
        >>> found[0].effect
        'another number of threads sums in another order'
    """
    facts: Mapping[str, Any] = environment_facts() if now is None else now
    left_out = _told_by_the_gpus(stored.get("gpus"), facts.get("gpus"))
    after = {path: value for path, value in facts.items() if path not in left_out}
    rules = {**dict.fromkeys(after, MACHINE), **ENVIRONMENT_RULES}
    found = [_in_plain_words(difference) for difference in compare(stored, after, rules)]
    return tuple(replace(difference, path=f"environment.{difference.path}") for difference in found)


def _told_by_the_gpus(stored: Sequence[str] | None, now: Sequence[str] | None) -> Collection[str]:
    """Return the paths to leave out: one line on the GPUs says all that follows from them."""
    if stored is None or now is None:
        return GPU_DETAILS
    if stored == now:
        return ()
    without_names = GPU_DETAILS[1:]
    return without_names if stored and now else (*without_names, *GPU_SOFTWARE)


def _in_plain_words(difference: Difference) -> Difference:
    if difference.path != "gpus" or not all(map(_is_names, (difference.stored, difference.now))):
        return difference
    before, after = Counter(difference.stored), Counter(difference.now)
    return replace(
        difference, stored=_counted(before), now=_counted(after), effect=_gpu_effect(before, after)
    )


def _is_names(gpus: object) -> bool:
    return isinstance(gpus, list | tuple) and all(isinstance(name, str) for name in gpus)


def _counted(gpus: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none"


def _gpu_effect(before: Counter[str], after: Counter[str]) -> str:
    if not before or not after:
        return "what ran on a GPU and runs on the CPU now, or the reverse, rounds differently"
    if before.keys() != after.keys():
        return GPU[1]
    if before == after:
        return "the same GPUs in another order: each process may have another one"
    return "the same GPU, but another number of them: sums over GPUs run in another order"
