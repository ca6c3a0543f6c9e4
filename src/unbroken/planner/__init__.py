"""Planning for a cluster that is not here: how often to save, and what failures will cost.

A tool beside the library: nothing that trains or saves imports it.
"""

from __future__ import annotations

from unbroken.planner.cluster import Cluster as Cluster
from unbroken.planner.cluster import Optimizer as Optimizer
from unbroken.planner.plan import ClusterPlan as ClusterPlan
from unbroken.planner.plan import make_plan as make_plan
from unbroken.planner.simulation import Simulated as Simulated
from unbroken.planner.simulation import simulate as simulate

__all__ = ["Cluster", "ClusterPlan", "Optimizer", "Simulated", "make_plan", "simulate"]
