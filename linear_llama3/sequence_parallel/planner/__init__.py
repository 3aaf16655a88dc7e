"""Adaptive groups: choose for every step which ranks share which sequences (FlexSP, arXiv:2412.01523)."""

from .group_costs import Cluster, Costs, DegreeCosts
from .partitions import fewest_groups
from .profile import Model, Profile, load_profile, model_costs
from .step_plan import (
    Group,
    MicroBatch,
    StepPlan,
    aligned_groups,
    lower_bound,
    plan,
    plan_one_degree,
)

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
