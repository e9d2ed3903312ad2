"""Model-centric techniques."""

from hf_accel.model import curriculum
from hf_accel.model.curriculum import *

__all__ = []
__all__ += curriculum.__all__
