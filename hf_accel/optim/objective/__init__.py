"""Objectives: what the loss of a step is, and how its gradient is found."""

from hf_accel.optim.objective.sharpness_aware import SharpnessAware

__all__ = ["SharpnessAware"]
