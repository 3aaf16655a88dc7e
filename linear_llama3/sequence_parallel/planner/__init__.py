"""Adaptive groups: which ranks share which sequences, chosen anew for every step. Imports no torch."""

from .group_costs import Costs, DegreeCosts
from .planner import lower_bound, plan, plan_one_degree
from .profile import Model, Profile, load_profile, model_costs
from .step_plan import Cluster, Group, MicroBatch, StepPlan, aligned_groups, fewest_groups

__all__ = [
    "Cluster",
    "Costs",
    "DegreeCosts",
    "Group",
    "MicroBatch",
    "Model",
    "Profile",
    "StepPlan",
    "aligned_groups",
    "fewest_groups",
    "load_profile",
    "lower_bound",
    "model_costs",
    "plan",
    "plan_one_degree",
]
