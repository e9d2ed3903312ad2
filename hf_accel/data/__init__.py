"""Data-centric techniques."""

from hf_accel.data import batching, curriculum, regularization, sampling
from hf_accel.data.batching import *
from hf_accel.data.curriculum import *
from hf_accel.data.regularization import *
from hf_accel.data.sampling import *

__all__ = []
__all__ += batching.__all__
__all__ += curriculum.__all__
__all__ += regularization.__all__
__all__ += sampling.__all__
