"""Budgeted training: what may be spent."""

from hf_accel.budget.budget import Budget

__all__ = ["Budget"]
