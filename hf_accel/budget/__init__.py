"""Budgeted training: what may be spent."""

from hf_accel.budget.budget import Budget
from hf_accel.budget.target_metric import TargetMetric

__all__ = ["Budget", "TargetMetric"]
