"""How often to save, and what part of the time is useful training: formula and simulation."""

from unbroken.goodput.cluster import PUBLISHED_FAILURES as PUBLISHED_FAILURES
from unbroken.goodput.cluster import Cluster as Cluster
from unbroken.goodput.cluster import Failures as Failures
from unbroken.goodput.cluster import Optimizer as Optimizer
from unbroken.goodput.interval import Rhythm as Rhythm
from unbroken.goodput.interval import best_interval as best_interval
from unbroken.goodput.simulation import Simulated as Simulated
from unbroken.goodput.simulation import simulate as simulate

__all__ = [
    "PUBLISHED_FAILURES",
    "Cluster",
    "Failures",
    "Optimizer",
    "Rhythm",
    "Simulated",
    "best_interval",
    "simulate",
]
