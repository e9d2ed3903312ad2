"""Limit what a run may spend, or the quality that it has to reach."""

from hf_accel.budget.budget import Budget
from hf_accel.budget.target_metric import TargetMetric

__all__ = ["Budget", "TargetMetric"]
