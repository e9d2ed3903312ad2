"""The shape of the learning rate over the budget."""

from hf_accel.optim.learning_rate.linear_to_zero import LinearToZero
from hf_accel.optim.learning_rate.warmup_stable_decay import WarmupStableDecay

__all__ = ["LinearToZero", "WarmupStableDecay"]
