"""Set the learning rate: its shape over the budget, and its size by batch and by layer."""

from hf_accel.optim.learning_rate.cosine import Cosine
from hf_accel.optim.learning_rate.layerwise_decay import LayerwiseDecay
from hf_accel.optim.learning_rate.learning_rate_scaling import LearningRateScaling
from hf_accel.optim.learning_rate.learning_rate_search import LearningRateSearch, find_lr
from hf_accel.optim.learning_rate.linear_to_zero import LinearToZero
from hf_accel.optim.learning_rate.one_cycle import OneCycle
from hf_accel.optim.learning_rate.rex import REX
from hf_accel.optim.learning_rate.warmup_stable_decay import WarmupStableDecay

__all__ = [
    "REX",
    "Cosine",
    "LayerwiseDecay",
    "LearningRateScaling",
    "LearningRateSearch",
    "LinearToZero",
    "OneCycle",
    "WarmupStableDecay",
    "find_lr",
]
