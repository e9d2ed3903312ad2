"""System-centric techniques and tools."""

from hf_accel.system import synchronize
from hf_accel.system.synchronize import *

__all__ = []
__all__ += synchronize.__all__
