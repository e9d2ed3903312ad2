"""Optimization-centric techniques: learning rates, batch sizes, optimizers, objectives and averages."""

from hf_accel.optim import averaging, large_batch, learning_rate, objective, optimizers
from hf_accel.optim.averaging import *
from hf_accel.optim.large_batch import *
from hf_accel.optim.learning_rate import *
from hf_accel.optim.objective import *
from hf_accel.optim.optimizers import *

__all__ = []
__all__ += averaging.__all__
__all__ += large_batch.__all__
__all__ += learning_rate.__all__
__all__ += objective.__all__
__all__ += optimizers.__all__
