"""Simulate failures, saves and starts event by event, to check the formula of `Rhythm`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from unbroken.goodput import Rhythm


@dataclass(frozen=True)
class Simulated:
    """What the simulation found.

    Attributes:
        goodput: The part of wall-clock time that trained and was kept.
        error: Its standard error: the formula should be within three of it.
        failures: How many failures were played.
    """

    goodput: float
    error: float
    failures: int


def simulate(
    rhythm: Rhythm, rng: random.Random, *, runs: int = 40, failures: int = 500
) -> Simulated:
    """Play `runs` trainings of `failures` failures each, and count what was kept.

    Nothing of the formula is used: time goes from failure to failure, each throws the training back
    to the last save that was durable by then, a start can be broken off by the next failure. How
    many saves lie between two failures is counted at once: there may be billions.

    Args:
        rhythm: The seconds of everything.
        rng: Where the moments of failures come from.
        runs: How many trainings; at least 2, for the error.
        failures: How many failures each of them has.

    Example:
        >>> rhythm = Rhythm(458, lost=10, until_durable=0, restart=300, between_failures=10800)
        >>> found = simulate(rhythm, random.Random(0))
        >>> abs(found.goodput - rhythm.goodput) < 3 * found.error < 0.01
        True
    """
    parts = [_play(rhythm, rng, failures) for _ in range(runs)]
    return Simulated(fmean(parts), stdev(parts) / sqrt(runs), runs * failures)


def _play(rhythm: Rhythm, rng: random.Random, failures: int) -> float:
    """Return what part of one training's time was kept."""
    now = kept = 0.0
    for _ in range(failures):
        fails_at = now + rng.expovariate(1 / rhythm.between_failures)
        kept += _kept_until(fails_at, now, rhythm)
        now = _trains_again_at(fails_at, rng, rhythm)
    return kept / now


def _kept_until(fails_at: float, now: float, rhythm: Rhythm) -> float:
    """Train and save from `now` on; return the seconds of training that are durable at the end."""
    durable = (fails_at - now - rhythm.until_durable) // (rhythm.interval + rhythm.lost)
    return max(durable, 0.0) * rhythm.interval


def _trains_again_at(failed_at: float, rng: random.Random, rhythm: Rhythm) -> float:
    """Return when a start after a failure came to its end, which another failure may delay."""
    now = failed_at
    while True:
        fails_after = rng.expovariate(1 / rhythm.between_failures)
        if fails_after >= rhythm.restart:
            return now + rhythm.restart
        now += fails_after
