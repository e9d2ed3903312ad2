"""System-centric techniques and tools."""

from hf_accel.system import synchronise
from hf_accel.system.synchronise import *

__all__ = []
__all__ += synchronise.__all__
"""System-centric: what runs where, and what it takes."""
