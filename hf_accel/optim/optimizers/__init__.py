"""How gradients become updates."""

from hf_accel.optim.optimizers.muon import Muon
from hf_accel.optim.optimizers.optimizer import Optimizer
from hf_accel.optim.optimizers.step_guard import StepGuard

__all__ = ["Muon", "Optimizer", "StepGuard"]
