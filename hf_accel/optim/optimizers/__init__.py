"""Turn gradients into updates."""

from hf_accel.optim.optimizers.gradient_spike_guard import GradientSpikeGuard
from hf_accel.optim.optimizers.muon import Muon
from hf_accel.optim.optimizers.named_optimizer import NamedOptimizer

__all__ = ["GradientSpikeGuard", "Muon", "NamedOptimizer"]
