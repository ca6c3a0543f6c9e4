"""How often to save, and what part of the time is useful training."""

from unbroken.goodput.cadence import PUBLISHED_FAILURES as PUBLISHED_FAILURES
from unbroken.goodput.cadence import FailureRate as FailureRate
from unbroken.goodput.cadence import Failures as Failures
from unbroken.goodput.cadence import Observed as Observed
from unbroken.goodput.cadence import SaveInterval as SaveInterval
from unbroken.goodput.cadence import UsualCost as UsualCost
from unbroken.goodput.interval import Rhythm as Rhythm
from unbroken.goodput.interval import best_interval as best_interval
from unbroken.goodput.interval import seconds_text as seconds_text

__all__ = [
    "PUBLISHED_FAILURES",
    "FailureRate",
    "Failures",
    "Observed",
    "Rhythm",
    "SaveInterval",
    "UsualCost",
    "best_interval",
    "seconds_text",
]
