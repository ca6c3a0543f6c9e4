"""How often to save, and what part of the time is useful training: formula and simulation."""

from unbroken.goodput.cadence import PUBLISHED_FAILURES as PUBLISHED_FAILURES
from unbroken.goodput.cadence import Cluster as Cluster
from unbroken.goodput.cadence import FailureRate as FailureRate
from unbroken.goodput.cadence import Failures as Failures
from unbroken.goodput.cadence import Observed as Observed
from unbroken.goodput.cadence import Optimizer as Optimizer
from unbroken.goodput.cadence import SaveInterval as SaveInterval
from unbroken.goodput.cadence import UsualCost as UsualCost
from unbroken.goodput.interval import Rhythm as Rhythm
from unbroken.goodput.interval import best_interval as best_interval
from unbroken.goodput.interval import seconds_text as seconds_text
from unbroken.goodput.simulation import Simulated as Simulated
from unbroken.goodput.simulation import simulate as simulate

__all__ = [
    "PUBLISHED_FAILURES",
    "Cluster",
    "FailureRate",
    "Failures",
    "Observed",
    "Optimizer",
    "Rhythm",
    "SaveInterval",
    "Simulated",
    "UsualCost",
    "best_interval",
    "seconds_text",
    "simulate",
]
